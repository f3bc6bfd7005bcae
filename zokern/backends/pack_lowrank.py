"""Tables of lowrank_: the factors of each tensor, and the tiles of csrc/lowrank.h, packed with NumPy."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import numpy as np
from torch import Tensor

from .device_tables import key_of as key
from .launch import Batch, Outer
from .lists import TensorList

FACTORS = np.dtype(
    [("left", "u8"), ("right", "u8"), ("rank", "i8"), ("columns", "i8"), ("scale", "f4"), ("reserved", "i4")]
)
TILE = np.dtype([("begin", "i8"), ("end", "i8"), ("entry", "i4"), ("column", "i4")])
FRAME = np.dtype(
    [("stride", "i8"), ("shift", "i8"), ("out_stride", "i8"), ("out_shift", "i8"), ("last", "i8")]
)
assert FACTORS.itemsize == 40 and TILE.itemsize == 24 and FRAME.itemsize == 40

# of a block of lowrank.cu: eight warps of 32 columns, and eight strips of 16 rows
TILE_ROWS, TILE_COLUMNS = 128, 256
PIECE = 4096  # elements of a tile that go one at a time


def pack_factors(lefts: Sequence[Tensor], rights: Sequence[Tensor], scales: Sequence[float]) -> np.ndarray:
    """Returns the factors of each tensor, contiguous float32: left (m, rank), right (columns, rank)."""
    table = np.zeros(len(lefts), dtype=FACTORS)
    table["left"], table["right"] = TensorList.of(lefts).pointers, TensorList.of(rights).pointers
    shapes = [right.shape for right in rights]
    table["rank"], table["columns"] = [r for _, r in shapes], [n for n, _ in shapes]
    table["scale"] = scales
    return table


def lies_on(factors: np.ndarray, bytes: int) -> bool:
    """Tells whether every factor begins at a multiple of so many bytes."""
    return not ((factors["left"] | factors["right"]) % bytes).any()


def key_of(batch: Batch, factors: Outer, outs: Sequence[Tensor] | None) -> Hashable:
    """Returns all that the tables of lowrank_ are made of."""
    sides = [tuple([(t.data_ptr(), t.shape) for t in side]) for side in factors[:2]]
    place = key(batch.tensors, batch.spans, () if outs is None else (outs,), batch.residuals)
    return "lowrank_", place, *sides, tuple(factors.scales)


def pack_tiles(
    entries: np.ndarray, factors: np.ndarray, tile_rows: int = TILE_ROWS, tile_columns: int = TILE_COLUMNS
) -> tuple[np.ndarray, np.ndarray]:
    """Returns tiles and frames of csrc/lowrank.h for packed, numbered entries.

    The whole rows of an entry that is contiguous in the stream, and an entry that is a slice of the matrix's
    columns, are cut into tiles of tile_rows x tile_columns if every eighth column lies on 16 bytes;
    everything else goes one element at a time."""
    n, first = factors[entries["tensor"]]["columns"], entries["first"].astype(np.int64)
    size, columns = entries["row_count"] * entries["columns"], entries["columns"]
    flat, cut = _forms(entries, n, first)
    top, left = first // n, first % n
    begin, end = (
        np.where(flat, -(-first // n), top),
        np.where(flat, (first + size) // n, top + entries["row_count"]),
    )
    frames = np.zeros(len(entries), dtype=FRAME)
    frames["stride"] = np.where(flat, n, entries["row_stride"])
    frames["shift"] = np.where(flat, -first, -top * entries["row_stride"] - left)
    frames["out_stride"] = np.where(flat, n, columns)
    frames["out_shift"] = np.where(flat, -first, -top * columns - left)
    frames["last"] = np.where(flat, n, left + columns)
    start = np.where(flat, 0, left)
    lies = cut & (left % 8 == 0) & (columns % 8 == 0) & (entries["row_stride"] % 8 == 0) | flat
    lies &= _aligned(entries, frames) & (end > begin) & (frames["stride"] < 1 << 26) & (end - begin < 1 << 31)
    rows, wide = (
        np.where(lies, end - begin, 0),
        np.where(lies, -(-(frames["last"] - start) // tile_columns), 0),
    )
    # rectangles, then the elements before and behind them, then entries that have none
    head = np.where(lies & flat, begin * n - first, np.where(lies, 0, size))
    tail = np.where(lies & flat, end * n - first, size)
    counts = -(-rows // tile_rows) * wide, -(-head // PIECE), -(-(size - tail) // PIECE)
    tiles = np.zeros(sum(int(count.sum()) for count in counts), dtype=TILE)
    tiles["column"] = -1
    done = 0
    for part, count in enumerate(counts):
        own = tiles[done : done + int(count.sum())]
        e = own["entry"] = np.repeat(np.arange(len(entries)), count)
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


def _forms(entries: np.ndarray, n: np.ndarray, first: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Tells whether an entry is contiguous in the stream, and whether it is a slice of columns."""
    columns, pitch = entries["columns"], entries["pitch"].astype(np.int64)
    dense = (entries["rows"] == 0) & (entries["column_stride"] == 1) & (n % 8 == 0)
    flat = dense & ((entries["row_count"] == 1) | ((pitch == columns) & (entries["row_stride"] == columns)))
    return flat, dense & ~flat & (pitch == n) & (first % n + columns <= n)


def _aligned(entries: np.ndarray, frames: np.ndarray) -> np.ndarray:
    """Tells whether element (0, 0) of an entry's matrix lies on 16 bytes in all of its memories."""
    width, out_width = np.where(entries["type"] == 0, 4, 2), np.where(entries["out_type"] == 0, 4, 2)
    lies = np.ones(len(entries), dtype=bool)
    for address, bytes_each, shift in (
        (entries["theta"], width, frames["shift"]),
        (entries["out"][:, 0], out_width, frames["out_shift"]),
        (entries["residual"], 2, frames["out_shift"]),
    ):
        lies &= (address == 0) | ((address.astype(np.int64) + shift * bytes_each) % 16 == 0)
    return lies


__all__ = ["FACTORS", "FRAME", "PIECE", "TILE", "key_of", "lies_on", "pack_factors", "pack_tiles"]
