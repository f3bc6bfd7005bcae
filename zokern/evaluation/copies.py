"""Copies: theta + offset eps z for one parameter, a tile of it, or its looked-up rows, in memory of the arena where that is safe."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack

from .. import overlap, products
from ..backends import Backend, Span
from ..directions import DIRECTIONS
from .arena import ALIGN, Arena
from .factors import Factors
from .plan import Group, Plan, Point

RESIDENT = 1 << 16  # elements: tensors up to this size are perturbed together, ahead of the reading
TILE = 1 << 21  # elements: larger tiles leave the caches before they are read, smaller ones starve the product (benchmarks/)


class Copies:
    """Perturbed copies of the trained parameters at one or more points; `side` is the point that is being read now."""

    def __init__(self, plan: Plan, arena: Arena) -> None:
        self.plan, self.arena = plan, arena
        self.table = plan.aliases | dict.fromkeys(plan.stale, (-1, -1)) if plan.stale else plan.aliases
        self.points: list[Point] = []
        self.resident: list[dict[tuple[int, int], Tensor]] = []
        self.small: set[tuple[int, int]] = set()
        self.factors = Factors(plan)
        self.used: set[tuple[int, int]] = set()
        self.whole: set[str] = set()
        self.alone: set[str] = set()  # read for each side alone although several are read together
        self.together = False  # whether the points are read in one pass
        self.meet: Callable | None = None  # how the sides of a paired reading wait for one another: Meeting.join
        self.coarse = False  # whether a product was in 16 bits
        self.rows = 0  # most rows of x that a product of one side has seen
        self.beside = 0  # bytes of the copies outside the arena that the call under way was given
        self.largest = 0
        self.views: dict[int, weakref.ref] = {}
        self.side = 0

    def prepare(self, points: Sequence[Point]) -> None:
        """Perturb the small tensors at every point, both signs of a query in one launch per group."""
        self.points = list(points)
        self.resident = [{} for _ in points]
        self.small = set()
        self.factors.prepare(self.points)
        moved = [side for side, point in enumerate(self.points) if point.offset]
        for g, group in enumerate(self.plan.groups):
            if group.matrices is not None:
                continue
            kept: list[int] = []
            for i, tensor in enumerate(group.tensors):
                if tensor.numel() > RESIDENT:
                    continue
                dtype = torch.float32 if tensor.dim() <= 1 else tensor.dtype
                needed = len(moved) * (tensor.numel() * dtype.itemsize + ALIGN)
                if self.arena.left(tensor.device) - needed < self.arena.budget // 2:
                    break  # half of the budget stays free for tiles
                kept.append(i)
                self.small.add((g, i))
                for side in moved:
                    copy = self.arena.take(tuple(tensor.shape), dtype, tensor.device)
                    assert copy is not None
                    self.resident[side][g, i] = copy
            for sides in self.by_query(moved):
                for wide in (False, True):  # a launch writes one output type per entry, theta's or float32
                    members = [i for i in kept if (self.resident[sides[0]][g, i].dtype != group.tensors[i].dtype) == wide]
                    if members:
                        views, spans = [group.tensors[i] for i in members], [group.spans[i] for i in members]
                        low = [group.residuals[i] for i in members] if group.residuals is not None else None
                        outs = [[self.resident[side][g, i] for i in members] for side in sides]
                        self._perturb(group, views, spans, sides, outs, low)
        self.arena.settle()

    def by_query(self, sides: Sequence[int]) -> list[list[int]]:
        """Sides in lists of one or two that share a z, so that one evaluation of the generator serves both."""
        found: dict[int, list[int]] = {}
        for side in sides:
            found.setdefault(self.points[side].query, []).append(side)
        return [members[part : part + 2] for members in found.values() for part in range(0, len(members), 2)]

    def _perturb(self, group: Group, views, spans, sides: Sequence[int], outs, residuals) -> None:
        scales = [self.points[side].offset * group.eps for side in sides]
        draw = self.plan.draw(self.points[sides[0]].query)
        group.backend.perturb(views, spans, self.plan.direction, self.plan.seed, self.plan.step, draw, scales, outs, residuals)

    def check_used(self) -> None:
        if not self.used:
            raise RuntimeError(
                "the loss never used a trained parameter: the closure runs another model, or code that reads weights outside torch "
                "(a frozen, folded or exported graph); give the optimizer the model that the closure runs, or use evaluation='walk'"
            )

    def report(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        unseen = [
            name for g, group in enumerate(self.plan.groups) for i, name in enumerate(group.names) if (g, i) not in self.used
        ]
        return tuple(sorted(self.whole)), tuple(unseen)

    def find(self, tensor: Tensor) -> tuple[Group, int]:
        g, i = self.table[id(tensor)]
        self.used.add((g, i))
        return self.plan.groups[g], i

    def is_resident(self, tensor: Tensor) -> bool:
        """Whether the sides that move read copies that were made ahead of the reading."""
        return self.table[id(tensor)] in self.small

    def untouched(self, group: Group, i: int, side: int) -> bool:
        """Whether the weights themselves are what this side reads."""
        return self.points[side].offset == 0.0 and (group.matrices is None or group.matrices[i].pending is None)

    def copy(self, tensor: Tensor, keep: bool = True, cast: torch.dtype | None = None, side: int | None = None) -> Tensor:
        """The whole parameter, perturbed: resident, from the arena (keep: until the call returns), or its own memory."""
        key = self.table[id(tensor)]
        small = self.resident[self.side if side is None else side].get(key)
        if small is not None and (small.dtype == tensor.dtype or cast is not None):
            self.used.add(key)
            return small
        if torch._C._functorch.peek_interpreter_stack() is None:
            return self._copy(tensor, keep, cast, side)
        with temporarily_clear_interpreter_stack():  # inside torch.func, new tensors are wrapped, and kernels need their memory
            return self._copy(tensor, keep, cast, side)

    @torch.no_grad()
    def _copy(self, tensor: Tensor, keep: bool, cast: torch.dtype | None, side: int | None) -> Tensor:
        side = self.side if side is None else side
        group, i = self.find(tensor)
        small = self.resident[side].get(self.table[id(tensor)])
        if small is not None:
            return small.to(tensor.dtype)
        source = group.tensors[i]
        if self.untouched(group, i, side):
            return source
        out = self.arena.take(tuple(source.shape), source.dtype, source.device) if keep else None
        if out is None:
            out = self.outside(group, i, tuple(source.shape))
        self.piece(group, i, source, group.spans[i], out, group.residual(i), side)
        self.single(group, i)
        return out

    def outside(self, group: Group, i: int, shape: tuple[int, ...]) -> Tensor:
        """Memory of its own for a copy that may outlive the call; the record tells when that is more than a tile."""
        source = group.tensors[i]
        out = torch.empty(shape, dtype=source.dtype, device=source.device)
        size = out.numel() * out.element_size()
        self.beside += size
        self.largest = max(self.largest, self.arena.top.get(source.device, 0) + self.beside)
        if size > self.arena.left(source.device) or out.shape == source.shape:
            self.whole.add(group.names[i])
        return out

    def release(self) -> None:
        """A call has returned."""
        self.arena.release()
        self.beside = 0

    def single(self, group: Group, i: int) -> None:
        """Note that a parameter was read for one side alone where several are read together."""
        if self.together:
            self.alone.add(group.names[i])

    def piece(
        self, group: Group, i: int, view: Tensor, span: Span, out: Tensor, residual: Tensor | None, side: int | None = None
    ) -> None:
        """out <- view + offset eps z, for a view of tensor i of the group."""
        side = self.side if side is None else side
        if group.matrices is None:
            self.pieces(group, i, view, span, [side], [out], residual)
        elif self.untouched(group, i, side):
            out.copy_(view if span.rows is None else view[span.rows])
        elif span.rows is not None and residual is None and group.matrices[i].shape == tuple(view.shape):
            left, right, shrink = self.factors.of(group, i, side, span.rows)
            torch.index_select(view, 0, span.rows, out=out)
            group.backend.lowrank_([out], [Span(span.who)], [left], [right], [1.0], shrink, "nearest", None)
        else:
            left, right, shrink = self.factors.of(group, i, side)
            low = None if residual is None else [residual]
            group.backend.lowrank_([view], [span], [left], [right], [1.0], shrink, "nearest", low, outs=[out])

    def pieces(
        self,
        group: Group,
        i: int,
        view: Tensor,
        span: Span,
        sides: Sequence[int],
        outs: Sequence[Tensor],
        residual: Tensor | None,
    ) -> None:
        """Dense: outs[j] <- view + offset eps z for one or two sides of a query, from one evaluation of z."""
        self._perturb(group, [view], [span], sides, [[out] for out in outs], [residual] if residual is not None else None)

    def tiled(
        self,
        group: Group,
        i: int,
        sides: Sequence[int],
        xs: Sequence[Tensor],
        biases: Sequence[Tensor | None],
        transposed: bool,
    ) -> list[Tensor]:
        """The product of each side's rows with its own perturbed matrix, a tile of it at a time."""
        weight = group.tensors[i]
        moved = [j for j, side in enumerate(sides) if not self.untouched(group, i, side)]
        if group.matrices is None:
            fills = [[sides.index(side) for side in pair] for pair in self.by_query([sides[j] for j in moved])]
        else:
            fills = [[j] for j in moved]
        many = max(map(len, fills), default=1)

        def fill(view: Tensor, span: Span, members: Sequence[int], tiles: Sequence[Tensor], residual: Tensor | None) -> None:
            if group.matrices is None:
                self.pieces(group, i, view, span, [sides[j] for j in members], tiles, residual)
            elif residual is None and not transposed and group.matrices[i].shape == tuple(weight.shape):
                start = (span.first - group.spans[i].first) // weight.shape[1]  # the left factor of this tile's rows only
                left, right, shrink = self.factors.of(group, i, sides[members[0]], slice(start, start + len(view)))
                here = [Span(span.who)]
                group.backend.lowrank_([view], here, [left], [right], [1.0], shrink, "nearest", None, outs=[tiles[0]])
            else:
                self.piece(group, i, view, span, tiles[0], residual, sides[members[0]])

        def take(shape: tuple[int, ...]) -> Tensor:
            tile = self.arena.take(shape, weight.dtype, weight.device)
            return tile if tile is not None else torch.empty(shape, dtype=weight.dtype, device=weight.device)

        step = self.tile_rows(weight, 1 if transposed else 0, many)
        return products.tiled_linear(
            xs, weight, group.spans[i], biases, group.residual(i), fills, fill, take, self.arena.release, step, transposed
        )  # fmt: skip

    def fused(
        self,
        group: Group,
        i: int,
        sides: Sequence[int],
        xs: Sequence[Tensor],
        biases: Sequence[Tensor | None],
        transposed: bool,
        room: int,
    ) -> list[Tensor]:
        """The same for a dense z where fuses(): z is made beside the product."""
        plan = self.plan
        draws = [-1 if self.untouched(group, i, side) else plan.draw(self.points[side].query) for side in sides]
        scales = [self.points[side].offset * group.eps for side in sides]
        backend, weight, span = self.working(group, xs, room), group.tensors[i], group.spans[i]
        return products.fused_linear(
            backend, xs, weight, span, plan.direction, plan.seed, plan.step, draws, scales, biases, transposed, room
        )

    def fuses(self, group: Group, i: int, xs: Sequence[Tensor], transposed: bool, room: int) -> bool:
        """Whether one kernel makes z and multiplies; low bits, which it does not read, and directions that it lacks go by tiles."""
        known = group.residual(i) is None and (group.matrices is not None or self.plan.direction.name in DIRECTIONS)
        return known and products.fuses(group.backend, xs, group.tensors[i], transposed, room)

    def working(self, group: Group, xs: Sequence[Tensor], room: int) -> Backend:
        """The group's backend, which multiplies; the record counts the memory that it works in."""
        size = products.own(group.backend).linear_bytes(products.counts_of(xs), room)
        self.largest = max(self.largest, self.arena.top.get(xs[0].device, 0) + size)
        return group.backend

    def bias(self, bias: Tensor | None, side: int, wide: bool) -> Tensor | None:
        """The bias of a product as this side reads it; wide: a kernel adds it in float32, which a small one's copy is."""
        if bias is None or id(bias) not in self.table:
            return bias
        return self.copy(bias, keep=False, cast=torch.float32 if wide else None, side=side)

    def note(self, group: Group, i: int, xs: Sequence[Tensor]) -> None:
        """What the record and the choice of an evaluation want to know of a product."""
        for x in xs:
            self.rows = max(self.rows, x.numel() // max(1, x.shape[-1]))
            self.coarse = self.coarse or x.dtype != torch.float32
        if self.together and len(xs) < len(self.points):
            self.alone.add(group.names[i])

    def tile_rows(self, weight: Tensor, dimension: int, sides: int = 1) -> int:
        """How many slices along a dimension of a matrix make a tile, where `sides` tiles exist at a time.

        As many as TILE elements and what is left of the arena hold, in tiles of nearly the same size; where one of them is made
        while another is used, both have to fit."""
        total = max(1, weight.shape[dimension])
        size = max(1, weight.numel() // total * weight.element_size())
        room, most = self.arena.left(weight.device) // sides, TILE * weight.element_size()
        rows = max(1, min(room, most) // size)
        slots = overlap.slots(weight.device, -(-total // rows))
        if slots > 1:
            rows = max(1, min(room // slots - ALIGN, most) // size)
        return -(-total // -(-total // rows))

    def watch(self, view: Tensor) -> None:
        """A result that shares memory with a perturbed copy: writing to it would have been writing to the weights."""
        key = id(view)

        def forget(_: object) -> None:
            self.views.pop(key, None)

        self.views[key] = weakref.ref(view, forget)

    def refuse_stale(self, values: Iterable[Any]) -> None:
        """Where the modules keep views of trained tensors that no copy can stand for: their use is an error, and no silent no-op."""
        for value in values:
            for one in value if type(value) in (list, tuple) else [value]:
                if id(one) in self.plan.stale:
                    raise RuntimeError(
                        f"the closure uses {self.plan.stale[id(one)]}, made before the step: it would see unperturbed weights; compute it "
                        "from the parameter in the forward, or use evaluation='walk'"
                    )

    def refuse_write(self, tensor: Tensor, name: str) -> None:
        g, i = self.table[id(tensor)]
        raise RuntimeError(
            f"the closure writes to the trained parameter {self.plan.groups[g].names[i]!r} ({name}): the loss of a step must only read "
            "the weights; the step was abandoned and no weight has changed"
        )
