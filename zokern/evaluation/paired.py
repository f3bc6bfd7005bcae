"""Evaluation ``paired``: both sides of a pair, and of all queries, in one pass through the model.

The sides run the closure as it is and meet at every large matrix (meeting.py). There

    dense z      one tile of W is read, z is generated once, and both signs are multiplied from the cache
    factored z   one product x W^T of all sides' rows, and thin products beside it: (x V) C^T U^T

Everything else is as in ``scratch``: copies, tiles, budget, and weights that nobody touches. The losses are those of ``scratch``
to rounding: a joint product may sum in another order. Parameters that the sides read apart are named in the record's `unpaired`.

It needs a closure whose sides do not talk to one another: Python state that a model keeps between two of its modules is shared by
sides that run interleaved. So the first step, and the first in other train/eval modes, is read both ways and compared, and where the sides
disagree, or use streams of `random` or NumPy, or write buffers, the run goes on with ``scratch`` and says why. In 16 bits only losses
that differ by more than 5 % show.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

from ..warning import warn
from . import meeting, stacked
from .arena import Arena
from .copies import Copies
from .meeting import Meeting, Unpairable
from .objective import Objective
from .plan import Plan, Point, Reading, unrepeatable
from .scratch import MIB, Scratch
from .substitution import Substitution
from .surroundings import Surroundings, device_streams, host_streams


class Paired:
    """Evaluation of all points of a step side by side.

    A closure in the form of a zokern.Objective is read in one call of the model, over the rows of all sides (stacked.py), where that
    gives the same losses.

    budget  bytes of reused memory per device (default 64 MB), as in Scratch; activations of all sides live at once
    sides   most sides in one pass; more queries take several passes
    check   read the first step with Scratch too, and fall back to it where the losses differ
    """

    name = "paired"

    def __init__(self, budget: int = 64 * MIB, sides: int = 32, check: bool = True) -> None:
        if meeting.greenlet is None:
            raise ImportError(
                "evaluation 'paired' needs the package greenlet: pip install greenlet, or use evaluation='scratch'"
            )
        if not isinstance(sides, int) or sides < 2:
            raise ValueError(f"Paired: sides is {sides!r}; expected an integer, at least 2")
        self.scratch = Scratch(budget)
        self.arena: Arena = self.scratch.arena
        self.sides, self.check = sides, check
        self.checked: dict[str, tuple[bool, ...]] = {}  # ways that were compared with scratch, and train/eval flags then
        self.refused: dict[str, str] = {}  # ways that this closure cannot be read in, and why

    @property
    def alone(self) -> str | None:
        """Why the run goes on with scratch; None while it does not."""
        return self.refused.get("met")

    def read(self, plan: Plan, closure: Callable[[], object], repeat_first: bool = False) -> Reading:
        apart: Reading | None = None
        flags = tuple([module.training for root in plan.roots for module in root.modules()])
        for way in ("stacked", "met") if isinstance(closure, Objective) else ("met",):
            if way in self.refused:
                continue
            unknown = self.check and self.checked.get(way) != flags
            try:
                reading = self._read(plan, closure, way)
                if repeat_first and (again := self._read(plan, closure, way)).losses[0] != reading.losses[0]:
                    raise unrepeatable(reading.losses[0][0], again.losses[0][0])
                if unknown:
                    apart = apart or self.scratch.read(plan, closure)
                    _compare(reading, apart)
                    self.checked[way] = flags
                return replace(reading, evaluation=self.name)
            except Unpairable as problem:
                self._refuse(way, str(problem))
            except Exception as problem:  # a model that cannot take more rows: the sides' own readings tell whether it is that
                if way != "stacked" or not unknown:
                    raise
                self._refuse(way, f"{type(problem).__name__}: {problem}")
        return replace(apart or self.scratch.read(plan, closure, repeat_first), evaluation=self.scratch.name)

    def _read(self, plan: Plan, closure: Callable[[], object], way: str) -> Reading:
        surroundings = Surroundings(plan)
        copies = Copies(plan, self.arena)
        points = [Point(query, offset) for query in range(plan.queries) for offset in plan.stencil.offsets if offset]
        if 0.0 in plan.stencil.offsets:
            points.insert(0, Point(0, 0.0))
        found: dict[Point, float] = {}
        sides = 2 if plan.probe else self.sides  # many probes: no more activations than a step's
        for part in range(0, len(points), sides):
            found.update(self._pass(surroundings, copies, points[part : part + sides], closure, way))
        losses = [
            tuple(found[Point(query, offset) if offset else Point(0, 0.0)] for offset in plan.stencil.offsets)
            for query in range(plan.queries)
        ]
        whole, unseen = copies.report()
        return Reading(
            losses, [0.0] * plan.queries, max(self.arena.peak, copies.largest), unseen, whole, tuple(sorted(copies.alone)),
            copies.rows, copies.coarse,
        )  # fmt: skip

    def _pass(
        self, surroundings: Surroundings, copies: Copies, points: list[Point], closure: Callable[[], object], way: str
    ) -> dict[Point, float]:
        self.arena.reset()
        copies.prepare(points)

        def select(side: int) -> None:
            copies.side = side

        meet = Meeting(select)
        copies.together = len(points) > 1
        copies.meet = meet.join if copies.together else None
        surroundings.written.clear()
        with surroundings.session(eager=True):
            before = host_streams()
            if way == "stacked" and isinstance(closure, Objective):
                copies.meet = None
                seeded = device_streams()
                losses = stacked.read(copies, closure)
                if device_streams() != seeded:
                    raise Unpairable("it draws random numbers (dropout), of which the rows of each side would get others")
            else:
                bodies = [lambda: Surroundings.body(closure, Substitution(copies))] * len(points)
                losses = meet.run(bodies)
            moved = host_streams() != before
        copies.check_used()
        if moved:
            raise Unpairable("it draws from `random` or NumPy, whose streams the sides would share")
        if surroundings.written:
            raise Unpairable(f"it writes to buffers ({', '.join(sorted(surroundings.written)[:3])}) that the sides would share")
        return dict(zip(points, losses))

    def _refuse(self, way: str, why: str) -> None:
        self.refused[way] = why
        if way == "stacked":
            warn(f"the Objective is read side by side and not in one call of its model for all sides ({why})")
        else:
            warn(f"evaluation 'paired' goes on as 'scratch': the closure cannot be interleaved ({why})")


def _compare(together: Reading, apart: Reading) -> None:
    """Losses of the same points, read both ways: equal to rounding, or something leaks from side to side.

    In float32 the difference of the sides is compared too: a loss that mixes the sides is near enough to both."""
    tolerance = 0.05 if together.coarse else 1e-4
    for mine, right in zip(together.losses, apart.losses):
        for a, b in zip(mine, right):
            if math.isfinite(a) != math.isfinite(b) or (math.isfinite(b) and abs(a - b) > tolerance * max(1.0, abs(b))):
                raise Unpairable(f"its loss is {a!r}, and {b!r} when it is read one side after the other")
        noise = 4e-6 * max(1.0, *map(abs, right))
        spread, expected = mine[0] - mine[-1], right[0] - right[-1]
        if not together.coarse and abs(expected) > 10 * noise and abs(spread - expected) > 0.25 * abs(expected):
            raise Unpairable(f"its losses differ by {spread:.3g}, and by {expected:.3g} when they are read one after the other")


__all__ = ["Paired"]
