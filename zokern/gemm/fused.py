"""Products by a kernel of ours, which makes z beside the product."""

from __future__ import annotations

import typing
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import Parameter

from .. import backends
from ..backends import Backend, Multiplies, Noise, Sides, Weight
from . import library
from .rows import counts_of, flatten

# Rows of all sides up to which the GPU's kernel is chosen. Below, a product is bound by what it does for each
# weight: W is read, z is made. The kernel does both once for both signs. The other way, tiles, writes W + z
# and W - z and reads them again, which costs more than making z (docs/kernels.md). Above, the products
# themselves cost more, and torch's fill the matrix units better. Float32 products have no matrix units
GPU_ROWS = {torch.float32: 64, torch.bfloat16: 256, torch.float16: 256}


def fuses(
    backend: Backend, xs: Sequence[Tensor], weight: Tensor, transposed: bool = False, room: int | None = None,
    rank: int = 0,
) -> bool:  # fmt: skip
    """Tells whether a kernel of ours computes these products instead of torch.

    room  bytes of scratch memory;  rank  of the thin products of a side"""
    dtype, width = weight.dtype, weight.shape[0 if transposed else 1]
    kernel = _own(backend, weight.device)
    if kernel is None or dtype not in GPU_ROWS or not weight.is_contiguous() or not weight.numel():
        return False
    for x in xs:
        if (
            x.dtype != dtype
            or x.device != weight.device
            or not x.dim()
            or x.shape[-1] != width
            or type(x) not in (Tensor, Parameter)
        ):
            return False
        if x.is_neg() or torch._C._functorch.is_functorch_wrapped_tensor(x):
            return False
    counts = counts_of(xs)
    kind = weight.device.type
    if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
        return False
    if not _pays(weight, counts, rank):
        return False
    most = getattr(kernel, "thin_rank", rank)
    return rank <= most and (room is None or kernel.linear_bytes(counts, room) <= room)


def _pays(weight: Tensor, counts: Sequence[int], rank: int) -> bool:
    """Tells whether the kernel is faster than torch's product for so many rows of each side."""
    if weight.is_cpu:
        return library.yields(weight.dtype)
    if rank and weight.dtype == torch.float32:
        return False  # without z, torch reads W once too
    # where rows do not begin with a unit of eight weights, each weight has a block of the stream of its own
    return sum(counts) <= GPU_ROWS[weight.dtype] and not any([size % 8 for size in weight.shape])


def fused_linear(
    backend: Backend, weight: Weight, sides: Sides, noise: Noise | None = None, room: int | None = None
) -> Tensor:
    """Returns Multiplies.linear() of all sides, one below the other. Call only if fuses() returned True.

    z is made beside the product: no tile of W + z exists. On a CPU the sums do not depend on how sides and
    threads are joined."""
    flat, counts = list(map(flatten, sides.xs)), counts_of(sides.xs)
    tensor = weight.tensor
    y = tensor.new_empty(sum(counts), tensor.shape[1 if weight.transposed else 0])
    kernel = own(backend, tensor.device)
    kernel.linear(weight, Sides(flat, *sides[1:]), noise, room, torch.split_with_sizes(y, counts))
    return y


def _own(backend: Backend, device: torch.device) -> Multiplies | None:
    """Returns the backend whose kernel multiplies for this one: itself, or ``triton`` for ``cuda``."""
    if not hasattr(backend, "linear") and device.type == "cuda" and backends.why_off("triton") is None:
        backend = backends.get("triton") if backend.name == "cuda" else backend
    return typing.cast(Multiplies, backend) if hasattr(backend, "linear") else None


def own(backend: Backend, device: torch.device) -> Multiplies:
    """Returns the backend whose kernel multiplies. Call only if fuses() returned True."""
    kernel = _own(backend, device)
    assert kernel is not None
    return kernel
