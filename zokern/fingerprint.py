"""Fingerprint: what a step relies on of a tensor. Kernels take raw pointers, so any change is looked at before the next launch."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor


def memory_of(tensors: Iterable[Tensor]) -> list[tuple]:
    """Returns what a kernel takes from each tensor: address, dtype, shape, strides, device."""
    return [(t.data_ptr(), t.dtype, t.shape, t.stride(), t.device) for t in tensors]


def versions_of(tensors: Iterable[Tensor]) -> list[int]:
    """Returns the version counters: torch's operations, and this package's launches, add to them when they write."""
    return [t._version for t in tensors]


class Fingerprint:
    """The state of some tensors at one moment: where they lie, how they are read, and how often they were written."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self.tensors = tensors
        self.memory = memory_of(tensors)
        self.versions = versions_of(tensors)

    def written(self) -> None:
        """Accepts what was just written to the tensors."""
        self.versions = versions_of(self.tensors)

    def changes(self) -> list[int]:
        """Returns the positions of tensors that were written, moved or replaced since."""
        if versions_of(self.tensors) == self.versions and memory_of(self.tensors) == self.memory:
            return []
        now = zip(memory_of(self.tensors), versions_of(self.tensors))
        return [i for i, at in enumerate(now) if at != (self.memory[i], self.versions[i])]


def announce(tensors: Sequence[Tensor]) -> None:
    """Adds to the version counters of tensors that a kernel wrote through raw pointers."""
    torch.autograd.graph.increment_version(tensors)


__all__ = ["Fingerprint", "announce", "memory_of", "versions_of"]
