"""Sizes that suit a class of devices: what a CPU's caches hold is not what a GPU's launches want.

No size changes a bit of z or of the weights. Where a product is cut decides which of torch's kernels sums it.
"""

from __future__ import annotations

import os
from typing import NamedTuple

import torch

LEAST = 64 << 20  # bytes: the budget of copies on a CPU, and the least elsewhere


class DeviceClass(NamedTuple):
    """What a class of devices wants.

    tile      elements of a tile of perturbed weights at most
    rows      a tile that is not the whole matrix has a multiple of so many rows; 1: any, of nearly equal
              size
    sketched  elements of a sum of directions that exist at a time in a sketch
    share     of the free memory that copies may take; 0: LEAST, whatever is free
    """

    tile: int
    rows: int
    sketched: int
    share: float

    def tile_rows(self, total: int, most: int) -> int:
        """Returns the rows of a tile of a matrix with `total` rows, if `most` fit the budget."""
        most = max(1, most)
        if self.rows == 1:
            return -(-total // -(-total // most)) if total else 1
        return max(1, total) if most >= total else most - most % self.rows or most

    def budget(self, wanted: int, free: int) -> int:
        """Returns the bytes that copies may take, where `wanted` would hold them as they are best."""
        return max(LEAST, min(wanted, int(self.share * free)))


CPU = DeviceClass(
    tile=1 << 21,  # a larger one leaves the caches before it is read, a smaller one starves the product
    rows=1,  # its products take any shape at the same speed
    sketched=1 << 20,  # 4 MB of float32: read again while the caches hold it
    share=0.0,
)
GPU = DeviceClass(
    # whole matrices: a tile costs the host its launches whatever its size, and a short one leaves
    # multiprocessors without a block
    tile=1 << 62,
    rows=256,  # blocks of cuBLAS have 128 or 256; at odd counts the results are no longer aligned for it
    sketched=1 << 26,  # 256 MB of float32: some 60 us to write, longer than the host takes to launch it
    share=0.25,  # activations of all sides need the rest
)


def of(device: torch.device) -> DeviceClass:
    """Returns the class of a device."""
    return CPU if device.type == "cpu" else GPU


def free_memory(device: torch.device) -> int:
    """Returns the bytes that a device, or the machine, has free; unknown counts as plenty."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    if device.type == "meta":
        return 1 << 60
    try:
        with open("/proc/meminfo") as lines:
            return next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration, ValueError):
        pages = (
            os.sysconf("SC_AVPHYS_PAGES")
            if "SC_AVPHYS_PAGES" in getattr(os, "sysconf_names", {})
            else 1 << 40
        )
        return pages * (os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 4096)


__all__ = ["CPU", "GPU", "LEAST", "DeviceClass", "free_memory", "of"]
