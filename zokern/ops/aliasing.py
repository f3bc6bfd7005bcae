"""Questions of shared memory. Addresses are compared here, and given to no other file."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ..backends import TensorList

FEW = 4  # tensors up to which questions are asked one by one, and not by NumPy


def overlaps_itself(tensor: Tensor) -> bool:
    """Tells whether two elements of a strided tensor may share memory (those of expanded tensors do)."""
    if tensor.is_contiguous() or tensor.numel() == 0:
        return False
    reach = 0
    for stride, size in sorted(
        (stride, size) for size, stride in zip(tensor.shape, tensor.stride()) if size > 1
    ):
        if stride <= reach:
            return True
        reach += stride * (size - 1)
    return False


def shared_memory(tensors: Sequence[Tensor]) -> tuple[int, int] | None:
    """Returns the positions of two tensors that have an element in common, or None."""
    if len(tensors) <= FEW:
        ends = sorted([(start := t.data_ptr(), start + _reach(t)) for t in tensors])
        if all([end <= start for (_, end), (start, _) in zip(ends, ends[1:])]):
            return None
    tensors = TensorList.of(tensors)
    starts = tensors.pointers.astype(np.int64)
    sizes = (
        np.array([_reach(t) for t in tensors])
        if not tensors.contiguous
        else tensors.sizes * [d.itemsize for d in tensors.dtypes]
    )
    order = np.argsort(starts)
    if np.all((starts + sizes)[order][:-1] <= starts[order][1:]):
        return None
    spans = [(int(starts[i]), int(sizes[i]), int(i)) for i in order if sizes[i]]
    for position, (start, size, i) in enumerate(spans):
        for after, _, j in spans[position + 1 :]:
            if after >= start + size:
                break
            if tensors[i].device == tensors[j].device and not _interleaved(tensors[i], tensors[j]):
                return i, j
    return None


def _reach(tensor: Tensor) -> int:
    """Returns the bytes from a strided tensor's first element to the end of its last."""
    if tensor.is_contiguous():
        return tensor.numel() * tensor.element_size()
    last = sum((extent - 1) * stride for extent, stride in zip(tensor.shape, tensor.stride()))
    return (last + 1) * tensor.element_size() if tensor.numel() else 0


def _interleaved(a: Tensor, b: Tensor) -> bool:
    """Tells exactly whether two tensors with crossing extents share no element (columns of one matrix)."""
    if (
        (a.is_contiguous() and b.is_contiguous())
        or a.element_size() != b.element_size()
        or a.numel() + b.numel() > 1 << 24
    ):
        return False

    def addresses(t: Tensor) -> Tensor:
        index = torch.zeros((), dtype=torch.int64, device="cpu")
        for size, stride in zip(t.shape, t.stride()):
            index = (
                index.unsqueeze(-1)
                + torch.arange(size, dtype=torch.int64, device="cpu") * stride * t.element_size()
            )
        return index.flatten() + t.data_ptr()

    return not bool(torch.isin(addresses(a), addresses(b)).any())
