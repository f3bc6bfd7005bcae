"""Factors: the low-rank part of theta + offset eps z for one matrix, at each of the points that are read together.

    theta + offset eps z = shrink W + L right^T,   L = left (pending + offset eps draw), or pending + offset eps draw

Waiting updates and the draw of a point are added in the small space, float32, so that an update that waits costs a reading
nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from ..products import Part
from .plan import Group, Plan, Point, left_of


class Factors:
    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.points: list[Point] = []
        # side -> group -> pending + offset eps draw of every matrix, where that is not nothing
        self.middles: list[dict[int, Sequence[Tensor] | Tensor]] = []
        self.cores: dict[int, Tensor] = {}  # group -> those of all sides (matrix, side, r, r), where they have one size
        self.lefts: dict[tuple[int, int, int], Tensor] = {}
        self.number = {id(group): g for g, group in enumerate(plan.groups)}

    def prepare(self, points: Sequence[Point]) -> None:
        """Draw the factors of every query that the points use: one launch per query and group."""
        self.points, self.lefts, self.cores = list(points), {}, {}
        self.middles = [{} for _ in points]
        for g, group in enumerate(self.plan.groups):
            if group.matrices is None:
                continue
            pending = [matrix.pending for matrix in group.matrices]
            waits = pending[0] is not None
            if all(matrix.left is not None and matrix.rank == group.matrices[0].rank for matrix in group.matrices):
                self._prepare_cores(g, group, torch.stack(pending) if waits else None)  # type: ignore[arg-type]
                continue
            for side, (query, offset) in enumerate(self.points):
                if not offset:
                    if waits:
                        self.middles[side][g] = pending  # type: ignore[assignment]
                    continue
                moved = torch._foreach_mul(group.draws(self.plan, query), offset * group.eps)
                self.middles[side][g] = list(torch._foreach_add(pending, moved) if waits else moved)  # type: ignore[arg-type]

    def _prepare_cores(self, g: int, group: Group, pending: Tensor | None) -> None:
        """The same for cores of one size: a few operations a side, and not as many as there are matrices."""
        moving = [side for side, point in enumerate(self.points) if point.offset or pending is not None]
        draws: dict[int, Tensor] = {}
        found = []
        for query, offset in (self.points[side] for side in moving):
            if not offset:
                assert pending is not None
                found.append(pending)
                continue
            if query not in draws:
                draws[query] = torch.stack(group.draws(self.plan, query))
            moved = draws[query] * (offset * group.eps)
            found.append(moved if pending is None else pending + moved)
        if not found:
            return
        cores = torch.stack(found, 1)
        if len(moving) == len(self.points):
            self.cores[g] = cores
        for side, middles in zip(moving, cores.unbind(1)):
            self.middles[side][g] = middles

    def of(self, group: Group, i: int, side: int, rows: Tensor | slice | None = None) -> tuple[Tensor, Tensor, float]:
        """(L, right, shrink) of one side; L of some rows only where they are given."""
        assert group.matrices is not None
        matrix, g = group.matrices[i], self.number[id(group)]
        assert matrix.right is not None
        middle = self.middles[side][g][i]
        if rows is not None:
            with torch.autocast(
                middle.device.type, enabled=False
            ):  # the verbs take float32, whatever the closure's products are in
                left = middle[rows] if matrix.left is None else matrix.left[rows] @ middle
            return left, matrix.right, matrix.shrink
        if (g, i, side) not in self.lefts:
            self.lefts[g, i, side] = left_of(matrix, middle, group.backend)
        return self.lefts[g, i, side], matrix.right, matrix.shrink

    def parts(self, group: Group, i: int, sides: Sequence[int], transposed: bool) -> list[Part]:
        """The thin products beside x W^T (transposed: x W) for these sides, those that share a factor in one part."""
        assert group.matrices is not None
        matrix, g = group.matrices[i], self.number[id(group)]
        right = matrix.right
        assert right is not None
        moved = [j for j, side in enumerate(sides) if g in self.middles[side]]
        if not moved:
            return []
        if matrix.left is not None:  # L = left middle
            everyone = g in self.cores and list(sides) == list(range(len(self.points)))
            middles = self.cores[g][i] if everyone else torch.stack([self.middles[sides[j]][g][i] for j in moved])
            if transposed:
                return [Part(moved, matrix.thin("left"), middles, right)]
            return [Part(moved, matrix.thin("right"), middles.mT, matrix.left)]
        # L = pending + s draw = (pending draw) (1; s): sides of one query share the wide factor
        by_query: dict[int, list[int]] = {}
        for j in moved:
            point = self.points[sides[j]]
            by_query.setdefault(point.query if point.offset else -1, []).append(j)
        parts = []
        unit = _unit(matrix.rank, right.device)
        for query, members in by_query.items():
            pending = [] if matrix.pending is None else [matrix.pending]
            drawn = [group.draws(self.plan, query)[i]] if query >= 0 else []
            wide = torch.cat([*pending, *drawn], 1) if pending and drawn else [*pending, *drawn][0]
            scales = [self.points[sides[j]].offset * group.eps for j in members]
            blocks = [torch.cat([unit] * len(pending) + [unit * s] * len(drawn), 1) for s in scales]  # r x (r or 2 r)
            middles = torch.stack(blocks)
            if transposed:
                parts.append(Part(members, wide.t().contiguous(), middles.mT, right))
            else:
                parts.append(Part(members, matrix.thin("right"), middles, wide))
        return parts


@lru_cache(maxsize=64)
def _unit(rank: int, device: torch.device) -> Tensor:
    return torch.eye(rank, device=device)
