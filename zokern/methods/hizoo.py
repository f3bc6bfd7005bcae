"""HiZOO: SGD that perturbs and moves every weight by a scale of its own, learned from curvature. Zhao et al.
2024, "Second-Order Fine-Tuning without Pain for LLMs: A Hessian Informed Zeroth-Order Optimizer"."""

from __future__ import annotations

from typing import Any

from ..directions import Curved
from ..estimator import Curvature
from ..optimizer import ZerothOrder


class HiZOO(ZerothOrder):
    """theta <- (1 - lr wd) theta - (lr / q) sum_k c_k s' z_k
    s' = s / sqrt(1 - smooth + smooth mean_k v_k z_k^2)
    c_k = (L(theta + eps s z_k) - L(theta - eps s z_k)) / (2 eps)
    v_k = |L(theta + eps s z_k) + L(theta - eps s z_k) - 2 L(theta)| / (2 eps^2)

    s = h^(-1/2) starts at 1. The losses are read along the
    old s and the weights move along the new one, as published.

    Use it where weights differ much in curvature and 4 bytes a weight are there. A third loss pays for it.

    params     a module, or parameters, (name, parameter) pairs or groups, as for zokern.MeZO
    lr, eps    in weights; None: 2e-5. Published for OPT-13B: lr 1e-6, eps 1e-3
    smooth     how much of h is new in a step; the published script: 1e-8. 0: MeZO
    queries    q: draws per step, averaged; two losses each, and L(theta) for all
    direction  of z: 'normal'
    options    those of zokern.MeZO; evaluation is 'auto' by default

    Keeps `scale` in the optimizer's state, float32, 4 bytes a weight.

    Raises ValueError or TypeError, before any weight is touched, for arguments out of range."""

    def __init__(
        self, params: Any, lr: float | None = None, eps: float = 1e-3, *, smooth: float = 1e-8,
        queries: int = 1, direction: Any = "normal", **options: Any,
    ) -> None:  # fmt: skip
        parts: dict[str, Any] = {"direction": Curved(smooth, direction), "estimator": Curvature(queries)}
        super().__init__(params, lr=lr, eps=eps, **parts, **options)
