"""ZOAdam: Adam of the estimated gradient. Zhang et al. 2024, arXiv 2402.11592."""

from __future__ import annotations

from typing import Any

from ..optimizer import ZerothOrder
from ..rule import Adam


class ZOAdam(ZerothOrder):
    """theta <- (1 - lr wd) theta - lr (M / c1) / (sqrt(V / c2) + adam_eps)
    M, V: averages of g and g^2,   g = (1 / q) sum_k c_k z_k,   c1 = 1 - beta1^t, c2 = 1 - beta2^t

    c_k is the central difference along z_k. The reference (ZO-Bench's ZO-Adam) keeps both moments in the
    weights' dtype: in float16 adam_eps is 0 there, and a quotient may be inf or NaN. It ignores weight decay.
    Here moments are float32, and decay is decoupled.

    Use it where steps should not depend on the scale of the loss, and slopes differ from tensor to tensor. It
    reads 2 q losses a step and keeps 8 bytes a weight; zokern.AdaMeZO keeps none.

    params           a module, or parameters, (name, parameter) pairs or groups, as for zokern.MeZO
    lr, eps          lr in weights, and eps of the difference. None: lr 2e-4. ZO-Bench: lr 1e-4 to 1e-8, eps
                     1e-3 to 1e-5
    betas, adam_eps  (0.9, 0.999) and 1e-8, as published
    options          those of zokern.MeZO

    Raises ValueError or TypeError, before any weight is touched, for arguments out of range."""

    def __init__(
        self, params: Any, lr: float | None = None, eps: float = 1e-3, *,
        betas: tuple[float, float] = (0.9, 0.999),
        adam_eps: float = 1e-8, **options: Any,
    ) -> None:  # fmt: skip
        super().__init__(params, lr=lr, eps=eps, rule=Adam(betas, adam_eps), **options)
