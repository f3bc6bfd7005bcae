"""Evaluation ``auto``: the fastest way that reads this closure right, chosen in the first step.

The first step is read by 'master', which is always right (by 'scratch' where no copy of the weights fits). Its inputs and calls of the
model decide:

    several forwards in a closure (generation)   'master': perturbed weights are made once, and not at every use
    short batches                                'paired': W is read once for both sides, and Python runs once
    long batches                                 'scratch' on a CPU, 'master' on a GPU: products dominate

The chosen way is compared with 'master' (trust.py). One that fails, then or later, gives its place to the next with one warning.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from .. import products
from ..warning import warn
from .base import Point, Record
from .isolation import Isolation
from .master import Master
from .paired import Paired
from ..plan import Plan
from .scratch import MIB, Scratch
from .trust import fits

ROWS = 512  # tokens or other inputs of the model up to which 'paired' is chosen for a dense z: it is generated once for both sides
FACTORED = products.JOIN // 2  # the same where z is factored: up to there W is read once


class Auto:
    """Master, Paired or Scratch. The step's record says which ran, and why.

    budget  bytes of reused memory per device for Paired and Scratch (default 64 MB)"""

    name = "auto"

    def __init__(self, budget: int = 64 * MIB) -> None:
        self.ways: dict[str, Any] = {"paired": Paired(budget), "scratch": Scratch(budget), "master": Master()}
        self.order: list[str] = []  # ways that are left, the one in use first
        self.why = ""
        self.record = Record(self.name)

    @property
    def choice(self) -> str | None:
        """The way in use, for a state_dict: a resumed run reads as the run that it continues."""
        return self.order[0] if self.order else None

    @choice.setter
    def choice(self, name: str | None) -> None:
        self.order = [] if name not in self.ways else [name, *(way for way in self.ways if way != name)]
        self.why = f"{name!r}, as in the run that was resumed" if self.order else ""

    @property
    def defers(self) -> bool:
        return bool(self.order) and self.ways[self.order[0]].defers

    def losses(self, plan: Plan, points: Sequence[Point], closure: Callable[[], object]) -> Tensor:
        """Returns the losses at the points, float64 [len(points)]; see Evaluation.losses."""
        if not self.order:
            return self._first(plan, points, closure)
        while True:
            way = self.ways[self.order[0]]
            try:
                found = way.losses(plan, points, closure)
                self.record = replace(way.record, why=self.why)
                return found
            except Exception as problem:
                if len(self.order) == 1 or way.name == "master":
                    raise
                found = self._without(way.name, problem, plan, points, closure)
                if found is not None:
                    return found

    def _without(
        self, name: str, problem: Exception, plan: Plan, points: Sequence[Point], closure: Callable[[], object]
    ) -> Tensor | None:
        """Goes on with the next way, if that reads what this one could not; else the closure is at fault and its error is raised."""
        left = [way for way in self.order[1:] if way != "master" or fits(plan)]
        if not left:
            raise problem
        way = self.ways["master" if "master" in left else left[0]]
        found = way.losses(plan, points, closure)
        left.sort(key=lambda way: way == "master")
        self.order = left
        self.why = f"{left[0]!r}: {name!r} failed ({_first_line(problem)})"
        warn(f"evaluation {name!r} cannot read this closure; the run goes on with {left[0]!r}. {_first_line(problem)}")
        self.record = replace(way.record, why=self.why)
        return found

    def _first(self, plan: Plan, points: Sequence[Point], closure: Callable[[], object]) -> Tensor:
        safe = self.ways["master" if fits(plan) else "scratch"]
        isolation = Isolation(plan)
        found = safe.read(plan, points, closure, isolation)
        self.order, self.why = _choose(plan, isolation, safe.name)
        self.record = replace(safe.record, why=f"the first step is read by {safe.name!r}; then {self.why}")
        while self.ways[self.order[0]] is not safe:
            way = self.ways[self.order[0]]
            try:
                way.trust.verify(way, plan, points, closure, isolation)
                break
            except Exception as problem:
                self.order = self.order[1:]
                self.why = f"{self.order[0]!r}: {way.name!r} failed ({_first_line(problem)})"
                warn(f"evaluation {way.name!r} cannot read this closure; the run goes on with {self.order[0]!r}. {_first_line(problem)}")
        return found


def _choose(plan: Plan, isolation: Isolation, safe: str) -> tuple[list[str], str]:
    """Returns the ways in the order in which they are tried, and the reason."""
    rest = [safe] if safe == "master" else ["scratch"]
    if isolation.calls > 2 and safe == "master":
        return rest, f"'master': {isolation.calls} forwards in one closure"
    on_cpu = plan.groups[0].theta[0].device.type == "cpu"
    most = ROWS if plan.factored is None else FACTORED
    if isolation.elements <= most:
        order = ["paired", *(["scratch"] if on_cpu else []), *rest]
        return list(dict.fromkeys(order)), f"'paired': inputs of {isolation.elements} elements, up to {most}"
    if on_cpu or safe != "master":
        return list(dict.fromkeys(["scratch", *rest])), f"'scratch': inputs of {isolation.elements} elements, more than {most}"
    return rest, f"'master': inputs of {isolation.elements} elements, more than {most}, on a GPU"


def _first_line(problem: Exception) -> str:
    return f"{type(problem).__name__}: {problem}".splitlines()[0][:300]


__all__ = ["Auto"]
