"""Tensors inside guarded memory: every byte that does not belong to the tensor holds a sentinel, and so does
every output.

    buffer   [ guard | offset | t0 . t1 . t2 ... | guard ]      . = gap of a strided tensor
              A5 A5    A5 A5     A5   A5            A5 A5

Two backends start from equal buffers and the *whole* buffers are compared afterwards. That one comparison
finds a wrong value, an element that was not written (its sentinel is left), and a write before, after or
between the elements.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

# elements on each side: at least 128 bytes, so that offset 0 keeps the alignment of the allocation
GUARD = 64
# 0xA5A5 and 0xA5A5A5A5 are finite in every type, so a sentinel never passes for an expected NaN
SENTINEL = 0xA5

BITS = {
    torch.float64: torch.int64,
    torch.float32: torch.int32,
    torch.bfloat16: torch.int16,
    torch.float16: torch.int16,
    torch.int16: torch.int16,
}


@dataclass(frozen=True)
class Guarded:
    """A strided tensor in a buffer of sentinels. ``view`` is the tensor; ``copy_to`` an equal one on a
    device."""

    buffer: Tensor
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int

    @property
    def view(self) -> Tensor:
        return self.buffer.as_strided(self.shape, self.stride, self.offset)

    def copy_to(self, device: str) -> Guarded:
        return replace(self, buffer=self.buffer.to(device, copy=True))


def guarded(
    shape: tuple[int, ...], dtype: torch.dtype, offset: int = 0, see: Callable[[Tensor], Tensor] | None = None
) -> Guarded:
    """A tensor of sentinels: ``see(contiguous tensor of this shape)``, ``offset`` elements after an aligned
    address."""
    size = torch.Size(shape).numel()
    buffer = torch.full(((2 * GUARD + offset + size) * dtype.itemsize,), SENTINEL, dtype=torch.uint8).view(
        dtype
    )
    whole = buffer[GUARD + offset : GUARD + offset + size].view(shape)
    view = whole if see is None else see(whole)
    return Guarded(buffer, tuple(view.shape), view.stride(), view.storage_offset())


def filled(values: Tensor, offset: int = 0) -> Guarded:
    """A contiguous tensor with these values."""
    tensor = guarded(tuple(values.shape), values.dtype, offset)
    tensor.view.copy_(values)
    return tensor


def equal(result: Tensor, expected: Tensor, what: str) -> None:
    """Bit for bit, except that any NaN equals any NaN."""
    result = result.detach().cpu()
    if result.shape != expected.shape or result.dtype != expected.dtype:
        raise AssertionError(
            f"{what}: got {result.dtype} {tuple(result.shape)}, expected {expected.dtype} "
            f"{tuple(expected.shape)}"
        )
    if not expected.is_floating_point():
        wrong = result != expected
    else:
        bits = BITS[expected.dtype]
        wrong = (result.view(bits) != expected.view(bits)) & ~(result.isnan() & expected.isnan())
    if wrong.any():
        where = wrong.flatten().nonzero()[:, 0]
        first = int(where[0])
        raise AssertionError(
            f"{what}: {where.numel()} of {wrong.numel()} differ, the first at {first}: "
            f"got {result.flatten()[first].item()!r}, expected {expected.flatten()[first].item()!r}"
        )
