"""Arena: the fixed budget of memory that perturbed copies live in."""

from __future__ import annotations

import torch
from torch import Tensor

ALIGN = 64  # bytes: a cache line, and the widest vector


class Arena:
    """One reused piece of memory per device:
    residents from the bottom, the tiles of the current call above them."""

    def __init__(self, budget: int) -> None:
        self.budget = budget
        self.memory: dict[torch.device, Tensor] = {}
        self.floor: dict[torch.device, int] = {}
        self.top: dict[torch.device, int] = {}
        self.pieces: dict[tuple, Tensor] = {}
        self.peak = 0

    def reset(self) -> None:
        self.floor, self.top, self.peak = {}, {}, 0

    def left(self, device: torch.device) -> int:
        return self.budget - self.top.get(device, 0) - ALIGN

    def take(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor | None:
        """A tensor from the arena, or None when the budget does not hold it."""
        count = 1
        for size in shape:
            count *= size
        start = -(-self.top.get(device, 0) // ALIGN) * ALIGN
        end = start + count * dtype.itemsize
        if end > self.budget:
            return None
        self.top[device] = end
        self.peak = max(self.peak, end)
        key = (start, shape, dtype, device)  # a step takes the same pieces as the one before
        if key not in self.pieces:
            if len(self.pieces) > 4096:
                self.pieces.clear()
            # whatever mode the closure is in, the next one may be in another, and its copies lie here too
            with torch.inference_mode(False):
                if device not in self.memory:  # pages come when they are used
                    self.memory[device] = torch.empty(self.budget, dtype=torch.uint8, device=device)
                piece = self.memory[device][start:end].view(dtype).view(shape)
                # with a version counter of its own: a write to a tile is none to its neighbours
                self.pieces[key] = piece.data
        return self.pieces[key]

    def settle(self) -> None:
        """What was taken so far stays; later takes are released by release()."""
        self.floor = dict(self.top)

    def release(self) -> None:
        self.top = dict(self.floor)
