"""theta + a z with tl.randn, as one writes it in Triton today: a yardstick. One normal for each Philox call,
and 32-bit offsets."""

from __future__ import annotations

from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None

if triton is not None:

    @triton.jit
    def kernel(theta, n, seed, a, BLOCK: tl.constexpr):
        i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        inside = i < n
        value = tl.load(theta + i, mask=inside).to(tl.float32) + a * tl.randn(seed, i)
        tl.store(theta + i, value.to(theta.dtype.element_ty), mask=inside)


def axpy_(theta: Tensor, seed: int, a: float, block: int = 1024) -> None:
    """In place; theta is contiguous and has fewer than 2^31 elements."""
    kernel[(triton.cdiv(theta.numel(), block),)](theta, theta.numel(), seed, a, BLOCK=block)
