"""How far lowrank_ on matrix units may be from exact arithmetic,
element by element, and how much of that is used.

A factor x goes in as T bfloat16 terms, each the rounding of what is left: |x - x_0 - ... - x_(T-1)| <= 2^-8T
|x|, and |x_p| <= 2^-8p |x| to first order. Of the products x_p y_q those with p + q < T are summed. With S =
sum_k |left[i, k] right[j, k]|:

    two factors' remainders and the T - 1 largest products left out      (T + 2) 2^-8T S     (one unit of it
    covers the second order) N = T (T + 1) / 2 ceil(r / 16) matrix products, float32 sums          N 2^-20 S

A matrix unit adds sixteen products and an accumulator at one alignment, cut and not rounded, with at least 24
bits (Fasi et al. 2021, "Numerical behavior of NVIDIA tensor cores"): 17 errors of 2^-24 or less of the
largest, below 2^-19.9; N 2^-20 with exact products and rounded sums in the emulation. Then fma, decay and the
rounding of the result to its type.
"""

from __future__ import annotations

import torch

from zokern.backends import Batch, Outer, Span

UNIT = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}


def terms(rank: int, dtype: torch.dtype) -> int:
    """As csrc/lowrank.cu and triton_kernels/lowrank.py choose."""
    if dtype == torch.float32:
        return 3 if rank <= 64 else 2
    return 2 if rank <= 32 else 1


def bound(theta, left, right, scale: float, decay: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Exact results in float64 and the largest distances from them."""
    rank, dtype = right.shape[1], theta.dtype
    padded = next(size for size in (16, 32, 64, 128) if rank <= size)
    exact = decay * theta.double() + scale * left.double() @ right.double().t()
    size = abs(scale) * left.double().abs() @ right.double().abs().t()
    count = terms(padded, dtype)
    products = count * (count + 1) // 2 * -(-padded // 16)
    error = ((count + 2) * 2.0 ** (-8 * count) + 1.1 * products * 2.0**-20) * size
    error = error + 2.0**-23 * (size + (decay * theta.double()).abs())
    smallest = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps / 2
    return exact, error + UNIT[dtype] * (exact.abs() + error) + smallest


def share(backend, device: str, shape: tuple[int, int], rank: int, dtype: torch.dtype) -> float:
    """The largest error over its bound, of a random matrix with zeros and large weights in it."""
    generator = torch.Generator().manual_seed(rank)
    left, right = (torch.randn(rows, rank, generator=generator) for rows in shape)
    left *= torch.exp(2 * torch.randn(left.shape, generator=generator))
    theta = torch.randn(shape, generator=generator).to(dtype)
    theta[::3] = 0
    result = theta.to(device, copy=True)
    backend.lowrank_(Batch([result], [Span(1)]), Outer([left.to(device)], [right.to(device)], [0.37]))
    exact, error = bound(theta, left, right, 0.37, 1.0)
    return float(((result.cpu().double() - exact).abs() / error).max())
