"""Estimator ``spsa``: a finite difference along each draw. The formula is data: offsets in units of eps, and
weights.

    c_k = (1 / eps) sum_j weights[j] L(theta + offsets[j] eps z_k)          g = (1 / q) sum_k c_k z_k

Spall 1992 (central); Malladi et al. 2023, Definition 1 and Algorithm 1.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ..checks import finite_number, is_number, whole_number
from ..evaluation import THETA, Point
from ..plan import Plan
from .base import Estimate, Estimator, Oracle


@dataclass(frozen=True)
class Stencil:
    """Says where the loss is read along a draw z, and how the readings are weighted.

        c = (1 / eps) sum_j weights[j] L(theta + offsets[j] eps z)

    name     how records and messages call it
    offsets  o_j, in units of eps: (1, -1) for the central difference
    weights  w_j, one for each offset: (1/2, -1/2) for the central difference

    The weights sum to 0, and sum_j w_j o_j = 1, so that c is exact for a linear loss.
    Raises ValueError in the estimator that is given the stencil, where this does not hold. Spall 1992."""

    name: str
    offsets: tuple[float, ...]
    weights: tuple[float, ...]


CENTRAL = Stencil("central", (1.0, -1.0), (0.5, -0.5))
FORWARD = Stencil("forward", (1.0, 0.0), (1.0, -1.0))
STENCILS = {stencil.name: stencil for stencil in (CENTRAL, FORWARD)}


def resolve(stencil: str | Stencil) -> Stencil:
    if isinstance(stencil, Stencil):
        figures = [*stencil.offsets, *stencil.weights]
        sound = (
            len(stencil.offsets) == len(stencil.weights)
            and all(map(is_number, figures))
            and all(map(math.isfinite, figures))
        )
        first = sum(w * o for w, o in zip(stencil.weights, stencil.offsets)) if sound else 0.0
        if not sound or abs(sum(stencil.weights)) > 1e-9 or abs(first - 1) > 1e-9:
            raise ValueError(
                f"stencil is {stencil}; expected finite numbers, as many weights as offsets, weights that "
                "sum to 0 and sum "
                "weights*offsets = 1"
            )
        return stencil
    if not isinstance(stencil, str) or stencil not in STENCILS:
        raise ValueError(f"unknown stencil {stencil!r}; expected one of {sorted(STENCILS)} or a Stencil")
    return STENCILS[stencil]


class Spsa(Estimator):
    """Estimates the gradient by differences of losses along random draws.

        g = (1/q) sum_k c_k z_k,   c_k = (L(theta + eps z_k) - L(theta - eps z_k)) / (2 eps)

    queries  q: draws a step, averaged
    stencil  'central' (two losses a query, the formula above), 'forward' (one loss a query, and that of
             theta, which all queries share), or a zokern.Stencil
    clip     bound on |c_k|, in units of loss per weight; None: no bound

    All losses of a step are asked for at once. It keeps nothing.
    Raises ValueError for arguments out of range. Spall 1992; Malladi et al. 2023, Algorithms 1 and 2."""

    captures = True
    gain: float | None = 1.0

    def __init__(
        self, queries: int = 1, stencil: str | Stencil = "central", clip: float | None = None
    ) -> None:
        self.queries = whole_number("queries", queries, 1, 2**24 - 1)
        self.stencil = resolve(stencil)
        self.clip = None if clip is None else finite_number("clip", clip, above=0.0)

    def __call__(self, oracle: Oracle, plan: Plan) -> Iterator[Estimate]:
        """Yields one estimate."""
        losses = oracle.losses(self.points(plan)).view(self.queries, -1)
        yield self.estimate(plan, losses, self.differences(losses))

    def points(self, plan: Plan) -> list[Point]:
        """Returns where a step reads the loss: the points of a query, and then of the next."""
        draws, offsets = [plan.draw(k) for k in range(self.queries)], self.stencil.offsets
        return [Point(((draw, offset),)) if offset else THETA for draw in draws for offset in offsets]

    def differences(self, losses: Tensor) -> Tensor:
        """Returns sum_j weights[j] losses[:, j], float64 [queries], summed in the order of the stencil."""
        terms = [weight * column for weight, column in zip(self.stencil.weights, losses.unbind(1))]
        total = terms[0]
        for term in terms[1:]:
            total = total + term
        return total

    def slopes(self, differences: Tensor, losses: Tensor, plan: Plan) -> Tensor:
        """Returns the differences over eps, float64 (groups, queries)."""
        eps = plan.numbers(lambda: [group.eps for group in plan.groups], torch.float64, losses.device)
        return differences / eps.unsqueeze(1)

    def estimate(self, plan: Plan, losses: Tensor, differences: Tensor) -> Estimate:
        """Returns the estimate of some differences: coefficients rounded to float32, and clipped."""
        found = self.slopes(differences, losses, plan).float().double()
        if self.clip is not None:
            found = found.clamp(-self.clip, self.clip)
        draws, slopes = tuple(plan.draw(k) for k in range(self.queries)), differences / plan.groups[0].eps
        return Estimate(draws, found, losses, self.queries, slopes=slopes)


__all__ = ["CENTRAL", "FORWARD", "STENCILS", "Spsa", "Stencil", "resolve"]
