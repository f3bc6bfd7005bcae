"""Products with a tile of the perturbed weights at a time."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate

import torch
from torch import Tensor

from .. import autocast
from . import library
from .rows import counts_of, flatten


def tiled_linear(
    xs: Sequence[Tensor],
    weight: Tensor,
    biases: Sequence[Tensor | None],
    tiles: Iterable[tuple[int, int, Mapping[int, Tensor]]],
    transposed: bool = False,
) -> Tensor:
    """Returns y_j = x_j W_j^T + b_j for perturbed W_j, one below the other; transposed: y_j = b_j + x_j W_j.

    tiles  (start, stop, {side: rows start .. stop of its W_j}), columns if transposed; a side that is
           missing reads W itself"""
    dimension = 1 if transposed else 0
    total = weight.shape[dimension]
    cast = autocast.is_on(weight.device.type)
    flat = list(map(flatten, xs))
    counts = counts_of(xs)
    begin = [0, *accumulate(counts)]
    out: Tensor | None = None
    for start, stop, moved in tiles:
        for side, x in enumerate(flat):
            matrix = moved[side] if side in moved else weight.narrow(dimension, start, stop - start)
            rows = matrix.t() if transposed else matrix  # y = x rows^T
            bias = biases[side]
            part_bias = None if bias is None else bias[start:stop]
            plain = not cast and x.dtype == weight.dtype and not library.chooses(x, rows)
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
                part = library.linear(x, rows, part_bias)
            if out is None:
                out = part.new_empty((begin[-1], total))
            out[begin[side] : begin[side + 1], start:stop] = part
    return flat[0].new_empty((begin[-1], total)) if out is None else out  # W without rows has no tile
