"""Products with factored perturbations: x W^T for the rows of all sides, and thin products beside it."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from functools import lru_cache
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from ..backends import Backend, Multiplies, Span
from . import library
from .fused import fuses, own
from .rows import flatten, joined, rows_of

JOIN = 512  # rows of all sides above which joining them gains nothing
CACHED = 1 << 19  # elements of a result that the caches hold from one product into it to the next
NARROW = 16  # columns below which a thin product is faster from MKL's kernels, and turned
_ORIGIN, _ONE = [Span(0)], [1.0]


class Part(NamedTuple):
    """Thin products beside x W^T: for sides[j], y += (x first^T) middles[j] last^T, float32."""

    sides: Sequence[int]
    first: Tensor  # (r, columns of x), contiguous: the products are several times faster from rows than from 8 columns
    middles: Tensor  # (len(sides), r, q)
    last: Tensor  # (columns of y, q)


def factored_linear(
    backend: Backend,
    xs: Sequence[Tensor],
    weight: Tensor,
    parts: Sequence[Part],
    shrink: float,
    biases: Sequence[Tensor | None],
    transposed: bool = False,
    room: int | None = None,
    fused: bool | None = None,
) -> Tensor:
    """Returns y_j = x_j (shrink W)^T + b_j + the thin products of side j, one below the other; transposed: x_j (shrink W).

    fused: what fuses() says, if it is known.

    One product for the rows of all sides while they are few. The thin products are summed in float32 whatever x and W are, and their sum with
    x W^T is rounded to y's dtype once more: 16 bits would lose the perturbation, and shrink. W is only read. room: bytes of scratch memory."""
    matrix = weight.t() if transposed else weight
    flat = list(map(flatten, xs))
    counts = [x.shape[0] for x in flat]
    if fuses(backend, flat, weight, transposed, room) if fused is None else fused:
        return _fused(own(backend), flat, counts, weight, parts, shrink, biases, transposed, room)
    device = weight.device.type
    cast = torch.is_autocast_enabled(device)
    dtype = torch.get_autocast_dtype(device) if cast else weight.dtype
    if shrink != 1.0 and dtype != torch.float32 and (cast or all(x.dtype == dtype for x in xs)):
        with torch.autocast(device, enabled=False):
            return _shrunk(flat, counts, matrix, parts, shrink, biases, dtype)
    few = sum(counts) <= JOIN and not cast and all(x.dtype == weight.dtype for x in xs)
    if len(xs) > 1 and few:
        x = joined(flat)
        begin = [0, *accumulate(counts)]
        left = list(range(len(xs)))  # sides whose bias is not in a thin product
        thins = []
        for part in parts:
            first, last = part.sides[0], part.sides[-1] + 1
            assert list(part.sides) == list(range(first, last)), "sides of a part follow one another"
            here = slice(begin[first], begin[last])
            thin = _Thin(here, _thin_rows(x[here], part.first, part.middles, counts[first:last]), part.last)
            columns_pay = thin.rows.shape[0] >= part.first.shape[0] >= len(part.sides)
            if biases[first] is not None and (columns_pay or weight.dtype != torch.float32):
                thin = _with_bias(thin, counts[first:last], biases[first:last])
                left = [j for j in left if j not in part.sides]
            thins.append(thin)
        y = _sum(backend, x if shrink == 1.0 else x * shrink, matrix, None, thins)
        others = [biases[j] for j in left]
        if len(left) == len(xs) and len(set(counts)) == 1 and all(bias is not None for bias in others):
            y.view(len(xs), counts[0], -1).add_(torch.stack(others).unsqueeze(1))  # type: ignore[arg-type]
            left = []
        for j in left:
            if (bias := biases[j]) is not None:
                y[begin[j] : begin[j + 1]] += bias
        return y
    outs = []
    for j, (x, bias) in enumerate(zip(flat, biases)):
        with torch.autocast(device, enabled=False) if cast else nullcontext():
            mine = [(part, list(part.sides).index(j)) for part in parts if j in part.sides]
            thins = [
                _Thin(slice(None), _thin_rows(x, part.first, part.middles[at : at + 1], counts[j : j + 1]), part.last)
                for part, at in mine
            ]
        outs.append(_sum(backend, x if shrink == 1.0 else x * shrink, matrix, bias, thins))
    return joined(outs)


def _shrunk(
    xs: Sequence[Tensor], counts: Sequence[int], matrix: Tensor, parts: Sequence[Part], shrink: float, biases: Sequence[Tensor | None],
    dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """factored_linear() of 16-bit operands with a decay that waits, summed in float32 and rounded to 16 bits once.

    A decay is far smaller than a rounding to 16 bits: multiplied into x, or into a product that was rounded before, it would be lost."""
    begin = [0, *accumulate(counts)]
    x = joined(xs) if len(xs) > 1 else xs[0]
    y = library.wide(x.to(dtype), matrix, dtype).mul_(shrink)
    for part in parts:
        for j, middle in zip(part.sides, part.middles.unbind(0)):
            here = slice(begin[j], begin[j + 1])
            y[here].addmm_(_thin_rows(x[here], part.first, middle.unsqueeze(0), counts[j : j + 1]), part.last.t())
    for j, bias in enumerate(biases):
        if bias is not None:
            y[begin[j] : begin[j + 1]] += bias.float()
    return y.to(dtype)


def is_long(xs: Sequence[Tensor], weight: Tensor) -> bool:
    """Whether every side has so many rows that W + z, a tile at a time, costs less than thin products beside x W^T.

    2 m n r flops against 2 rows (m + n) r; a tile's are taken to be half as fast. Only in float32: 16 bits would lose the perturbation."""
    if weight.device.type != "cpu" or weight.dtype != torch.float32 or torch.is_autocast_enabled("cpu"):
        return False
    m, n = weight.shape
    return all(x.dtype == torch.float32 and rows_of(x) * (m + n) > 2 * m * n for x in xs)


class _Thin(NamedTuple):
    """y[here] += rows last^T, float32."""

    here: slice
    rows: Tensor  # (rows of y[here], q)
    last: Tensor  # (columns of y, q)


def _thin_rows(x: Tensor, first: Tensor, middles: Tensor, counts: Sequence[int]) -> Tensor:
    """(x first^T) middle, with the rows of each side, which lie one after the other, by its own middle."""
    x = x if x.dtype == torch.float32 else x.float()
    rank = first.shape[0]
    thin = torch.mm(first, x.t()).t() if rank < NARROW else library.linear(x, first)
    if len(set(counts)) == 1:
        return torch.bmm(thin.reshape(len(counts), counts[0], rank), middles).view(len(x), middles.shape[-1])
    return torch.cat([t @ middle for t, middle in zip(thin.split(list(counts)), middles)])


def _with_bias(thin: _Thin, counts: Sequence[int], biases: Sequence[Tensor | None]) -> _Thin:
    """One more column a side: its bias, and a one in its own rows."""
    rows = torch.cat([thin.rows, _own_rows(tuple(counts), thin.rows.device)], 1)
    last = torch.cat([thin.last, torch.stack([bias.float() for bias in biases], 1)], 1)  # type: ignore[union-attr]
    return _Thin(thin.here, rows, last)


def _sum(backend: Backend, x: Tensor, matrix: Tensor, bias: Tensor | None, thins: Sequence[_Thin]) -> Tensor:
    """y = x matrix^T + bias + the thin products; where y is larger than the caches, a block of its columns at a time: the thin products
    would read and write all of it once more."""
    rows, columns = x.shape[0], matrix.shape[0]
    device = x.device.type
    cast = torch.is_autocast_enabled(device)
    blocks = device == "cpu" and x.dtype == matrix.dtype == torch.float32 and rows * columns > 2 * CACHED
    if not (blocks and thins) or cast or library.chooses(x, matrix):
        y = library.linear(x, matrix, bias)
        with torch.autocast(device, enabled=False) if cast else nullcontext():
            for thin in thins:
                _add(backend, y[thin.here], thin)
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
        for thin in thins:
            block[thin.here].addmm_(thin.rows, thin.last[here].t())
    return y


def _fused(
    backend: Multiplies, xs: Sequence[Tensor], counts: Sequence[int], weight: Tensor, parts: Sequence[Part], shrink: float,
    biases: Sequence[Tensor | None], transposed: bool, room: int | None,
) -> Tensor:  # fmt: skip
    """factored_linear() where it fuses(): all sides, their thin products and biases in one kernel; the results lie one below the other."""
    thins = [
        (j, part.first, middle, part.last)
        for part in parts
        for j, middle in zip(part.sides, part.middles.unbind(0))
        if counts[j]
    ]
    y = weight.new_empty(sum(counts), weight.shape[1 if transposed else 0])
    ys, many = torch.split_with_sizes(y, list(counts)), len(xs)
    backend.linear(xs, weight, _ORIGIN[0], None, 0, 0, [-1] * many, [0.0] * many, biases, thins, room, ys, transposed, shrink)
    return y


def _add(backend: Backend, y: Tensor, thin: _Thin) -> None:
    """y += rows last^T, summed in float32; y's dtype is rounded to once."""
    if y.dtype != torch.float32:
        most = getattr(backend, "most_rank", None) or thin.rows.shape[1]
        for rows, last in zip(thin.rows.split(most, 1), thin.last.split(most, 1)):  # a rounding for each
            backend.lowrank_([y], _ORIGIN, [rows.contiguous()], [last.contiguous()], _ONE, 1.0, "nearest", None)
    elif thin.rows.shape[1] >= NARROW and library.chooses(thin.rows, thin.last):
        y += library.linear(thin.rows, thin.last)
    else:
        y.addmm_(thin.rows, thin.last.t())


@lru_cache(maxsize=64)
def _own_rows(counts: tuple[int, ...], device: torch.device) -> Tensor:
    """(sum of counts, sides): 1 where a row belongs to a side."""
    unit = torch.eye(len(counts), dtype=torch.float32, device=device)
    return torch.repeat_interleave(unit, torch.tensor(counts, dtype=torch.int64, device=device), dim=0)
