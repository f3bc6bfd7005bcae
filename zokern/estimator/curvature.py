"""Estimator ``curvature``: a central difference and the loss's curvature along the same draw. Zhao et al.
2024 (HiZOO)."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ..plan import Plan
from .base import Estimate
from .spsa import Spsa, Stencil

THREE = Stencil("three", (1.0, -1.0, 0.0), (0.5, -0.5, 0.0))


class Curvature(Spsa):
    """Estimates slopes and curvatures along draws, for a direction that scales z by what it learns of the
    curvature (HiZOO).

        g = (1/q) sum_k c_k z_k,   c_k = (L+ - L-) / (2 eps)
        L+ = L(theta + eps z_k),   L- = L(theta - eps z_k)
        |z_k^T H z_k| as |L+ + L- - 2 L(theta)| / (2 eps^2)

    queries  q: draws a step, averaged; each reads two losses, and all share that of theta
    clip     bound on |c_k|, in units of loss per weight; None: no bound

    The published code divides by 2 eps^2, which gives half of the second derivative, and so does this.
    The option `smooth` of zokern.HiZOO takes the factor.
    Raises ValueError for arguments out of range. Zhao et al. 2024, Algorithm 1."""

    captures = True

    def __init__(self, queries: int = 1, clip: float | None = None) -> None:
        super().__init__(queries, THREE, clip)

    def estimate(self, plan: Plan, losses: Tensor, differences: Tensor) -> Estimate:
        eps = plan.numbers(lambda: [group.eps for group in plan.groups], torch.float64, losses.device)
        eps = eps.unsqueeze(1)
        second = (losses[:, 0] + losses[:, 1] - 2.0 * losses[:, 2]).abs() / (2.0 * eps * eps)
        # the weights move along other factors than the losses were read along, so their slope does not tell
        # how far the loss falls
        return replace(super().estimate(plan, losses, differences), slopes=None, curvatures=second)


__all__ = ["Curvature"]
