"""SubZero: SGD in random subspaces that change now and then. Yu et al. 2025, "Zeroth-Order Fine-Tuning of
LLMs in Random Subspaces"."""

from __future__ import annotations

from typing import Any

from ..directions import Subspace
from ..optimizer import ZerothOrder


class SubZero(ZerothOrder):
    """W <- (1 - lr wd) W - (lr / q) sum_k c_k S_k,   S_k = s U Z_k V^T
    c_k = (L(W + eps S_k) - L(W - eps S_k)) / (2 eps)

    U (m x r) and V (n x r) are orthonormal, the Q factors of normals of (seed, name, refresh step). So a run
    can be replayed from its seed and coefficients, which the reference's ambient generator does not allow.
    Z_k is r x r, standard normal, anew for every step and query. Parameters that are not matrices take a
    dense normal z.

    Use it where forwards are short: a perturbed product is x W^T and two thin products,
    and W is written once an interval.

    params    a module, or parameters, (name, parameter) pairs or groups, as for zokern.MeZO
    lr, eps   per step and in weights, as for MeZO: with norm='matched' they carry over. The reference: lr
              1e-7, eps 1e-3 for all weights; lr 1e-3, eps 1e-2 for prompts
    rank      r, at most min(m, n) of each matrix; the reference's code 8, the paper 8 to 128
    interval  steps between two bases (the paper's F or T0: 500 to 2000)
    norm      s: 'matched' sqrt(m n) / r, the reference's code, E||S||_F^2 = m n; 'unit' 1, the formula as
              printed
    reshape   'adapters': matrices with a side of at most 4 r, and of at most 64, are factored as the
              near-square view of their elements (the reference does so for LoRA, prefixes and prompts);
              'all'; 'none'
    defer     updates wait in the r x r core until the basis changes, and W is written once per interval;
              None: where the optimizer was given the module, whose forward and state_dict then write them
              (ZerothOrder.flush, ZerothOrder.evaluating)
    options   those of zokern.MeZO: weight_decay, queries, seed, rounding, evaluation ('auto' by default),
              backend, stencil, ...

    Raises ValueError or TypeError, before any weight is touched, for arguments out of range."""

    def __init__(
        self,
        params: Any,
        lr: float | None = None,
        eps: float = 1e-3,
        *,
        rank: int = 8,
        interval: int = 2000,
        norm: str = "matched",
        reshape: str = "adapters",
        **options: Any,
    ) -> None:
        direction = Subspace(rank, interval, norm, reshape)
        super().__init__(params, lr=lr, eps=eps, direction=direction, **options)
