"""Stand-ins for what torch.compile made: its graphs read all sides, and stay compiled.

dynamo runs no graph under an active torch.vmap. Here a tensor class has the shape of one side, and holds the
tensor of all sides. Torch's compiler takes it apart: every operation of a graph is mapped while the graph is
made, and the graph itself computes with plain tensors.

    Mapped    the copies of all sides, stacked, and what was computed from them
    Unmade    a large matrix that is perturbed at its use: operations of torch.library make products,
              looked-up rows, or a whole copy. They find the points of the reading when they run, so a graph
              serves all steps
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, reduce
from hashlib import blake2b
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._compile import _disable_dynamo
from torch.overrides import enable_reentrant_dispatch
from torch.utils._pytree import tree_flatten, tree_map_only, tree_unflatten

from ..fingerprint import memory_of
from .base import WAY_OUT, Refused
from .copies import Copies

aten = torch.ops.aten


class StandIn(Tensor):
    """A tensor of torch's protocol for those that consist of others."""

    __torch_function__ = nn.Parameter.__torch_function__  # none: compilers look below it

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):  # type: ignore[override]
        return _run(func, args, kwargs or {})

    def __repr__(self, **how: Any) -> str:  # type: ignore[override]
        return f"{type(self).__name__}({tuple(self.shape)}, {self.dtype})"


class Mapped(StandIn):
    """One tensor of a side each, the shape of which it has.

    _stack  all of them, (sides, ...); of a 16-bit vector in float32"""

    _stack: Tensor

    @staticmethod
    def __new__(cls, stack: Tensor, dtype: torch.dtype | None = None) -> Mapped:
        made = torch.Tensor._make_wrapper_subclass(
            cls, stack.shape[1:], strides=stack.stride()[1:], dtype=dtype or stack.dtype, device=stack.device
        )
        made._stack = stack
        return made

    def __tensor_flatten__(self) -> tuple[list[str], Any]:
        return ["_stack"], self.dtype

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, Tensor], dtype: torch.dtype, *outer: Any) -> Mapped:
        return Mapped(inner["_stack"], dtype)

    def _stable_hash_for_caching(self) -> str:
        return _hash(self.dtype, self._stack)


class Unmade(StandIn):
    """A large matrix at every point, which has no memory.

    _theta  the weights;  sides  how many points there are;  transposed  whether it is theta^T"""

    _theta: Tensor
    _sides: int
    _transposed: bool

    @staticmethod
    def __new__(cls, theta: Tensor, sides: int, transposed: bool = False) -> Unmade:
        view = theta.mT if transposed else theta
        made = torch.Tensor._make_wrapper_subclass(
            cls, view.shape, strides=view.stride(), dtype=theta.dtype, device=theta.device
        )
        made._theta, made._sides, made._transposed = theta, sides, transposed
        return made

    def __tensor_flatten__(self) -> tuple[list[str], Any]:
        return ["_theta"], (self._sides, self._transposed)

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, Tensor], how: tuple[int, bool], *outer: Any) -> Unmade:
        return Unmade(inner["_theta"], *how)

    def _stable_hash_for_caching(self) -> str:
        return _hash((self._sides, self._transposed), self._theta)

    def whole(self) -> Mapped:
        stack = torch.ops.zokern.perturbed(self._theta, self._sides)
        return Mapped(stack.mT if self._transposed else stack)


@cache
def _source() -> str:
    return blake2b(Path(__file__).read_bytes()).hexdigest()


def _hash(how: Any, inner: Tensor) -> str:
    """Names a stand-in in the caches of compiled graphs: they hold what this file made of a model."""
    return f"{_source()} {how} {inner.shape} {inner.stride()} {inner.dtype} {inner.device}"


# A use ------------------------------------------------------------------------------------------------------


@_disable_dynamo  # where no graph is made it runs between graphs, and would become one
def _run(func: Any, args: tuple, kwargs: dict) -> Any:
    """Maps one operation over the sides."""
    handler = HANDLERS.get(func)
    if handler is not None and (found := handler(*args, **kwargs)) is not NotImplemented:
        return found
    values, spec = tree_flatten((args, kwargs))
    values = [v.whole() if isinstance(v, Unmade) else v for v in values]
    if func.overloadpacket.__name__.startswith(ATTENTION):
        return _attention(func, *tree_unflatten(values, spec))
    mutates = func._schema.is_mutable
    if mutates and (
        torch.Tag.inplace_view in func.tags or not func._schema.arguments[0].alias_info or _is_wide(values[0])
    ):
        raise Refused(f"{func} writes in a way that is not mapped: {WAY_OUT}")
    values, dtype = _widened(func, values)
    at = [k for k, v in enumerate(values) if isinstance(v, Tensor)]

    def one(*tensors: Tensor) -> Any:
        given = list(values)
        for k, tensor in zip(at, tensors):
            given[k] = tensor
        args, kwargs = tree_unflatten(given, spec)
        return func(*args, **kwargs)

    stacks = [values[k]._stack if isinstance(values[k], Mapped) else values[k] for k in at]
    dims = tuple(0 if isinstance(values[k], Mapped) else None for k in at)
    with enable_reentrant_dispatch():
        result = torch.vmap(one, dims, randomness="same")(*stacks)
    if mutates:
        return values[0]
    if dtype is None or func.is_view:
        return tree_map_only(Tensor, lambda t: Mapped(t, dtype), result)
    first, *rest = result if isinstance(result, tuple) else (result,)
    made = Mapped(first.to(dtype)), *map(Mapped, rest)
    return made if rest else made[0]


def _widened(func: Any, values: list) -> tuple[list, torch.dtype | None]:
    """Returns the arguments as an operation takes them, and the dtype of its result; None: as it comes.

    Norms, products and sums with a 16-bit vector, whose copies are float32, are computed in float32."""
    wide = list(filter(_is_wide, values))
    if not wide:
        return values, None
    if func.is_view:
        return values, wide[0].dtype
    if func.overloadpacket.__name__ in WIDE:
        floating = [v for v in values if isinstance(v, Tensor) and v.is_floating_point()]
        dtype = reduce(torch.promote_types, [v.dtype for v in floating])
        known = set(map(id, floating))
        return [_float(v) if id(v) in known else v for v in values], dtype
    to = next((v for v in values if isinstance(v, torch.dtype)), None)
    if func is aten._to_copy.default and to is not None and to.is_floating_point and to.itemsize > 2:
        return [Mapped(v._stack) if v is wide[0] else v for v in values], None
    known = set(map(id, wide))
    return [Mapped(v._stack.to(v.dtype)) if id(v) in known else v for v in values], None


def _is_wide(value: Any) -> bool:
    """Whether these are float32 copies of a 16-bit vector."""
    return isinstance(value, Mapped) and value._stack.dtype != value.dtype


def _float(t: Tensor) -> Tensor:
    return Mapped(t._stack.float()) if isinstance(t, Mapped) else t.float()


def _attention(func: Any, args: tuple, kwargs: dict) -> Any:
    """Folds the sides into the batch: torch has no mapping rule for attention on a CPU."""
    values, spec = tree_flatten((args, kwargs))
    sides = next(v._stack.shape[0] for v in values if isinstance(v, Mapped))
    batch = args[0].shape[0]

    def fold(t: Any) -> Any:
        if isinstance(t, Mapped):
            return t._stack.flatten(0, 1)
        if isinstance(t, Tensor) and t.dim() == 4 and t.shape[0] == batch:
            return t.expand(sides, *t.shape).flatten(0, 1)
        return t

    args, kwargs = tree_unflatten(list(map(fold, values)), spec)

    def unfold(t: Tensor) -> Tensor:
        return Mapped(t.unflatten(0, (sides, batch))) if t.dim() and t.shape[0] == sides * batch else t

    return tree_map_only(Tensor, unfold, func(*args, **kwargs))


def _transposed(weight: Any, *dims: int) -> Any:
    if not isinstance(weight, Unmade) or sorted(d % 2 for d in dims) not in ([], [0, 1]):
        return NotImplemented
    return Unmade(weight._theta, weight._sides, not weight._transposed)


def _same(weight: Any) -> Any:
    return (
        Unmade(weight._theta, weight._sides, weight._transposed)
        if isinstance(weight, Unmade)
        else NotImplemented
    )


def _mm(x: Any, weight: Any) -> Any:
    return _addmm(None, x, weight)


def _addmm(bias: Any, x: Any, weight: Any, beta: float = 1, alpha: float = 1) -> Any:
    """y = x W + b."""
    if not isinstance(weight, Unmade) or isinstance(x, Unmade):
        return NotImplemented
    bias = bias.whole() if isinstance(bias, Unmade) else bias
    plain = bias is None or (bias.shape == weight.shape[1:] and bias.dtype == weight.dtype)
    if not plain or (beta, alpha) != (1, 1) or x.dtype != weight.dtype:
        return NotImplemented
    parts = [t._stack if isinstance(t, Mapped) else t for t in (x, bias)]
    product = torch.ops.zokern.perturbed_product
    return Mapped(product(weight._theta, *parts, weight._sides, not weight._transposed))


def _embedding(weight: Any, index: Tensor, *rest: Any, **how: Any) -> Any:
    mapped = isinstance(index, Mapped)
    if isinstance(weight, Unmade) and not weight._transposed:
        here = index._stack if isinstance(index, Mapped) else index
        return Mapped(torch.ops.zokern.perturbed_rows(weight._theta, here, weight._sides, mapped))
    if not isinstance(weight, Mapped) or mapped:
        return NotImplemented
    rows = weight._stack.index_select(1, index.flatten())  # torch's own rule leaves a side in pieces
    return Mapped(rows.view(-1, *index.shape, weight.shape[1]))


def _dropout(x: Any, p: float, train: bool | None) -> Any:
    """One mask for all sides, from the operation by which a graph of one side draws it."""
    if not isinstance(x, Mapped):
        return NotImplemented
    _, mask = aten.native_dropout(x._stack.new_ones(x.shape), p, train)
    scale = 1.0 if train is False or p == 1 else 1 / (1 - p)
    return Mapped(mask * x._stack * scale), Mapped(mask.expand(x._stack.shape))


HANDLERS: dict[Any, Callable] = {
    aten.t.default: _transposed, aten.transpose.int: _transposed, aten.detach.default: _same,
    aten.alias.default: _same, aten.mm.default: _mm, aten.addmm.default: _addmm,
    aten.embedding.default: _embedding, aten.native_dropout.default: _dropout,
}  # fmt: skip
WIDE = {"mul", "add", "native_layer_norm", "native_group_norm", "native_batch_norm", "_fused_rms_norm"}
ATTENTION = "_scaled_dot_product", "_fused_sdp_choice"


# Operations that a graph calls --------------------------------------------------------------------------


def _register(schema: str, fake: Callable[..., Tensor]) -> Callable[[Callable], Callable]:
    """Registers an operation on one large matrix, called with the copies of the reading and its place."""

    def registered(call: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def run(theta: Tensor, *rest: Any) -> Tensor:
            copies, places = reading[-1]
            place = places.get(memory_of([theta])[0][0])
            if place is None:
                raise Refused(f"a graph reads a copy of a large parameter of shape {list(theta.shape)}")
            return call(copies, *place, *rest)

        name = f"zokern::{schema.partition('(')[0]}"
        torch.library.define(name, schema.partition("(")[1] + schema.partition("(")[2], tags=TAGS)
        torch.library.impl(name, "default")(run)
        torch.library.register_fake(name)(fake)
        return call

    return registered


# a graph of the device would keep the points of the reading in which it was captured
TAGS = [tag for tag in [getattr(torch.Tag, "cudagraph_unsafe", None)] if tag is not None]
reading: list[tuple[Copies, dict]] = []


@_register(
    "perturbed_product(Tensor theta, Tensor x, Tensor? bias, SymInt sides, bool transposed) -> Tensor",
    lambda theta, x, bias, sides, transposed: x.new_empty(
        sides, x.shape[-2], theta.shape[1 if transposed else 0]
    ),
)
def _product(
    copies: Copies, g: int, i: int, x: Tensor, bias: Tensor | None, sides: int, transposed: bool
) -> Tensor:
    xs = list(x.unbind(0)) if x.dim() == 3 else [x] * sides
    biases: list[Tensor | None] = (
        list(bias.unbind(0)) if bias is not None and bias.dim() == 2 else [bias] * sides
    )
    return copies.product(g, i, xs, biases, transposed).view(sides, x.shape[-2], -1)


@_register(
    "perturbed_rows(Tensor theta, Tensor index, SymInt sides, bool mapped) -> Tensor",
    lambda theta, index, sides, mapped: theta.new_empty(
        sides, *(index.shape[1:] if mapped else index.shape), theta.shape[1]
    ),
)
def _rows(copies: Copies, g: int, i: int, index: Tensor, sides: int, mapped: bool) -> Tensor:
    indices = list(index.unbind(0)) if mapped else [index] * sides
    if copies.is_simple():
        rows = copies.rows(g, i, indices)
    else:
        rows = torch.stack([part[at] for part, at in zip(copies.stack(g, i), indices)])
    return rows.view(sides, *indices[0].shape, rows.shape[-1])


@_register(
    "perturbed(Tensor theta, SymInt sides) -> Tensor",
    lambda theta, sides: theta.new_empty(sides, *theta.shape),
)
def _whole(copies: Copies, g: int, i: int, sides: int) -> Tensor:
    return copies.stack(g, i)


__all__ = ["Mapped", "Unmade", "reading"]
