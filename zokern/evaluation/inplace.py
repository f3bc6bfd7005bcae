"""Evaluation ``inplace``: the weights themselves move to each point and back,
by arithmetic; no memory beside them.

In 16 bits every move rounds: at lr = 0 and eps = 1e-3, bfloat16 weights of size 0.02 drift by 12 % in 1000
steps. Float32 weights come back to the last bit or the one before. An exception in the loss restores by the
same arithmetic. Evaluation 'master' is exact. Malladi et al. 2023, Algorithm 1.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..device_numbers import Amount, scalar
from ..part import Part
from ..plan import Plan
from .base import THETA, Point, Record, distinct
from .isolation import Isolation


class InPlace(Part):
    """Reads the losses by moving the weights to each point and back by arithmetic, as the published loops
    do.

    It takes no extra memory. A weight is rounded at each move, so 16-bit weights drift, also at lr = 0.
    An exception leaves the weights as they were up to rounding. Malladi et al. 2023, Algorithm 1."""

    name, defers, exact, stands_in = "inplace", False, False, False

    def __init__(self) -> None:
        self.record = Record(self.name)

    def losses(self, plan: Plan, points: Sequence[Point], closure: Callable[[], object]) -> Tensor:
        """Returns the losses at the points, float64 [len(points)]; see Evaluation.losses."""
        isolation = Isolation(plan)
        rounding = "residual" if plan.rounding == "residual" else "nearest"
        read: dict[Point, Tensor] = {}
        at = THETA
        try:
            with isolation.session(eager=False):
                for point in distinct(points):
                    at = _move(plan, at, point, rounding)
                    isolation.weights.written()
                    read[point] = isolation.read(closure)
        finally:
            _move(plan, at, THETA, rounding)
            torch.clear_autocast_cache()
        return torch.stack([read[point] for point in points])


def _move(plan: Plan, start: Point, end: Point, rounding: str) -> Point:
    """Moves the weights from one point to another; returns where they are."""
    ways: dict[Any, float | Amount] = dict(end.terms)
    for draw, amount in start.terms:
        ways[draw] = ways.get(draw, 0.0) - amount
    ways = {draw: amount for draw, amount in ways.items() if amount}
    if not ways:
        return end
    for group in plan.groups:
        scales = [amount * group.reach(word) for word, amount in ways.items()]
        if group.matrices is None:
            table = plan.table(scales, group.theta[0].device)
            group.axpy_(plan.noise([plan.named(draw) for draw in ways]), table, 1.0, rounding)
            continue
        assert plan.factored is not None
        for draw, scale in zip(ways, scales):
            moved = plan.factored.plus(group.matrices, [], group.draws(plan, draw), scalar(scale))
            group.add_lowrank(moved, rounding, plan)
    return end


__all__ = ["InPlace"]
