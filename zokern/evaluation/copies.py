"""Copies: theta + offset eps z for one parameter, a tile of it, or its looked-up rows, in memory of the arena where that is safe."""

from __future__ import annotations

import weakref

import torch
from torch import Tensor

from ..backends import Span
from .arena import ALIGN, Arena
from .plan import Group, Plan

RESIDENT = 1 << 16  # elements: tensors up to this size are perturbed together, ahead of the reading
TILE = 1 << 23  # elements: larger tiles leave the caches before they are read, smaller ones starve the product (benchmarks/)


class Copies:
    """Perturbed copies of the trained parameters, for one draw at a time."""

    def __init__(self, plan: Plan, arena: Arena) -> None:
        self.plan, self.arena = plan, arena
        self.table = plan.aliases
        self.resident: list[dict[tuple[int, int], Tensor]] = []
        self.used: set[tuple[int, int]] = set()
        self.whole: set[str] = set()
        self.largest = 0
        self.views: dict[int, weakref.ref] = {}
        self.query, self.side = 0, 0
        self.offsets: list[float] = []

    def prepare(self, query: int, offsets: list[float]) -> None:
        """Perturb the small tensors of a draw for every offset, one launch per group."""
        self.query, self.offsets = query, offsets
        self.resident = [{} for _ in offsets]
        for g, group in enumerate(self.plan.groups):
            small = [i for i, t in enumerate(group.tensors) if t.numel() <= RESIDENT]
            outs: list[list[Tensor]] = [[] for _ in offsets]
            kept = []
            for i in small:
                tensor = group.tensors[i]
                dtype = torch.float32 if tensor.dim() <= 1 else tensor.dtype
                needed = len(offsets) * (tensor.numel() * dtype.itemsize + ALIGN)
                if self.arena.left(tensor.device) - needed < self.arena.budget // 2:
                    break  # half of the budget stays free for tiles
                copies = [self.arena.take(tuple(tensor.shape), dtype, tensor.device) for _ in offsets]
                kept.append(i)
                for side, copy in enumerate(copies):
                    assert copy is not None
                    outs[side].append(copy)
                    self.resident[side][g, i] = copy
            for wide in (False, True):  # a launch writes one output type per entry, theta's or float32
                self.launch(
                    group, [(i, j) for j, i in enumerate(kept) if (outs[0][j].dtype != group.tensors[i].dtype) == wide], outs
                )
        self.arena.settle()

    def launch(self, group: Group, members: list[tuple[int, int]], outs: list[list[Tensor]]) -> None:
        if not members:
            return
        residuals = [group.residuals[i] for i, _ in members] if group.residuals is not None else None
        scales = [offset * group.eps for offset in self.offsets]
        for part in range(0, len(scales), 2):
            group.backend.perturb(
                [group.tensors[i] for i, _ in members], [group.spans[i] for i, _ in members], self.plan.direction, self.plan.seed,
                self.plan.step, self.query, scales[part : part + 2], [[side[j] for _, j in members] for side in outs[part : part + 2]], residuals,
            )  # fmt: skip

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

    def copy(self, tensor: Tensor, keep: bool = True, cast: torch.dtype | None = None) -> Tensor:
        """The whole parameter, perturbed: resident, from the arena (keep: until the call returns), or its own memory."""
        group, i = self.find(tensor)
        small = self.resident[self.side].get(self.table[id(tensor)])
        if small is not None:
            return small if small.dtype == tensor.dtype or cast is not None else small.to(tensor.dtype)
        source = group.tensors[i]
        out = self.arena.take(tuple(source.shape), source.dtype, source.device) if keep else None
        if out is None:
            out = self.outside(group, i, tuple(source.shape))
        self.piece(group, i, source, group.spans[i], out, group.residual(i))
        return out

    def outside(self, group: Group, i: int, shape: tuple[int, ...]) -> Tensor:
        """Memory of its own for a copy that may outlive the call; the record tells when that is more than a tile."""
        source = group.tensors[i]
        out = torch.empty(shape, dtype=source.dtype, device=source.device)
        size = out.numel() * out.element_size()
        self.largest = max(self.largest, self.arena.top.get(source.device, 0) + size)
        if size > self.arena.left(source.device) or out.shape == source.shape:
            self.whole.add(group.names[i])
        return out

    def piece(self, group: Group, i: int, view: Tensor, span: Span, out: Tensor, residual: Tensor | None) -> None:
        """out <- view + offset eps z, for a view of tensor i of the group."""
        scale = self.offsets[self.side] * group.eps
        residuals = [residual] if residual is not None else None
        group.backend.perturb(
            [view], [span], self.plan.direction, self.plan.seed, self.plan.step, self.query, [scale], [[out]], residuals
        )

    def tile_rows(self, weight: Tensor, dimension: int) -> int:
        """How many slices along a dimension of a matrix make a tile: what is left of the arena, at most TILE elements."""
        size = max(1, weight.numel() // max(1, weight.shape[dimension]) * weight.element_size())
        return max(1, min(self.arena.left(weight.device), TILE * weight.element_size()) // size)

    def watch(self, view: Tensor) -> None:
        """A result that shares memory with a perturbed copy: writing to it would have been writing to the weights."""
        key = id(view)

        def forget(_: object) -> None:
            self.views.pop(key, None)

        self.views[key] = weakref.ref(view, forget)

    def refuse_write(self, tensor: Tensor, name: str) -> None:
        g, i = self.table[id(tensor)]
        raise RuntimeError(
            f"the closure writes to the trained parameter {self.plan.groups[g].names[i]!r} ({name}): the loss of a step must only read "
            "the weights; the step was abandoned and no weight has changed"
        )
