"""Estimator ``kernel``: KerZOO's differences over random radii, whose weights cancel the bias of third order.

    c_k = K(r_k) (L(theta + eps r_k z_k) - L(theta - eps r_k z_k)) / (2 eps),   r_k uniform in (-d, d)
    K(r) = (C / d^2) (15/4) r (5 - 7 (r/d)^2):   E[r K(r)] = C, E[r^3 K(r)] = 0

KerZOO (arXiv 2505.18886, 2025); the kernel is Bach and Perchet's (2016). The published trainer uses C = 4.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import torch

from ..checks import finite_number
from ..evaluation import Point
from ..plan import Plan
from ..stream import RADIUS
from .base import Estimate, Oracle
from .spsa import Spsa


class Kernel(Spsa):
    """KerZOO's estimator. r_k is a function of (seed, step, query) alone, one for all parameters, as the theorem needs.

    queries  q: draws a step, averaged (the published trainer: 3)
    scale    C, what E[r K(r)] is: 1 gives g MeZO's length; the published trainer has 4
    width    d: a number, or a function of the step number that returns one (published: lambda t: max(1 - t/4000, 1e-4))
    clip     bound on |c_k|"""

    def __init__(
        self,
        queries: int = 3,
        scale: float = 1.0,
        width: float | Callable[[int], float] = 1.0,
        clip: float | None = None,
    ) -> None:
        super().__init__(queries, "central", clip)
        self.gain = self.scale = finite_number("scale", scale, above=0.0)
        self.width = width if callable(width) else finite_number("width", width, above=0.0)

    def radii(self, plan: Plan) -> list[tuple[float, float]]:
        """Returns (r_k, K(r_k)) of every query."""
        width = finite_number("width", self.width(plan.step), above=0.0) if callable(self.width) else self.width
        found = []
        for query in range(self.queries):
            unit = (float(plan.bits(RADIUS, query)[0, 0]) + 0.5) * 2.0**-31 - 1.0
            found.append((width * unit, self.scale / width * 3.75 * unit * (5.0 - 7.0 * unit * unit)))
        return found

    def __call__(self, oracle: Oracle, plan: Plan) -> Iterator[Estimate]:
        radii = self.radii(plan)
        points = [Point(((plan.draw(k), sign * r),)) for k, (r, _) in enumerate(radii) for sign in (1.0, -1.0)]
        losses = oracle.losses(points).view(self.queries, 2)
        where, weights = torch.tensor(radii, dtype=torch.float64, device=losses.device).T
        estimate = self.estimate(plan, losses, self.differences(losses) * weights)
        assert estimate.slopes is not None
        yield replace(estimate, slopes=estimate.slopes / (weights * where))


__all__ = ["Kernel"]
