"""SubZero+: many one-sided queries in one random subspace, and Adam in its core. Yu et al. 2026, "SubZero+:
Efficient Zeroth-Order LLM Fine-Tuning via Large Learning Rates", arXiv 2608.15665."""

from __future__ import annotations

from typing import Any

from ..directions import Subspace
from ..estimator import Spsa
from ..estimator.base import ONES
from ..optimizer import ZerothOrder
from ..rule import Adam
from ..rule.muon import share_of


class SubZeroPlus(ZerothOrder):
    """W <- (1 - lr wd) W - lr s U (M / (sqrt(V) + adam_eps)) V^T,   M, V corrected averages of G and G^2
    G = (1/K) sum_k c_k Z_k, r x r,   c_k = (L(W + eps s U Z_k V^T) - L(W)) / eps

    U (m x r) and V (n x r) are orthonormal, Haar distributed, and kept for an interval, as in zokern.SubZero.
    Z_k is r x r, standard normal, anew for every step and query. The K queries share U, V, the batch and
    L(W). Parameters that are not matrices take a dense normal z, and Adam with two float32 moments a weight.

    Use it where many losses of one batch are cheap, as with short inputs. One product x W^T serves the rows
    of all points of a pass. A pass of 'paired' has 32 points; evaluation=zokern.Paired(sides=100) reads all
    of them in one. The activations of all points of a pass live at once, and K cores of each matrix during a
    step.

    params     a module, or parameters, (name, parameter) pairs or groups, as for zokern.MeZO
    lr, eps    in weights: with norm='matched' a step is about lr long in every weight. None: 2e-4. Published,
               with norm='unit': lr 1e-3 to 1e-2 for all weights and 5e-3 to 5e-2 for LoRA, eps 1e-3
    dense_lr   lr of the parameters that are not matrices, while lr has its first value, above 0; it follows
               schedules of lr. A group of these alone that has an lr of its own moves by that. None: lr with
               norm='matched', and 2e-4 with 'unit', where a matrix moves by about lr r / sqrt(m n)
    rank       r, at most min(m, n); published: 16 (OPT-1.3B) or 128 for all weights, 4 to 16 for LoRA
    interval   steps between two bases (the paper's F): 50 or 100
    queries    K: 99
    betas, adam_eps   of Adam, with bias correction
    carry      True: at a new basis the moments are carried over to it. False: their numbers stay as they are,
               the plain reading of the paper, which says nothing of a change
    norm       s: 'matched' sqrt(m n) / r, as in SubZero's code; 'unit' 1, the formula as printed
    reshape    as for zokern.SubZero: full weights keep their shape at rank 128 too
    options    those of zokern.MeZO; evaluation is 'auto' by default, and updates wait in the core

    Raises ValueError or TypeError, before any weight is touched, for arguments out of range."""

    def __init__(
        self,
        params: Any,
        lr: float | None = None,
        eps: float = 1e-3,
        *,
        dense_lr: float | None = None,
        rank: int = 16,
        interval: int = 100,
        queries: int = 99,
        betas: tuple[float, float] = (0.9, 0.95),
        adam_eps: float = 1e-8,
        carry: bool = False,
        norm: str = "matched",
        reshape: str = "adapters",
        **options: Any,
    ) -> None:
        if dense_lr is None and norm == "unit":
            dense_lr = ONES
        share = 1.0 if dense_lr is None else share_of(dense_lr, lr)
        super().__init__(
            params,
            lr=lr,
            eps=eps,
            direction=Subspace(rank, interval, norm, reshape),
            estimator=Spsa(queries, "forward"),
            rule=Adam(betas, adam_eps, core=True, carry=carry, share=share),
            **options,
        )
