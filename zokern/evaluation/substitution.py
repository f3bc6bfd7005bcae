"""Substitution: while the closure runs, every use of a trained parameter sees a perturbed copy instead."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ..backends import Span
from .arena import Arena
from .plan import Group, Plan
from .uses import DATA_ATTRIBUTES, FRESH, HANDLERS, METADATA, NORMS, PRODUCTS, VIEWS, writes

RESIDENT = 1 << 16  # elements: tensors up to this size are perturbed together, ahead of the reading


class Substitution(TorchFunctionMode):
    """The perturbed copies of one query, put in the place of trained parameters call by call."""

    def __init__(self, plan: Plan, arena: Arena) -> None:
        super().__init__()
        self.plan, self.arena = plan, arena
        self.table = plan.aliases
        self.resident: list[dict[tuple[int, int], Tensor]] = []
        self.used: set[tuple[int, int]] = set()
        self.whole: set[str] = set()
        self.largest = 0
        self.views: dict[int, weakref.ref] = {}

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
                if (self.arena.left(tensor.device) - (1 << 12)) * 2 < self.arena.budget:
                    break  # half of the budget stays free for tiles
                copies = [self.arena.take(tuple(tensor.shape), dtype, tensor.device) for _ in offsets]
                kept.append(i)
                for side, copy in enumerate(copies):
                    assert copy is not None
                    outs[side].append(copy)
                    self.resident[side][g, i] = copy
            for wide in (False, True):  # a launch writes one output type per entry, theta's or float32
                self._launch(
                    group, [(i, j) for j, i in enumerate(kept) if (outs[0][j].dtype != group.tensors[i].dtype) == wide], outs
                )
        self.arena.settle()

    def _launch(self, group: Group, members: list[tuple[int, int]], outs: list[list[Tensor]]) -> None:
        if not members:
            return
        residuals = [group.residuals[i] for i, _ in members] if group.residuals is not None else None
        scales = [offset * group.eps for offset in self.offsets]
        for part in range(0, len(scales), 2):
            group.backend.perturb(
                [group.tensors[i] for i, _ in members], [group.spans[i] for i, _ in members], self.plan.direction, self.plan.seed,
                self.plan.step, self.query, scales[part : part + 2], [[side[j] for _, j in members] for side in outs[part : part + 2]], residuals,
            )  # fmt: skip

    def at(self, side: int) -> Substitution:
        self.side = side
        return self

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

    # One call into torch ------------------------------------------------------------------------------------------------

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        table = self.table
        for value in args:
            if id(value) in table or (type(value) in (list, tuple) and any(id(v) in table for v in value)):
                break
        else:
            if self.views and args and id(args[0]) in self.views:
                self.refuse_write_to_view(func, args[0])
            if not kwargs or not any(
                id(v) in table or (type(v) in (list, tuple) and any(id(u) in table for u in v)) for v in kwargs.values()
            ):
                return func(*args, **kwargs)
        return self._substitute(func, args, kwargs)

    def _substitute(self, func, args: tuple, kwargs: dict[str, Any]):
        name = getattr(func, "__name__", "")
        if name in ("__get__", "__set__", "__delete__"):
            attribute = getattr(getattr(func, "__self__", None), "__name__", "")
            if name != "__get__" and attribute in ("data", "real", "imag"):
                self.refuse_write(args[0], f"{attribute} = ...")
            if attribute not in DATA_ATTRIBUTES:
                return func(*args, **kwargs)
        elif name in METADATA:
            return func(*args, **kwargs)
        for target in _written(name, args, kwargs):
            if id(target) in self.table:
                self.refuse_write(target, name)
        handler = HANDLERS.get(func)
        try:
            if handler is not None and (result := handler(self, func, args, kwargs)) is not NotImplemented:
                return result
            keep = func in FRESH  # the result cannot alias its arguments, so the copies may lie in the arena
            cast = self._upcast(func, args, kwargs)
            swapped = tuple(self._swap(a, keep, cast) for a in args)
            result = func(*swapped, **{k: self._swap(v, keep, cast) for k, v in kwargs.items()})
        finally:
            self.arena.release()
        if cast is not None and isinstance(result, Tensor) and result.is_floating_point():
            return result.to(cast)
        if (
            isinstance(result, Tensor)
            and func not in FRESH
            and any(result is s for s in swapped) | (name in VIEWS or name == "__get__")
        ):
            self.watch(result)
        return result

    def _swap(self, value, keep: bool, cast: torch.dtype | None):
        if id(value) in self.table:
            return self.copy(value, keep, cast)
        if type(value) in (list, tuple) and any(id(v) in self.table for v in value):
            return type(value)(self._swap(v, keep, cast) for v in value)
        if cast is not None and isinstance(value, Tensor) and value.dtype == cast:
            return value.float()
        return value

    def _upcast(self, func, args: tuple, kwargs: dict) -> torch.dtype | None:
        """The 16-bit dtype to come back to when a norm or an elementwise product runs in float32 for its small weight's sake."""
        if func not in NORMS and func not in PRODUCTS:
            return None
        values = [*args, *kwargs.values()]
        wide = any(
            id(v) in self.table
            and (copy := self.resident[self.side].get(self.table[id(v)])) is not None
            and copy.dtype != v.dtype
            for v in values
        )
        kinds = {v.dtype for v in values if isinstance(v, Tensor) and v.is_floating_point()}
        return kinds.pop() if wide and len(kinds) == 1 else None

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

    def refuse_write_to_view(self, func, tensor: Tensor) -> None:
        name = getattr(func, "__name__", "")
        reference = self.views.get(id(tensor))
        if writes(name) and reference is not None and reference() is tensor:
            raise RuntimeError(
                f"the closure writes to a view of a trained parameter ({name}): the loss of a step must only read the weights; "
                "the step was abandoned and no weight has changed"
            )

    # Perturbed copies ---------------------------------------------------------------------------------------------------

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
        """How many slices along a dimension of a matrix fit what is left of the arena."""
        size = max(1, weight.numel() // max(1, weight.shape[dimension]) * weight.element_size())
        return max(1, self.arena.left(weight.device) // size)


def _written(name: str, args: tuple, kwargs: dict[str, Any]) -> list:
    """What a call writes to: out=, and the first argument of an in-place function, whatever it is called and also as a list."""
    targets = [kwargs.get("out")]
    if writes(name):
        targets += [*args[:1], *(kwargs.get(key) for key in ("tensor", "input", "self"))]
    return [t for target in targets if target is not None for t in (target if isinstance(target, (list, tuple)) else [target])]
