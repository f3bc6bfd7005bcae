"""Factors: the low-rank part of theta + eps sum_k a_k z_k for one matrix,
at each of the points that are read together.

    theta + eps sum_k a_k z_k = shrink W + L C R^T,   (L, C, R) = Matrix.factors(M),   M = pending + eps sum_k
    a_k draw_k

Deferred updates and the draws of a point are added in the small space, in float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from ..backends import Thin
from ..device_numbers import constant, scalar
from ..group import Draw, Group, ends_of
from ..modules import same
from ..plan import Plan
from .base import Point


class Factors:
    """The middle factors M of every matrix at every point."""

    def __init__(self, plan: Plan, points: Sequence[Point]) -> None:
        self.plan, self.points = plan, list(points)
        self.number = {id(group): g for g, group in enumerate(plan.groups)}
        # side -> group -> M of every matrix; a group is missing where M is zero
        self.middles: list[dict[int, Sequence[Tensor] | Tensor]] = [{} for _ in points]
        # group -> M of all sides (matrix, side, r, r), where they have one size
        self.cores: dict[int, Tensor] = {}
        self.ends: dict[tuple[int, int, int], tuple[Tensor, Tensor]] = {}  # (L C, R)
        for g, group in enumerate(plan.groups):
            if group.matrices is not None:
                self._prepare(g, group)

    def _prepare(self, g: int, group: Group) -> None:
        assert group.matrices is not None and self.plan.factored is not None
        even = group.is_even
        # cores of one size are stacked: a few operations a side, and not as many as there are matrices
        waiting = group.together()
        assert not waiting or even or len(waiting) == len(group.matrices), "a group is deferred together"
        moving = [side for side, point in enumerate(self.points) if point.terms or waiting]
        found = []
        for side in moving:
            sums = list(waiting)
            for word, amount in self.points[side].terms:
                sums = self.plan.factored.plus(
                    group.matrices, sums, group.stacked(self.plan, word), scalar(amount * group.reach(word))
                )
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

    def untouched(self, group: Group, i: int, side: int) -> bool:
        """Whether W itself is theta at this point."""
        return self.number[id(group)] not in self.middles[side]

    def of(
        self, group: Group, i: int, side: int, rows: Tensor | slice | None = None
    ) -> tuple[Tensor, Tensor, float]:
        """Returns (L C, R, shrink) of one side; of L some rows only, where they are given."""
        assert group.matrices is not None
        matrix, g = group.matrices[i], self.number[id(group)]
        if rows is not None:
            left, core, right = matrix.factors(self.middles[side][g][i])
            with torch.autocast(left.device.type, enabled=False):  # the verbs take float32
                return left[rows] if core is None else left[rows] @ core, right, matrix.shrink
        if (g, i, side) not in self.ends:
            self.prepare_ends(group, [i], [side])
        return *self.ends[g, i, side], matrix.shrink

    def prepare_ends(self, group: Group, members: Sequence[int], sides: Sequence[int]) -> None:
        """Makes L C and R of several matrices and sides in one launch."""
        assert group.matrices is not None
        g = self.number[id(group)]
        keys = [(g, i, side) for side in sides for i in members]
        matrices = [group.matrices[i] for _, i, _ in keys]
        middles = [self.middles[side][g][i] for _, i, side in keys]
        self.ends.update(zip(keys, ends_of(matrices, middles, group.backend)))

    def stack(self, group: Group, positions: Sequence[int], out: Tensor) -> None:
        """out[side, j] <- shrink W + L C R^T of matrices of one shape,
        float32, by one batched product for each side.

        out is (sides, matrices, *shape of W). A launch for hundreds
        of small matrices spends more on their addresses."""
        matrices = [group.matrices[i] for i in positions]  # type: ignore[index]
        lefts, rights = [m.left for m in matrices], [m.right for m in matrices]
        first, g = matrices[0], self.number[id(group)]
        known = group.memo.get(("bases", positions[0]))
        if known is None or not same([*lefts, *rights], known[0]):
            left, right = _bases(lefts), _bases(rights)
            index = constant(tuple(positions), torch.int64, group.theta[0].device)
            known = group.memo["bases", positions[0]] = [*lefts, *rights], left, right, index
        _, left, right, index = known
        torch.stack([group.theta[i] for i in positions] * len(self.points), out=out.flatten(0, 1))
        moved = [middles[g] for middles in self.middles if g in middles]
        if not moved:
            return
        # points without a draw are first (base.distinct)
        assert all(g in middles for middles in self.middles[-len(moved) :])
        target = out[len(self.points) - len(moved) :].view(-1, *first.shape)
        with torch.autocast(out.device.type, enabled=False):
            some = torch.stack(
                [m[index] if isinstance(m, Tensor) else torch.stack([m[i] for i in positions]) for m in moved]
            )
            before = some[..., : first.rows, :] if left is None else left if right is None else left @ some
            after = some[..., -first.columns :, :] if right is None else right
            before, after = (
                t.expand(*some.shape[:2], *t.shape[-2:]).reshape(-1, *t.shape[-2:]) for t in (before, after)
            )
            target.baddbmm_(before, after.mT, beta=first.shrink)

    def rank(self, group: Group, i: int) -> int:
        """Returns the rank of the thin products of a side, at points of one draw at most."""
        assert group.matrices is not None
        matrix = group.matrices[i]
        kept = matrix.left is not None and matrix.right is not None
        return matrix.rank * (1 if kept or matrix.pending is None else 2)

    def parts(self, group: Group, i: int, sides: Sequence[int], transposed: bool) -> list[Thin]:
        """Returns the thin products beside x W^T (transposed: x W),
        those of sides that share a factor in one part."""
        assert group.matrices is not None
        matrix, g = group.matrices[i], self.number[id(group)]
        moved = [j for j, side in enumerate(sides) if g in self.middles[side]]
        if not moved:
            return []
        if matrix.left is None or matrix.right is None:
            return self._wide_parts(group, i, sides, moved, transposed)
        everyone = g in self.cores and list(sides) == list(range(len(self.points)))
        middles = self.cores[g][i] if everyone else torch.stack([self.middles[sides[j]][g][i] for j in moved])
        if transposed:
            return [Thin(moved, matrix.thin("left"), middles, matrix.right)]
        return [Thin(moved, matrix.thin("right"), middles.mT, matrix.left)]

    def _wide_parts(
        self, group: Group, i: int, sides: Sequence[int], moved: list[int], transposed: bool
    ) -> list[Thin]:
        """Returns the thin products where U, V or both are drawn:
        sides of the same draws share the wide factors.

        pending + sum_k s_k draw_k = (pending draw_1 ...) (1; s_1; ...)"""
        assert group.matrices is not None
        matrix, free = group.matrices[i], group.matrices[i].left is None and group.matrices[i].right is None
        by_draws: dict[tuple[Draw, ...], list[int]] = {}
        for j in moved:
            by_draws.setdefault(tuple(word for word, _ in self.points[sides[j]].terms), []).append(j)
        parts = []
        unit = _unit(matrix.rank, matrix.device)
        for words, members in by_draws.items():
            pending = [] if matrix.pending is None else [matrix.pending]
            drawn = [group.draws(self.plan, word)[i] for word in words]
            wide = (
                torch.cat([*pending, *drawn], 1) if len(pending) + len(drawn) > 1 else [*pending, *drawn][0]
            )
            blocks = []
            for j in members:
                amounts = [scalar(amount * group.reach(word)) for word, amount in self.points[sides[j]].terms]
                each = [unit] * len(pending) + [unit * amount for amount in amounts]
                blocks.append(torch.block_diag(*each) if free else torch.cat(each, 1))
            # (sides, r or width of V, width)
            middles, (left, _, right) = torch.stack(blocks), matrix.factors(wide)
            first, last = (left, right) if transposed else (right, left)
            kept = matrix.left if transposed else matrix.right
            narrow = (
                first.t().contiguous() if kept is None else matrix.thin("left" if transposed else "right")
            )
            parts.append(Thin(members, narrow, middles.mT if kept is None and not free else middles, last))
        return parts


def _bases(kept: Sequence[Tensor | None]) -> Tensor | None:
    """Returns the kept factors of matrices of one shape in one tensor; None where each step draws them."""
    here = [factor for factor in kept if factor is not None]
    return torch.stack(here) if here else None


@lru_cache(maxsize=64)
def _unit(rank: int, device: torch.device) -> Tensor:
    return torch.eye(rank, dtype=torch.float32, device=device)
