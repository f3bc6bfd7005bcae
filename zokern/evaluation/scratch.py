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

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..parameters import is_compiled
from ..part import Part
from ..plan import Plan
from . import exchange
from .arena import Arena
from .base import WAY_OUT, Point, Record, Refused, distinct
from .copies import Copies
from .isolation import Isolation
from .loss import loss_tensor
from .master import Master
from .standin import standing_in
from .trust import Reads, Trust, fits

MIB = 1 << 20
SETS = 3  # of trained parameters: torch makes 8 graphs of a function, and then none


class Scratch(Part):
    """Reads one point after another, from perturbed copies of the weights within a fixed budget of
    memory.

    budget  bytes of reused memory per device, at least 1 MB. None: 64 MB on a CPU; on a GPU room for two
            of the largest matrix, within a quarter of what is free. A use that cannot be tiled takes its
            own parameter's size if that is more. The step's record lists such parameters in ``whole``
    check   True: compare with 'master' in the first two steps, when flags or shapes change, and every 500
            steps; a difference is an error

    The weights are never written. Copies of small tensors and tiles of large ones stand in their place.
    What torch.compile made stays compiled (docs/internals.md).
    Raises ValueError for a budget out of range. A step raises zokern.Refused where a use cannot be
    followed, as in TorchScript modules and for parameters of a class of their own. An exception that 'master'
    meets too is the closure's own, and is raised as it is; the closure runs once or twice more to tell."""

    name, defers, exact, stands_in = "scratch", True, True, True
    sides = 1  # points that are read in one pass
    refusal = "copies cannot stand in for the weights in this closure"

    def __init__(self, budget: int | None = None, check: bool = True) -> None:
        if budget is not None and (not isinstance(budget, int) or budget < MIB):
            raise ValueError(
                f"{type(self).__name__}: budget is {budget!r} bytes; expected an integer, at least {MIB} (1 "
                "MB), or None"
            )
        self.budget, self.check = budget, check
        self.begin()

    def begin(self) -> None:
        """Forgets what was compared and compiled, and takes memory of its own."""
        super().begin()
        self.arena, self.trust, self.record = Arena(self.budget), Trust(self.check), Record(self.name)
        self.why = ""  # what torch.compile made runs as Python; empty: it does not
        self.trained: set[tuple[str, ...]] = set()  # sets of parameters for which graphs were made

    def losses(self, plan: Plan, points: Sequence[Point], closure: Callable[[], object]) -> Tensor:
        """Returns the losses at the points, float64 [len(points)]; see Evaluation.losses."""
        if self.trust.is_new(plan):
            self._verify(plan, points, closure)
        elif plan.step != self.trust.step:
            for group in plan.groups:
                # of a comparison, or of another evaluation: a copy of all weights
                group.memo.pop("masters", None)
        isolation = Isolation(plan)
        found = self.read(plan, points, closure, isolation)
        if isolation.rows > self.trust.rows and self.trust.check and plan.tape is None:
            before = self.why
            self._verify(plan, points, closure)
            if self.why != before:
                found = self.read(plan, points, closure, Isolation(plan))
        self.trust.rows = max(self.trust.rows, isolation.rows)
        return found

    def _verify(self, plan: Plan, points: Sequence[Point], closure: Callable[[], object]) -> None:
        """Compares the losses with those of 'master'; graphs that read others run as Python."""
        verify = partial(self.trust.verify, self, plan, points, closure)
        try:
            verify()
        except Refused as problem:
            if not self._runs_graphs(plan):
                raise
            self._without_graphs(problem, verify)

    def read(
        self, plan: Plan, points: Sequence[Point], closure: Callable[[], object], isolation: Isolation
    ) -> Tensor:
        """Returns the losses without a comparison."""
        read = partial(self._read_eager, plan, points, closure, isolation)
        if not self._runs_graphs(plan):
            return read()
        try:
            return self._read(plan, points, closure, isolation, graphs=True)
        except Exception as problem:
            return self._without_graphs(problem, read)

    def _read_eager(
        self, plan: Plan, points: Sequence[Point], closure: Callable[[], object], isolation: Isolation
    ) -> Tensor:
        """Returns the losses, without torch.compile's graphs. What fails here alone is refused."""
        try:
            return self._read(plan, points, closure, isolation, graphs=False)
        except Refused:
            raise
        except Exception as problem:
            if not self._fails_alone(plan, points, closure):
                raise
            said = f"{type(problem).__name__}: {problem}"
            raise Refused(f"{self.refusal} ({said}): {WAY_OUT}") from problem

    def _fails_alone(self, plan: Plan, points: Sequence[Point], closure: Callable[[], object]) -> bool:
        """Whether another way reads the points at which this one failed, and this one fails again: else the
        error is the closure's own."""
        if (safer := self._safer(plan)) is None:
            return False
        try:
            safer.read(plan, points, closure, Isolation(plan))
        except Exception:
            return False
        try:
            self._read(plan, points, closure, Isolation(plan), graphs=False)
        except Exception:
            return True
        return False

    def _safer(self, plan: Plan) -> Reads | None:
        """Returns the way that tells whose an error is; None: there is no memory for one."""
        return Master() if fits(plan) else None

    def _runs_graphs(self, plan: Plan) -> bool:
        """Whether what torch.compile made stays compiled."""
        if plan.tree.is_compiled is None:
            plan.tree.is_compiled = any(map(is_compiled, plan.tree.modules))
        return plan.tree.is_compiled and not self.why

    def _without_graphs(self, problem: Exception, act: Callable[[], Any]) -> Any:
        """Lets Python run in the place of graphs, from now on unless that fails too."""
        said = " ".join(f"{type(problem).__name__}: {problem}".split())
        self.why = f"torch.compile's graphs run as Python: {said[:300]}"
        try:
            return act()
        except Exception:
            self.why = ""
            raise

    def _read(
        self, plan: Plan, points: Sequence[Point], closure: Callable[[], object], isolation: Isolation,
        graphs: bool,
    ) -> Tensor:  # fmt: skip
        each = distinct(points)
        found: list[Tensor] = []
        whole: set[str] = set()
        largest = 0
        if graphs:
            if not exchange.guards_see_stand_ins():
                raise Refused(f"guards of torch {torch.__version__} do not see perturbed parameters")
            self.trained.add(tuple(plan.names))
            if len(self.trained) > SETS:  # as where each step moves other layers
                raise Refused(f"more than {SETS} sets of trained parameters, each with graphs of its own")
        with isolation.session(eager=not graphs), _quiet():
            for part in range(0, len(each), self.sides):
                here = each[part : part + self.sides]
                copies = Copies(plan, here, self.arena)
                found.append(
                    isolation.run(partial(exchange.losses if graphs else self._pass, copies, closure))
                )
                whole |= copies.whole
                largest = max(largest, self.arena.peak, copies.largest)
        self.record = Record(self.name, self.why, largest, tuple(sorted(whole)))
        losses = found[0] if len(found) == 1 else torch.cat(found)
        if each == list(points):
            return losses
        read = dict(zip(each, losses.unbind(0)))
        return torch.stack([read[point] for point in points])

    def _pass(self, copies: Copies, closure: Callable[[], object]) -> Tensor:
        """Returns the losses of all sides of a pass."""
        with standing_in(copies):
            return loss_tensor(closure(), copies.plan.rows).unsqueeze(0)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keeps torch from warning about operations that it maps in a loop."""
    functorch: Any = torch._C._functorch
    functorch._set_vmap_fallback_warning_enabled(False)
    try:
        yield
    finally:
        functorch._set_vmap_fallback_warning_enabled(True)


__all__ = ["MIB", "Scratch"]
