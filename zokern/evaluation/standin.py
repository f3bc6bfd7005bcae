"""Stand-ins: perturbed copies in the place of the trained parameters while a closure runs.

A parameter stays the same Python object, wherever it is held; what is exchanged is the tensor inside it
(torch.utils.swap_tensors does the same for Module.to). So a use by hand, through a list or through a tie sees
the copy as a module's own forward does.

    resident copies   are ordinary tensors, or tensors mapped by torch.vmap: torch's own operations do the
                      rest
    Perturbed         has no memory. Products, lookups and indexing by large parameters are done by this
                      package; other functions get a whole copy. Code that reads its memory directly gets an
                      error, and no unperturbed weight.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count, repeat
from operator import attrgetter
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from ..backends import Span
from ..fingerprint import versions_of
from ..modules import same
from .base import Refused
from .copies import Copies

swap = torch._C._swap_tensor_impl


class Copy(nn.Parameter):
    """The class of a parameter while a resident copy is inside it."""

    requires_grad = property(lambda self: True)


class Use(NamedTuple):
    copies: Copies
    group: int
    position: int

    @property
    def name(self) -> str:
        return self.copies.plan.groups[self.group].names[self.position]

    @property
    def dtype(self) -> torch.dtype:
        return self.copies.plan.groups[self.group].theta[self.position].dtype

    def stack(self) -> Tensor:
        return self.copies.stack(self.group, self.position)

    def is_resident(self) -> bool:
        return (self.group, self.position) in self.copies.resident

    def is_wide(self) -> bool:
        """Whether the resident copy of a 16-bit vector is float32."""
        return self.is_resident() and self.stack().dtype != self.dtype

    def is_whole(self) -> bool:
        """Whether the resident copy can be put inside the parameter."""
        return self.is_resident() and self.stack().dtype == self.dtype

    def copy(self, cast: torch.dtype | None = None) -> Tensor:
        """Returns the whole parameter as this reading sees it, in its own dtype or another."""
        return self.copies.mapped(self.stack().to(cast or self.dtype))


class Perturbed(Copy):
    """The class of a parameter that is perturbed at its use."""

    _use: Any  # Use, while it stands in

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        with torch._C.DisableTorchFunctionSubclass():
            if name == "__get__":
                if getattr(getattr(func, "__self__", None), "__name__", "") not in DATA_ATTRIBUTES:
                    return func(*args, **kwargs)
            elif name in METADATA:
                return func(*args, **kwargs)
            elif name == "__set__":
                raise writes(args[0]._use.name, " (= ...)")
            elif (handler := HANDLERS.get(func)) is not None:
                if (result := handler(func, args, kwargs)) is not NotImplemented:
                    return result
            cast = _upcast(func, args, kwargs)
            return _with_copies(func, name, args, kwargs, cast)

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):  # type: ignore[override]
        """A use below torch's Python functions:
        C++ code, a TorchScript function, a subclass made of the parameter."""
        values, spec = tree_flatten((args, kwargs or {}))
        found = next(v for v in values if isinstance(v, Perturbed))
        if func._schema.is_mutable:
            raise writes(found._use.name, f" ({func})")
        if found._use.copies.level is not None:
            raise Refused(
                f"{func} reads the trained parameter {found._use.name!r} below torch.vmap: use "
                "evaluation='master'"
            )
        args, kwargs = tree_unflatten(
            [v._use.copy() if isinstance(v, Perturbed) else v for v in values], spec
        )
        return func(*args, **kwargs)


def writes(name: str, how: str = "") -> RuntimeError:
    return RuntimeError(
        f"the closure writes to the trained parameter {name!r}{how}: the loss of a step must only read the "
        "weights; the step was abandoned and no weight has changed"
    )


def _with_copies(func, name: str, args: tuple, kwargs: dict, cast: torch.dtype | None) -> Any:
    """Calls the function with whole copies. cast:
    in float32 for a small vector's sake, with a result of this dtype."""
    values, spec = tree_flatten((args, kwargs))
    others = cast is not None and cast.itemsize < 4 and not _mixes(func, values)
    copies, held = [], 0
    for k, value in enumerate(values):
        if isinstance(value, Perturbed):
            wide = cast is not None and value._use.is_wide()
            values[k] = copy = value._use.copy(torch.float32 if wide else None)
            copies.append((value, copy, _version(copy)))
            held += 0 if value._use.is_resident() else copy.nbytes * value._use.copies.sides
        elif others and isinstance(value, Tensor) and value.dtype == cast:
            values[k] = value.float()
    if held:
        copies[0][0]._use.copies.hold(copies[0][1].device, held)
    args, kwargs = tree_unflatten(values, spec)
    result = func(*args, **kwargs)
    for value, copy, version in copies:
        if _version(copy) != version:
            raise writes(value._use.name, f" ({name})")
    if any(result is copy for _, copy, _ in copies):
        # a conversion from 16 bits makes a tensor of its own, which the closure may write to
        result = result.clone()
    if cast is not None and isinstance(result, Tensor) and result.is_floating_point():
        return result.to(cast)
    return result


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


def _upcast(func, args: tuple, kwargs: dict) -> torch.dtype | None:
    """Returns the result's dtype where a norm, an elementwise product or a conversion runs in float32 for a
    small vector's sake."""
    if func not in NORMS and func not in PRODUCTS and func not in CONVERSIONS:
        return None
    values = [v for v in (*args, *kwargs.values()) if isinstance(v, Tensor)]
    if not any(isinstance(v, Perturbed) and v._use.is_wide() for v in values):
        return None
    if func in CONVERSIONS:
        like = func(torch.empty(0, dtype=args[0].dtype, device=args[0].device), *args[1:], **kwargs)
        wide = isinstance(like, Tensor) and like.dtype.itemsize > 2 and like.is_floating_point()
        return like.dtype if wide else None
    kinds = {v.dtype for v in values if v.is_floating_point()}
    if len(kinds) > 1 and func in PRODUCTS and len(args) == 2:
        return torch.result_type(*args)
    return kinds.pop() if len(kinds) == 1 else None


def _mixes(func, values: list) -> bool:
    """Whether torch itself computes this in float32: sums and products, on the CPU layer norms of vectors."""
    tensors = [v for v in values if isinstance(v, Tensor)]
    if func in PRODUCTS:  # a tensor without dimensions takes the dtype of the other one
        return all(v.dim() for v in tensors if isinstance(v, Perturbed) and v._use.is_wide())
    if func not in (F.layer_norm, torch.layer_norm):
        return False
    return tensors[0].is_cpu and all(isinstance(v, Perturbed) and v._use.is_wide() for v in tensors[1:])


# Handlers ---------------------------------------------------------------------------------------------------


def _linear(func, args: tuple, kwargs: dict):
    """y = x W^T + b."""
    names = dict(zip(("input", "weight", "bias"), args)) | kwargs
    return _product(names["input"], names["weight"], names.get("bias"), transposed=False)


def _addmm(func, args: tuple, kwargs: dict):
    """y = b + x W (transformers' Conv1D)."""
    if len(args) != 3 or kwargs:
        return NotImplemented
    bias, x, weight = args
    return _product(x, weight, bias, transposed=True)


def _product(x: Any, weight: Any, bias: Any, transposed: bool):
    """Rows, a large matrix and a bias of one number for each of its columns;
    other arguments get a whole copy."""
    if not isinstance(weight, Perturbed) or isinstance(x, Perturbed) or not isinstance(x, Tensor):
        return NotImplemented
    copies, g, i = weight._use
    if (g, i) in copies.resident or weight.dim() != 2 or _is_taped(x, bias):
        return NotImplemented
    if x.is_nested or x.layout != torch.strided or not x.dim():
        return NotImplemented
    width, columns = weight.shape if transposed else weight.shape[::-1]
    if x.shape[-1] != width or (transposed and x.dim() != 2):
        return NotImplemented
    if bias is not None and (bias.shape != (columns,) or bias.dtype != weight.dtype):
        return NotImplemented
    with torch.no_grad():
        if isinstance(bias, Perturbed):
            biases: list[Tensor | None] = list(bias._use.stack().unbind(0))
        else:
            biases = copies.parts(bias)
        y = copies.product(g, i, copies.parts(x), biases, transposed)
        return copies.mapped(y.view(copies.sides, *x.shape[:-1], columns))


def _embedding(func, args: tuple, kwargs: dict):
    names = dict(zip(("input", "weight", "padding_idx", "max_norm", "norm_type"), args)) | kwargs
    weight, index = names["weight"], names["input"]
    if not isinstance(weight, Perturbed):
        return NotImplemented
    if names.get("max_norm") is not None:
        raise writes(weight._use.name, " (embedding with max_norm)")
    return _lookup(weight, index)


def _lookup(weight: Any, index: Tensor):
    copies, g, i = weight._use
    if (g, i) in copies.resident or weight.dim() != 2 or not copies.is_simple():
        return NotImplemented
    rows = copies.rows(g, i, copies.parts(index))
    return copies.mapped(rows.view(copies.sides, *index.shape, weight.shape[1]))


def _getitem(func, args: tuple, kwargs: dict):
    """One expert of a stack, a block of rows, or looked-up rows."""
    weight, index = args
    if not isinstance(weight, Perturbed):
        return NotImplemented
    copies, g, i = weight._use
    if (g, i) in copies.resident or weight.dim() < 2:
        return NotImplemented
    if (
        isinstance(index, Tensor)
        and not isinstance(index, Perturbed)
        and index.dtype in (torch.int64, torch.int32)
        and index.dim()
    ):
        return (
            _lookup(weight, torch.where(index < 0, index + weight.shape[0], index))
            if weight.dim() == 2
            else NotImplemented
        )
    group = copies.plan.groups[g]
    theta, span, low = group.theta[i], group.spans[i], group.residual(i)
    if isinstance(index, slice):
        start, stop, step = index.indices(theta.shape[0])
        if step != 1 or stop - start >= theta.shape[0]:  # all of it is a whole copy, which the record names
            return NotImplemented
    elif type(index) is int:
        start = index + theta.shape[0] if index < 0 else index
    else:
        return NotImplemented
    view = theta[index]
    out = copies.own(group, i, (copies.sides, *view.shape))
    here = Span(span.who, span.first + start * theta[0].numel())
    parts = [None if whole is None else whole[index] for whole in (low, group.scale(i))]
    copies.fill(group, i, view, here, range(copies.sides), list(out.unbind(0)), *parts)
    return copies.mapped(out)


def _is_taped(x: Tensor, bias: Any) -> bool:
    """Whether autograd follows the call: a closure that differentiates by its inputs.
    Torch's own operations then do it."""
    if torch.autograd.forward_ad._current_level >= 0:
        return True
    return torch.is_grad_enabled() and (
        x.requires_grad or (isinstance(bias, Tensor) and not isinstance(bias, Copy) and bias.requires_grad)
    )


HANDLERS: dict[Any, Callable] = {
    F.linear: _linear,
    torch.addmm: _addmm,
    F.embedding: _embedding,
    torch.embedding: lambda func, args, kwargs: (
        _embedding(func, (args[1], args[0]), {}) if len(args) >= 2 else NotImplemented
    ),
    Tensor.__getitem__: _getitem,
}
CONVERSIONS = {Tensor.to, Tensor.float, Tensor.double, Tensor.type, Tensor.type_as}
NORMS = {
    F.layer_norm, F.group_norm, F.rms_norm, F.instance_norm, F.batch_norm, torch.layer_norm, torch.group_norm,
}  # fmt: skip
PRODUCTS = {
    Tensor.mul, Tensor.__mul__, Tensor.__rmul__, torch.mul,
    Tensor.add, Tensor.__add__, Tensor.__radd__, torch.add,
}  # fmt: skip
DATA_ATTRIBUTES = {"data", "T", "mT", "H", "mH", "real", "imag"}
# Answered by the stand-in itself: a copy would be wrong, or wasted.
METADATA = {
    "size", "stride", "dim", "ndimension", "numel", "nelement", "element_size", "storage_offset",
    "is_contiguous", "is_floating_point", "is_complex", "is_signed", "is_inference", "get_device", "data_ptr",
    "storage", "untyped_storage", "requires_grad_", "register_hook", "register_post_accumulate_grad_hook",
    "retain_grad", "__len__", "__hash__", "__reduce_ex__", "is_tensor", "result_type", "can_cast",
}  # fmt: skip


# Exchange ---------------------------------------------------------------------------------------------------


def places_of(
    copies: Copies, stacks: list[Tensor]
) -> tuple[list[Any], int, list[tuple[Any, int, int]], list[Tensor]]:
    """Returns the parameters; how many have resident copies, which are the first; (parameter, group,
    position) of all; and what goes inside each. Prepared once for the same copies.

    Raises Refused for parameters that cannot hold another tensor."""
    groups, level = copies.plan.groups, copies.level
    memo, key = groups[0].memo, ("places", level)
    if key not in memo or not same(stacks, memo[key][0]):
        places = [
            (p, g, i) for g, group in enumerate(groups) for i, tied in enumerate(group.objects) for p in tied
        ]
        for parameter, g, i in places:
            if type(parameter) not in (Tensor, nn.Parameter):
                raise Refused(
                    f"parameter {groups[g].names[i]!r} is {type(parameter).__name__}, a class of its own: "
                    "use evaluation='master'"
                )
        places.sort(key=lambda place: not Use(copies, *place[1:]).is_whole())
        own = sum(Use(copies, g, i).is_whole() for _, g, i in places)
        insides = [copies.mapped(copies.resident[g, i]) for _, g, i in places[:own]]
        insides += [_bodiless(groups[g].theta[i]) for _, g, i in places[own:]]
        memo[key] = stacks, ([parameter for parameter, _, _ in places], own, places, insides)
    return memo[key][1]


@contextmanager
def standing_in(copies: Copies) -> Iterator[None]:
    """Puts the copies into the trained parameters; on the way out takes them back and looks whether the
    closure wrote to one."""
    stacks = list(copies.resident.values())
    parameters, own, places, insides = places_of(copies, stacks)
    others, before, done = places[own:], list(map(type, parameters)), list[None]()
    try:
        done.extend(map(swap, parameters, insides))  # after an exception it has as many as were swapped
        list(map(setattr, parameters, repeat("__class__"), [Copy] * own + [Perturbed] * len(others)))
        for parameter, g, i in others:
            parameter._use = Use(copies, g, i)
        _number(parameters)
        versions = versions_of(stacks)
        yield
        if (now := versions_of(stacks)) != versions:
            g, i = next(place for place, a, b in zip(copies.resident, now, versions) if a != b)
            raise writes(copies.plan.groups[g].names[i])
    finally:
        for parameter, _, _ in others:
            vars(parameter).pop("_use", None)
        list(map(setattr, parameters, repeat("__class__"), before))
        list(map(swap, parameters[: len(done)], insides))
        if any(map(_asks, insides[:own])):  # a closure may have said so of what stood in
            del copies.plan.groups[0].memo["places", copies.level]


_asks = attrgetter("requires_grad")
_count = count(1 << 30)


def _number(tensors: list[Tensor]) -> None:
    """Gives stand-ins a version of their own: caches that go by versions find nothing of another reading."""
    version, number = next(_count) % (1 << 32), torch._C._autograd._unsafe_set_version_counter
    try:
        number(tuple(tensors), (version,) * len(tensors))
    except TypeError:  # earlier versions of torch take one tensor at a time
        for tensor in tensors:
            number(tensor, version)  # type: ignore[arg-type]


def _bodiless(theta: Tensor) -> Tensor:
    """Returns a tensor with the shape, strides, dtype and device of a parameter and without memory."""
    made = torch.Tensor._make_wrapper_subclass(
        Perturbed, theta.shape, strides=theta.stride(), dtype=theta.dtype, device=theta.device,
        requires_grad=False,
    )  # fmt: skip
    torch._C._set_throw_on_mutable_data_ptr(made)
    return made


__all__ = ["Perturbed", "places_of", "standing_in", "swap", "writes"]
