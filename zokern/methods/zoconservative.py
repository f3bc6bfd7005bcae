"""ZOConservative: the best of a step, no step and a step back. Zhang et al. 2024, arXiv 2402.11592."""

from __future__ import annotations

from typing import Any

from ..estimator import Conservative, Stencil
from ..optimizer import ZerothOrder


class ZOConservative(ZerothOrder):
    """theta <- argmin of L over theta, theta - lr g, theta + lr g
    g = (1 / q) sum_k c_k z_k,   c_k = (L(theta + eps z_k) - L(theta - eps z_k)) / (2 eps)

    The reference (ZO-Bench's ZO-SGD-Cons) moves the weights to each candidate and back, which is right for
    plain SGD alone, and its sweeps run AdamW. Here the three losses are read, and the weights are written
    once.

    Use it where no step may raise the loss of its own batch. It reads 2 q + 3 losses a step and keeps
    nothing. At an lr that suits, MeZO's two losses a step buy more.

    params   a module, or parameters, (name, parameter) pairs or groups, as for zokern.MeZO: all of one lr and
             one eps
    lr, eps  per step and in weights. None: lr 2e-5. ZO-Bench: lr 1e-5 to 1e-8, eps 1e-2 to 1e-4
    queries  q: draws a step, averaged
    stencil  'central' or 'forward'
    options  those of zokern.MeZO; weight_decay is 0, because the three losses do not contain it

    Raises ValueError or TypeError, before any weight is touched, for arguments out of range. A step raises
    ValueError for a weight_decay above 0."""

    def __init__(
        self, params: Any, lr: float | None = None, eps: float = 1e-3, *, queries: int = 1,
        stencil: str | Stencil = "central", **options: Any,
    ) -> None:  # fmt: skip
        super().__init__(params, lr=lr, eps=eps, estimator=Conservative(queries, stencil), **options)
