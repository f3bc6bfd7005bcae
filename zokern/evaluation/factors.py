"""Factors: the low-rank part of theta + eps sum_k a_k z_k for one matrix, at each of the points that are read together.

    theta + eps sum_k a_k z_k = shrink W + L right^T,   L = left M or M,   M = pending + eps sum_k a_k draw_k

Deferred updates and the draws of a point are added in the small space, in float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from ..backends import Thin
from ..modules import same
from ..plan import Draw, Group, Plan, lefts_of
from .base import Point


class Factors:
    """The middle factors M of every matrix at every point."""

    def __init__(self, plan: Plan, points: Sequence[Point]) -> None:
        self.plan, self.points = plan, list(points)
        self.number = {id(group): g for g, group in enumerate(plan.groups)}
        # side -> group -> M of every matrix; a group is missing where M is zero
        self.middles: list[dict[int, Sequence[Tensor] | Tensor]] = [{} for _ in points]
        self.cores: dict[int, Tensor] = {}  # group -> M of all sides (matrix, side, r, r), where they have one size
        self.lefts: dict[tuple[int, int, int], Tensor] = {}
        for g, group in enumerate(plan.groups):
            if group.matrices is not None:
                self._prepare(g, group)

    def _prepare(self, g: int, group: Group) -> None:
        assert group.matrices is not None
        first = group.matrices[0]
        even = all(matrix.left is not None and matrix.rank == first.rank for matrix in group.matrices)
        pending = [matrix.pending for matrix in group.matrices if matrix.pending is not None]
        assert not pending or len(pending) == len(group.matrices), "matrices of a group are deferred together"
        # cores of one size are stacked: a few operations a side, and not as many as there are matrices
        waiting = [torch.stack(pending)] if even and pending else list(pending)
        moving = [side for side, point in enumerate(self.points) if point.terms or pending]
        found = []
        for side in moving:
            sums = list(waiting)
            for word, amount in self.points[side].terms:
                moved = torch._foreach_mul(self._draws(group, word, even), amount * group.reach(word))
                sums = list(torch._foreach_add(sums, moved)) if sums else list(moved)
            found.append(sums)
        if even and found:
            cores = torch.stack([sums[0] for sums in found], 1)
            if len(moving) == len(self.points):
                self.cores[g] = cores
            for side, middles in zip(moving, cores.unbind(1)):
                self.middles[side][g] = middles
        else:
            for side, sums in zip(moving, found):
                self.middles[side][g] = sums

    def _draws(self, group: Group, word: Draw, even: bool) -> list[Tensor]:
        draws = group.draws(self.plan, word)
        if not even:
            return draws
        key = "stacked", self.plan.step, word
        if key not in group.drawn:
            group.drawn[key] = [torch.stack(draws)]  # type: ignore[index]
        return group.drawn[key]  # type: ignore[index]

    def untouched(self, group: Group, i: int, side: int) -> bool:
        """Whether W itself is theta at this point."""
        return self.number[id(group)] not in self.middles[side]

    def of(self, group: Group, i: int, side: int, rows: Tensor | slice | None = None) -> tuple[Tensor, Tensor, float]:
        """Returns (L, right, shrink) of one side; of L some rows only, where they are given."""
        assert group.matrices is not None
        matrix, g = group.matrices[i], self.number[id(group)]
        assert matrix.right is not None
        middle = self.middles[side][g][i]
        if rows is not None:
            with torch.autocast(middle.device.type, enabled=False):  # the verbs take float32
                left = middle[rows] if matrix.left is None else matrix.left[rows] @ middle
            return left, matrix.right, matrix.shrink
        if (g, i, side) not in self.lefts:
            self.prepare_lefts(group, [i], [side])
        return self.lefts[g, i, side], matrix.right, matrix.shrink

    def prepare_lefts(self, group: Group, members: Sequence[int], sides: Sequence[int]) -> None:
        """Makes L of several matrices and sides in one launch."""
        assert group.matrices is not None
        g = self.number[id(group)]
        keys = [(g, i, side) for side in sides for i in members]
        matrices = [group.matrices[i] for _, i, _ in keys]
        middles = [self.middles[side][g][i] for _, i, side in keys]
        self.lefts.update(zip(keys, lefts_of(matrices, middles, group.backend)))

    def stack(self, group: Group, positions: Sequence[int], out: Tensor) -> None:
        """out[side, j] <- shrink W + L right^T of matrices of one shape, float32, by one batched product for each side.

        out is (sides, matrices, *shape of W). A launch for hundreds of small matrices spends more on their addresses."""
        matrices = [group.matrices[i] for i in positions]  # type: ignore[index]
        lefts, rights, first, g = [m.left for m in matrices], [m.right for m in matrices], matrices[0], self.number[id(group)]
        known = group.memo.get(("bases", positions[0]))
        if known is None or not same([*lefts, *rights], known[0]):
            left = None if first.left is None else torch.stack(lefts)  # type: ignore[arg-type]
            index = torch.tensor(positions, dtype=torch.int64, device=group.theta[0].device)
            known = group.memo["bases", positions[0]] = [*lefts, *rights], left, torch.stack(rights).mT, index  # type: ignore[arg-type]
        _, left, right, index = known
        weights = torch.stack([group.theta[i] for i in positions]).view(len(positions), *first.shape)
        with torch.autocast(weights.device.type, enabled=False):
            for middles, target in zip(self.middles, out.view(-1, *weights.shape).unbind(0)):
                if (middle := middles.get(g)) is not None:
                    some = middle[index] if isinstance(middle, Tensor) else torch.stack([middle[i] for i in positions])
                    torch.baddbmm(weights, some if left is None else left @ some, right, beta=first.shrink, out=target)
                else:
                    target.copy_(weights)

    def parts(self, group: Group, i: int, sides: Sequence[int], transposed: bool) -> list[Thin]:
        """Returns the thin products beside x W^T (transposed: x W), those of sides that share a factor in one part."""
        assert group.matrices is not None
        matrix, g = group.matrices[i], self.number[id(group)]
        right = matrix.right
        assert right is not None
        moved = [j for j, side in enumerate(sides) if g in self.middles[side]]
        if not moved:
            return []
        if matrix.left is not None:  # L = left M
            everyone = g in self.cores and list(sides) == list(range(len(self.points)))
            middles = self.cores[g][i] if everyone else torch.stack([self.middles[sides[j]][g][i] for j in moved])
            if transposed:
                return [Thin(moved, matrix.thin("left"), middles, right)]
            return [Thin(moved, matrix.thin("right"), middles.mT, matrix.left)]
        # L = pending + sum_k s_k draw_k = (pending draw_1 ...) (1; s_1; ...): sides of the same draws share the wide factor
        by_draws: dict[tuple[Draw, ...], list[int]] = {}
        for j in moved:
            by_draws.setdefault(tuple(word for word, _ in self.points[sides[j]].terms), []).append(j)
        parts = []
        unit = _unit(matrix.rank, right.device)
        for words, members in by_draws.items():
            pending = [] if matrix.pending is None else [matrix.pending]
            drawn = [group.draws(self.plan, word)[i] for word in words]
            wide = torch.cat([*pending, *drawn], 1) if len(pending) + len(drawn) > 1 else [*pending, *drawn][0]
            blocks = []
            for j in members:
                amounts = [amount * group.reach(word) for word, amount in self.points[sides[j]].terms]
                blocks.append(torch.cat([unit] * len(pending) + [unit * amount for amount in amounts], 1))
            middles = torch.stack(blocks)
            if transposed:
                parts.append(Thin(members, wide.t().contiguous(), middles.mT, right))
            else:
                parts.append(Thin(members, matrix.thin("right"), middles, wide))
        return parts


@lru_cache(maxsize=64)
def _unit(rank: int, device: torch.device) -> Tensor:
    return torch.eye(rank, dtype=torch.float32, device=device)
