"""FZOO: one-sided batches of sign perturbations, steps scaled by the spread of the losses. Dang et al. 2026,
"FZOO: Fast Zeroth-Order Optimizer for Fine-Tuning Large Language Models"."""

from __future__ import annotations

from typing import Any

from ..checks import whole_number
from ..estimator import Spread
from ..optimizer import ZerothOrder


class FZOO(ZerothOrder):
    """theta <- (1 - lr wd) theta - (lr / N) sum_i a_i z_i
    a_i = (L(theta + eps z_i) - L(theta)) / sigma,   z_i in {-1, +1}^d

    sigma is the population standard deviation of the N perturbed losses, as in the reference's code. The
    paper divides by N - 1, and by eps, which lr absorbs. A step where all losses are equal moves nothing.
    With evaluation='paired' the N + 1 losses are read in one pass.

    Use it where the slope's size changes much during training:
    steps have one length, and no lr has to follow the loss.

    params     a module, or parameters, (name, parameter) pairs or groups, as for zokern.MeZO
    lr, eps    in weights. A step is lr long in every weight, times an average of a z of about 1 / sqrt(N): lr
               is MeZO's times the root mean square of MeZO's c.
               None: 2e-4. The reference: lr 5e-5 and eps 1e-4
    queries    N, at least 2; the reference: 8
    direction  'rademacher' as published, or 'normal'
    options    those of zokern.MeZO; evaluation is 'auto' by default

    Raises ValueError or TypeError, before any weight is touched, for arguments out of range."""

    def __init__(
        self, params: Any, lr: float | None = None, eps: float = 1e-4, *, queries: int = 8,
        direction: Any = "rademacher", **options: Any,
    ) -> None:  # fmt: skip
        queries = whole_number(
            "queries", queries, 2, expected="an integer, at least 2: one loss has no spread"
        )
        super().__init__(
            params,
            lr=lr,
            eps=eps,
            direction=direction,
            estimator=Spread(queries),
            **options,
        )
