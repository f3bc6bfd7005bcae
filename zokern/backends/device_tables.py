"""Tables of launches on the device: packed and uploaded once for a list, then found again.

The key of a table holds where each tensor lies, its dtype, shape, strides and Span, and those of the results.
It is made anew at each call, so a tensor that moved, was cast or reshaped has another key, and never meets an
old table. An upload is ordered by its stream, so the stream is part of the key. While a CUDA graph is
captured nothing may be uploaded; then the stream does not matter, because earlier uploads are complete.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .launch import Span

TABLES = 8192  # a model evaluated tensor by tensor has one for each tensor and side
BYTES = 1 << 26


class Kept(NamedTuple):
    buffer: Tensor | None  # uint8 on the device; None for a list without elements
    facts: Any  # what the host wants to know of the table


def key_of(
    thetas: Sequence[Tensor] | None,
    spans: Sequence[Span],
    outs: Sequence[Sequence[Tensor]] = (),
    residuals: Sequence[Tensor] | None = None,
    scales: Sequence[Tensor | None] | None = None,
) -> Hashable:
    """Returns all that pack.pack() reads of a list."""
    lists = [() if thetas is None else thetas, *outs, residuals or ()]
    where = [[(t.data_ptr(), t.dtype, t.shape, t.stride()) for t in tensors] for tensors in lists]
    factors = [(i, s.data_ptr(), s.dtype) for i, s in enumerate(scales or ()) if s is not None]
    rows = [(i, s.rows.data_ptr(), s.rows.numel()) for i, s in enumerate(spans) if s.rows is not None]
    return thetas is None, *map(tuple, where), tuple([s[:3] for s in spans]), tuple(rows), tuple(factors)


class Tables:
    """Holds the tables of one backend, and drops the least recently used first."""

    def __init__(self, tables: int = TABLES, bytes: int = BYTES) -> None:
        self.limits = (tables, bytes)
        self.kept: OrderedDict[tuple[Hashable, int], Kept] = OrderedDict()
        self.bytes = 0
        self.built = 0  # how often a table had to be packed
        self.captured: list[Kept] = []  # a captured graph reads these at every replay: never dropped

    def get(
        self, key: Hashable, device: torch.device, make: Callable[[], tuple[Sequence[np.ndarray], Any]]
    ) -> Kept:
        """Returns the table of this key. make() returns its parts, which are laid end to end, and its facts.

        Raises RuntimeError while a CUDA graph is captured and the table is not there yet."""
        key = (key, device)
        if capturing(device):
            return self._in_capture(key)
        place = (key, stream_of(device))
        kept = self.kept.get(place)
        if kept is not None:
            self.kept.move_to_end(place)
            return kept
        parts, facts = make()
        self.built += 1
        kept = self.kept[place] = Kept(upload(parts, device), facts)
        self.bytes += size(kept)
        while len(self.kept) > 1 and (len(self.kept) > self.limits[0] or self.bytes > self.limits[1]):
            self.bytes -= size(self.kept.popitem(last=False)[1])
        return kept

    def _in_capture(self, key: Hashable) -> Kept:
        for (other, _), kept in self.kept.items():
            if other == key:
                self.captured.append(kept)
                return kept
        raise RuntimeError(
            "this list of tensors has no table on the device yet, and none can be uploaded while a CUDA "
            "graph is captured; "
            "make the same call on the same tensors once before the capture"
        )


def capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def stream_of(device: torch.device) -> int:
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0


def size(kept: Kept) -> int:
    return 0 if kept.buffer is None else kept.buffer.nbytes


def upload(parts: Sequence[np.ndarray], device: torch.device) -> Tensor | None:
    """Uploads arrays end to end by one copy, ordered on the current stream. It does not block."""
    words = [np.ascontiguousarray(part).view(np.uint8).reshape(-1) for part in parts]
    host = (
        torch.from_numpy(np.concatenate(words)) if words else torch.empty(0, dtype=torch.uint8, device="cpu")
    )
    if not host.numel():
        return None
    return host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host


__all__ = ["Kept", "Tables", "key_of", "upload"]
