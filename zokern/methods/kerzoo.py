"""KerZOO: kernel-weighted differences over random radii. arXiv 2505.18886, 2025."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..estimator import Kernel
from ..optimizer import ZerothOrder
from ..rule import Averaged


class KerZOO(ZerothOrder):
    """theta <- (1 - lr wd) theta - (lr / q) sum_k c_k z_k
    c_k = K(r_k) (L(theta + eps r_k z_k) - L(theta - eps r_k z_k)) / (2 eps),   r_k uniform in (-d, d)

    E[r K(r)] is C, and the odd moments up to r^order are 0, so the bias falls as eps^(order + 1). The price
    is the variance of c: for a linear loss 1.8, 6.25, 13.25 and 22.8 times MeZO's with order 1, 3, 5 and 7.

    Use it where eps has to be large, because of 16 bits or noise, so that the bias of a difference is felt.

    params     a module, or parameters, (name, parameter) pairs or groups, as for zokern.MeZO
    lr, eps    per step and in weights, of MeZO's size with scale = 1. None: 2e-5. Published: lr 1e-6, eps
               1e-3 (OPT-2.7B, 4000 steps)
    queries    q: 3, as in the published code
    order      1, 3 (the paper), 5 or 7: zokern.Kernel has the polynomials
    scale      C, which multiplies c and so the step, in weights; the published code has 4
    width      d, a number or a function of the step number
    rescale    whether K follows the width; False in the published code, where a smaller d is a smaller lr
    scope      'query': one r_k for all parameters, as the paper's theorem needs; 'tensor': one for each, as
               in the published code
    clip_norm  bound on each parameter's norm of g, in units of loss per weight; None: no bound. The published
               code: 4e5
    averaging  the published code's acceleration: weights are the average of fast ones, and losses are read at
               the next average (zokern.Averaged). It keeps 4 bytes a weight,
               and a step copies what is trained
    options    those of zokern.MeZO; evaluation is 'auto' by default

    KerZOO.published() is the published trainer, whose code differs from the paper's formula.

    Raises ValueError or TypeError, before any weight is touched, for arguments out of range."""

    def __init__(
        self, params: Any, lr: float | None = None, eps: float = 1e-3, *, queries: int = 3, order: int = 3,
        scale: float = 1.0, width: float | Callable[[int], float] = 1.0, rescale: bool = True,
        scope: str = "query", clip_norm: float | None = None, averaging: bool = False,
        **options: Any,
    ) -> None:  # fmt: skip
        estimator = Kernel(queries, scale, width, None, order, rescale, scope, clip_norm)
        rule = Averaged() if averaging else options.pop("rule", None)
        super().__init__(params, lr=lr, eps=eps, estimator=estimator, rule=rule, **options)

    @classmethod
    def published(cls, params: Any, lr: float | None = 1e-6, eps: float = 1e-3, **options: Any) -> KerZOO:
        """Returns the published trainer's method.

        C = 4, d = max(1 - t / 4000, 1e-4), K(r) = 15 r (5 - 7 r^2) at any d, a radius for each parameter,
        norms of g clipped at 4e5, averaging. Its z comes from zokern's stream, and no weight is moved to
        read a loss. For OPT the trainer leaves embed_tokens, the tied head, out of what is trained.

        Arguments as for KerZOO, which replace these."""
        code = {
            "scale": 4.0, "width": shrinking, "rescale": False, "scope": "tensor", "clip_norm": 4e5,
            "averaging": True,
        }  # fmt: skip
        return cls(params, lr, eps, **{**code, **options})


def shrinking(step: int) -> float:
    """Returns d of the published trainer: max(1 - step / 4000, 1e-4)."""
    return max(1.0 - step / 4000, 1e-4)
