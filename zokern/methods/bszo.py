"""BSZO: SGD along the posterior mean of the slopes along a few draws. arXiv 2601.01452, 2026."""

from __future__ import annotations

from typing import Any

from ..estimator import Bayesian
from ..optimizer import ZerothOrder


class BSZO(ZerothOrder):
    """theta <- (1 - lr wd) theta - lr sum_k mu_k z_k
    mu: posterior mean of the slopes along q draws, by a Kalman filter (zokern.Bayesian)

    A step reads theta, and then losses along combinations of the draws, each where the posterior is widest.
    The variance of the filter's noise follows its residuals, so mu shrinks where losses are rounded. This is
    version 4 of the published trainer. Its version 3 reckons the third observation from those before.

    Use it where losses are noisy, as in 16 bits. It reads 1 + observations losses a step, one after another,
    and keeps one number in all.

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
