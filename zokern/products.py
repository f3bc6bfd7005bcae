"""Verbs that hold a matrix product: `linear`, with weights that are never written, and `sketch`. The products are torch's.

linear   y_j = x_j (W + a_j z_j)^T + b_j, j = 1 .. sides
         dense z       a tile of W + a z at a time, both signs of a z from one read of W and one evaluation of the generator
         factored z    x (shrink W + left right^T)^T: one product for the rows of all sides, and two thin ones beside it
sketch   Y = (sum_k c_k z_k) Omega, or its transpose's, a tile of rows at a time: no m x n buffer
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor

from .backends import Backend, Span

JOIN = 1024  # rows of all sides above which a joint product is slower than one a side (benchmarks/)


def tiled_linear(
    xs: Sequence[Tensor],
    weight: Tensor,
    span: Span,
    biases: Sequence[Tensor | None],
    residual: Tensor | None,
    fills: Sequence[Sequence[int]],
    fill: Callable[[Tensor, Span, Sequence[int], Sequence[Tensor], Tensor | None], None],
    take: Callable[[tuple[int, ...]], Tensor],
    release: Callable[[], None],
    tile: int,
    transposed: bool = False,
) -> list[Tensor]:
    """y_j = x_j W_j^T + b_j for perturbed W_j, `tile` rows of W at a time; transposed: y_j = b_j + x_j W_j, `tile` columns.

    fills  lists of sides whose tiles are made together; a side in none of them reads W itself
    fill(view, span, sides, tiles, residual) writes them; take(shape) gives scratch memory of W's dtype for one tile, release()
    takes all of it back. W is only read."""
    dimension = 1 if transposed else 0
    total, width = weight.shape[dimension], weight.shape[1 - dimension]
    plain = all(x.dtype == weight.dtype for x in xs) and not torch.is_autocast_enabled(weight.device.type)
    outs: list[Tensor | None] = [None] * len(xs)
    untouched = set(range(len(xs))) - {side for sides in fills for side in sides}

    def multiply(side: int, matrix: Tensor, start: int, stop: int) -> None:
        x, bias, out = xs[side], biases[side], outs[side]
        right = matrix if transposed else matrix.t()
        if stop - start == total and not transposed:
            outs[side] = F.linear(x, matrix, bias)
            return
        part_bias = bias[start:stop] if bias is not None else None
        if plain:  # straight into its columns: a product of its own would be a second copy of the result
            if out is None:
                outs[side] = out = x.new_empty((x.numel() // width, total))
            if part_bias is None:
                torch.mm(x.reshape(-1, width), right, out=out[:, start:stop])
            else:
                torch.addmm(part_bias, x.reshape(-1, width), right, out=out[:, start:stop])
            return
        if transposed and part_bias is not None:
            part = torch.addmm(part_bias, x.reshape(-1, width), right)
        else:
            part = F.linear(x.reshape(-1, width), right.t(), part_bias)
        if out is None:
            outs[side] = out = part.new_empty((part.shape[0], total))
        out[:, start:stop] = part

    for start in range(0, total, tile):
        stop = min(total, start + tile)
        view = weight.narrow(dimension, start, stop - start)
        low = None if residual is None else residual.narrow(dimension, start, stop - start)
        if transposed:
            here = Span(span.who, span.first + start, pitch=total)
        else:
            here = Span(span.who, span.first + start * width)
        for sides in fills:
            tiles = [take(tuple(view.shape)) for _ in sides]
            fill(view, here, sides, tiles, low)
            for side, matrix in zip(sides, tiles):
                multiply(side, matrix, start, stop)
            del tiles
            release()
        for side in untouched:
            multiply(side, view, start, stop)
    return [_shaped(out, x, total) for out, x in zip(outs, xs)]


def _shaped(out: Tensor | None, x: Tensor, columns: int) -> Tensor:
    assert out is not None
    return out.view(*x.shape[:-1], columns)


def factored_linear(
    backend: Backend,
    xs: Sequence[Tensor],
    weight: Tensor,
    middles: Sequence[Tensor | None],
    left: Tensor | None,
    right: Tensor,
    shrink: float,
    biases: Sequence[Tensor | None],
    transposed: bool = False,
) -> list[Tensor]:
    """y_j = x_j (shrink W + L_j right^T)^T + b_j with L_j = left middle_j, or middle_j where left is None.

    The thin products are float32 whatever x and W are, and the sum with x W^T is rounded to y's dtype once: 16 bits would lose
    the perturbation. transposed: y_j = b_j + x_j (shrink W + L_j right^T). W is only read."""
    columns = weight.shape[1] if transposed else weight.shape[0]
    width = weight.numel() // columns
    flat = [x.reshape(-1, width) for x in xs]
    counts = [x.shape[0] for x in flat]
    matrix = weight.t() if transposed else weight
    scaled = flat if shrink == 1.0 else [x * shrink for x in flat]
    if len(xs) > 1 and sum(counts) <= JOIN:
        joint = F.linear(torch.cat(scaled), matrix)
        outs = list(joint.split(counts))
        late = biases
    else:
        early = [None if b is None else b.to(x.dtype) if not torch.is_autocast_enabled(x.device.type) else b for b, x in zip(biases, xs)]
        outs = [F.linear(x, matrix, bias) for x, bias in zip(scaled, early)]
        late = [None] * len(xs)
    device = weight.device.type
    with torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext():
        # x V C^T and U^T for y = x W^T; x U C and V^T for y = x W
        for j, (x, middle, bias) in enumerate(zip(flat, middles, late)):
            thin, wide = _thin(x, middle, left, right, transposed)
            if bias is not None:
                ones = x.new_ones((x.shape[0], 1), dtype=torch.float32)
                row = bias.float().unsqueeze(1)
                thin, wide = (ones, row) if thin is None else (torch.cat((thin, ones), 1), torch.cat((wide, row), 1))
            if thin is not None:
                y = outs[j]
                backend.lowrank_([y], [Span(0)], [thin.contiguous()], [wide.contiguous()], [1.0], 1.0, "nearest", None)
    return [out.view(*x.shape[:-1], columns) for out, x in zip(outs, xs)]


def _thin(
    x: Tensor, middle: Tensor | None, left: Tensor | None, right: Tensor, transposed: bool
) -> tuple[Tensor | None, Tensor | None]:
    """What is multiplied beside x W: (rows, r) and (columns, r), float32."""
    if middle is None:
        return None, None
    x = x.float()
    if not transposed:
        t = x @ right
        return (t, middle) if left is None else (t @ middle.t(), left)
    return (x @ middle, right) if left is None else (x @ left @ middle, right)
