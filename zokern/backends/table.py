"""The table of a launch: the entries, chunks, draws and factors that csrc/elementwise.h and lowrank.h declare, packed with NumPy.

Raw pointers exist from here down to the kernels and nowhere else.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from ..stream import INDEX_LIMIT
from .base import ROUNDINGS, STATES, Span
from .columns import SpanList, TensorList

ENTRY = np.dtype(
    [("theta", "u8"), ("out", "u8", 2), ("residual", "u8"), ("rows", "u8"), ("row_count", "i8"), ("columns", "i8"),
     ("row_stride", "i8"), ("column_stride", "i8"), ("first", "u8"), ("pitch", "u8"), ("who", "u4"), ("type", "i4"),
     ("out_type", "i4"), ("tensor", "i4")]
)  # fmt: skip
CHUNK = np.dtype([("begin", "i8"), ("end", "i8"), ("entry", "i8")])
DRAW = np.dtype([("step", "u4"), ("draw", "u4"), ("coefficient", "f4"), ("decay", "f4")])
FACTORS = np.dtype([("left", "u8"), ("right", "u8"), ("rank", "i8"), ("columns", "i8"), ("scale", "f4"), ("reserved", "i4")])
TILE = np.dtype([("begin", "i8"), ("end", "i8"), ("entry", "i4"), ("column", "i4")])
FRAME = np.dtype([("stride", "i8"), ("shift", "i8"), ("out_stride", "i8"), ("out_shift", "i8"), ("last", "i8")])
assert TILE.itemsize == 24 and FRAME.itemsize == 40
assert ENTRY.itemsize == 104 and CHUNK.itemsize == 24 and DRAW.itemsize == 16 and FACTORS.itemsize == 40

TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
DIRECTIONS = {"normal": 0, "rademacher": 1}
ROUNDING = {name: number for number, name in enumerate(ROUNDINGS)}
RULES = {name: number for number, name in enumerate(STATES)}

CHUNK_ELEMENTS = 1 << 15
TILE_ROWS, TILE_COLUMNS = 128, 256  # of a block of lowrank.cu: eight warps of 32 columns, and eight strips of 16 rows
PIECE = 4096  # elements of a tile that go one at a time
ALIGN = 128  # chunks end where both directions' blocks end, so no block is generated twice


def collapse(shape: Sequence[int], strides: Sequence[int]) -> list[tuple[int, int]]:
    """Dimensions (size, stride), outermost first, with every pair merged that one stride can walk."""
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
    thetas: Sequence[Tensor] | None,
    spans: Sequence[Span],
    outs: Sequence[Sequence[Tensor]] = (),
    residuals: Sequence[Tensor] | None = None,
    elements: int = CHUNK_ELEMENTS,
    numbered: bool = False,
) -> tuple[np.ndarray, np.ndarray]:
    """Entries and chunks (of about `elements`) of a launch; `numbered` entries know the positions of their tensors in it.

    Empty tensors take no entry; a tensor of more than two strided dimensions takes several."""
    if thetas is not None and len(thetas) > 8 and residuals is None and not outs:
        thetas, spans = TensorList.of(thetas), SpanList.of(spans)
        if thetas.contiguous and spans.plain:
            entries = _pack_plain(thetas, spans, numbered)
            return entries, chunks(entries, elements)
    words: list[int] = []  # an entry is 13 of 64 bits; one flat list is the fastest way from Python to NumPy
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
        who, out_kind = span.who | kind << 32, out_type | (i << 32 if numbered else 0)
        if span.rows is not None or span.pitch is not None:
            columns = tensor.shape[-1]
            count = tensor.shape[0] if span.rows is None else span.rows.numel()
            pitch = columns if span.pitch is None else span.pitch
            index = 0 if span.rows is None else span.rows.data_ptr()
            if count and columns:
                words += (pointer, out0, out1, low, index, count, columns, tensor.stride(0), tensor.stride(1), span.first, pitch, who,
                          out_kind)  # fmt: skip
            continue
        size = tensor.numel()
        if size == 0:
            continue
        if thetas is None or tensor.is_contiguous():
            words += (pointer, out0, out1, low, 0, 1, size, 0, 1, span.first, size, who, out_kind)
            continue
        dims = collapse(tensor.shape, tensor.stride())
        # the innermost two dimensions make an entry; the outer ones are unrolled here
        outer, inner = dims[:-2], dims[-2:]
        (count, row_stride), (columns, column_stride) = inner if len(inner) == 2 else [(1, 0), *(inner or [(1, 1)])]
        each, width, out_width = count * columns, tensor.element_size(), 4 if out_type == 0 else 2
        offsets = np.zeros(1, dtype=np.int64)
        for extent, stride in outer:
            offsets = (offsets[:, None] + np.arange(extent) * stride).ravel()
        for j, offset in enumerate(offsets.tolist()):
            done = j * each
            words += (pointer + offset * width, out0 and out0 + done * out_width, out1 and out1 + done * out_width, low and low + 2 * done,
                      0, count, columns, row_stride, column_stride, span.first + done, columns, who, out_kind)  # fmt: skip
    entries = np.array(words, dtype=np.uint64).view(ENTRY)
    if len(words) == 13:  # one tensor: the common launch of an evaluation, called hundreds of times a step
        return entries, _chunks_of_one(words[5] * words[6], words[9] % ALIGN, elements)
    return entries, chunks(entries, elements)


def _pack_plain(thetas: TensorList, spans: SpanList, numbered: bool) -> np.ndarray:
    """pack() for a long list of contiguous tensors that are updated in place: column by column, which NumPy does faster."""
    entries = np.zeros(len(thetas), dtype=ENTRY)
    entries["theta"] = thetas.pointers
    entries["tensor"] = np.arange(len(thetas)) if numbered else 0
    entries["columns"] = entries["pitch"] = thetas.sizes
    entries["row_count"], entries["column_stride"] = 1, 1
    entries["first"], entries["who"] = spans.firsts, spans.whos
    dtypes = thetas.dtypes
    entries["type"] = entries["out_type"] = TYPES[dtypes[0]] if len(set(dtypes)) == 1 else [TYPES[dtype] for dtype in dtypes]
    return entries if thetas.sizes.all() else entries[thetas.sizes > 0]


@lru_cache(maxsize=4096)
def _chunks_of_one(count: int, skew: int, elements: int) -> np.ndarray:
    """The chunks of a single entry depend on its size and on where it stands in the stream, not on where it lies."""
    entry = np.zeros(1, dtype=ENTRY)
    entry["row_count"], entry["columns"], entry["first"] = 1, count, skew
    found = chunks(entry, elements)
    found.flags.writeable = False
    return found


def chunks(entries: np.ndarray, elements: int = CHUNK_ELEMENTS) -> np.ndarray:
    """Cut every entry's logical elements [0, row_count * columns) into pieces of about `elements`, a multiple of ALIGN."""
    count = entries["row_count"] * entries["columns"]
    skew = (entries["first"] % ALIGN).astype(np.int64)  # pieces are aligned in the stream's numbering, not in memory
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


def address(array: np.ndarray) -> int:
    """Where a table lies. Asked of a plain view, because NumPy describes every field of a structured array at each question."""
    return array.view(np.uint64).__array_interface__["data"][0]


def pack_draws(
    draws: Sequence[tuple[int, int]], coeffs: Sequence[float] | np.ndarray | float, decays: Sequence[float]
) -> np.ndarray:
    """The terms of a sum, and the factor of what stands before each is added."""
    table = np.zeros(len(draws), dtype=DRAW)
    table["step"], table["draw"] = [s for s, _ in draws], [d for _, d in draws]
    table["coefficient"], table["decay"] = coeffs, decays
    return table


def pack_factors(lefts: Sequence[Tensor], rights: Sequence[Tensor], scales: Sequence[float]) -> np.ndarray:
    """The factors of each tensor of a launch, contiguous float32: left (m, rank) and right (columns, rank)."""
    table = np.zeros(len(lefts), dtype=FACTORS)
    for i, (left, right, scale) in enumerate(zip(lefts, rights, scales)):
        table[i] = left.data_ptr(), right.data_ptr(), right.shape[1], right.shape[0], scale, 0
    return table


def pack_tiles(
    entries: np.ndarray, factors: np.ndarray, tile_rows: int = TILE_ROWS, tile_columns: int = TILE_COLUMNS
) -> tuple[np.ndarray, np.ndarray]:
    """Tiles and frames of csrc/lowrank.h for packed, numbered entries.

    The whole rows of an entry that is contiguous in the stream, and an entry that is a slice of the matrix's columns, are cut into
    tiles of tile_rows x tile_columns if every eighth column lies on 16 bytes; everything else goes one element at a time."""
    known = factors[entries["tensor"]]
    n, first = known["columns"], entries["first"].astype(np.int64)
    size, columns = entries["row_count"] * entries["columns"], entries["columns"]
    width, out_width = np.where(entries["type"] == 0, 4, 2), np.where(entries["out_type"] == 0, 4, 2)
    dense = (entries["rows"] == 0) & (entries["column_stride"] == 1) & (n % 8 == 0)
    flat = dense & (
        (entries["row_count"] == 1) | ((entries["pitch"] == columns.astype(np.uint64)) & (entries["row_stride"] == columns))
    )
    cut = dense & ~flat & (entries["pitch"] == n.astype(np.uint64)) & (first % n + columns <= n)
    top, left = first // n, first % n
    begin, end = np.where(flat, -(-first // n), top), np.where(flat, (first + size) // n, top + entries["row_count"])
    frames = np.zeros(len(entries), dtype=FRAME)
    frames["stride"] = np.where(flat, n, entries["row_stride"])
    frames["shift"] = np.where(flat, -first, -top * entries["row_stride"] - left)
    frames["out_stride"] = np.where(flat, n, columns)
    frames["out_shift"] = np.where(flat, -first, -top * columns - left)
    frames["last"] = np.where(flat, n, left + columns)
    start = np.where(flat, 0, left)
    lies = cut & (left % 8 == 0) & (columns % 8 == 0) & (entries["row_stride"] % 8 == 0) | flat
    for address, bytes_each, shift in (
        (entries["theta"], width, frames["shift"]),
        (entries["out"][:, 0], out_width, frames["out_shift"]),
        (entries["residual"], 2, frames["out_shift"]),
    ):  # of element (0, 0) of the matrix, modulo 16
        lies &= (address == 0) | ((address.astype(np.int64) + shift * bytes_each) % 16 == 0)
    lies &= (end > begin) & (frames["stride"] < 1 << 26) & (end - begin < 1 << 31)
    rows, wide = np.where(lies, end - begin, 0), np.where(lies, -(-(frames["last"] - start) // tile_columns), 0)
    down = -(-rows // tile_rows)
    # rectangles, then what is before and behind them, then entries that have none
    head = np.where(lies & flat, begin * n - first, np.where(lies, 0, size))
    tail = np.where(lies & flat, end * n - first, size)
    which = np.concatenate(
        [np.repeat(np.arange(len(entries)), count) for count in (down * wide, -(-head // PIECE), -(-(size - tail) // PIECE))]
    )
    tiles = np.zeros(len(which), dtype=TILE)
    tiles["entry"], tiles["column"] = which, -1
    done = 0
    for part, count in enumerate((down * wide, -(-head // PIECE), -(-(size - tail) // PIECE))):
        own = tiles[done : done + count.sum()]
        e = own["entry"]
        place = np.arange(len(own)) - np.repeat(np.cumsum(count) - count, count)
        if part == 0:  # row by row of tiles: blocks that run together share their rows of `left`
            own["begin"] = begin[e] + place // wide[e] * tile_rows
            own["end"] = np.minimum(own["begin"] + tile_rows, end[e])
            own["column"] = start[e] + place % wide[e] * tile_columns
        else:
            own["begin"] = place * PIECE + (0 if part == 1 else tail[e])
            own["end"] = np.minimum(own["begin"] + PIECE, (head if part == 1 else size)[e])
        done += len(own)
    return tiles, frames


__all__ = [
    "CHUNK", "CHUNK_ELEMENTS", "DIRECTIONS", "DRAW", "ENTRY", "FACTORS", "INDEX_LIMIT", "ROUNDING", "RULES", "TYPES", "address", "pack", "pack_draws",
    "pack_factors", "pack_tiles",
]  # fmt: skip
