"""Factors: the low-rank part of theta + eps sum_k a_k z_k for one matrix,
at each of the points that are read together.

    theta + eps sum_k a_k z_k = shrink W + L C R^T,   (L, C, R) = Matrix.factors(M),   M = pending + eps sum_k
    a_k draw_k

Deferred updates and the draws of a point are added in the small space, in float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from functools import lru_cache

import torch
from torch import Tensor

from ..autocast import is_on, off
from ..backends import Thin
from ..device_numbers import constant, scalar
from ..directions import Matrix
from ..group import Draw, Group, ends_of
from ..modules import same
from ..plan import Plan
from .base import Point

PIECE = 1 << 17  # elements of the results of stack() that are made at a time


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
        """out[j, side] <- shrink W + L C R^T of matrices of one shape, float32, by batched products.

        out is (matrices, sides, *shape of W). A launch for hundreds of small matrices spends more on their
        addresses. Where R is kept, one product makes all sides of a matrix. A few matrices are copied and
        moved at a time, while the caches hold them."""
        g, matrices = self.number[id(group)], [group.matrices[i] for i in positions]  # type: ignore[index]
        moved = [middles[g] for middles in self.middles if g in middles]
        # points without a draw are first (base.distinct)
        assert not moved or all(g in middles for middles in self.middles[-len(moved) :])
        kept = [m.left for m in matrices] + [m.right for m in matrices]
        key = "bases", positions[0], len(moved), out.shape[1]
        bases: _Bases | None = group.memo.get(key)
        if bases is None or bases.out is not out or not same(kept, bases.kept):
            theta = [group.theta[i] for i in positions]
            bases = group.memo[key] = _Bases(theta, matrices, positions, out, len(moved))
        if g in self.cores:
            some = self.cores[g].index_select(0, bases.index)
        elif moved:
            parts = [
                m.index_select(0, bases.index) if isinstance(m, Tensor) else [m[i] for i in positions]
                for m in moved
            ]
            some = torch.stack([m if isinstance(m, Tensor) else torch.stack(m) for m in parts], 1)
        # autocast would multiply in 16 bits
        with off(out.device.type) if is_on(out.device.type) else nullcontext():
            bases.fill(bases.products(some) if moved else [], matrices[0].shrink)

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


class _Bases:
    """What lasts of Factors.stack(): kept factors of matrices of one shape, and the pieces of the results.

    moved  sides that are not W itself: the last ones
    left   (matrices * moved, rows, r), and right (matrices, columns, r); None where each step draws it"""

    def __init__(
        self, theta: Sequence[Tensor], matrices: Sequence[Matrix], positions: Sequence[int], out: Tensor,
        moved: int
    ) -> None:  # fmt: skip
        lefts, rights = [m.left for m in matrices], [m.right for m in matrices]
        self.kept, self.out, (rows, columns) = lefts + rights, out, matrices[0].shape
        self.rows, self.columns, self.moved = rows, columns, moved
        self.index = constant(tuple(positions), torch.int64, out.device)
        self.left, self.right = _stacked([left for left in lefts for _ in range(moved)]), _stacked(rights)
        self.before = None if self.left is None else torch.empty_like(self.left)
        (count, sides), size = out.shape[:2], out[0].numel()
        step = PIECE // size if 2 * size <= PIECE else count
        last = out[:, sides - moved :]
        several = [] if not moved else [last] if self.right is not None else last.unbind(1)
        # the sides of a matrix lie below one another
        targets = [target.flatten(1) for target in several]
        self.pieces: list[tuple[slice, list[Tensor], Tensor, list[Tensor]]] = []
        for start in range(0, count, step):
            here = slice(start, start + step)
            sources = [t for t in theta[here] for _ in range(sides)]
            views = [target[here].unflatten(1, (-1, columns)) for target in targets]
            self.pieces.append((here, sources, out[here].flatten(0, 1), views))

    def products(self, some: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Returns (L C, R) of all moved sides below one another, or of each of them where R is drawn.

        some  M of every matrix and side"""
        if self.right is None:
            lefts = [some[:, j, : self.rows] for j in range(self.moved)]
            if self.left is not None:
                lefts = [self.left[:: self.moved]] * self.moved
            return [(left, some[:, j, -self.columns :]) for j, left in enumerate(lefts)]
        before = some[..., : self.rows, :]
        if self.left is not None:
            before = torch.bmm(self.left, some.flatten(0, 1), out=self.before)
        return [(before.reshape(len(self.right), -1, before.shape[-1]), self.right)]

    def fill(self, products: Sequence[tuple[Tensor, Tensor]], shrink: float) -> None:
        """out <- W, and where a side moved shrink W + L C R^T."""
        for here, sources, copies, targets in self.pieces:
            torch.stack(sources, out=copies)
            for target, (left, right) in zip(targets, products):
                target.baddbmm_(left[here], right[here].mT, beta=shrink)


def _stacked(kept: Sequence[Tensor | None]) -> Tensor | None:
    """Returns kept factors of one shape in one tensor; None where each step draws them."""
    here = [factor for factor in kept if factor is not None]
    return torch.stack(here) if here else None


@lru_cache(maxsize=64)
def _unit(rank: int, device: torch.device) -> Tensor:
    return torch.eye(rank, dtype=torch.float32, device=device)
