"""Evaluation ``paired``: both sides of a pair, and of all queries, in one pass through the model.

The sides run the closure as it is and meet at every large matrix (meeting.py). There

    dense z      one tile of W is read, z is generated once, and both signs are multiplied from the cache
    factored z   one product x W^T of all sides' rows, and thin products beside it: (x V) C^T U^T

Everything else is as in ``scratch``: copies, tiles, budget, and weights that nobody touches. The losses are those of ``scratch``
to rounding: a joint product may sum in another order. Parameters that the sides read apart are named in the record's `unpaired`.

It needs a closure whose sides do not talk to one another: Python state that a model keeps between two of its modules is shared by
sides that run interleaved. So the first step is read both ways and compared, and where the sides disagree, or use streams of
`random` or NumPy, or write buffers, the run goes on with ``scratch`` and says why.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import replace

from . import meeting
from .arena import Arena
from .copies import Copies
from .meeting import Meeting, Unpairable
from .plan import Plan, Point, Reading, unrepeatable
from .scratch import MIB, Scratch
from .substitution import Substitution
from .surroundings import Surroundings, host_streams


class Paired:
    """Evaluation of all points of a step side by side.

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
        self.alone: str | None = None  # why the run goes on with scratch

    def read(self, plan: Plan, closure: Callable[[], object], repeat_first: bool = False) -> Reading:
        if self.alone is not None:
            return replace(self.scratch.read(plan, closure, repeat_first), evaluation=self.scratch.name)
        try:
            reading = self._read(plan, closure)
            if repeat_first and (again := self._read(plan, closure)).losses[0] != reading.losses[0]:
                raise unrepeatable(reading.losses[0][0], again.losses[0][0])
            if self.check:
                self._compare(reading, separate := self.scratch.read(plan, closure))
                self.check, reading = False, separate if self.alone else reading
        except Unpairable as problem:
            self._give_up(str(problem))
            reading = self.scratch.read(plan, closure, repeat_first)
        return replace(reading, evaluation="scratch" if self.alone else self.name)

    def _read(self, plan: Plan, closure: Callable[[], object]) -> Reading:
        surroundings = Surroundings(plan)
        copies = Copies(plan, self.arena)
        points = [Point(query, offset) for query in range(plan.queries) for offset in plan.stencil.offsets if offset]
        if 0.0 in plan.stencil.offsets:
            points.insert(0, Point(0, 0.0))
        found: dict[Point, float] = {}
        for part in range(0, len(points), self.sides):
            found.update(self._pass(surroundings, copies, points[part : part + self.sides], closure))
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
        self, surroundings: Surroundings, copies: Copies, points: list[Point], closure: Callable[[], object]
    ) -> dict[Point, float]:
        self.arena.reset()
        copies.prepare(points)

        def select(side: int) -> None:
            copies.side = side

        meet = Meeting(select)
        copies.meet = meet.join if len(points) > 1 else None
        surroundings.written.clear()
        with surroundings.session(eager=True):
            before = host_streams()
            bodies = [lambda: Surroundings.body(closure, Substitution(copies))] * len(points)
            losses = meet.run(bodies)
            moved = host_streams() != before
        copies.check_used()
        if moved:
            raise Unpairable("it draws from `random` or NumPy, whose streams the sides would share")
        if surroundings.written:
            raise Unpairable(f"it writes to buffers ({', '.join(sorted(surroundings.written)[:3])}) that the sides would share")
        return dict(zip(points, losses))

    def _compare(self, together: Reading, apart: Reading) -> None:
        """Losses of the same points, read both ways: equal to rounding, or something leaks from side to side."""
        pairs = [(a, b) for one, two in zip(together.losses, apart.losses) for a, b in zip(one, two)]
        worst = max((abs(a - b) / max(1.0, abs(b)) for a, b in pairs if math.isfinite(b)), default=0.0)
        tolerance = 0.05 if together.coarse else 1e-4
        if worst > tolerance or any(math.isfinite(a) != math.isfinite(b) for a, b in pairs):
            self._give_up(f"its losses differ by {worst:.2g} from those that are read one side after the other")

    def _give_up(self, why: str) -> None:
        self.alone = why
        warnings.warn(
            f"evaluation 'paired' goes on as 'scratch': the closure cannot be interleaved ({why})", RuntimeWarning, stacklevel=6
        )


__all__ = ["Paired"]
