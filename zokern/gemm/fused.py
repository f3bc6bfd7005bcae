"""Products by the CPU's own kernel, which makes z beside the product."""

from __future__ import annotations

import typing
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import Parameter

from ..backends import Backend, Multiplies, Noise, Sides, Weight
from . import library
from .rows import counts_of, flatten


def fuses(
    backend: Backend, xs: Sequence[Tensor], weight: Tensor, transposed: bool = False, room: int | None = None
) -> bool:
    """Tells whether the CPU's kernel computes these products instead of torch.

    room  bytes of scratch memory"""
    dtype, width = weight.dtype, weight.shape[0 if transposed else 1]
    if not (
        hasattr(backend, "linear") and library.yields(dtype) and weight.is_contiguous() and weight.numel()
    ):
        return False
    for x in xs:
        if (
            x.dtype != dtype
            or not x.is_cpu
            or not x.dim()
            or x.shape[-1] != width
            or type(x) not in (Tensor, Parameter)
        ):
            return False
        if x.is_neg() or torch._C._functorch.is_functorch_wrapped_tensor(x):
            return False
    return not torch.is_autocast_enabled("cpu") and (
        room is None or own(backend).linear_bytes(counts_of(xs), room) <= room
    )


def fused_linear(
    backend: Backend, weight: Weight, sides: Sides, noise: Noise | None = None, room: int | None = None
) -> Tensor:
    """Returns Multiplies.linear() of all sides, one below the other. Call only if fuses() returned True.

    z is made beside the product: no tile of W + z exists, and the sums do not depend on how sides and
    threads are joined."""
    flat, counts = list(map(flatten, sides.xs)), counts_of(sides.xs)
    y = weight.tensor.new_empty(sum(counts), weight.tensor.shape[1 if weight.transposed else 0])
    own(backend).linear(weight, Sides(flat, *sides[1:]), noise, room, torch.split_with_sizes(y, counts))
    return y


def own(backend: Backend) -> Multiplies:
    """Returns the same backend with the type of one that multiplies. Call only if fuses() returned True."""
    return typing.cast(Multiplies, backend)
