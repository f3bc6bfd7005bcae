"""Budget: the memory that copies of the trained parameters may take on each device, and whether it holds them
all.

    CPU  64 MB, half of it for tiles: they stay in the caches
    GPU  copies of all sides, if they are read in one pass and a quarter of the free memory holds them: one
         launch makes them, and torch's own batched products read them. Else both sides of the largest matrix,
         and the small tensors
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .. import devices
from ..group import Group
from ..plan import Plan
from .arena import ALIGN, Arena


def settle(arena: Arena, plan: Plan, sides: int, small: int, size: Callable[[Tensor], int]) -> bool:
    """Finds the budget of each device where none is given, and returns whether all copies fit.

    small  elements of a tensor that is copied before the reading in any case;  size  of a tensor, in bytes"""
    needed: dict[torch.device, list[int]] = {}
    for group in plan.groups:
        device = group.theta[0].device
        most = needed.setdefault(device, [0, 0, 0])
        everything, largest, little = _sizes(group, sides, small, size)
        needed[device] = [most[0] + everything, max(most[1], largest), most[2] + little]
    fits = True
    for device, (everything, largest, little) in needed.items():
        if not devices.of(device).share:
            fits &= everything <= arena.size(device) // 2
            continue
        everything, some = everything + little + ALIGN, 2 * largest + little + 2 * ALIGN
        if arena.budget is None:
            dense = all(group.matrices is None for group in plan.groups)
            arena.settle_budget(device, everything if dense and sides > 1 else some, some)
        fits &= everything <= arena.size(device)
    return fits


def _sizes(group: Group, sides: int, small: int, size: Callable[[Tensor], int]) -> tuple[int, int, int]:
    """Returns the bytes of all copies, of the largest one that is made at its use, and of all small ones."""
    key = "sizes", sides
    if key not in group.memo and not devices.of(group.theta[0].device).share:
        group.memo[key] = sum(size(t) for t in group.theta) * sides, 0, 0
    if key not in group.memo:
        thin = group.matrices is not None and group.residuals is None  # products without a copy
        large = [size(t) for t in group.theta if t.numel() > small and not thin]
        # vectors of 16 bits become float32
        little = 2 * max(2, sides) * sum(size(t) for t in group.theta if t.numel() <= small)
        group.memo[key] = sum(size(t) for t in group.theta) * sides, max(large, default=0), little
    return group.memo[key]


__all__ = ["settle"]
