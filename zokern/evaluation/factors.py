"""Factors: the low-rank part of theta + offset eps z for one matrix, at each of the points that are read together.

    theta + offset eps z = shrink W + left right^T

`pending` updates and the draw of a point are added in the small space (r x r where the basis has both sides, m x r where a draw
is the left factor), float32, so that a deferred update costs a reading nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..directions import Matrix
from .plan import Group, Plan, Point


def left_of(matrix: Matrix, middle: Tensor, backend) -> Tensor:
    """U middle, or the middle itself where a draw is the left factor; the exact sum of the lowrank_ verb."""
    if matrix.left is None:
        return middle
    out = torch.empty(matrix.rows, middle.shape[1], device=middle.device)
    from ..backends import Span

    backend.lowrank_([out], [Span(0)], [matrix.left], [middle.t().contiguous()], [1.0], 0.0, "nearest", None, outs=[out])
    return out


class Factors:
    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.points: list[Point] = []
        self.middles: list[dict[int, Tensor]] = []
        self.lefts: dict[tuple[int, int], Tensor] = {}
        self.drawn: dict[tuple[int, int], dict[int, Tensor]] = {}

    def prepare(self, points: Sequence[Point]) -> None:
        """Draw the factors of every query that the points use: one launch per query and group."""
        self.points = list(points)
        self.lefts = {}
        queries = {point.query for point in points if point.offset}
        self.drawn = {key: draws for key, draws in self.drawn.items() if key[1] in queries}
        for g, group in enumerate(self.plan.groups):
            if group.matrices is None:
                continue
            for query in sorted(queries):
                if (g, query) not in self.drawn:
                    found = group.draws(self.plan, query)
                    self.drawn[g, query] = {id(matrix): draw for matrix, draw in zip(group.matrices, found)}

    def draw(self, group: Group, matrix: Matrix, query: int) -> Tensor:
        return self.drawn[self.plan.groups.index(group), query][id(matrix)]

    def middle(self, group: Group, i: int, side: int) -> Tensor | None:
        """pending + offset eps draw, in the small space; None where both are nothing."""
        assert group.matrices is not None
        matrix, point = group.matrices[i], self.points[side]
        if not point.offset:
            return matrix.pending
        moved = self.draw(group, matrix, point.query) * (point.offset * group.eps)
        return moved if matrix.pending is None else matrix.pending + moved

    def of(self, group: Group, i: int, side: int) -> tuple[Tensor, Tensor, float]:
        """(left, right, shrink) of one side."""
        assert group.matrices is not None
        matrix = group.matrices[i]
        assert matrix.right is not None
        key = (id(matrix), side)
        if key not in self.lefts:
            middle = self.middle(group, i, side)
            assert middle is not None
            self.lefts[key] = left_of(matrix, middle, group.backend)
        return self.lefts[key], matrix.right, matrix.shrink
