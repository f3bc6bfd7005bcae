"""MeZO-SVRG: variance-reduced SGD with an anchor and a full loss. Gautam et al. 2024, "Variance-reduced
Zeroth-Order Methods for Fine-Tuning Language Models", arXiv 2404.08080."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..estimator import Anchored
from ..optimizer import ZerothOrder


class MeZOSVRG(ZerothOrder):
    """theta <- (1 - lr wd) theta - lr (G + (1/q) sum_k (c_k(theta) - c_k(anchor)) z_k)
    c_k(x) = (L(x + eps z_k) - L(x - eps z_k)) / (2 eps)

    Every `interval` steps the anchor becomes theta. G is then the estimate (1/q) sum_k c_k(theta) z_k of the
    full loss, and the step is theta <- (1 - lr wd) theta - lr ratio G. In the other steps both c_k are read
    on the step's batch, along one z_k. G is q numbers: its z_k are made again.

    Use it where batches differ much in their slopes, and the loss of all data can be read now and then.

    params    a module, or parameters, (name, parameter) pairs or groups, as for zokern.MeZO
    lr, eps   per step and in weights, of MeZO's size. None: 2e-5. Published: lr 1e-6 with ratio 50, eps 1e-3
              (OPT-2.7B, by the names of its runs and the defaults of the public script)
    full      a closure of the loss of the full data, read every `interval` steps: in the public code one
              batch of all 512 examples. None: the step's own closure, which is not the method as published.
              G then keeps the noise of one batch for the interval
    interval  the paper's q: 2, as in the published script
    ratio     the paper's eta_1 / eta_2: lr of the steps that set the anchor over that of the others. 1 by
              default. Published: 50, and 1 to 100 in the scripts for RoBERTa-large
    queries   draws per step, averaged (1)
    options   those of zokern.MeZO; evaluation is 'auto' by default

    A step reads 4 losses a query, or 2 where it sets the anchor, and copies what is trained. The public code
    differs. Its two c are of different draws, whose variances add up, and its anchor holds the current
    parameters.

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
        **options: Any,
    ) -> None:
        estimator = Anchored(interval, full, ratio, queries)
        super().__init__(params, lr=lr, eps=eps, estimator=estimator, **options)
