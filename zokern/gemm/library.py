"""x W^T on the CPU by the fastest of the products that torch ships; elsewhere torch's own choice.

torch gives float32 products to MKL, which keeps its fast kernels for Intel's processors. It gives 16-bit
products to oneDNN if the processor has instructions for them, else to a plain loop. So, on x86:

    float32, another maker's processor, at most FEW rows   oneDNN's float32 product
    bfloat16, float16 without instructions for them        float32 products of blocks of W in a buffer that
                                                           the caches hold, rounded once

The choice depends on the processor and on the shapes alone: the same bits on every run of a machine.
benchmarks/bench_matmul.py prints what it is worth.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

FEW = 256  # rows of x above which MKL is not slower
WIDE = 8  # rows of x from which 16-bit blocks of W are worth being widened
BLOCK = 1 << 18  # elements of such a block: 1 MB in float32
WIDE_BLOCK = 1 << 25  # elements of one on another device, where a launch costs more than memory


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Returns x weight^T + bias, as torch.nn.functional.linear: float32 sums, one rounding.

    x (..., k), weight (m, k) with any strides"""
    if not chooses(x, weight):
        return F.linear(x, weight, bias)
    if x.dtype == torch.float32:
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return _widened(x, weight, bias)


def chooses(x: Tensor, weight: Tensor) -> bool:
    """Tells whether linear() takes another product than torch would."""
    if (
        x.dtype != weight.dtype
        or x.device.type != "cpu"
        or weight.dim() != 2
        or x.dim() < 2
        or not x.numel()
        or not weight.numel()
    ):
        return False
    if x.shape[-1] != weight.shape[1]:  # torch says what is wrong
        return False
    if torch.is_autocast_enabled("cpu") or (
        torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
    ):
        return False
    rows = x.numel() // x.shape[-1]
    if x.dtype == torch.float32:
        return rows <= FEW and has_onednn()
    return rows >= WIDE and x.dtype in (torch.bfloat16, torch.float16) and not has_half(x.dtype)


def yields(dtype: torch.dtype) -> bool:
    """Tells whether csrc/linear.cpp's product is faster here than torch's: then it computes products with z.

    Measured on AMD processors, with AVX2 and with AVX-512 (benchmarks/bench_matmul.py); Intel's are left to
    torch, unmeasured."""
    from ..backends import cpu

    if cpu.why_off() is not None or cpu.isa() == "scalar" or not has_onednn():
        return False
    return dtype == torch.float32 or not has_half(dtype) or (dtype == torch.bfloat16 and cpu.pairs())


def _widened(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Returns x weight^T by float32 products of blocks of W's rows."""
    flat = x.reshape(-1, x.shape[-1]).float()
    rows, width = weight.shape
    out = x.new_empty((flat.shape[0], rows))
    step = max(1, min(rows, BLOCK // width))
    buffer = torch.empty((step, width), dtype=torch.float32, device=weight.device)
    wide = None if bias is None else bias.float()
    for start in range(0, rows, step):
        stop = min(rows, start + step)
        block = buffer[: stop - start].copy_(weight[start:stop])
        out[:, start:stop] = linear(flat, block, None if wide is None else wide[start:stop])
    return out.view(*x.shape[:-1], rows)


def wide(x: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns x weight^T in float32 of operands that are rounded to a 16-bit dtype, x (rows, k).

    The sums are not rounded. Widened operands are exact, in TF32 too."""
    rows, width = weight.shape
    flat = x.to(dtype).float()
    step = max(1, min(rows, (BLOCK if weight.is_cpu else WIDE_BLOCK) // max(1, width)))
    out = torch.empty((x.shape[0], rows), dtype=torch.float32, device=x.device)
    for start in range(0, rows, step):
        block = weight[start : start + step]
        out[:, start : start + step] = linear(flat, block.to(dtype).float())
    return out


@cache
def has_onednn() -> bool:
    """Tells whether oneDNN's float32 product is there, and MKL, torch's choice, is on its slow path."""
    return (
        torch.backends.mkl.is_available()
        and _has("_linear_pointwise")
        and maker() not in ("", "GenuineIntel")
    )


@cache
def has_half(dtype: torch.dtype) -> bool:
    """Tells whether the processor has instructions for torch's product of this type; unknown is yes."""
    question = "_is_mkldnn_bf16_supported" if dtype == torch.bfloat16 else "_is_mkldnn_fp16_supported"
    return not _has(question) or bool(getattr(torch.ops.mkldnn, question)())


def _has(name: str) -> bool:
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, name)


def maker() -> str:
    """Returns the processor's maker as it names itself; empty if the system does not tell."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("vendor_id")), "")


@contextmanager
def one_thread() -> Iterator[None]:
    """Inside, torch has one thread: the sums of a product depend on how many share it."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


__all__ = ["linear", "one_thread", "wide"]
