"""Evaluation ``scratch``: the loss at theta + offset eps z, with weights that nobody touches.

While the closure runs, a TorchFunctionMode looks at every call into torch. Where a trained parameter is an argument, a perturbed
copy takes its place for that one call: nothing in the model is replaced, so there is nothing to put back, whatever the closure
raises, and a parameter is found wherever it is used, through a module, a tie, or by hand.

    small tensors (norms, biases)   perturbed once per draw, both signs in one launch, and kept for the reading
    linear, addmm (Conv1D)          tile by tile through one reused piece of memory, so the budget holds for any size
    embedding, indexing             only the rows that are looked up
    everything else                 the whole tensor, for that call; the record names it in `whole`

16-bit norm weights and biases are perturbed in float32: at 1.0 a step of eps = 1e-3 is below half an ulp of bfloat16.
"""

from __future__ import annotations

import weakref
from typing import Any, Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ..backends import Span
from .plan import Group, Plan, Reading
from .surroundings import Surroundings
from .walk import _unrepeatable

MIB = 1 << 20
RESIDENT = 1 << 16  # elements: tensors up to this size are perturbed together, ahead of the reading
ALIGN = 64  # bytes


class Arena:
    """One reused piece of memory per device: residents from the bottom, the tiles of the current call above them."""

    def __init__(self, budget: int) -> None:
        self.budget = budget
        self.memory: dict[torch.device, Tensor] = {}
        self.floor: dict[torch.device, int] = {}
        self.top: dict[torch.device, int] = {}
        self.peak = 0
        self.outside = 0

    def reset(self) -> None:
        self.floor, self.top, self.peak = {}, {}, 0

    def left(self, device: torch.device) -> int:
        return self.budget - self.top.get(device, 0) - ALIGN

    def take(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor | None:
        """A tensor from the arena, or None when the budget does not hold it."""
        count = 1
        for size in shape:
            count *= size
        start = -(-self.top.get(device, 0) // ALIGN) * ALIGN
        end = start + count * dtype.itemsize
        if end > self.budget:
            return None
        if device not in self.memory:
            self.memory[device] = torch.empty(self.budget, dtype=torch.uint8, device=device)  # pages come when they are used
        self.top[device] = end
        self.peak = max(self.peak, end)
        return self.memory[device][start:end].view(dtype).view(shape)

    def settle(self) -> None:
        """What was taken so far stays; later takes are released by release()."""
        self.floor = dict(self.top)

    def release(self) -> None:
        self.top = dict(self.floor)


class Scratch:
    """Evaluation through perturbed copies, never through the weights.

    budget  bytes of reused memory per device (default 64 MB). A use that cannot be tiled takes its own parameter's size if that
            is more; the step's record lists such parameters in ``whole``.
    """

    name = "scratch"

    def __init__(self, budget: int = 64 * MIB) -> None:
        if not isinstance(budget, int) or budget < MIB:
            raise ValueError(f"Scratch: budget is {budget!r} bytes; expected an integer, at least {MIB} (1 MB)")
        self.arena = Arena(budget)

    def read(self, plan: Plan, closure: Callable[[], object], repeat_first: bool = False) -> Reading:
        surroundings = Surroundings(plan)
        substitution = Substitution(plan, self.arena)
        base: float | None = None
        losses = []
        for query in range(plan.queries):
            self.arena.reset()
            offsets = [offset for offset in plan.stencil.offsets if offset != 0.0]
            substitution.prepare(query, offsets)
            sides: list[float] = []
            for offset in plan.stencil.offsets:
                if offset == 0.0:
                    if base is None:
                        base = surroundings.read(closure)
                    sides.append(base)
                    continue

                def loss(side: int = offsets.index(offset)) -> float:
                    return surroundings.read(closure, substitution.at(side))

                sides.append(loss())
                substitution.check_used()
                if repeat_first and query == 0 and len(sides) == 1 and (again := loss()) != sides[0]:
                    raise _unrepeatable(sides[0], again)
            losses.append(tuple(sides))
        whole, unseen = substitution.report()
        return Reading(losses, [0.0] * plan.queries, max(self.arena.peak, substitution.largest), unseen, whole)


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
                self._launch(group, [(i, j) for j, i in enumerate(kept) if (outs[0][j].dtype != group.tensors[i].dtype) == wide], outs)
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
                self._refuse_write_to_view(func, args[0])
            if not kwargs or not any(id(v) in table or (type(v) in (list, tuple) and any(id(u) in table for u in v)) for v in kwargs.values()):
                return func(*args, **kwargs)
        return self._substitute(func, args, kwargs)

    def _substitute(self, func, args: tuple, kwargs: dict[str, Any]):
        name = getattr(func, "__name__", "")
        if name in ("__get__", "__set__", "__delete__"):
            attribute = getattr(getattr(func, "__self__", None), "__name__", "")
            if name != "__get__" and attribute in ("data", "real", "imag"):
                self._refuse_write(args[0], f"{attribute} = ...")
            if attribute not in _DATA_ATTRIBUTES:
                return func(*args, **kwargs)
        elif name in _METADATA:
            return func(*args, **kwargs)
        elif _writes(name) and args and id(args[0]) in self.table:
            self._refuse_write(args[0], name)
        if kwargs.get("out") is not None and id(kwargs["out"]) in self.table:
            self._refuse_write(kwargs["out"], f"{name}(out=...)")
        handler = _HANDLERS.get(func)
        try:
            if handler is not None and (result := handler(self, func, args, kwargs)) is not NotImplemented:
                return result
            keep = func in _FRESH  # the result cannot alias its arguments, so the copies may lie in the arena
            cast = self._upcast(func, args, kwargs)
            swapped = tuple(self._swap(a, keep, cast) for a in args)
            result = func(*swapped, **{k: self._swap(v, keep, cast) for k, v in kwargs.items()})
        finally:
            self.arena.release()
        if cast is not None and isinstance(result, Tensor) and result.is_floating_point():
            return result.to(cast)
        if isinstance(result, Tensor) and func not in _FRESH and any(result is s for s in swapped) | (name in _VIEWS or name == "__get__"):
            self.views[id(result)] = weakref.ref(result, lambda _, key=id(result): self.views.pop(key, None))
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
        if func not in _NORMS and func not in _PRODUCTS:
            return None
        values = [*args, *kwargs.values()]
        wide = any(
            id(v) in self.table and (copy := self.resident[self.side].get(self.table[id(v)])) is not None and copy.dtype != v.dtype
            for v in values
        )
        kinds = {v.dtype for v in values if isinstance(v, Tensor) and v.is_floating_point()}
        return kinds.pop() if wide and len(kinds) == 1 else None

    def _refuse_write(self, tensor: Tensor, name: str) -> None:
        g, i = self.table[id(tensor)]
        raise RuntimeError(
            f"the closure writes to the trained parameter {self.plan.groups[g].names[i]!r} ({name}): the loss of a step must only read "
            "the weights; the step was abandoned and no weight has changed"
        )

    def _refuse_write_to_view(self, func, tensor: Tensor) -> None:
        name = getattr(func, "__name__", "")
        reference = self.views.get(id(tensor))
        if _writes(name) and reference is not None and reference() is tensor:
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
            out = torch.empty(source.shape, dtype=source.dtype, device=source.device)
            size = out.numel() * out.element_size()
            self.largest = max(self.largest, self.arena.top.get(source.device, 0) + size)
            if size > self.arena.budget or not keep:
                self.whole.add(group.names[i])
        self.piece(group, i, source, group.spans[i], out, group.residuals[i] if group.residuals is not None else None)
        return out

    def piece(self, group: Group, i: int, view: Tensor, span: Span, out: Tensor, residual: Tensor | None) -> None:
        """out <- view + offset eps z, for a view of tensor i of the group."""
        scale = self.offsets[self.side] * group.eps
        residuals = [residual] if residual is not None else None
        group.backend.perturb([view], [span], self.plan.direction, self.plan.seed, self.plan.step, self.query, [scale], [[out]], residuals)

    def tile_rows(self, weight: Tensor, dimension: int) -> int:
        """How many slices along a dimension of a matrix fit what is left of the arena."""
        size = max(1, weight.numel() // max(1, weight.shape[dimension]) * weight.element_size())
        return max(1, self.arena.left(weight.device) // size)


# Uses that need less than a whole copy ----------------------------------------------------------------------------------


def _linear(mode: Substitution, func, args: tuple, kwargs: dict):
    """y = x W^T + b, W perturbed a few rows at a time."""
    names = dict(zip(("input", "weight", "bias"), args)) | kwargs
    x, weight, bias = names["input"], names["weight"], names.get("bias")
    if id(weight) not in mode.table or id(x) in mode.table or mode.table[id(weight)] in mode.resident[mode.side]:
        return NotImplemented
    if bias is not None and id(bias) in mode.table:
        bias = mode.copy(bias, keep=False)
    group, i = mode.find(weight)
    source, span = group.tensors[i], group.spans[i]
    residual = group.residuals[i] if group.residuals is not None else None
    rows, columns = source.shape
    step = mode.tile_rows(source, 0)
    out = None
    for start in range(0, rows, step):
        stop = min(rows, start + step)
        tile = mode.arena.take((stop - start, columns), source.dtype, source.device)
        if tile is None:
            tile = torch.empty((stop - start, columns), dtype=source.dtype, device=source.device)
        here = Span(span.who, span.first + start * columns)
        mode.piece(group, i, source[start:stop], here, tile, residual[start:stop] if residual is not None else None)
        part = F.linear(x, tile, bias[start:stop] if bias is not None else None)
        if stop - start == rows:
            return part
        if out is None:
            out = part.new_empty((*part.shape[:-1], rows))
        out[..., start:stop] = part
        del tile, part
        mode.arena.release()
    return out


def _addmm(mode: Substitution, func, args: tuple, kwargs: dict):
    """y = b + x W (transformers' Conv1D), W perturbed a few columns at a time."""
    if len(args) != 3 or kwargs or id(args[2]) not in mode.table or id(args[1]) in mode.table:
        return NotImplemented
    bias, x, weight = args
    group, i = mode.find(weight)
    source, span = group.tensors[i], group.spans[i]
    if mode.table[id(weight)] in mode.resident[mode.side] or span.pitch is not None:
        return NotImplemented
    if id(bias) in mode.table:
        bias = mode.copy(bias, keep=False)
    residual = group.residuals[i] if group.residuals is not None else None
    rows, columns = source.shape
    step = mode.tile_rows(source, 1)
    if step >= columns or bias.dim() != 1:
        return func(bias, x, mode.copy(weight))
    out = None
    for start in range(0, columns, step):
        stop = min(columns, start + step)
        tile = mode.arena.take((rows, stop - start), source.dtype, source.device)
        if tile is None:
            tile = torch.empty((rows, stop - start), dtype=source.dtype, device=source.device)
        here = Span(span.who, span.first + start, pitch=columns)
        mode.piece(group, i, source[:, start:stop], here, tile, residual[:, start:stop] if residual is not None else None)
        part = torch.addmm(bias[start:stop], x, tile)
        if out is None:
            out = part.new_empty((part.shape[0], columns))
        out[:, start:stop] = part
        del tile, part
        mode.arena.release()
    return out


def _rows(mode: Substitution, weight: Tensor, index: Tensor) -> Tensor:
    """Rows of a perturbed matrix: only those."""
    group, i = mode.find(weight)
    source, span = group.tensors[i], group.spans[i]
    residual = group.residuals[i] if group.residuals is not None else None
    rows = index.reshape(-1).to(device=source.device, dtype=torch.int64)
    if rows.numel() and (int(rows.min()) < 0 or int(rows.max()) >= source.shape[0]):
        raise IndexError(f"index out of range: {group.names[i]!r} has {source.shape[0]} rows")
    out = torch.empty((rows.numel(), source.shape[1]), dtype=source.dtype, device=source.device)
    mode.piece(group, i, source, Span(span.who, span.first, rows=rows.contiguous()), out, residual)
    return out.view(*index.shape, source.shape[1])


def _embedding(mode: Substitution, func, args: tuple, kwargs: dict):
    names = dict(zip(("input", "weight", "padding_idx", "max_norm", "norm_type"), args)) | kwargs
    weight = names["weight"]
    if names.get("max_norm") is not None and id(weight) in mode.table:
        mode._refuse_write(weight, "embedding with max_norm")
    if id(weight) not in mode.table or mode.table[id(weight)] in mode.resident[mode.side] or weight.dim() != 2:
        return NotImplemented
    return _rows(mode, weight, names["input"])


def _getitem(mode: Substitution, func, args: tuple, kwargs: dict):
    """One expert of a stack, a block of rows, or looked-up rows."""
    weight, index = args
    if id(weight) not in mode.table or mode.table[id(weight)] in mode.resident[mode.side] or weight.dim() < 2:
        return NotImplemented
    group, i = mode.find(weight)
    source, span = group.tensors[i], group.spans[i]
    if isinstance(index, Tensor) and index.dtype in (torch.int64, torch.int32) and index.dim() == 0:
        index = int(index)
    if isinstance(index, Tensor):
        if index.dtype not in (torch.int64, torch.int32) or weight.dim() != 2 or id(index) in mode.table:
            return NotImplemented
        return _rows(mode, weight, torch.where(index < 0, index + weight.shape[0], index))
    if isinstance(index, slice):
        start, stop, step = index.indices(source.shape[0])
        if step != 1:
            return NotImplemented
        view = source[start:stop]
    elif type(index) is int:
        start = index + source.shape[0] if index < 0 else index
        view = source[index]
    else:
        return NotImplemented
    each = source[0].numel()
    residual = group.residuals[i] if group.residuals is not None else None
    out = torch.empty(view.shape, dtype=source.dtype, device=source.device)
    mode.piece(group, i, view, Span(span.who, span.first + start * each), out, residual[index] if residual is not None else None)
    mode.views[id(out)] = weakref.ref(out, lambda _, key=id(out): mode.views.pop(key, None))
    return out


_HANDLERS: dict[Any, Callable] = {
    F.linear: _linear,
    torch.addmm: _addmm,
    F.embedding: _embedding,
    torch.embedding: lambda mode, func, args, kwargs: _embedding(mode, func, (args[1], args[0]), {}) if len(args) >= 2 else NotImplemented,
    Tensor.__getitem__: _getitem,
}

_NORMS = {F.layer_norm, F.group_norm, F.rms_norm, F.instance_norm, F.batch_norm, torch.layer_norm, torch.group_norm}
_PRODUCTS = {Tensor.mul, Tensor.__mul__, Tensor.__rmul__, torch.mul, Tensor.add, Tensor.__add__, Tensor.__radd__, torch.add}
_FRESH = _NORMS | _PRODUCTS | {
    F.linear, F.bilinear, F.embedding, F.embedding_bag, F.conv1d, F.conv2d, F.conv3d, F.conv_transpose1d, F.conv_transpose2d,
    F.conv_transpose3d, F.multi_head_attention_forward, F.prelu, torch.addmm, torch.mm, torch.matmul, torch.bmm, torch.baddbmm,
    torch.einsum, torch.sub, torch.div, Tensor.matmul, Tensor.__matmul__, Tensor.__rmatmul__, Tensor.mm, Tensor.addmm, Tensor.bmm,
    Tensor.__sub__, Tensor.__rsub__, Tensor.sub, Tensor.__truediv__, Tensor.div, Tensor.pow, Tensor.__pow__, Tensor.sum, Tensor.mean,
    torch.sum, torch.mean, torch.conv1d, torch.conv2d, torch.conv3d,
}  # fmt: skip
_FRESH |= {f for f in (getattr(torch, "_grouped_mm", None), getattr(F, "grouped_mm", None)) if f is not None}
_DATA_ATTRIBUTES = {"data", "T", "mT", "H", "mH", "real", "imag"}
_VIEWS = {
    "detach", "view", "view_as", "reshape", "t", "transpose", "permute", "unsqueeze", "squeeze", "flatten", "expand", "narrow", "select",
    "__getitem__", "chunk", "split", "unbind", "diagonal", "swapaxes", "movedim",
}  # fmt: skip
_METADATA = {
    "size", "stride", "dim", "ndimension", "numel", "nelement", "element_size", "storage_offset", "is_contiguous", "is_floating_point",
    "is_complex", "is_signed", "is_inference", "is_pinned", "is_same_size", "is_set_to", "is_shared", "get_device", "data_ptr", "has_names",
    "storage", "untyped_storage", "storage_type", "type", "requires_grad_", "register_hook", "register_post_accumulate_grad_hook", "retain_grad",
    "__len__", "__hash__", "__repr__", "__format__", "__dir__", "__reduce_ex__", "has_torch_function", "is_tensor", "result_type",
    "is_nonzero", "numel", "is_storage", "can_cast", "_is_zerotensor", "is_conj", "is_neg", "_has_compatible_shallow_copy_type",
}  # fmt: skip


def _writes(name: str) -> bool:
    return (name.endswith("_") and not name.endswith("__")) or name in ("__setitem__", "__iadd__", "__isub__", "__imul__", "__itruediv__", "__ipow__")
