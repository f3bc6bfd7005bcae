"""Products by the CPU's own kernel, which makes z beside the product."""

from __future__ import annotations

import typing
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import Parameter

from ..backends import Backend, Multiplies, Span
from . import library
from .rows import counts_of, flatten


def fuses(backend: Backend, xs: Sequence[Tensor], weight: Tensor, transposed: bool = False, room: int | None = None) -> bool:
    """Whether linear() of the CPU's kernels takes these products, z and all, from torch. room: bytes of scratch memory."""
    dtype, width = weight.dtype, weight.shape[0 if transposed else 1]
    if not (hasattr(backend, "linear") and library.yields(dtype) and weight.is_contiguous() and weight.numel()):
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
    flat = list(map(flatten, xs))
    y = weight.new_empty(sum(counts_of(xs)), columns)
    outs = torch.split_with_sizes(y, counts_of(xs))
    own(backend).linear(flat, weight, span, direction, seed, step, draws, scales, biases, (), room, outs, transposed)
    return y


def own(backend: Backend) -> Multiplies:
    """The same backend, where fuses() said that it multiplies."""
    return typing.cast(Multiplies, backend)
