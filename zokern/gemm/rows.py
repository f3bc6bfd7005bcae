"""The rows of several sides, which one product multiplies: counted, flattened, joined."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor


def counts_of(xs: Sequence[Tensor]) -> list[int]:
    """Returns the rows of each side."""
    return [rows_of(x) for x in xs]


def rows_of(x: Tensor) -> int:
    return prod(x.shape[:-1])


def flatten(x: Tensor) -> Tensor:
    """Returns x as a matrix. view(-1, width) fails for a width of 0."""
    return x if x.dim() == 2 else x.reshape(rows_of(x), x.shape[-1])


def joined(pieces: Sequence[Tensor]) -> Tensor:
    """Returns the rows of all pieces one below the other; a copy only if they do not lie so already."""
    first = pieces[0]
    base = first._base
    if (
        base is not None
        and base.is_contiguous()
        and all(piece._base is base and piece.is_contiguous() for piece in pieces)
    ):
        ends = [piece.storage_offset() + piece.numel() for piece in pieces]
        starts = [piece.storage_offset() for piece in pieces]
        if ends[:-1] == starts[1:] and sum(piece.numel() for piece in pieces) == base.numel():
            return base.view(-1, *first.shape[1:])
    return torch.cat(list(pieces))
