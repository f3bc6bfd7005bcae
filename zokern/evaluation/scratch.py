"""Evaluation ``scratch``: the loss at theta + eps sum_k a_k z_k, a side at a time, from copies within a fixed
budget of memory.

Perturbed copies stand in the parameters' place while the closure runs (standin.py),
so the weights are never written:

    small tensors                   copied before the reading, in one launch per group
    linear, addmm (Conv1D)          a CPU kernel that makes z beside the product, or a tile of the weights at
                                    a time
    embedding, indexing             the rows that are looked up
    other functions                 the whole tensor, for that call; the record names it in `whole`
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..plan import Plan
from .arena import Arena
from .base import Point, Record, distinct
from .copies import Copies
from .isolation import Isolation
from .standin import standing_in
from .trust import Trust

MIB = 1 << 20


class Scratch:
    """Reads one point after another, from perturbed copies of the weights within a fixed budget of
    memory.

    budget  bytes of reused memory per device, at least 1 MB. None: 64 MB on a CPU; on a GPU room for two
            of the largest matrix, within a quarter of what is free. A use that cannot be tiled takes its
            own parameter's size if that is more. The step's record lists such parameters in ``whole``
    check   True: compare with 'master' in the first two steps, when flags or shapes change, and every 500
            steps; a difference is an error

    The weights are never written. Copies of small tensors and tiles of large ones stand in their place.
    Raises ValueError for a budget out of range. A step raises zokern.Refused where a use cannot be
    followed, as in TorchScript modules and for parameters of a class of their own."""

    name, defers, exact, stands_in = "scratch", True, True, True

    def __init__(self, budget: int | None = None, check: bool = True) -> None:
        if budget is not None and (not isinstance(budget, int) or budget < MIB):
            raise ValueError(
                f"{type(self).__name__}: budget is {budget!r} bytes; expected an integer, at least {MIB} (1 "
                "MB), or None"
            )
        self.arena = Arena(budget)
        self.trust = Trust(check)
        self.record = Record(self.name)
        self.state: dict[str, Any] = {}

    def losses(self, plan: Plan, points: Sequence[Point], closure: Callable[[], object]) -> Tensor:
        """Returns the losses at the points, float64 [len(points)]; see Evaluation.losses."""
        if self.trust.is_new(plan):
            self.trust.verify(self, plan, points, closure)
        elif plan.step != self.trust.step:
            for group in plan.groups:
                # of a comparison, or of another evaluation: a copy of all weights
                group.memo.pop("masters", None)
        isolation = Isolation(plan)
        found = self.read(plan, points, closure, isolation)
        if isolation.rows > self.trust.rows and self.trust.check and plan.tape is None:
            self.trust.verify(self, plan, points, closure)
        self.trust.rows = max(self.trust.rows, isolation.rows)
        return found

    def read(
        self, plan: Plan, points: Sequence[Point], closure: Callable[[], object], isolation: Isolation
    ) -> Tensor:
        """Returns the losses without a comparison."""
        read: dict[Point, Tensor] = {}
        whole: set[str] = set()
        largest = 0
        with isolation.session(eager=True):
            for point in distinct(points):
                copies = Copies(plan, [point], self.arena)
                read[point] = isolation.read(closure, standing_in(copies))
                whole |= copies.whole
                largest = max(largest, self.arena.peak, copies.largest)
        self.record = Record(self.name, scratch_bytes=largest, whole=tuple(sorted(whole)))
        return torch.stack([read[point] for point in points])


__all__ = ["MIB", "Scratch"]
