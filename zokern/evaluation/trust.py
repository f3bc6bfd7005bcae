"""Trust: a faster evaluation is compared with one through real parameters,
at the same points and a larger offset.

The offset grows until the losses of two points differ by more than rounding does, so a parameter that the
faster way does not perturb, or a stale cache, stands out. Compared are the first step, the first in other
train/eval flags or with larger inputs, and every 500th.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from ..devices import free_memory
from ..modules import State
from ..plan import Plan
from .base import THETA, WAY_OUT, NotRepeatable, Point, Refused
from .isolation import Isolation
from .loss import mean_of
from .master import Master

EVERY = 500  # steps
FARTHEST = 0.1  # largest offset of a comparison, in weights per unit of z


class Reads(Protocol):
    name: str

    def read(
        self, plan: Plan, points: Sequence[Point], closure: Callable[[], object], isolation: Isolation
    ) -> Tensor: ...


class Trust:
    """Remembers what was compared.

    rows  of the largest inputs that the model got since"""

    def __init__(self, check: bool = True) -> None:
        self.check = check
        self.flags: list[bool] = []
        self.seen: State | None = None  # a state of the modules with these flags
        # parameters that were moved in a comparison: a step may move one part after another
        self.names: set[str] = set()
        self.step = -1
        self.rows = 0

    def is_new(self, plan: Plan) -> bool:
        """Whether a comparison is due before the next reading."""
        return (
            self.check
            and plan.tape is None
            and not (self._is_recent(plan) and self.names.issuperset(plan.names))
        )

    def _is_recent(self, plan: Plan) -> bool:
        if not 0 <= plan.step - self.step < EVERY or self.step < 0:
            return False
        tree = plan.tree
        if tree.seen is None or tree.seen is not self.seen:
            if [module.training for module in tree.modules] != self.flags:
                return False
            self.seen = tree.seen if tree.is_plain else None
        return True

    def verify(
        self, evaluation: Reads, plan: Plan, points: Sequence[Point], closure: Callable[[], object]
    ) -> None:
        """Raises Refused if the evaluation reads other losses than 'master'.

        Does nothing where no copy of the weights fits. Without a point beside theta there is nothing to
        compare, and the comparison stays due."""
        if not any(point.terms for point in points):
            return
        if plan.rows:
            plan, closure = replace(plan, rows=False), mean_of(closure)
        if fits(plan):
            self.rows = max(self.rows, compare(evaluation, Master(), plan, points, closure))
        if not self._is_recent(plan):
            self.names = set()
            self.flags = [module.training for module in plan.tree.modules]
            self.step = plan.step
        self.names.update(plan.names)


class _Case(NamedTuple):
    """A pair of points at an offset, as the safe way reads it.

    apart  by how many times the noise its losses differ
    noise  that a right reading may have"""

    apart: float
    noise: float
    points: list[Point]
    losses: list[float]
    offset: float


def compare(
    fast: Reads,
    safe: Reads,
    plan: Plan,
    points: Sequence[Point],
    closure: Callable[[], object],
    floor: float | None = None,
) -> int:
    """Raises Refused if two evaluations disagree on the losses of a pair of points;
    returns the rows of the inputs.

    The pair moves away from theta until its losses differ by far more than rounding does: in 16 bits by the
    difference between rounding the weights to nearest and stochastically, in float32 by a few units in the
    last place.

    floor  noise that was measured: rounding to 16 bits inside the closure; None: none is known"""
    ends = [point for point in dict.fromkeys(points) if point.terms][:2]
    if not ends:
        return 0
    coarse = plan.is_coarse or floor is not None
    share, enough = (0.25, 32) if coarse else (0.02, 250)
    tried: list[_Case] = []
    refusal: Refused | None = None
    for case in _farther(safe, plan, ends, closure, floor, coarse):
        tried.append(case)
        if case.apart <= enough:
            continue
        rows, apart = _agree(fast, plan, case, share, closure)
        if not apart:
            return rows
        if floor is None and (found := _rounding(fast, safe, plan, case.points[0], closure)) > apart / 8:
            return compare(fast, safe, plan, points, closure, found)
        if refusal is not None or not coarse:
            raise _refused(fast, safe, apart, case.offset)
        # in 16 bits 'master' loses perturbations that a faster way reads in float32: less so farther away
        refusal = _refused(fast, safe, apart, case.offset)
    if refusal is not None:
        raise refusal
    if not tried:
        return 0
    case = max(tried)
    rows, apart = _agree(fast, plan, case, share, closure)
    if apart and floor is None:
        found = _rounding(fast, safe, plan, case.points[0], closure)
        if found > apart / 8:
            return compare(fast, safe, plan, points, closure, found)
    if apart:
        raise _refused(fast, safe, apart, tried[0].offset)
    return rows


def _farther(
    safe: Reads,
    plan: Plan,
    ends: Sequence[Point],
    closure: Callable[[], object],
    floor: float | None,
    coarse: bool,
) -> Iterator[_Case]:
    """Yields the pair at larger and larger offsets, to FARTHEST or while the losses are finite.

    Raises NotRepeatable where the first point reads another loss the second time."""
    pair = ends if len(ends) == 2 else [*ends, THETA]
    eps, factor = max(group.eps for group in plan.groups), 1.0
    again = safe.read(plan, pair[:1], closure, Isolation(plan)).item()
    while factor == 1.0 or factor * eps <= FARTHEST:
        points = [point.scaled(factor) for point in pair]
        right = safe.read(plan, points, closure, Isolation(plan)).tolist()
        size = max(map(abs, right))
        # before a faster way leaves traces in what the closure keeps
        if factor == 1.0 and not _repeats(again, right[0], coarse):
            raise NotRepeatable(right[0], again)
        if not all(map(math.isfinite, right)):  # max() does not see NaN behind a number
            return
        noise = 4e-6 * size
        if coarse:
            other = Master("stochastic").read(plan, points, closure, Isolation(plan)).tolist()
            noise = max(floor or 1e-4 * size, *(abs(a - b) for a, b in zip(right, other)))
        yield _Case(abs(right[0] - right[1]) / max(noise, 1e-300), noise, points, right, factor * eps)
        factor *= 8


def _agree(
    fast: Reads, plan: Plan, case: _Case, share: float, closure: Callable[[], object]
) -> tuple[int, float]:
    """Returns the rows of the inputs, and by how much the losses are apart where that is too much; else 0."""
    isolation, right = Isolation(plan), case.losses
    mine = fast.read(plan, case.points, closure, isolation).tolist()
    apart = max(abs(a - b) if a == a else float("inf") for a, b in zip(mine, right))
    return isolation.rows, 0.0 if apart <= share * abs(right[0] - right[1]) + 2 * case.noise else apart


def _refused(fast: Reads, safe: Reads, apart: float, offset: float) -> Refused:
    return Refused(
        f"evaluation {fast.name!r} reads losses that differ by {apart:.3g} from those of {safe.name!r} at "
        f"the same weights (offset {offset:.3g}): the closure reads a trained parameter in a way that "
        f"{fast.name!r} cannot follow; {WAY_OUT}"
    )


def _repeats(a: float, b: float, coarse: bool) -> bool:
    if not (abs(a) < float("inf") and abs(b) < float("inf")):
        return True
    return abs(a - b) <= (4e-3 if coarse else 1e-4) * abs(b)


def _rounding(fast: Reads, safe: Reads, plan: Plan, point: Point, closure: Callable[[], object]) -> float:
    """Returns by how much two evaluations are apart close to theta: rounding to 16 bits, as in an autocast
    region inside the closure.

    A misreading shrinks with the offset, and rounding does not. More than 1 % of the loss is no rounding:
    another way through the model."""
    near = [THETA, point.scaled(2.0**-6), point.scaled(-(2.0**-6))]
    mine, right = (way.read(plan, near, closure, Isolation(plan)).tolist() for way in (fast, safe))
    apart = max(abs(a - b) for a, b in zip(mine, right))
    return apart if apart <= 0.01 * max(map(abs, right)) else 0.0


def fits(plan: Plan) -> bool:
    """Whether a copy of what is trained fits the free memory of its devices, with a tenth to spare."""
    needed: dict[torch.device, int] = {}
    for group in plan.groups:
        device = group.theta[0].device
        needed[device] = needed.get(device, 0) + (0 if "masters" in group.memo else group.nbytes)
    return all(size < 0.9 * free_memory(device) for device, size in needed.items())


__all__ = ["Trust", "compare", "fits"]
