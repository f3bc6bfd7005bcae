"""Uses of a parameter: which calls need less than a whole perturbed copy, and what the others may do with it.

A handler gets the copies, the function and its arguments, and returns the result, or NotImplemented to leave the call to
the general way: a whole copy in the parameter's place.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import products
from ..backends import Span
from .copies import Copies


class _Product(NamedTuple):
    """One side's use of a matrix: y = x W^T + b, or y = b + x W (transposed)."""

    x: Tensor
    bias: Tensor | None


def _linear(copies: Copies, func, args: tuple, kwargs: dict):
    """y = x W^T + b, W perturbed a few rows at a time."""
    names = dict(zip(("input", "weight", "bias"), args)) | kwargs
    x, weight, bias = names["input"], names["weight"], names.get("bias")
    if not _is_product(copies, x, weight, bias, 0):
        return NotImplemented
    return _meet(copies, weight, _Product(x, bias), transposed=False)


def _addmm(copies: Copies, func, args: tuple, kwargs: dict):
    """y = b + x W (transformers' Conv1D), W perturbed a few columns at a time."""
    if len(args) != 3 or kwargs or not _is_product(copies, args[1], args[2], args[0], 1):
        return NotImplemented
    bias, x, weight = args
    return _meet(copies, weight, _Product(x, bias), transposed=True)


def _is_product(copies: Copies, x: Any, weight: Any, bias: Any, dimension: int) -> bool:
    """Whether these are rows, a large trained matrix and a bias of one number for each of its columns of results.

    Everything else that torch takes, or refuses, is left to torch: other biases, nested rows, mixed dtypes."""
    if id(weight) not in copies.table or id(x) in copies.table or copies.is_resident(weight) or weight.dim() != 2:
        return False
    if not isinstance(x, Tensor) or x.is_nested or x.layout != torch.strided or not x.dim():
        return False
    if x.shape[-1] != weight.shape[1 - dimension] or (dimension and x.dim() != 2):
        return False
    return bias is None or (bias.shape == weight.shape[dimension : dimension + 1] and bias.dtype == weight.dtype)


def _meet(copies: Copies, weight: Tensor, use: _Product, transposed: bool) -> Tensor:
    """Alone, or together with the other sides that come to the same product."""

    def compute(uses: Sequence[tuple[int, _Product]]) -> list[Tensor]:
        return _product(copies, weight, uses, transposed)

    if copies.meet is None:
        return compute([(copies.side, use)])[0]
    return copies.meet((copies.table[id(weight)], transposed, use.x.dtype, use.bias is None), use, compute)


def stacked_product(copies: Copies, func, args: tuple, kwargs: dict, sides: int) -> Tensor | None:
    """A product whose x holds the rows of all sides, one below the other; None where that is not what it is."""
    if func is F.linear:
        names = dict(zip(("input", "weight", "bias"), args)) | kwargs
        x, weight, bias, transposed = names["input"], names["weight"], names.get("bias"), False
    elif func is torch.addmm and len(args) == 3 and not kwargs:
        bias, x, weight, transposed = args[0], args[1], args[2], True
    else:
        return None
    if not _is_product(copies, x, weight, bias, int(transposed)) or x.shape[0] % sides:
        return None
    uses = [(side, _Product(piece, bias)) for side, piece in enumerate(x.chunk(sides))]
    return products.joined(_product(copies, weight, uses, transposed))


@torch.no_grad()  # where the closure turned autograd on: copies have no history
def _product(copies: Copies, weight: Tensor, uses: Sequence[tuple[int, _Product]], transposed: bool) -> list[Tensor]:
    group, i = copies.find(weight)
    source, residual = group.tensors[i], group.residual(i)
    sides, xs = [side for side, _ in uses], [use.x for _, use in uses]
    copies.note(group, i, xs)
    try:
        # with low bits beside them, 16-bit weights are read as copies of the float32 that they are
        whole = group.matrices is None or (residual is None and group.matrices[i].shape == tuple(source.shape))
        room = copies.arena.left(source.device)
        fused = whole and copies.fuses(group, i, xs, transposed, room)
        biases = [copies.bias(use.bias, side, wide=fused) for side, use in uses]
        if fused and group.matrices is None:
            return copies.fused(group, i, sides, xs, biases, transposed, room)
        if group.matrices is not None and whole and (transposed or fused or not products.is_long(xs, source)):
            if fused:
                copies.working(group, xs, room)
            parts = copies.factors.parts(group, i, sides, transposed)
            return products.factored_linear(
                group.backend, xs, source, parts, group.matrices[i].shrink, biases, transposed, room, fused
            )
        return copies.tiled(group, i, sides, xs, biases, transposed)
    finally:
        copies.release()


@torch.no_grad()
def _rows(copies: Copies, weight: Tensor, index: Tensor) -> Tensor:
    """Rows of a perturbed matrix: only those."""
    group, i = copies.find(weight)
    source, span = group.tensors[i], group.spans[i]
    residual = group.residual(i)
    rows = index.reshape(-1).to(device=source.device, dtype=torch.int64)
    if rows.numel() and (int(rows.min()) < 0 or int(rows.max()) >= source.shape[0]):
        raise IndexError(f"index out of range: {group.names[i]!r} has {source.shape[0]} rows")
    copies.single(group, i)
    out = copies.outside(group, i, (rows.numel(), source.shape[1]))
    copies.piece(group, i, source, Span(span.who, span.first, rows=rows.contiguous()), out, residual)
    return out.view(*index.shape, source.shape[1])


def _embedding(copies: Copies, func, args: tuple, kwargs: dict):
    names = dict(zip(("input", "weight", "padding_idx", "max_norm", "norm_type"), args)) | kwargs
    weight = names["weight"]
    if names.get("max_norm") is not None and id(weight) in copies.table:
        copies.refuse_write(weight, "embedding with max_norm")
    if id(weight) not in copies.table or copies.is_resident(weight) or weight.dim() != 2:
        return NotImplemented
    return _rows(copies, weight, names["input"])


@torch.no_grad()
def _getitem(copies: Copies, func, args: tuple, kwargs: dict):
    """One expert of a stack, a block of rows, or looked-up rows."""
    weight, index = args
    if id(weight) not in copies.table or copies.is_resident(weight) or weight.dim() < 2:
        return NotImplemented
    group, i = copies.find(weight)
    source, span = group.tensors[i], group.spans[i]
    if isinstance(index, Tensor) and index.dtype in (torch.int64, torch.int32) and index.dim() == 0:
        index = int(index)
    if isinstance(index, Tensor):
        if index.dtype not in (torch.int64, torch.int32) or weight.dim() != 2 or id(index) in copies.table:
            return NotImplemented
        return _rows(copies, weight, torch.where(index < 0, index + weight.shape[0], index))
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
    copies.single(group, i)
    each = source[0].numel()
    residual = group.residual(i)
    out = copies.outside(group, i, tuple(view.shape))
    copies.piece(
        group, i, view, Span(span.who, span.first + start * each), out, residual[index] if residual is not None else None
    )
    copies.watch(out)
    return out


def _iterate(copies: Copies, func, args: tuple, kwargs: dict):
    """Row by row, from one copy; writes to a row are seen like those to any other view."""
    whole = copies.copy(args[0], keep=False)
    rows = whole.unbind(0)
    for row in rows:
        copies.watch(row)
    return iter(rows)


def _export(copies: Copies, func, args: tuple, kwargs: dict):
    """Memory that leaves torch is the closure's own: what is written to it stays there."""
    return func(copies.copy(args[0], keep=False).clone(), *args[1:], **kwargs)


HANDLERS: dict[Any, Callable] = {
    F.linear: _linear,
    torch.addmm: _addmm,
    F.embedding: _embedding,
    torch.embedding: lambda copies, func, args, kwargs: (
        _embedding(copies, func, (args[1], args[0]), {}) if len(args) >= 2 else NotImplemented
    ),
    Tensor.__getitem__: _getitem,
    Tensor.__iter__: _iterate,
    Tensor.numpy: _export,
    Tensor.__array__: _export,
    Tensor.__dlpack__: _export,
}
EXPORTS = {"numpy", "__array__", "__dlpack__"}
CONVERSIONS = {Tensor.to, Tensor.float, Tensor.double, Tensor.type, Tensor.type_as}

NORMS = {F.layer_norm, F.group_norm, F.rms_norm, F.instance_norm, F.batch_norm, torch.layer_norm, torch.group_norm}
PRODUCTS = {Tensor.mul, Tensor.__mul__, Tensor.__rmul__, torch.mul, Tensor.add, Tensor.__add__, Tensor.__radd__, torch.add}
FRESH = NORMS | PRODUCTS | {
    F.linear, F.bilinear, F.embedding, F.embedding_bag, F.conv1d, F.conv2d, F.conv3d, F.conv_transpose1d, F.conv_transpose2d,
    F.conv_transpose3d, F.multi_head_attention_forward, F.prelu, torch.addmm, torch.mm, torch.matmul, torch.bmm, torch.baddbmm,
    torch.sub, torch.div, Tensor.matmul, Tensor.__matmul__, Tensor.__rmatmul__, Tensor.mm, Tensor.addmm, Tensor.bmm,
    Tensor.__sub__, Tensor.__rsub__, Tensor.sub, Tensor.__truediv__, Tensor.div, Tensor.pow, Tensor.__pow__, Tensor.sum, Tensor.mean,
    torch.sum, torch.mean, torch.conv1d, torch.conv2d, torch.conv3d,
}  # fmt: skip
FRESH |= {f for f in (getattr(torch, "_grouped_mm", None), getattr(F, "grouped_mm", None)) if f is not None}
DATA_ATTRIBUTES = {"data", "T", "mT", "H", "mH", "real", "imag"}
VIEWS = {
    "detach", "view", "view_as", "reshape", "t", "transpose", "permute", "unsqueeze", "squeeze", "flatten", "expand", "narrow", "select",
    "__getitem__", "chunk", "split", "split_with_sizes", "tensor_split", "unsafe_chunk", "unsafe_split", "hsplit", "vsplit", "unbind", "diagonal",
    "swapaxes", "swapdims", "moveaxis", "movedim", "unflatten", "ravel", "unfold", "as_strided", "squeeze_", "view_as_real", "expand_as", "adjoint",
}  # fmt: skip
METADATA = {
    "size", "stride", "dim", "ndimension", "numel", "nelement", "element_size", "storage_offset", "is_contiguous", "is_floating_point",
    "is_complex", "is_signed", "is_inference", "is_pinned", "is_same_size", "is_set_to", "is_shared", "get_device", "data_ptr", "has_names",
    "storage", "untyped_storage", "storage_type", "requires_grad_", "register_hook", "register_post_accumulate_grad_hook", "retain_grad",
    "__len__", "__hash__", "__repr__", "__format__", "__dir__", "__reduce_ex__", "has_torch_function", "is_tensor", "result_type",
    "is_storage", "can_cast", "_is_zerotensor", "is_conj", "is_neg", "_has_compatible_shallow_copy_type",
}  # fmt: skip


def writes(name: str) -> bool:
    """Whether a function of this name writes to its first argument."""
    return (name.endswith("_") and not name.endswith("__")) or name in (
        "__setitem__",
        "__iadd__",
        "__isub__",
        "__imul__",
        "__itruediv__",
        "__ipow__",
    )
