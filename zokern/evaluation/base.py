"""The contract of an evaluation: points in, losses out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from torch import Tensor

from ..device_numbers import Amount
from ..group import Draw
from ..plan import Plan

WAY_OUT = "use evaluation='master'"


class Point(NamedTuple):
    """Names weights at which a loss is read: theta + eps sum_k amount_k z_k, with eps of each group and draw.

    terms  pairs (draw, amount); without terms the point is theta itself, zokern.THETA. A draw is a draw word
           of this step, or (step, draw word) of an earlier one. An amount is a number without unit, or an
           Amount in device memory

    Raises ValueError, when it is read, for a draw of an earlier basis of a low-rank direction."""

    terms: tuple[tuple[Draw, float | Amount], ...] = ()

    @property
    def is_known(self) -> bool:
        """Whether the host knows the amounts, as launches need it that take them by value."""
        return not any(isinstance(amount, Amount) for _, amount in self.terms)

    def scaled(self, factor: float) -> Point:
        """Returns the point `factor` times as far from theta."""
        return Point(tuple((draw, amount * factor) for draw, amount in self.terms))


THETA = Point()


def point_of(plan: Plan, draws: Sequence[Draw], amounts: Tensor) -> Point:
    """Returns the point at amounts that were computed, float64 [draws]; see Plan.at_hand."""
    each = [Amount(a) if isinstance(a, Tensor) else a for a in plan.at_hand(amounts)]
    return Point(tuple(zip(draws, each)))


class Refused(RuntimeError):
    """Says that an evaluation cannot read this closure right, and why; evaluation 'auto' then goes on
    with another.

    It is a RuntimeError. No weight has changed where it is raised."""


class NotRepeatable(RuntimeError):
    """The closure returned two losses for the same weights."""

    def __init__(self, first: float, again: float, also: str = "") -> None:
        super().__init__(
            f"the closure returned {first!r} and then {again!r} for the same weights: it advances a data "
            "iterator, a cache or a random generator of its own, or changes its batch, so the two sides of a "
            "pair do not measure the same loss; take the batch, and what changes, outside the closure" + also
        )


@dataclass
class Record:
    """How the losses of the last call were obtained.

    evaluation     the way that ran
    why            evaluation 'auto': the reason for the choice; and why torch.compile's graphs did not run
    scratch_bytes  most extra memory that was held at once
    whole          large parameters that were copied in one piece because their use cannot be tiled
    swallowed      share of sampled 16-bit weights that the perturbation left as they were, and what is said
                   of it; None: nothing is in 16 bits, or it was not measured"""

    evaluation: str
    why: str = ""
    scratch_bytes: int = 0
    whole: tuple[str, ...] = ()
    swallowed: Any = None


class Evaluation(Protocol):
    """How the loss at theta + eps sum_k a_k z_k is obtained.

    defers     whether updates of factored matrices may wait in their small space between steps
    exact      whether the weights have their bits again after a call
    stands_in  whether copies stand in the parameters' place while the closure runs
    state      what a resumed run continues with, as plain values
    record     how the last call went"""

    name: str
    defers: bool
    exact: bool
    stands_in: bool
    state: dict[str, Any]
    record: Record

    def losses(self, plan: Plan, points: Sequence[Point], closure: Callable[[], object]) -> Tensor:
        """Returns the losses at the points, float64 [len(points)], in order, on the device of the losses.

        Afterwards the weights, the RNG streams, flags, buffers and attributes of the modules are as before,
        also when the closure raised. Raises Refused when the closure cannot be read right in this way, and
        what the closure raises."""


class Differentiates(Evaluation, Protocol):
    """An evaluation that reads derivatives too: Jvp, and Auto through it."""

    def slopes(
        self, plan: Plan, words: Sequence[int], closure: Callable[[], object]
    ) -> tuple[Tensor, Tensor]:
        """Returns the loss of theta and its derivative along z of each draw word, float64 [len(words)] each.

        Promises and raises what `losses` does. eps plays no part: z moves every parameter by itself."""


def distinct(points: Sequence[Point]) -> list[Point]:
    """Returns each point once, theta first: it needs no copy of a weight that was moved."""
    found = list(dict.fromkeys(points))
    return sorted(found, key=lambda point: bool(point.terms))


__all__ = [
    "THETA",
    "WAY_OUT",
    "Differentiates",
    "Evaluation",
    "NotRepeatable",
    "Point",
    "Record",
    "Refused",
    "distinct",
    "point_of",
]
