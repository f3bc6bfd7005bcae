"""Verbs that hold a matrix product: `linear`, with weights that are never written, and `sketch`. The products are torch's, but where fuses().

linear   y_j = x_j (W + a_j z_j)^T + b_j, j = 1 .. sides
         fuses()       one kernel of the CPU's makes z beside the product, thin products included, for the rows of all sides
         dense z       a tile of W + a z at a time, both signs of a z from one read of W and one evaluation of the generator
         factored z    x (shrink W + left right^T)^T: one product for the rows of all sides, and two thin ones beside it
sketch   Y = (sum_k c_k z_k) Omega, or its transpose's, a tile of rows at a time: no m x n buffer
"""

from __future__ import annotations

import typing
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from functools import lru_cache
from itertools import accumulate
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import Parameter

from . import matmul
from .backends import Backend, Multiplies, Span
from .backends.door import described

JOIN = 512  # rows of all sides above which joining them gains nothing
CACHED = 1 << 19  # elements of a result that the caches hold from one product into it to the next
NARROW = 16  # columns below which a thin product is faster from MKL's kernels, and turned


def fuses(backend: Backend, xs: Sequence[Tensor], weight: Tensor, transposed: bool = False, room: int | None = None) -> bool:
    """Whether linear() of the CPU's kernels takes these products, z and all, from torch. room: bytes of scratch memory."""
    dtype, width = weight.dtype, weight.shape[0 if transposed else 1]
    if not (hasattr(backend, "linear") and matmul.yields(dtype) and weight.is_contiguous() and weight.numel()):
        return False
    for x in xs:
        if x.dtype != dtype or not x.is_cpu or not x.dim() or x.shape[-1] != width or type(x) not in (Tensor, Parameter):
            return False
        if x.is_neg() or torch._C._functorch.is_functorch_wrapped_tensor(x):
            return False
    return not torch.is_autocast_enabled("cpu") and (room is None or own(backend).linear_bytes(counts_of(xs), room) <= room)


def fused_linear(
    backend: Backend,
    xs: Sequence[Tensor],
    weight: Tensor,
    span: Span,
    direction: object,
    seed: int,
    step: int,
    draws: Sequence[int],
    scales: Sequence[float],
    biases: Sequence[Tensor | None],
    transposed: bool = False,
    room: int | None = None,
) -> Tensor:
    """Returns y_j = x_j (W + scales[j] z(draws[j]))^T + b_j, one below the other (transposed: x_j (W + ...)), where fuses().

    z is made beside the product: no tile of W + z exists, and the sums do not depend on how sides and threads are joined.
    draws[j] < 0: side j reads W itself."""
    columns = weight.shape[1 if transposed else 0]
    flat = list(map(_flat, xs))
    y = weight.new_empty(sum(counts_of(xs)), columns)
    outs = torch.split_with_sizes(y, counts_of(xs))
    own(backend).linear(flat, weight, span, direction, seed, step, draws, scales, biases, (), room, outs, transposed)
    return y


def tiled_linear(
    xs: Sequence[Tensor],
    weight: Tensor,
    biases: Sequence[Tensor | None],
    tiles: Iterable[tuple[int, int, Mapping[int, Tensor]]],
    transposed: bool = False,
) -> Tensor:
    """Returns y_j = x_j W_j^T + b_j for perturbed W_j, one below the other; transposed: y_j = b_j + x_j W_j.

    tiles  (start, stop, {side: rows start .. stop of its W_j}); columns where it is transposed. A side that is missing reads W itself"""
    dimension = 1 if transposed else 0
    total = weight.shape[dimension]
    cast = torch.is_autocast_enabled(weight.device.type)
    flat = list(map(_flat, xs))
    counts = counts_of(xs)
    begin = [0, *accumulate(counts)]
    out: Tensor | None = None
    for start, stop, moved in tiles:
        for side, x in enumerate(flat):
            matrix = moved[side] if side in moved else weight.narrow(dimension, start, stop - start)
            rows = matrix.t() if transposed else matrix  # y = x rows^T
            bias = biases[side]
            part_bias = None if bias is None else bias[start:stop]
            plain = not cast and x.dtype == weight.dtype and not matmul.chooses(x, rows)
            if out is None and plain:
                out = x.new_empty((begin[-1], total))
            if plain and out is not None:  # straight into its place
                here = out[begin[side] : begin[side + 1], start:stop]
                if part_bias is None:
                    torch.mm(x, rows.t(), out=here)
                else:
                    torch.addmm(part_bias, x, rows.t(), out=here)
                continue
            if transposed and part_bias is not None:
                part = torch.addmm(part_bias, x, rows.t())
            else:
                part = matmul.linear(x, rows, part_bias)
            if out is None:
                out = part.new_empty((begin[-1], total))
            out[begin[side] : begin[side + 1], start:stop] = part
    return flat[0].new_empty((begin[-1], total)) if out is None else out  # W without rows has no tile


def own(backend: Backend) -> Multiplies:
    """The same backend, where fuses() said that it multiplies."""
    return typing.cast(Multiplies, backend)


def counts_of(xs: Sequence[Tensor]) -> list[int]:
    """Rows of each side."""
    return [_rows(x) for x in xs]


def _rows(x: Tensor) -> int:
    return prod(x.shape[:-1])


def _flat(x: Tensor) -> Tensor:
    """x as a matrix; -1 rows would not do for a width of 0."""
    return x if x.dim() == 2 else x.reshape(_rows(x), x.shape[-1])


def joined(pieces: Sequence[Tensor]) -> Tensor:
    """Rows of all pieces one below the other: a copy only where they do not lie so already."""
    first = pieces[0]
    base = first._base
    if base is not None and base.is_contiguous() and all(piece._base is base and piece.is_contiguous() for piece in pieces):
        ends = [piece.storage_offset() + piece.numel() for piece in pieces]
        starts = [piece.storage_offset() for piece in pieces]
        if ends[:-1] == starts[1:] and sum(piece.numel() for piece in pieces) == base.numel():
            return base.view(-1, *first.shape[1:])
    return torch.cat(list(pieces))


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
    flat = list(map(_flat, xs))
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
            thin = _Thin(here, _rows_of(x[here], part.first, part.middles, counts[first:last]), part.last)
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
                _Thin(slice(None), _rows_of(x, part.first, part.middles[at : at + 1], counts[j : j + 1]), part.last)
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
    y = matmul.wide(x.to(dtype), matrix, dtype).mul_(shrink)
    for part in parts:
        for j, middle in zip(part.sides, part.middles.unbind(0)):
            here = slice(begin[j], begin[j + 1])
            y[here].addmm_(_rows_of(x[here], part.first, middle.unsqueeze(0), counts[j : j + 1]), part.last.t())
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
    return all(x.dtype == torch.float32 and _rows(x) * (m + n) > 2 * m * n for x in xs)


class _Thin(NamedTuple):
    """y[here] += rows last^T, float32."""

    here: slice
    rows: Tensor  # (rows of y[here], q)
    last: Tensor  # (columns of y, q)


def _rows_of(x: Tensor, first: Tensor, middles: Tensor, counts: Sequence[int]) -> Tensor:
    """(x first^T) middle, with the rows of each side, which lie one after the other, by its own middle."""
    x = x if x.dtype == torch.float32 else x.float()
    rank = first.shape[0]
    thin = torch.mm(first, x.t()).t() if rank < NARROW else matmul.linear(x, first)
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
    if not (blocks and thins) or cast or matmul.chooses(x, matrix):
        y = matmul.linear(x, matrix, bias)
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
    elif thin.rows.shape[1] >= NARROW and matmul.chooses(thin.rows, thin.last):
        y += matmul.linear(thin.rows, thin.last)
    else:
        y.addmm_(thin.rows, thin.last.t())


@lru_cache(maxsize=64)
def _own_rows(counts: tuple[int, ...], device: torch.device) -> Tensor:
    """(sum of counts, sides): 1 where a row belongs to a side."""
    unit = torch.eye(len(counts), dtype=torch.float32, device=device)
    return torch.repeat_interleave(unit, torch.tensor(counts, dtype=torch.int64, device=device), dim=0)


_ORIGIN, _ONE = [Span(0)], [1.0]


def sketch_of(
    backend: Backend, direction: object, seed: int, span: Span, shape: tuple[int, int], draws: Sequence[tuple[int, int]], coeffs: Sequence[float],
    omega: Tensor, transposed: bool = False, tile: int = 1 << 20,
) -> Tensor:  # fmt: skip
    """Y = G Omega, or G^T Omega, of G = sum_k coeffs[k] z(*draws[k]), m x n: float32, about `tile` elements of G at a time."""
    rows, columns = shape
    device = omega.device
    if omega.dtype != torch.float32:
        raise ValueError(f"sketch: omega is {described(omega)}; expected float32: .float() it")
    table = torch.tensor(list(coeffs), dtype=torch.float32, device=device)
    result = torch.zeros(columns if transposed else rows, omega.shape[1], dtype=torch.float32, device=device)
    step = max(1, min(rows, tile // columns))
    buffer = torch.empty(step, columns, dtype=torch.float32, device=device)
    for start in range(0, rows, step):
        stop = min(rows, start + step)
        part = buffer[: stop - start].zero_()
        here = Span(span.who, span.first + start * columns)
        backend.axpy_([part], [here], direction, seed, draws, table, 1.0, "nearest", None)
        if transposed:
            result += part.t() @ omega[start:stop]
        else:
            torch.mm(part, omega, out=result[start:stop])
    return result
