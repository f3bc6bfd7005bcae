"""Scaling: the factors of z of the tensors that a step works on, made when a group is new and when its
direction changes them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import devices
from ..backends import Batch, Noise
from ..directions import Curved, Normal, Scaled
from ..estimator import Estimate
from ..group import Group
from ..plan import Plan


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

        z is made a piece at a time. In place: 28 bytes an element of a piece.

        finite  1, or 0 in a step that is not finite, which teaches nothing"""
        if not isinstance(self.direction, Curved):
            return
        if estimate.curvatures is None:
            raise ValueError(
                "the estimator reads no curvature; expected zokern.Curvature() beside direction 'curved'"
            )
        smooth = self.direction.smooth
        for group, curvatures in zip(plan.groups, estimate.curvatures):
            if not group.names:
                continue
            device = group.theta[0].device
            fine = finite.to(device) == 1.0
            each, rest = torch.where(fine, curvatures.to(device), 0.0), 1.0 - smooth * fine.double()
            for span, scale in zip(group.spans, group.scales or ()):
                assert scale is not None
                self._grow(plan, group, span, scale.view(-1), each, rest)

    def _grow(
        self, plan: Plan, group: Group, span: Any, flat: Tensor, curvatures: Tensor, rest: Tensor
    ) -> None:
        """Divides the factors of a tensor by their growth; where `rest` is 1 and curvatures are 0, by 1."""
        assert isinstance(self.direction, Curved)
        many, size = len(curvatures), sketched(flat.device, len(flat))
        z = torch.empty(size, dtype=flat.dtype, device=flat.device)
        wide, term, growth = torch.empty(3, size, dtype=torch.float64, device=flat.device)
        for start in range(0, len(flat), size):
            part = flat[start : start + size]
            here = [span._replace(first=span.first + start)]
            z, wide, term, growth = (buffer[: len(part)] for buffer in (z, wide, term, growth))
            growth.zero_()
            for draw, curvature in zip(plan.draws(), curvatures):
                group.backend.draw(Batch([z], here), plan.noise([draw]))
                torch.mul(wide.copy_(z), curvature, out=term)
                growth.add_(term.mul_(wide))
            growth.mul_(self.direction.smooth / many).add_(rest).sqrt_()
            part.copy_(wide.copy_(part).div_(growth))


def sketched(device: torch.device, elements: int) -> int:
    """Returns how many of `elements` normals exist at a time."""
    return min(max(1, elements), devices.of(device).sketched)


class _Normals:
    """Normals of the stream for tensors of several groups (directions.scaled.Normals)."""

    def __init__(self, places: Sequence[tuple[Group, int]], seed: int) -> None:
        self.places, self.seed = places, seed

    def below(self, i: int, step: int, draw: int, limit: float) -> Tensor:
        group, position = self.places[i]
        theta, span = group.theta[position], group.spans[position]
        mask = torch.empty(theta.shape, dtype=torch.bool, device=theta.device)
        flat, noise = mask.view(-1), Noise(Normal(), self.seed, [(step, draw)])
        size = sketched(theta.device, len(flat))
        for start in range(0, len(flat), size):
            part = flat[start : start + size]
            z = torch.empty(len(part), dtype=torch.float32, device=theta.device)
            group.backend.draw(Batch([z], [span._replace(first=span.first + start)]), noise)
            torch.lt(z, limit, out=part)
        return mask


__all__ = ["Scaling"]
