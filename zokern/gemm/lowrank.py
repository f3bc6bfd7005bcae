"""Products with factored perturbations: x W^T for the rows of all sides, and thin products beside it."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from functools import lru_cache
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from .. import autocast
from ..backends import Backend, Batch, Outer, Sides, Span, Weight
from . import library
from .fused import fused_linear, fuses
from .rows import flatten, joined, rows_of

JOIN = 512  # rows of all sides above which joining them gains nothing
MANY = 32  # sides above which they are joined whatever their rows: a kernel's operands for each cost more
CACHED = 1 << 19  # elements of a result that the caches hold from one product into it to the next
NARROW = 16  # columns below which a thin product is faster from MKL's kernels, and turned
_ORIGIN, _ONE = [Span(0)], [1.0]  # of a sum that has no place in the stream


def factored_linear(
    backend: Backend, weight: Weight, sides: Sides, room: int | None = None, fused: bool | None = None
) -> Tensor:
    """Returns y_j = x_j (shrink W)^T + b_j + the thin products of side j, one below the other.

    transposed: x_j (shrink W)

    room   bytes of scratch memory
    fused  what fuses() says, if it is known

    One product serves the rows of all sides while they are few. The thin products are summed in float32
    whatever x and W are, and their sum with x W^T is rounded to y's dtype once more: 16 bits would lose the
    perturbation, and shrink. W is only read."""
    tensor, _, transposed, shrink = weight
    flat = list(map(flatten, sides.xs))
    if fused is None:
        ranks = [sum([t.first.shape[0] for t in sides.thins if j in t.sides]) for j in range(len(flat))]
        fused = fuses(backend, flat, tensor, transposed, room, max(ranks))
    if fused:
        return fused_linear(backend, weight, sides, None, room)
    counts = [x.shape[0] for x in flat]
    matrix, sides = tensor.t() if transposed else tensor, Sides(flat, *sides[1:])
    device = tensor.device.type
    cast = autocast.is_on(device)
    dtype = torch.get_autocast_dtype(device) if cast else tensor.dtype
    if shrink != 1.0 and dtype != torch.float32 and (cast or all(x.dtype == dtype for x in flat)):
        with torch.autocast(device, enabled=False):
            return _shrunk(sides, counts, matrix, shrink, dtype)
    if (
        len(flat) > 1
        and (sum(counts) <= JOIN or len(flat) > MANY)
        and not cast
        and all(x.dtype == tensor.dtype for x in flat)
    ):
        return _together(backend, sides, counts, matrix, shrink)
    outs = []
    for j, (x, bias) in enumerate(zip(flat, sides.biases)):
        with torch.autocast(device, enabled=False) if cast else nullcontext():
            mine = [(thin, list(thin.sides).index(j)) for thin in sides.thins if j in thin.sides]
            strips = [
                _Strip(
                    slice(None),
                    _strip_rows(x, thin.first, thin.middles[at : at + 1], counts[j : j + 1]),
                    thin.last,
                )
                for thin, at in mine
            ]
        outs.append(_sum(backend, x if shrink == 1.0 else x * shrink, matrix, bias, strips))
    return joined(outs)


def _together(backend: Backend, sides: Sides, counts: list[int], matrix: Tensor, shrink: float) -> Tensor:
    """Returns factored_linear() by one product for the rows of all sides."""
    xs, biases = sides.xs, sides.biases
    x = joined(xs)
    begin = [0, *accumulate(counts)]
    left = list(range(len(xs)))  # sides whose bias is not in a thin product
    strips = []
    for thin in sides.thins:
        first, last = thin.sides[0], thin.sides[-1] + 1
        assert list(thin.sides) == list(range(first, last)), "the sides of a thin product follow one another"
        here = slice(begin[first], begin[last])
        strip = _Strip(here, _strip_rows(x[here], thin.first, thin.middles, counts[first:last]), thin.last)
        columns_pay = strip.rows.shape[0] >= thin.first.shape[0] >= len(thin.sides)
        if biases[first] is not None and (columns_pay or matrix.dtype != torch.float32):
            strip = _with_bias(strip, counts[first:last], biases[first:last])
            left = [j for j in left if j not in thin.sides]
        strips.append(strip)
    y = _sum(backend, x if shrink == 1.0 else x * shrink, matrix, None, strips)
    others = [biases[j] for j in left]
    if len(left) == len(xs) and len(set(counts)) == 1 and all(bias is not None for bias in others):
        y.view(len(xs), counts[0], -1).add_(torch.stack(others).unsqueeze(1))  # type: ignore[arg-type]
        left = []
    for j in left:
        if (bias := biases[j]) is not None:
            y[begin[j] : begin[j + 1]] += bias
    return y


def _shrunk(sides: Sides, counts: list[int], matrix: Tensor, shrink: float, dtype: torch.dtype) -> Tensor:
    """Returns factored_linear() of 16-bit operands with a pending decay: float32 sums, rounded once.

    A decay is far smaller than a rounding to 16 bits:
    multiplied into x, or into a rounded product, it would be lost."""
    xs, begin = sides.xs, [0, *accumulate(counts)]
    x = joined(xs) if len(xs) > 1 else xs[0]
    y = library.wide(x.to(dtype), matrix, dtype).mul_(shrink)
    for thin in sides.thins:
        for j, middle in zip(thin.sides, thin.middles.unbind(0)):
            here = slice(begin[j], begin[j + 1])
            y[here].addmm_(
                _strip_rows(x[here], thin.first, middle.unsqueeze(0), counts[j : j + 1]), thin.last.t()
            )
    for j, bias in enumerate(sides.biases):
        if bias is not None:
            y[begin[j] : begin[j + 1]] += bias.float()
    return y.to(dtype)


def is_long(xs: Sequence[Tensor], weight: Tensor) -> bool:
    """Tells whether a tile of W + z at a time costs less than thin products beside x W^T, for every side.

    2 m n r flops against 2 rows (m + n) r; a tile's are taken to be half as fast.
    Only in float32: 16 bits would lose z."""
    if weight.device.type != "cpu" or weight.dtype != torch.float32 or torch.is_autocast_enabled("cpu"):
        return False
    m, n = weight.shape
    return all(x.dtype == torch.float32 and rows_of(x) * (m + n) > 2 * m * n for x in xs)


class _Strip(NamedTuple):
    """A thin product for some rows of y: y[here] += rows last^T, float32."""

    here: slice
    rows: Tensor  # (rows of y[here], q)
    last: Tensor  # (columns of y, q)


def _strip_rows(x: Tensor, first: Tensor, middles: Tensor, counts: Sequence[int]) -> Tensor:
    """Returns (x first^T) middle. The rows of the sides follow one another; each side has its own middle."""
    x = x if x.dtype == torch.float32 else x.float()
    rank = first.shape[0]
    narrow = torch.mm(first, x.t()).t() if rank < NARROW else library.linear(x, first)
    if len(set(counts)) == 1:
        return torch.bmm(narrow.reshape(len(counts), counts[0], rank), middles).view(
            len(x), middles.shape[-1]
        )
    return torch.cat([t @ middle for t, middle in zip(narrow.split(list(counts)), middles)])


def _with_bias(strip: _Strip, counts: Sequence[int], biases: Sequence[Tensor | None]) -> _Strip:
    """Returns the strip with one more column for each side: its bias, and a one in its own rows."""
    rows = torch.cat([strip.rows, _own_rows(tuple(counts), strip.rows.device)], 1)
    columns = torch.stack([bias.float() for bias in biases if bias is not None], 1)
    last = torch.cat([strip.last, columns], 1)
    return _Strip(strip.here, rows, last)


def _sum(
    backend: Backend, x: Tensor, matrix: Tensor, bias: Tensor | None, strips: Sequence[_Strip]
) -> Tensor:
    """Returns x matrix^T + bias + the thin products, by blocks of columns if y is larger than the caches.

    The thin products would otherwise read and write all of y once more."""
    rows, columns = x.shape[0], matrix.shape[0]
    device = x.device.type
    cast = autocast.is_on(device)
    blocks = device == "cpu" and x.dtype == matrix.dtype == torch.float32 and rows * columns > 2 * CACHED
    if not (blocks and strips) or cast or library.chooses(x, matrix):
        y = library.linear(x, matrix, bias)
        with torch.autocast(device, enabled=False) if cast else nullcontext():
            for strip in strips:
                _add(backend, y[strip.here], strip)
        return y
    y = x.new_empty(rows, columns)
    step = max(512, CACHED // rows)
    for start in range(0, columns, step):
        here = slice(start, min(columns, start + step))
        block = y[:, here]
        if bias is None:
            torch.mm(x, matrix[here].t(), out=block)
        else:
            torch.addmm(bias[here], x, matrix[here].t(), out=block)
        for strip in strips:
            block[strip.here].addmm_(strip.rows, strip.last[here].t())
    return y


def _add(backend: Backend, y: Tensor, strip: _Strip) -> None:
    """Adds rows last^T to y, summed in float32 and rounded to y's dtype once."""
    if y.dtype != torch.float32:
        most = getattr(backend, "most_rank", None) or strip.rows.shape[1]
        for rows, last in zip(strip.rows.split(most, 1), strip.last.split(most, 1)):  # a rounding for each
            backend.lowrank_(Batch([y], _ORIGIN), Outer([rows.contiguous()], [last.contiguous()], _ONE))
    elif strip.rows.shape[1] >= NARROW and library.chooses(strip.rows, strip.last):
        y += library.linear(strip.rows, strip.last)
    else:
        y.addmm_(strip.rows, strip.last.t())


@lru_cache(maxsize=64)
def _own_rows(counts: tuple[int, ...], device: torch.device) -> Tensor:
    """Returns (sum of counts, sides): 1 if the row belongs to the side."""
    unit = torch.eye(len(counts), dtype=torch.float32, device=device)
    return torch.repeat_interleave(unit, torch.tensor(counts, dtype=torch.int64, device=device), dim=0)
