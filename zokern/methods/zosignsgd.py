"""ZOSignSGD: SGD along the sign of the projected gradient. Zhang et al. 2024, arXiv 2402.11592."""

from __future__ import annotations

from typing import Any

from ..estimator import Sign, Stencil
from ..optimizer import ZerothOrder


class ZOSignSGD(ZerothOrder):
    """theta <- (1 - lr wd) theta - (lr / q) sum_k sign(c_k) z_k
    c_k = (L(theta + eps z_k) - L(theta - eps z_k)) / (2 eps)

    The sign is taken of the projected gradient c_k, as in the code of ZO-Bench's ZO-SGD-Sign, and z_k stays
    normal. signSGD via a zeroth-order oracle (Liu et al. 2019) takes the sign of every element of c_k z_k
    instead. That is another method. ZO-Bench's published sweeps name no optimizer, so transformers' AdamW
    runs on sign(c) z there. Here the rule is SGD.

    Use it where losses have outliers: every step has one length, and a batch with large losses moves no
    farther than another. It reads 2 q losses a step and keeps nothing.

    params   a module, or parameters, (name, parameter) pairs or groups, as for zokern.MeZO
    lr, eps  in weights. None: lr 2e-4, the length of a step in every weight
    queries  q: draws a step, averaged
    stencil  'central' (two losses a query) or 'forward' (one, and that of theta)
    options  those of zokern.MeZO

    Raises ValueError or TypeError, before any weight is touched, for arguments out of range."""

    def __init__(
        self, params: Any, lr: float | None = None, eps: float = 1e-3, *, queries: int = 1, stencil: str | Stencil = "central",
        evaluation: Any = "auto", **options: Any,
    ) -> None:  # fmt: skip
        super().__init__(params, lr=lr, eps=eps, estimator=Sign(queries, stencil), evaluation=evaluation, **options)
