"""ZOMomentum: SGD with momentum, stored or made from a window of draws. Zhang et al. 2024, arXiv
2402.11592.
"""

from __future__ import annotations

from typing import Any

from ..checks import within
from ..estimator import SLOPES
from ..optimizer import ZerothOrder
from ..rule import Momentum, Rule, WindowMomentum


class ZOMomentum(ZerothOrder):
    """theta <- (1 - lr wd) theta - lr M,   M <- beta M + (1 / q) sum_k c_k z_k
    c_k = (L(theta + eps z_k) - L(theta - eps z_k)) / (2 eps)

    The reference (ZO-Bench's ZO-SGD-MMT) keeps M in the weights' dtype, and ignores weight decay. Here M is
    float32, and decay is decoupled.

    Use it with batches whose gradients agree. It reads 2 q losses a step and keeps 4 bytes a weight, or
    numbers in the small space of a low-rank z. With a window it keeps 16 q n bytes in all, and makes n times
    the z of an update.

    params    a module, or parameters, (name, parameter) pairs or groups, as for zokern.MeZO
    lr, eps   per step and in weights. M is up to 1 / (1 - beta) times as long as an estimate. None: lr is
              2e-5 (1 - beta), so that a step is as long as MeZO's.
              ZO-Bench: lr 1e-4 to 1e-8, eps 1e-3 to 1e-5
    momentum  beta: 0.9, as published
    window    None: M is stored. n: M = sum_{j < n} beta^j g_j of the last n estimates (zokern.WindowMomentum)
    options   those of zokern.MeZO

    Raises ValueError or TypeError, before any weight is touched, for arguments out of range."""

    def __init__(
        self, params: Any, lr: float | None = None, eps: float = 1e-3, *, momentum: float = 0.9,
        window: int | None = None, **options: Any,
    ) -> None:  # fmt: skip
        beta = within("momentum", momentum, 0.0, 1.0, "0 <= momentum < 1")
        rule: Rule = Momentum(beta, 0.0) if window is None else WindowMomentum(beta, window, average=False)
        lr = SLOPES * (1.0 - beta) if lr is None else lr
        super().__init__(params, lr=lr, eps=eps, rule=rule, **options)
