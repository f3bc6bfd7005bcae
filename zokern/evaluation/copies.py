"""Copies: theta + eps sum_k a_k z_k of the trained parameters at one or more points, whole, by tiles or by
rows.

    small tensors, or all where the budget holds them   resident: made before the reading, for all sides in
    one launch per group large matrices                                      made at their use: z beside the
    product, a tile, looked-up rows, or whole

16-bit vectors (norm weights, biases) are resident in float32: at 1.0 a step of eps = 1e-3 is below half an
ulp of bfloat16.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import devices, gemm
from ..backends import Batch, Outer, Sides, Span, TensorList, Terms, Weight
from ..directions import DIRECTIONS
from ..group import Draw, Group
from ..plan import Plan
from .arena import ALIGN, Arena
from .base import Point, Refused
from .budget import settle
from .factors import Factors

RESIDENT = 1 << 16  # elements: tensors up to this size are perturbed together, ahead of the reading
TRANSFORMED = (
    "the closure uses torch.func transforms of its own around a large parameter: use evaluation='master'"
)


class Copies:
    """Perturbed copies for the sides of one pass; a side is a point.

    level  of torch.vmap, whose mapped dimension is the sides; None: one side alone, without a mapped
           dimension"""

    def __init__(self, plan: Plan, points: Sequence[Point], arena: Arena) -> None:
        self.plan, self.points, self.arena = plan, list(points), arena
        self.sides = len(self.points)
        self.level: int | None = None
        self.whole: set[str] = set()
        self.largest = 0  # bytes of copies outside the arena
        self.resident: dict[tuple[int, int], Tensor] = {}  # (group, position) -> copies of all sides, stacked
        arena.reset()
        self.factors = Factors(plan, self.points)
        most = None if settle(arena, plan, self.sides, RESIDENT, self._size) else RESIDENT
        for g, group in enumerate(plan.groups):
            self._make_resident(g, group, most)
        arena.settle()

    @staticmethod
    def _size(tensor: Tensor) -> int:
        return tensor.numel() * tensor.element_size() + ALIGN

    def _make_resident(self, g: int, group: Group, most: int | None) -> None:
        device = group.theta[0].device
        members, launches, top = self._places(g, group, most, self.arena.top.get(device, 0))
        self.arena.top[device] = max(top, self.arena.top.get(device, 0))
        self.arena.peak = max(self.arena.peak, top)
        self.resident.update(members)
        for positions, thetas, spans, outs in launches:
            if isinstance(outs, Tensor):
                self.factors.stack(group, positions, outs)
                continue
            low = None if group.residuals is None else [group.residuals[i] for i in positions]
            self._fill(
                group, positions, thetas, spans, range(self.sides), outs, low, group.scales_of(positions)
            )

    def _places(self, g: int, group: Group, most: int | None, start: int) -> tuple:
        """Returns resident members with their stacks, and launches that fill them; prepared once for a list
        of tensors."""
        key = "resident", g, self.sides, most, start
        known = group.memo.get(key)
        if known is not None and known[0] == (self.arena, self.arena.renewals):
            return known[1]
        device = group.theta[0].device
        # half of the budget stays free for tiles, where there are any
        spare = 0 if most is None and devices.of(device).share else self.arena.size(device) // 2
        members: list[tuple[int, Tensor]] = []
        launches: list[tuple] = []
        by_kind: dict[bool, list[int]] = {}
        by_shape: dict[tuple, list[int]] = {}
        if most is None and device.type == "cpu":
            for i, matrix in enumerate(group.matrices or ()):
                if group.theta[i].dtype == torch.float32:
                    by_shape.setdefault((matrix.shape, matrix.rank, group.theta[i].shape), []).append(i)
        for (*_, shape), positions in by_shape.items():
            stack = self.arena.take((len(positions), self.sides, *shape), torch.float32, device)
            assert stack is not None
            members += [(i, stack[j].data) for j, i in enumerate(positions)]
            launches.append((positions, None, None, stack))
        stacks = dict(members)
        for i, tensor in enumerate(group.theta):
            if i in stacks:
                continue
            if most is not None and (group.matrices is not None or tensor.numel() > most):
                continue
            wide = tensor.dim() <= 1 and tensor.dtype != torch.float32
            dtype = torch.float32 if wide else tensor.dtype
            if self.arena.left(device) - self.sides * (tensor.numel() * dtype.itemsize + ALIGN) < spare:
                break
            stack = self.arena.take((self.sides, *tensor.shape), dtype, device)
            assert stack is not None
            members.append((i, stack))
            by_kind.setdefault(wide, []).append(i)  # a launch writes one type of result: theta's, or float32
        stacks = dict(members)
        for positions in by_kind.values():
            thetas = TensorList.lasting([group.theta[i] for i in positions])
            spans = [group.spans[i] for i in positions]
            outs = [TensorList.lasting([stacks[i][side] for i in positions]) for side in range(self.sides)]
            launches.append((positions, thetas, type(group.spans)(spans), outs))
        found = {(g, i): stack for i, stack in members}, launches, self.arena.top.get(device, 0)
        group.memo[key] = (self.arena, self.arena.renewals), found
        return found

    def _fill(
        self, group: Group, positions: Sequence[int], thetas, spans, sides: Sequence[int], outs, low, factors
    ) -> None:  # fmt: skip
        """outs[j] <- tensors of a group at the point of sides[j]; sides of one draw share its z, two in a
        launch."""
        plan, by_draw = self.plan, dict[Draw, list[int]]()
        for j, side in enumerate(sides):
            terms = self.points[side].terms if group.matrices is None else ()
            if group.matrices is not None and not self.factors.untouched(group, 0, side):
                self._fill_factored(group, positions, thetas, spans, side, outs[j], low)
            elif len(terms) == 1 and self.points[side].is_known:
                by_draw.setdefault(terms[0][0], []).append(j)
            elif not terms and low is None and all(span.rows is None for span in spans):
                torch._foreach_copy_(list(outs[j]), list(thetas))
            elif not terms:
                # at the scale 0: low bits are added and rows are looked up
                by_draw.setdefault(0, []).append(j)
            else:
                self._fill_terms(group, thetas, spans, terms, outs[j], low, factors)
        for draw, members in by_draw.items():
            for part in range(0, len(members), 2):
                pair = members[part : part + 2]
                amounts = [
                    sum(a for _, a in self.points[sides[j]].terms) if group.matrices is None else 0.0
                    for j in pair
                ]
                scales: Any = [amount * group.reach(draw) for amount in amounts]
                targets = [outs[j] for j in pair]
                noise = plan.noise([plan.named(draw)])
                group.backend.perturb(
                    Batch(thetas, spans, residuals=low, scales=factors), noise, scales, targets
                )

    def _fill_terms(self, group: Group, thetas, spans, terms, outs, low, factors) -> None:
        """outs <- theta + eps sum_k a_k z_k of several draws."""
        plan = self.plan
        if low is not None and outs[0].dtype == torch.float32:  # which holds the low bits as well
            still = plan.noise([(plan.step, 0)])
            group.backend.perturb(Batch(thetas, spans, residuals=low), still, [0.0], [outs])
            low = None
        else:
            torch._foreach_copy_(list(outs), list(thetas))
        spent = None if low is None else [bits.clone() for bits in low]
        amounts = [a * group.reach(draw) for draw, a in terms]
        table = plan.table(amounts, outs[0].device)
        draws = [plan.named(draw) for draw, _ in terms]
        rounding = "nearest" if spent is None else "residual"
        batch, noise = Batch(outs, spans, rounding, spent, factors), plan.noise(draws)
        group.backend.axpy_(batch, noise, Terms(table))

    def _fill_factored(
        self, group: Group, positions: Sequence[int], thetas, spans, side: int, outs, low
    ) -> None:
        """outs <- shrink theta + L C R^T, in one launch."""
        plan = self.plan
        if len(positions) > 1:
            self.factors.prepare_ends(group, positions, [side])
        lefts, rights, shrinks = zip(*[self.factors.of(group, i, side) for i in positions])
        ones, rounding = [1.0] * len(lefts), "nearest" if low is None else "residual"
        noise = plan.noise([(plan.step, 0)], None)
        group.backend.lowrank_(
            Batch(thetas, spans, rounding, low), Outer(lefts, rights, ones, shrinks[0]), noise, outs
        )

    # One parameter at its use -------------------------------------------------------------------------------

    def is_simple(self) -> bool:
        """Whether every point lies along one draw of this step at most, by a number of the host: the product
        kernel, and rows, know no other."""
        return all(
            len(point.terms) <= 1 and point.is_known and all(isinstance(draw, int) for draw, _ in point.terms)
            for point in self.points
        )

    def untouched(self, group: Group, i: int, side: int) -> bool:
        """Whether this side reads the weights themselves."""
        if group.residual(i) is not None:
            return False
        return (
            self.factors.untouched(group, i, side)
            if group.matrices is not None
            else not self.points[side].terms
        )

    def fill(
        self, group: Group, i: int, view: Tensor, span: Span, sides: Sequence[int], outs: Sequence[Tensor],
        low: Tensor | None,
        factors: Tensor | None,
    ) -> None:  # fmt: skip
        """outs[j] <- a view of tensor i at the point of sides[j]. low, factors: of the view."""
        matrix = None if group.matrices is None else group.matrices[i]
        if matrix is None or span.rows is None or low is not None or matrix.shape != tuple(view.shape):
            low, factors = (None if given is None else [given] for given in (low, factors))  # type: ignore[assignment]
            self._fill(group, [i], [view], [span], sides, [[out] for out in outs], low, factors)
            return
        for side, out in zip(sides, outs):  # looked-up rows need their rows of the left factor alone
            torch.index_select(view, 0, span.rows, out=out)
            if not self.factors.untouched(group, i, side):
                left, right, shrink = self.factors.of(group, i, side, span.rows)
                group.backend.lowrank_(Batch([out], [Span(span.who)]), Outer([left], [right], [1.0], shrink))

    def stack(self, g: int, i: int) -> Tensor:
        """Returns the whole tensor at every point, (sides, *shape): resident, or in memory of its own."""
        if (g, i) in self.resident:
            return self.resident[g, i]
        group = self.plan.groups[g]
        theta = group.theta[i]
        out = self.own(group, i, (self.sides, *theta.shape))
        self.whole.add(group.names[i])
        self.fill(
            group,
            i,
            theta,
            group.spans[i],
            range(self.sides),
            list(out.unbind(0)),
            group.residual(i),
            group.scale(i),
        )
        return out

    def own(self, group: Group, i: int, shape: tuple[int, ...]) -> Tensor:
        """Returns memory for copies of tensor i that may outlive the call."""
        inner = torch._C._functorch.peek_interpreter_stack()
        if (None if inner is None else inner.level()) != self.level:
            raise Refused(TRANSFORMED)
        theta = group.theta[i]
        out = torch.empty(shape, dtype=theta.dtype, device=theta.device)
        self.hold(theta.device, out.nbytes)
        return out

    def hold(self, device: torch.device, size: int) -> None:
        """Notes copies outside the arena that live at once."""
        self.largest = max(self.largest, self.arena.top.get(device, 0) + size)

    def rows(self, g: int, i: int, indices: Sequence[Tensor]) -> Tensor:
        """Returns looked-up rows of a matrix, (sides, number of rows, columns); an index for each side."""
        group = self.plan.groups[g]
        theta, span = group.theta[i], group.spans[i]
        out = self.own(group, i, (self.sides, indices[0].numel(), theta.shape[1]))
        same = all(index is indices[0] for index in indices)
        for sides in [list(range(self.sides))] if same else [[side] for side in range(self.sides)]:
            rows = indices[sides[0]].reshape(-1).to(device=theta.device, dtype=torch.int64)
            try:  # torch's own lookup of a column holds the bounds: on a GPU no value is read for it
                theta[:, :1].index_select(0, rows)
            except IndexError as problem:
                raise IndexError(
                    f"index out of range: {group.names[i]!r} has {theta.shape[0]} rows"
                ) from problem
            here = Span(span.who, span.first, rows=rows.contiguous())
            self.fill(
                group, i, theta, here, sides, [out[side] for side in sides], group.residual(i), group.scale(i)
            )
        return out

    def product(
        self, g: int, i: int, xs: list[Tensor], biases: list[Tensor | None], transposed: bool
    ) -> Tensor:
        """Returns y_j = x_j W_j^T + b_j of every side, one below the other: (rows of all sides, columns).
        Transposed: x_j W_j."""
        group = self.plan.groups[g]
        weight, low, span = group.theta[i], group.residual(i), group.spans[i]
        sides, room = range(self.sides), self.arena.left(weight.device)
        factored = (
            group.matrices is not None and low is None and group.matrices[i].shape == tuple(weight.shape)
        )
        fused = (
            low is None
            and (factored or group.matrices is None)
            and self.is_simple()
            and group.scale(i) is None
        )
        fused = fused and (self.sides <= gemm.MANY if factored else self.plan.direction.name in DIRECTIONS)
        rank = self.factors.rank(group, i) if factored else 0
        fused = fused and gemm.fuses(group.backend, xs, weight, transposed, room, rank)
        if fused:
            size = gemm.own(group.backend, weight.device).linear_bytes(gemm.counts_of(xs), room)
            self.largest = max(self.largest, self.arena.top.get(weight.device, 0) + size)
        else:
            biases = [b if b is None or b.dtype == weight.dtype else b.to(weight.dtype) for b in biases]
        if fused and not factored:
            terms: Any = [point.terms[0] if point.terms else (0, 0.0) for point in self.points]
            noise = self.plan.noise([self.plan.named(draw) for draw, _ in terms])
            operands = Sides(xs, biases, [amount * group.reach(draw) for draw, amount in terms])
            return gemm.fused_linear(group.backend, Weight(weight, span, transposed), operands, noise, room)
        if factored and (transposed or fused or not gemm.is_long(xs, weight)):
            assert group.matrices is not None
            parts = self.factors.parts(group, i, sides, transposed)
            matrix = Weight(weight, span, transposed, group.matrices[i].shrink)
            return gemm.factored_linear(group.backend, matrix, Sides(xs, biases, thins=parts), room, fused)
        moved = [side for side in sides if not self.untouched(group, i, side)]
        return gemm.tiled_linear(xs, weight, biases, self._tiles(group, i, moved, transposed), transposed)

    def _tiles(
        self, group: Group, i: int, moved: Sequence[int], transposed: bool
    ) -> Iterator[tuple[int, int, dict[int, Tensor]]]:
        """Yields (start, stop, the tile of each side that moved): some rows of a matrix, or columns where it
        is transposed.

        A tile has as many elements as the device's class asks for, and what is left of the arena holds those
        of all sides."""
        theta, span, low = group.theta[i], group.spans[i], group.residual(i)
        dimension = 1 if transposed else 0
        total, width = theta.shape[dimension], theta.shape[1 - dimension]
        size, many = width * theta.element_size(), max(1, len(moved))
        kind, room = devices.of(theta.device), self.arena.left(theta.device) // many - ALIGN
        step = kind.tile_rows(total, min(room, kind.tile * theta.element_size()) // max(1, size))
        for start in range(0, total, step):
            stop = min(total, start + step)
            shape = (width, stop - start) if transposed else (stop - start, width)
            tiles = {}
            for side in moved:
                tile = self.arena.take(shape, theta.dtype, theta.device)
                tiles[side] = (
                    tile if tile is not None else torch.empty(shape, dtype=theta.dtype, device=theta.device)
                )
            view = theta.narrow(dimension, start, stop - start)
            parts = [
                None if whole is None else whole.narrow(dimension, start, stop - start).contiguous()
                for whole in (low, group.scale(i))
            ]
            if transposed:
                here = Span(span.who, span.first + start, pitch=total)
            else:
                here = Span(span.who, span.first + start * width)
            self.fill(group, i, view, here, moved, list(tiles.values()), *parts)
            yield start, stop, tiles
            self.arena.release()

    # Sides as a mapped dimension ----------------------------------------------------------------------------

    def stacked(self, x: Tensor) -> Tensor:
        """Returns (sides, *shape) of a tensor that is mapped over the sides, or the same for all."""
        functorch = torch._C._functorch
        if functorch.is_functorch_wrapped_tensor(x):
            if (
                self.level is None
                or not functorch.is_batchedtensor(x)
                or functorch.maybe_get_level(x) != self.level
            ):
                raise Refused(TRANSFORMED)
            at, x = functorch.maybe_get_bdim(x), functorch.get_unwrapped(x)
            return x if at == 0 else x.movedim(at, 0)
        return x.unsqueeze(0) if self.sides == 1 else x.expand(self.sides, *x.shape)

    def parts(self, x: Tensor | None) -> list:
        """Returns the tensor of each side, or the same for all."""
        if x is None or not torch._C._functorch.is_functorch_wrapped_tensor(x):
            return [x] * self.sides
        return list(self.stacked(x).unbind(0))

    def mapped(self, stack: Tensor) -> Tensor:
        """Returns (sides, ...) as one tensor mapped over the sides, or the tensor of the one side."""
        return stack[0] if self.level is None else torch._C._functorch._add_batch_dim(stack, 0, self.level)
