"""ConMeZO: SGD along draws in a cone about the momentum of the estimates. arXiv 2511.02757, 2025."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..estimator import Spsa
from ..optimizer import ZerothOrder
from ..rule import Cone
from ..rule.cone import warming


class ConMeZO(ZerothOrder):
    """theta <- (1 - lr wd) theta - lr c z,   c = (L(theta + eps z) - L(theta - eps z)) / (2 eps)
    z = cos(angle) m / l + sin(angle) u,   m <- beta m + (1 - beta) c z

    u is a draw, and m starts as another one. l follows the root mean square that m is expected to have. So z
    is about as long as u, and MeZO's lr and eps carry over.

    Use it where the slope keeps its direction over many steps, and 4 bytes a weight are there for a momentum.

    params   a module, or parameters, (name, parameter) pairs or groups, as for zokern.MeZO
    lr, eps  per step and in weights, of MeZO's size. None: 2e-5. Published: lr 1e-7, eps 1e-3, no weight
             decay
    angle    between z and m, in radians: 1.35; pi/2 would be MeZO
    beta     a number, or a function of the step number. Published, and the default: 0.1 to step 200, then
             up to 0.9888 at step 2000, then 0.99
    options  those of zokern.MeZO; evaluation is 'auto' by default

    m is float32; the published code keeps it in the weights' dtype. The two losses of a step have bases of
    their own: 'paired' reads them in two passes, and a step copies what is trained.

    Raises ValueError or TypeError, before any weight is touched, for arguments out of range."""

    def __init__(
        self,
        params: Any,
        lr: float | None = None,
        eps: float = 1e-3,
        *,
        angle: float = 1.35,
        beta: float | Callable[[int], float] = warming,
        **options: Any,
    ) -> None:
        super().__init__(params, lr=lr, eps=eps, estimator=Spsa(), rule=Cone(angle, beta), **options)
