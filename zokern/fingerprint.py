"""Fingerprint: what a step relies on of a tensor. Kernels take raw pointers, so any change is looked at
before the next launch."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from operator import attrgetter

import torch
from torch import Tensor

_dtype, _device, _version = attrgetter("dtype"), attrgetter("device"), attrgetter("_version")


def memory_of(tensors: Sequence[Tensor]) -> tuple[list, ...]:
    """Returns what a kernel takes from each tensor: addresses, strides, shapes, dtypes, devices."""
    maps = Tensor.data_ptr, Tensor.stride, Tensor.size, _dtype, _device
    return tuple([list(map(question, tensors)) for question in maps])


class Held:
    """The memory that some tensors are, at one moment."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self.aliases, self.dtypes = list(map(Tensor.detach, tensors)), list(map(_dtype, tensors))

    def by(self, tensors: Sequence[Tensor]) -> bool:
        """Tells whether each tensor is this memory still, with the strides, shape and dtype of then."""
        try:
            return (
                all(map(Tensor.is_set_to, tensors, self.aliases))
                and list(map(_dtype, tensors)) == self.dtypes
            )
        except RuntimeError:  # a tensor without memory now, or of another device
            return False


def versions_of(tensors: Iterable[Tensor]) -> list[int]:
    """Returns the version counters: torch's operations,
    and this package's launches, add to them when they write."""
    # a class of its own may answer for other numbers than its own, as quantised weights do
    with torch._C.DisableTorchFunctionSubclass():
        return list(map(_version, tensors))


def _places(tensors: Iterable[Tensor]) -> list[int]:
    """Returns the addresses, of tensors of any class."""
    with torch._C.DisableTorchFunctionSubclass():
        return list(map(Tensor.data_ptr, tensors))


class Fingerprint:
    """Where some tensors lie and how often they were written, at the moment of watch().

    places  the addresses of the tensors, where they are known already"""

    def __init__(self, tensors: Sequence[Tensor], places: list[int] | None = None) -> None:
        self.tensors, self.places = tensors, _places(tensors) if places is None else places
        self.versions: list[int] | None = None

    def watch(self) -> Fingerprint:
        """Takes the versions of now, unless those of an earlier moment count still; returns itself."""
        if self.versions is None:
            self.versions = versions_of(self.tensors)
        return self

    def written(self) -> None:
        """Accepts what is written to the tensors until the next watch()."""
        self.versions = None

    def changes(self) -> list[int]:
        """Returns the positions of tensors that were written, moved or replaced since."""
        if not self.tensors:
            return []
        places, versions = _places(self.tensors), versions_of(self.tensors)
        known = versions if self.versions is None else self.versions
        if versions == known and places == self.places:
            return []
        before = zip(known, self.places)
        return [i for i, (now, then) in enumerate(zip(zip(versions, places), before)) if now != then]


def announce(tensors: Sequence[Tensor]) -> None:
    """Adds to the version counters of tensors that a kernel wrote through raw pointers."""
    torch.autograd.graph.increment_version(tensors)


__all__ = ["Fingerprint", "Held", "announce", "memory_of", "versions_of"]
