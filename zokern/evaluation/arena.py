"""Arena: the memory that perturbed copies live in, reused from call to call within a budget."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import devices

ALIGN = 64  # bytes: a cache line, and the widest vector


class Arena:
    """One reused piece of memory per device and stream: residents from the bottom, the tiles of the current
    call above them.

    Work of one stream is in order, so a tile may take the place of the one before. A model that uses several
    streams has memory for each.

    budget    bytes per device; None: as settle_budget() finds it, devices.LEAST until then
    renewals  how often a device's memory was given up for a larger one"""

    def __init__(self, budget: int | None = None) -> None:
        self.budget = budget
        self.sizes: dict[torch.device, int] = {}
        self.wanted: dict[torch.device, int] = {}
        self.memory: dict[tuple[torch.device, int], Tensor] = {}
        self.floor: dict[torch.device, int] = {}
        self.top: dict[torch.device, int] = {}
        self.pieces: dict[tuple, Tensor] = {}
        self.peak = self.renewals = 0

    def settle_budget(self, device: torch.device, wanted: int, enough: int) -> None:
        """Sets the budget of a device to what is wanted if its free memory allows that, else to what is
        enough, as far as it goes. It never shrinks."""
        if wanted <= self.wanted.get(device, 0):
            return
        self.wanted[device] = wanted
        self.memory = {key: memory for key, memory in self.memory.items() if key[0] != device}
        self.pieces.clear()
        self.renewals += 1
        kind, free = devices.of(device), devices.free_memory(device)
        found = kind.budget(wanted, free)
        found = found if found >= wanted else kind.budget(enough, free)
        self.sizes[device] = max(found, self.size(device))

    def size(self, device: torch.device) -> int:
        """Returns the budget of a device."""
        return self.sizes.get(device, devices.LEAST) if self.budget is None else self.budget

    def reset(self) -> None:
        self.floor, self.top, self.peak = {}, {}, 0

    def left(self, device: torch.device) -> int:
        return self.size(device) - self.top.get(device, 0) - ALIGN

    def take(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor | None:
        """A tensor from the arena, or None when the budget does not hold it."""
        count = 1
        for size in shape:
            count *= size
        start = -(-self.top.get(device, 0) // ALIGN) * ALIGN
        end = start + count * dtype.itemsize
        if end > self.size(device):
            return None
        self.top[device] = end
        self.peak = max(self.peak, end)
        place = device, stream_of(device)
        key = (start, shape, dtype, place)  # a step takes the same pieces as the one before
        if key not in self.pieces:
            if len(self.pieces) > 4096:
                self.pieces.clear()
            # whatever mode the closure is in, the next one may be in another, and its copies lie here too
            with torch.inference_mode(False):
                if place not in self.memory:  # pages come when they are used
                    self.memory[place] = torch.empty(self.size(device), dtype=torch.uint8, device=device)
                piece = self.memory[place][start:end].view(dtype).view(shape)
                # with a version counter of its own: a write to a tile is none to its neighbours
                self.pieces[key] = piece.data
        return self.pieces[key]

    def settle(self) -> None:
        """What was taken so far stays; later takes are released by release()."""
        self.floor = dict(self.top)

    def release(self) -> None:
        self.top = dict(self.floor)


def stream_of(device: torch.device) -> int:
    """Returns the stream that work on a device is put on, as a number; 0 where there is one alone."""
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
