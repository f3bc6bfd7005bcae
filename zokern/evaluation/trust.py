"""Trust: a faster evaluation is compared with one through real parameters, at the same points and a larger offset.

The offset grows until the losses of two points differ by more than rounding does, so a parameter that the faster way does not perturb,
or a stale cache, stands out. Compared are the first step, the first in other train/eval flags or with larger inputs, and every 500th.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from ..plan import Plan
from .base import THETA, WAY_OUT, NotRepeatable, Point, Refused
from .isolation import Isolation
from .master import Master

EVERY = 500  # steps
FARTHEST = 0.25  # largest offset of a comparison, in weights per unit of z


class Reads(Protocol):
    name: str

    def read(self, plan: Plan, points: Sequence[Point], closure: Callable[[], object], isolation: Isolation) -> Tensor: ...


class Trust:
    """Remembers what was compared.

    rows  of the largest inputs that the model got since"""

    def __init__(self, check: bool = True) -> None:
        self.check = check
        self.flags: list[bool] = []
        self.step = -1
        self.rows = 0

    def is_new(self, plan: Plan) -> bool:
        """Whether a comparison is due before the next reading."""
        flags = [module.training for module in plan.tree.modules]
        recent = 0 <= plan.step - self.step < EVERY and self.step >= 0
        return self.check and not (recent and flags == self.flags)

    def verify(self, evaluation: Reads, plan: Plan, points: Sequence[Point], closure: Callable[[], object]) -> None:
        """Raises Refused if the evaluation reads other losses than 'master'; does nothing where no copy of the weights fits."""
        if fits(plan):
            self.rows = max(self.rows, compare(evaluation, Master(), plan, points, closure))
        self.flags, self.step = [module.training for module in plan.tree.modules], plan.step


def compare(fast: Reads, safe: Reads, plan: Plan, points: Sequence[Point], closure: Callable[[], object]) -> int:
    """Raises Refused if two evaluations disagree on the losses at some of the points, farther away; returns the rows of the inputs."""
    ends = [point for point in dict.fromkeys(points) if point.terms][:2]
    if not ends:
        return 0
    coarse = any(t.dtype != torch.float32 for group in plan.groups for t in group.theta)
    eps = max(group.eps for group in plan.groups)
    # in 16 bits 'master' rounds norm weights that the faster way reads in float32: not where the offset is large
    factor = start = max(1.0, 0.03 / eps) if coarse else 1.0
    while True:
        pair = [point.scaled(factor) for point in ends]
        pair = pair if len(pair) == 2 else [*pair, THETA]
        right = safe.read(plan, pair, closure, Isolation(plan)).tolist()
        if factor == start:  # before a faster way leaves traces of its own in what the closure keeps
            again = safe.read(plan, pair[:1], closure, Isolation(plan)).item()
            if abs(again - right[0]) > (4e-3 if coarse else 1e-4) * abs(right[0]):
                raise NotRepeatable(right[0], again)
        size, spread = max(map(abs, right)), abs(right[0] - right[1])
        if not size < float("inf") or spread > (0.02 if coarse else 1e-3) * size or factor * 8 * eps > FARTHEST:
            break
        factor *= 8
    if not size < float("inf"):
        return 0  # the loss is NaN or infinite: nothing to compare
    isolation = Isolation(plan)
    mine = fast.read(plan, pair, closure, isolation).tolist()
    allowed = (0.2 if coarse else 0.02) * spread + (4e-3 if coarse else 4e-6) * size
    for a, b in zip(mine, right):
        if not abs(a - b) <= allowed:
            raise Refused(
                f"evaluation {fast.name!r} reads the loss {a:.6g} where {safe.name!r} reads {b:.6g} (offset {factor * eps:.3g}): the "
                f"closure reads a trained parameter in a way that {fast.name!r} cannot follow; {WAY_OUT}"
            )
    return isolation.rows


def fits(plan: Plan) -> bool:
    """Whether a copy of what is trained fits the free memory of its devices, with a tenth to spare."""
    needed: dict[torch.device, int] = {}
    for group in plan.groups:
        for t in group.theta:
            held = 0 if "masters" in group.memo else t.numel() * t.element_size()
            needed[t.device] = needed.get(t.device, 0) + held
    return all(size < 0.9 * free_memory(device) for device, size in needed.items())


def free_memory(device: torch.device) -> int:
    """Returns the bytes that a device, or the machine, has free; unknown counts as plenty."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    try:
        with open("/proc/meminfo") as lines:
            return next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration, ValueError):
        pages = os.sysconf("SC_AVPHYS_PAGES") if "SC_AVPHYS_PAGES" in getattr(os, "sysconf_names", {}) else 1 << 40
        return pages * (os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 4096)


__all__ = ["Trust", "compare", "fits", "free_memory"]
