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
    """g = (1/q) sum_k c_k z_k, c_k = (L+ - L-) / (2 eps), and |z_k^T H z_k| = |L+ + L- - 2 L(theta)| / (2
    eps^2) for zokern.directions.Curved.

    The published code divides by 2 eps^2, half of the second derivative, and so does this: `smooth` takes the
    factor. Two losses a query, and that of theta, which all queries share. queries, clip: as for zokern.Spsa.
    Zhao et al. 2024, Algorithm 1."""

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
