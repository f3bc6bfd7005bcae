"""MeZO-SVRG: variance-reduced zeroth-order SGD. Gautam et al. 2024, "Variance-reduced Zeroth-Order Methods for Fine-Tuning Language
Models", arXiv 2404.08080."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..estimator import Anchored
from ..optimizer import ZerothOrder


class MeZOSVRG(ZerothOrder):
    """theta <- (1 - lr wd) theta - lr [c(theta) z - c(anchor) z + G],   c(x) = (L(x + eps z) - L(x - eps z)) / (2 eps).

    Every `interval` steps anchor <- theta, G is the full loss's difference along a draw of that step, times the draw, and the step is
    theta <- (1 - lr wd) theta - lr ratio G. Both c are read on the step's batch and along one z. G is two numbers: its z is made again.

    params    a module, or parameters, (name, parameter) pairs or groups, as for zokern.MeZO
    lr, eps   per step and in weights, of MeZO's size. None: 2e-5. Published lr: not found, eta_1 above eta_2
    full      a closure of the loss of the full data, read every `interval` steps. None: the step's own closure, so that G is of one
              batch, as in the published code; G then keeps that batch's noise for the interval
    interval  the paper's q: 2, as in the published script
    ratio     eta_1 / eta_2, the lr of the steps that set the anchor over that of the others
    queries   draws per step, averaged (1)
    options   those of zokern.MeZO; evaluation is 'auto' by default

    Keeps the anchor in float32, 4 bytes a weight. A step reads 4 losses, or 2 where it sets the anchor, and takes a copy of what is trained.
    The public code differs: its two c are of different draws, and its anchor is the current parameters.
    Raises ValueError or TypeError, before any weight is touched, for arguments out of range."""

    def __init__(
        self,
        params: Any,
        lr: float | None = None,
        eps: float = 1e-3,
        *,
        full: Callable[[], Any] | None = None,
        interval: int = 2,
        ratio: float = 1.0,
        queries: int = 1,
        evaluation: Any = "auto",
        **options: Any,
    ) -> None:
        estimator = Anchored(interval, full, ratio, queries)
        super().__init__(params, lr=lr, eps=eps, estimator=estimator, evaluation=evaluation, **options)
