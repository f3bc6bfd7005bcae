"""BSZO: SGD along the posterior mean of the slopes along a few draws. arXiv 2601.01452, 2026."""

from __future__ import annotations

from typing import Any

from ..estimator import Bayesian
from ..optimizer import ZerothOrder


class BSZO(ZerothOrder):
    """theta <- (1 - lr wd) theta - lr sum_k mu_k z_k
    mu: posterior mean of the slopes along q draws, by a Kalman filter (zokern.Bayesian)

    A step reads theta and each draw, and then losses along combinations of the draws, each where the
    posterior is widest. The variance of the filter's noise follows its residuals, those of this step too. So
    mu shrinks where losses are rounded, and where a batch is an outlier. This is version 4 of the published
    trainer. Its version 3 weighs the loss of a draw again in place of the third observation.

    Where slopes are above the prior's s = sqrt(weights / 1e6), mu is about s^2 times the slope over its mean
    square. lr then depends on the scale of the loss, and MeZO's does not carry over. zokern.tune finds it.

    Use it where losses are noisy, as in 16 bits. It reads 1 + observations losses a step: those at theta
    and along the draws together, and the others one after another. It keeps one number in all.

    params        a module, or parameters, (name, parameter) pairs or groups, as for zokern.MeZO
    lr, eps       per step and in weights. None: lr 2e-5. Published: lr 1e-7, eps 1e-4
    queries       q: draws a step (published: 2)
    observations  losses beside that of theta (published: 3)
    options       those of zokern.MeZO, without stencil

    Raises ValueError or TypeError, before any weight is touched, for arguments out of range."""

    def __init__(
        self, params: Any, lr: float | None = None, eps: float = 1e-3, *, queries: int = 2,
        observations: int = 3, **options: Any,
    ) -> None:  # fmt: skip
        super().__init__(
            params,
            lr=lr,
            eps=eps,
            estimator=Bayesian(queries, observations),
            **options,
        )
