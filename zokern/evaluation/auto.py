"""Evaluation ``auto``: the fastest way that reads this closure right, chosen in the first step.

The first step is read by 'master', which is always right (by 'scratch' where no copy of the weights fits).
Its inputs and calls of the model decide:

    several forwards in a closure (generation)   'master': perturbed weights are made once, and not at every
    use short batches                                'paired': W is read once for both sides, and Python runs
    once long batches                                 'scratch' on a CPU, 'master' on a GPU: products dominate

The chosen way is compared with 'master' (trust.py). One that refuses the closure, then or later, gives its
place to the next with one warning. An error that 'master' meets too is the closure's own, and is raised.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from .. import gemm
from ..parameters import is_compiled
from ..part import Part
from ..plan import Plan
from ..warning import warn
from .base import Point, Record, Refused
from .isolation import Isolation
from .jvp import Jvp
from .master import Master
from .paired import Paired
from .scratch import Scratch
from .trust import fits

ROWS = (
    # tokens or other inputs of the model up to which 'paired' is chosen for a dense z:
    # it is generated once for both sides
    512
)
FACTORED = gemm.JOIN // 2  # the same where z is factored: up to there W is read once


class Auto(Part):
    """Chooses between zokern.Master, zokern.Paired and zokern.Scratch; the step's record says which ran,
    and why.

    budget  bytes of reused memory per device for Paired and Scratch, see zokern.Scratch

    The first step is read by 'master'. The inputs of the model and its number of calls then decide:
    'master' for several forwards in a closure, 'paired' for short batches, else 'scratch' on a CPU and
    'master' on a GPU. What torch.compile made stays with 'master', where its graphs run as they are. A
    way that fails where 'master' reads gives its place to the next, with one warning. Derivatives are read
    as by zokern.Jvp. Weights are as before after every reading.
    Raises ValueError for a budget below 1 MB, and in a step what the closure raises."""

    name, exact, stands_in = "auto", True, False

    def __init__(self, budget: int | None = None) -> None:
        self.ways: dict[str, Any] = {"paired": Paired(budget), "scratch": Scratch(budget), "master": Master()}
        self.begin()

    def begin(self) -> None:
        """Forgets what was chosen, and takes copies of the ways as they are before a run."""
        self.ways = {name: way.fresh() for name, way in self.ways.items()}
        self.jvp = Jvp()
        self.differentiates = False  # whether the estimator asks for slopes
        self.order: list[str] = []  # ways that are left, the one in use first
        self.began = 0
        # first step: rows of the inputs, forwards, whether they are compiled; None once a way is chosen
        self.seen: tuple[int, ...] | None = None
        self.why = ""
        self.record = Record(self.name)

    @property
    def state(self) -> dict[str, Any]:
        """The way in use, and what the first step saw: a resumed run reads as the run that it continues."""
        return (
            {"choice": self.order[0], "seen": None if self.seen is None else list(self.seen)}
            if self.order
            else {}
        )

    @state.setter
    def state(self, kept: dict[str, Any]) -> None:
        name = kept.get("choice")
        self.order = [] if name not in self.ways else list(dict.fromkeys([name, "scratch", "master"]))
        self.began, self.seen = -1, tuple(kept["seen"]) if self.order and kept.get("seen") else None
        self.why = f"{name!r}, as in the run that was resumed" if self.order else ""

    @property
    def defers(self) -> bool:
        """Whether the way in use does. Where the estimator asks for slopes that is Jvp, which does not.

        Then checks alone read losses, in other steps of a resumed run than of the run that it continues."""
        return bool(self.order) and not self.differentiates and self.ways[self.order[0]].defers

    def losses(self, plan: Plan, points: Sequence[Point], closure: Callable[[], object]) -> Tensor:
        """Returns the losses at the points, float64 [len(points)]; see Evaluation.losses."""
        if not self.order:
            self._begin(plan)
        elif self.seen is not None and plan.step != self.began:
            self.order, self.why = _choose(plan, self.seen, self.order[0])
            self.seen = None
        failed: list[tuple[str, Refused]] = []
        order = self.order
        while True:
            way = self.ways[self.order[0]]
            try:
                if self.seen is not None:
                    isolation = Isolation(plan)
                    found = way.read(plan, points, closure, isolation)
                    here = isolation.rows, isolation.calls, isolation.compiled
                    self.seen = tuple(map(max, self.seen, here))
                else:
                    found = way.losses(plan, points, closure)
                break
            except Refused as problem:  # other errors are the closure's own (Scratch.read)
                left = [name for name in self.order[1:] if name != "master" or fits(plan)]
                if not left:
                    self.order = order  # no way could read it: the closure is at fault
                    raise
                failed.append((way.name, problem))
                self.order = left
        self.record = self._recorded(way)
        if failed:  # the next way could read what these could not: the closure is not at fault
            causes = "; ".join(f"{name!r}: {_first_line(problem)}" for name, problem in failed)
            self.why = f"{way.name!r}, because others failed: {causes}"
            self.record = self._recorded(way)
            warn(
                f"this closure is read by evaluation {way.name!r} from now on, because others cannot: "
                f"{causes}"
            )
        return found

    def slopes(
        self, plan: Plan, words: Sequence[int], closure: Callable[[], object]
    ) -> tuple[Tensor, Tensor]:
        """Returns losses and slopes as Jvp reads them: there is one way. See Differentiates.slopes."""
        found = self.jvp.slopes(plan, words, closure)
        self.differentiates = True
        self.record = replace(self.jvp.record, why="'jvp': the estimator asks for slopes")
        return found

    def _recorded(self, way: Any) -> Record:
        """Returns the record of the way that ran, with the reason for the choice before its own."""
        return replace(way.record, why="; ".join(filter(None, (self.why, way.record.why))))

    def _begin(self, plan: Plan) -> None:
        safe = "master" if plan.sharded or fits(plan) else "scratch"
        self.order, self.began, self.seen = [safe], plan.step, (0, 0, 0)
        self.why = f"{safe!r} reads the first step"


def _choose(plan: Plan, seen: Sequence[int], safe: str) -> tuple[list[str], str]:
    """Returns the ways in the order in which they are tried, and the reason."""
    rows, calls, compiled = seen
    if plan.sharded:
        return ["master"], "'master': the parameters are sharded, and each process writes its own blocks"
    rest = [safe] if safe == "master" else ["scratch"]
    if calls > 2 and safe == "master":
        return rest, f"'master': {calls} forwards in one closure"
    if safe == "master" and (compiled or any(map(is_compiled, plan.tree.modules))):
        return rest, "'master': torch.compile's graphs run there as they are"
    on_cpu = plan.groups[0].theta[0].device.type == "cpu"
    most = ROWS if plan.factored is None else FACTORED
    if rows <= most:
        order = ["paired", *(["scratch"] if on_cpu else []), *rest]
        return list(dict.fromkeys(order)), f"'paired': inputs of {rows} rows, up to {most}"
    if on_cpu or safe != "master":
        return list(dict.fromkeys(["scratch", *rest])), f"'scratch': inputs of {rows} rows, more than {most}"
    return rest, f"'master': inputs of {rows} rows, more than {most}, on a GPU"


def _first_line(problem: Exception) -> str:
    return f"{type(problem).__name__}: {problem}".splitlines()[0][:300]


__all__ = ["Auto"]
