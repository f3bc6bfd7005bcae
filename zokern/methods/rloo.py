"""RLOO: SGD along draws whose losses are compared with one another. Kool et al. 2019."""

from __future__ import annotations

from typing import Any

from ..estimator import LeaveOneOut
from ..optimizer import ZerothOrder


class RLOO(ZerothOrder):
    """theta <- (1 - lr wd) theta - (lr / q) sum_k c_k z_k
    c_k = (L_k - mean_{j != k} L_j) / eps,   L_k = L(theta + eps z_k)

    The mean of the others is a baseline that is independent of z_k, so c_k z_k has no bias from it. LOREN's
    code steps once for each draw, at weights that have moved meanwhile. Here a step is written once.

    Use it for many draws a step: it reads q losses, one a draw, and none of theta. evaluation='paired' reads
    them in one pass. For rewards pass maximize=True. It keeps nothing.

    params   a module, or parameters, (name, parameter) pairs or groups, as for zokern.MeZO
    lr, eps  per step and in weights, of MeZO's size. None: lr 2e-5
    queries  q: draws a step, at least 2
    options  those of zokern.MeZO, without stencil

    Raises ValueError or TypeError, before any weight is touched, for arguments out of range."""

    def __init__(
        self, params: Any, lr: float | None = None, eps: float = 1e-3, *, queries: int = 4,
        **options: Any
    ) -> None:  # fmt: skip
        super().__init__(params, lr=lr, eps=eps, estimator=LeaveOneOut(queries), **options)
