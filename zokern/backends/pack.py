"""The table of a launch: entries, chunks and draws of csrc/elementwise.h, packed with NumPy.

Raw pointers exist from here down to the kernels and nowhere else.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from .base import ROUNDINGS, STATES
from .launch import Span
from .lists import SpanList, TensorList

ENTRY = np.dtype(
    [("theta", "u8"), ("out", "u8", 2), ("residual", "u8"), ("rows", "u8"), ("row_count", "i8"),
        ("columns", "i8"),
     ("row_stride", "i8"), ("column_stride", "i8"), ("first", "u8"), ("pitch", "u8"), ("who", "u4"),
     ("type", "i4"),
     ("out_type", "i4"), ("tensor", "i4"), ("scale", "u8"), ("scale_type", "i4"), ("reserved", "i4")]
)  # fmt: skip
CHUNK = np.dtype([("begin", "i8"), ("end", "i8"), ("entry", "i8")])
DRAW = np.dtype([("step", "u4"), ("draw", "u4"), ("coefficient", "f4"), ("decay", "f4")])
assert ENTRY.itemsize == 120 and CHUNK.itemsize == 24 and DRAW.itemsize == 16

TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
SCALES = {torch.float32: 0, torch.bfloat16: 1, torch.bool: 2}
WORDS = ENTRY.itemsize // 8
ROUNDING = {name: number for number, name in enumerate(ROUNDINGS)}
RULES = {name: number for number, name in enumerate(STATES)}

CHUNK_ELEMENTS = 1 << 15
ALIGN = 128  # chunks end where both directions' blocks end, so no block is generated twice


def collapse(shape: Sequence[int], strides: Sequence[int]) -> list[tuple[int, int]]:
    """Returns dimensions (size, stride), outermost first; pairs that one stride can walk are merged."""
    dims: list[tuple[int, int]] = []
    for size, stride in zip(shape, strides):
        if size == 1:
            continue
        if dims and dims[-1][1] == size * stride:
            dims[-1] = (dims[-1][0] * size, stride)
        else:
            dims.append((size, stride))
    return dims


def pack(
    thetas: Sequence[Tensor] | None, spans: Sequence[Span], outs: Sequence[Sequence[Tensor]] = (),
    residuals: Sequence[Tensor] | None = None, elements: int = CHUNK_ELEMENTS, numbered: bool = False,
    scales: Sequence[Tensor | None] | None = None,
) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
    """Returns entries and chunks (of about `elements`) of a launch.

    numbered  entries hold the positions of their tensors in it

    Empty tensors take no entry; a tensor of more than two strided dimensions takes several."""
    # one list, which is updated in place, or which z is drawn into
    alone = outs[0] if thetas is None and len(outs) == 1 else () if thetas is None or outs else thetas
    if len(alone) > 8 and residuals is None and scales is None:
        tensors, spans = TensorList.of(alone), SpanList.of(spans)
        if tensors.contiguous and spans.plain:
            entries = _pack_plain(tensors, spans, numbered, thetas is None)
            return entries, chunks(entries, elements)
    # an entry is WORDS of 64 bits; one flat list is the fastest way from Python to NumPy
    words: list[int] = []
    sides: list[Sequence[Tensor]] = list(outs)
    shapes = thetas if thetas is not None else sides[0]
    for i, (tensor, span) in enumerate(zip(shapes, spans)):
        kind = out_type = TYPES[tensor.dtype]
        out0 = out1 = 0
        if sides:
            out_type, out0 = TYPES[sides[0][i].dtype], sides[0][i].data_ptr()
            out1 = sides[1][i].data_ptr() if len(sides) > 1 else 0
        pointer = tensor.data_ptr() if thetas is not None else 0
        low = 0 if residuals is None or kind != 1 else residuals[i].data_ptr()
        factors = None if scales is None else scales[i]
        scale, factor = (0, 0) if factors is None else (factors.data_ptr(), SCALES[factors.dtype])
        who, out_kind = span.who | kind << 32, out_type | (i << 32 if numbered else 0)
        if span.rows is not None or span.pitch is not None:
            (count, columns), (down, right) = tensor.shape, tensor.stride()
            index, count = (0, count) if span.rows is None else (span.rows.data_ptr(), span.rows.numel())
            pitch = columns if span.pitch is None else span.pitch
            if count and columns:
                words += (pointer, out0, out1, low, index, count, columns, down, right, span.first, pitch,
                          who, out_kind, scale, factor)  # fmt: skip
        elif (size := tensor.numel()) and (thetas is None or tensor.is_contiguous()):
            words += (pointer, out0, out1, low, 0, 1, size, 0, 1, span.first, size,
                      who, out_kind, scale, factor)  # fmt: skip
        elif size:
            width, factor_width = 4 if out_type == 0 else 2, 0 if factors is None else factors.element_size()
            ends, names = (pointer, out0, out1, low), (who, out_kind, scale, factor)
            words += _strided(tensor, span, ends, width, names, factor_width)
    entries = np.array(words, dtype=np.uint64).view(ENTRY)
    if len(words) == WORDS:  # one tensor: the common launch of an evaluation, called hundreds of times a step
        return entries, _chunks_of_one(words[5] * words[6], words[9] % ALIGN, elements)
    return entries, chunks(entries, elements)


def _strided(
    tensor: Tensor,
    span: Span,
    pointers: tuple[int, int, int, int],
    out_width: int,
    names: tuple[int, int, int, int],
    factor_width: int,
) -> list[int]:
    """Returns the entries of a tensor with gaps.

    The innermost two dimensions make an entry; the outer ones are unrolled."""
    (pointer, out0, out1, low), (who, out_kind, scale, factor) = pointers, names
    dims = collapse(tensor.shape, tensor.stride())
    outer, inner = dims[:-2], dims[-2:]
    (count, row_stride), (columns, column_stride) = (
        inner if len(inner) == 2 else [(1, 0), *(inner or [(1, 1)])]
    )
    each, width = count * columns, tensor.element_size()
    offsets = np.zeros(1, dtype=np.int64)
    for extent, stride in outer:
        offsets = (offsets[:, None] + np.arange(extent) * stride).ravel()
    words: list[int] = []
    for j, offset in enumerate(offsets.tolist()):
        done = j * each
        words += (pointer + offset * width, out0 and out0 + done * out_width,
            out1 and out1 + done * out_width,
                  low and low + 2 * done, 0, count, columns, row_stride, column_stride, span.first + done,
                  columns, who,
                  out_kind, scale and scale + factor_width * done, factor)  # fmt: skip
    return words


def _pack_plain(thetas: TensorList, spans: SpanList, numbered: bool, drawn: bool) -> np.ndarray:
    """Returns entries of a long list of contiguous tensors that are updated in place, or drawn, column by
    column."""
    entries = np.zeros(len(thetas), dtype=ENTRY)
    if drawn:
        entries["out"][:, 0] = thetas.pointers
    else:
        entries["theta"] = thetas.pointers
    entries["tensor"] = np.arange(len(thetas)) if numbered else 0
    entries["columns"] = entries["pitch"] = thetas.sizes
    entries["row_count"], entries["column_stride"] = 1, 1
    entries["first"], entries["who"] = spans.firsts, spans.whos
    dtypes = thetas.dtypes
    entries["type"] = entries["out_type"] = (
        TYPES[dtypes[0]] if len(set(dtypes)) == 1 else [TYPES[dtype] for dtype in dtypes]
    )
    return entries if thetas.sizes.all() else entries[thetas.sizes > 0]


@lru_cache(maxsize=4096)
def _chunks_of_one(count: int, skew: int, elements: int) -> np.ndarray:
    """Returns the chunks of a single entry. They depend on its size and place in the stream alone."""
    entry = np.zeros(1, dtype=ENTRY)
    entry["row_count"], entry["columns"], entry["first"] = 1, count, skew
    found = chunks(entry, elements)
    found.flags.writeable = False
    return found


def chunks(entries: np.ndarray, elements: int = CHUNK_ELEMENTS) -> np.ndarray:
    """Cuts every entry's elements [0, row_count * columns) into pieces of about `elements`.

    Pieces begin at multiples of ALIGN in the stream."""
    count = entries["row_count"] * entries["columns"]
    # pieces are aligned in the stream's numbering, not in memory
    skew = (entries["first"] % ALIGN).astype(np.int64)
    if len(entries) and (count + skew).max() <= elements:  # a piece each
        table = np.zeros(len(entries), dtype=CHUNK)
        table["end"], table["entry"] = count, np.arange(len(entries))
        return table
    pieces = np.maximum(1, -(-(count + skew) // elements))
    entry = np.repeat(np.arange(len(entries)), pieces)
    piece = np.arange(len(entry)) - np.repeat(np.cumsum(pieces) - pieces, pieces)
    table = np.zeros(len(entry), dtype=CHUNK)
    table["entry"] = entry
    table["begin"] = np.maximum(0, piece * elements - skew[entry])
    table["end"] = np.minimum(count[entry], (piece + 1) * elements - skew[entry])
    return table


def address(table: np.ndarray | array) -> int:
    """Returns the address of a table.

    NumPy describes every field of a structured array when it is asked, so a plain view is asked."""
    if isinstance(table, array):
        return table.buffer_info()[0]
    return table.view(np.uint64).__array_interface__["data"][0]


def pack_draw(step: int, draw: int, coefficient: bytes, decay: float) -> array:
    """Returns what pack_draws() returns of one term, in a tenth of the time.

    coefficient  its bytes: as a number it is 0 where it is subnormal and the caller flushes such numbers"""
    return array("B", array("I", (step, draw)).tobytes() + coefficient + array("f", (decay,)).tobytes())


def pack_draws(
    draws: Sequence[tuple[int, int]], coeffs: Sequence[float] | np.ndarray | float, decays: Sequence[float]
) -> np.ndarray:
    """Returns the terms of a sum, and the factor of the value before each is added."""
    table = np.zeros(len(draws), dtype=DRAW)
    table["step"], table["draw"] = [s for s, _ in draws], [d for _, d in draws]
    table["coefficient"], table["decay"] = coeffs, decays
    return table


__all__ = [
    "ALIGN", "CHUNK", "CHUNK_ELEMENTS", "DRAW", "ENTRY", "ROUNDING", "RULES", "TYPES", "address", "pack",
    "pack_draw", "pack_draws",
]  # fmt: skip
