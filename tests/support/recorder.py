"""A backend for tensors on the meta device: it runs nothing, and records every launch.

Meta tensors have a shape and no values. A step that reads one fails with torch's own error, so a step that
runs on them waits for no device."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from torch import Tensor

from zokern.backends import Batch, Noise, Outer, Projected, Projection, Terms, Update
from zokern.ops import operands
from zokern.parameters import checks


class Launch(NamedTuple):
    """One call of a verb: how many tensors, elements and bytes of tensors it takes."""

    verb: str
    tensors: int
    elements: int
    bytes: int


@dataclass
class Recorder:
    """Records launches. `name` is that of a GPU backend, whose rules for lists it stands for."""

    name: str = "recorder"
    most_rank: int | None = 128
    launches: list[Launch] = field(default_factory=list)

    def _record(self, verb: str, tensors: Sequence[Tensor], device: torch.device | None = None) -> Tensor:
        assert all([t.device.type == "meta" for t in tensors]), f"{verb}: {[t.device for t in tensors][:3]}"
        self.launches.append(
            Launch(verb, len(tensors), sum(t.numel() for t in tensors), sum(t.nbytes for t in tensors))
        )
        return torch.empty(1, dtype=torch.int64, device="meta")

    def draw(self, batch: Batch, noise: Noise) -> None:
        self._record("draw", batch.tensors)

    def axpy_(self, batch: Batch, noise: Noise, terms: Terms) -> Tensor:
        return self._record("axpy_", batch.tensors)

    def update_(self, batch: Batch, noise: Noise, update: Update) -> Tensor:
        return self._record("update_", batch.tensors)

    def perturb(
        self, batch: Batch, noise: Noise, scales: Sequence[float], outs: Sequence[Sequence[Tensor]]
    ) -> None:
        self._record("perturb", batch.tensors)

    def lowrank_(self, batch: Batch, factors: Outer, noise: Any = None, outs: Any = None) -> Tensor:
        return self._record("lowrank_", batch.tensors)

    def project(self, projection: Projection) -> Projected:
        self._record("project", [projection.losses, projection.scalars])
        count = projection.losses.shape[1] if projection.weights is None else len(projection.weights)
        kinds = ((count, torch.float64), (count, torch.float64), (count, torch.float32), (3, torch.float32))
        return Projected(*[torch.empty(size, dtype=dtype, device="meta") for size, dtype in kinds])


NUMBERS: dict[int, int] = {}  # of storages


def _address(tensor: Tensor) -> int:
    """Returns what stands for the address of a tensor without memory: one number for each storage."""
    number = NUMBERS.setdefault(tensor.untyped_storage()._cdata, len(NUMBERS) + 1)
    return (number << 40) + tensor.storage_offset() * tensor.element_size()


@contextmanager
def on_meta() -> Iterator[None]:
    """Inside, an optimizer takes parameters on the meta device."""
    right = torch.Tensor.data_ptr
    kinds = [patch.object(room, "NO_MEMORY", set()) for room in (operands, checks)]

    def data_ptr(tensor: Tensor) -> int:
        return _address(tensor) if tensor.is_meta else right(tensor)

    with kinds[0], kinds[1], patch.object(torch.Tensor, "data_ptr", data_ptr):
        with patch.object(checks, "storage_of", lambda t: _address(t) >> 40):
            yield


__all__ = ["Launch", "Recorder", "on_meta"]
