"""ZO-Muon: steps along orthogonalised estimates in random subspaces. Lang et al. 2026, "Powering Up
Zeroth-Order Training via Subspace Gradient Orthogonalization", arXiv 2602.17155."""

from __future__ import annotations

from typing import Any

from ..directions import Drawn, Kept, LowRank
from ..estimator import SLOPES, Spsa
from ..optimizer import ZerothOrder
from ..rule import Muon
from ..rule.muon import share_of


class ZOMuon(ZerothOrder):
    """W <- (1 - lr wd) W - lr t P msign(G),   G = (1/N) sum_i c_i Psi_i
    c_i = (L(W + eps s P Psi_i) - L(W)) / eps

    P (m x r) has orthonormal columns, Haar distributed, and is kept for an interval. Psi_i (r x n) is
    standard normal, anew for every step and query. msign(G) is about the U V^T of the singular value
    decomposition of G: five Newton-Schulz iterations in float32 (zokern.Muon). Parameters that are not
    matrices take a dense normal z and SGD.

    In the reference a step of a new P measures every query along a P of its own, and moves along the last
    one. Here all queries of a step share P.

    Use it where a few directions of the gradient outweigh the others:
    a step is equally long along all r of them.

    params     a module, or parameters, (name, parameter) pairs or groups, as for zokern.MeZO
    lr, eps    in weights: with norm='matched' a step is about lr long in every weight. None: 2e-4. Published
               for OPT-13B, with norm='unit': lr 1e-2, eps 1e-3
    dense_lr   lr of the parameters that are not matrices, while lr has its first value, above 0; it follows
               schedules of lr. The reference: 1e-7. A group of these alone that has an lr of its own moves by
               that
    rank       r, at most min(m, n); published: 64
    interval   steps between two P (the paper's T0): 100
    queries    N: 4 as published, of a search over 4 to 16
    norm       'matched': s = sqrt(m / r) and t = sqrt(m n / r), so that z and the step are as long as dense
               ones; 'unit': s = t = 1, the formula as printed
    options    those of zokern.MeZO; evaluation is 'auto' by default, and updates wait in an n x r sum

    Raises ValueError or TypeError, before any weight is touched, for arguments out of range."""

    def __init__(
        self,
        params: Any,
        lr: float | None = None,
        eps: float = 1e-3,
        *,
        dense_lr: float = SLOPES,
        rank: int = 64,
        interval: int = 100,
        queries: int = 4,
        norm: str = "matched",
        **options: Any,
    ) -> None:
        super().__init__(
            params,
            lr=lr,
            eps=eps,
            direction=LowRank(Kept("orthonormal", interval), None, Drawn(), rank=rank, norm=norm),
            estimator=Spsa(queries, "forward"),
            rule=Muon(share=share_of(dense_lr, lr)),
            **options,
        )
