"""Scaling: the factors of z of the tensors that a step works on, made when a group is new and when its
direction changes them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .backends import Batch, Noise
from .directions import Curved, Normal, Scaled
from .estimator import Estimate
from .group import Group
from .plan import Plan

PIECE = 1 << 20  # normals that exist at a time


class Scaling:
    """The factors of a scaled direction. Without such a direction there are none.

    born  the step that the factors in use belong to"""

    def __init__(self, direction: Scaled | None, states: Any) -> None:
        self.direction, self.states = direction, states
        self.born = -1

    def renew(self, plan: Plan) -> None:
        """Gives every group the factors of this step, in the memory that they have."""
        if self.direction is None:
            return
        born = self.direction.born(plan.step)
        if born == self.born and all(group.scales is not None for group in plan.groups):
            return
        places = [(group, i) for group in plan.groups for i in range(len(group.names))]
        names, thetas = [group.names[i] for group, i in places], [group.theta[i] for group, i in places]
        states = [self.states[group.tensors[i]] for group, i in places]
        found = iter(self.direction.factors(names, thetas, states, _Normals(places, plan.seed), born))
        for group in plan.groups:
            new = [next(found) for _ in group.names]
            if group.scales is None:
                group.scales = new
            for old, factors in zip(group.scales, new):
                if old is not None and factors is not None and old is not factors:
                    old.copy_(factors)
        self.born = born

    def learn(self, plan: Plan, estimate: Estimate, finite: Tensor) -> None:
        """s <- s / sqrt(1 - smooth + smooth mean_k |z_k^T H z_k| z_k^2), in float64, rounded once, for every
        factor of a curved direction.

        z is made a piece at a time.

        finite  1, or 0 in a step that is not finite, which teaches nothing"""
        if not isinstance(self.direction, Curved):
            return
        if estimate.curvatures is None:
            raise ValueError(
                "the estimator reads no curvature; expected zokern.Curvature() beside direction 'curved'"
            )
        for group, curvatures in zip(plan.groups, estimate.curvatures):
            for theta, span, scale in zip(group.theta, group.spans, group.scales or ()):
                assert scale is not None
                flat = scale.view(-1)
                for start in range(0, len(flat), PIECE):
                    part = flat[start : start + PIECE]
                    z, here = torch.empty_like(part), [span._replace(first=span.first + start)]
                    growth = torch.zeros(len(part), dtype=torch.float64, device=theta.device)
                    for draw, curvature in zip(plan.draws(), curvatures):
                        group.backend.draw(Batch([z], here), plan.noise([draw]))
                        growth = growth + curvature * z.double() * z.double()
                    growth = (1.0 - self.direction.smooth) + (
                        self.direction.smooth / len(curvatures)
                    ) * growth
                    growth = torch.where(finite.to(growth.device) == 1.0, growth, 1.0)
                    part.copy_(part.double() / growth.sqrt())


class _Normals:
    """Normals of the stream for tensors of several groups (directions.scaled.Normals)."""

    def __init__(self, places: Sequence[tuple[Group, int]], seed: int) -> None:
        self.places, self.seed = places, seed

    def below(self, i: int, step: int, draw: int, limit: float) -> Tensor:
        group, position = self.places[i]
        theta, span = group.theta[position], group.spans[position]
        mask = torch.empty(theta.shape, dtype=torch.bool, device=theta.device)
        flat, noise = mask.view(-1), Noise(Normal(), self.seed, [(step, draw)])
        for start in range(0, len(flat), PIECE):
            part = flat[start : start + PIECE]
            z = torch.empty(len(part), dtype=torch.float32, device=theta.device)
            group.backend.draw(Batch([z], [span._replace(first=span.first + start)]), noise)
            torch.lt(z, limit, out=part)
        return mask


__all__ = ["Scaling"]
