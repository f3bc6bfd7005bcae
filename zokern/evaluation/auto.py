"""Evaluation ``auto``: ``paired`` where reading both sides together pays, else ``scratch``. Chosen once, in the first step.

Measured (benchmarks/bench_methods.py): up to a few hundred rows a side, one read of the weights and one z for both sides is faster;
above, products dominate, joining them gains nothing, and the activations of both sides would be held for it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from .. import products
from . import meeting
from .paired import Paired
from .plan import Plan, Reading
from .scratch import MIB, Scratch

ROWS = 512  # rows of a product, one side, up to which `paired` is chosen for a dense z: it is generated once for both sides
FACTORED = products.JOIN // 2  # the same where z is factored: up to there W is read once


class Auto:
    """Paired or Scratch, by the size of the first batch. The step's record says which ran.

    budget  bytes of reused memory per device (default 64 MB)
    """

    name = "auto"

    def __init__(self, budget: int = 64 * MIB) -> None:
        self.scratch: Scratch = Scratch(budget)
        self.chosen: Scratch | Paired | None = None if meeting.greenlet is not None else self.scratch

    @property
    def choice(self) -> str | None:
        """What was chosen, for a state_dict: a resumed run reads as the run that it continues."""
        return self.chosen.name if self.chosen is not None else None

    @choice.setter
    def choice(self, name: str | None) -> None:
        if name == "paired" and meeting.greenlet is not None:
            self.chosen = Paired(self.scratch.arena.budget)
        elif name == "scratch":
            self.chosen = self.scratch

    def read(self, plan: Plan, closure: Callable[[], object], repeat_first: bool = False) -> Reading:
        if self.chosen is not None:
            reading = self.chosen.read(plan, closure, repeat_first)
            return replace(reading, evaluation=reading.evaluation or self.chosen.name)
        reading = self.scratch.read(plan, closure, repeat_first)
        if plan.probe:  # its z is dense where the steps' may be factored
            return replace(reading, evaluation="scratch")
        most = ROWS if plan.factored is None else FACTORED
        self.chosen = Paired(self.scratch.arena.budget) if reading.rows <= most else self.scratch
        return replace(reading, evaluation="scratch")


__all__ = ["Auto"]
