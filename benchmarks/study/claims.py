"""Sentences that the rows carry: which method to start with,
and what was reproduced of the papers' claims."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from typing import NamedTuple

from torch import nn

from zokern.methods import METHODS

from .order import BASE
from .reading import TIME, Group, Mean, crossing, read_at, student

NOTHING = "not measured"
APART = "not told apart from MeZO"


class Claim(NamedTuple):
    """What a paper says of its method against MeZO.

    axis   what it counts to a target loss; '' where it claims a higher accuracy
    share  of MeZO's amount that the method is said to take"""

    method: str
    words: str
    axis: str = ""
    share: float = 1.0


CLAIMS = (
    Claim("PGAP", "-81 % iterations (P-GAP)", "steps", 0.19),
    Claim("KerZOO", "-74 % GPU hours (KerZOO; here time of the processor)", TIME, 0.26),
    Claim("SubZero", "higher accuracy (SubZero)"),
)


class Interval(NamedTuple):
    """A mean with a 95 % interval of Student's t over pairs;
    low and high are infinite where there are fewer than two pairs."""

    value: float
    low: float
    high: float
    pairs: int


def interval(values: Sequence[float]) -> Interval:
    """Returns the mean of values with its interval."""
    value = statistics.fmean(values)
    if len(values) < 2:
        return Interval(value, -math.inf, math.inf, len(values))
    half = student(len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values))
    return Interval(value, value - half, value + half, len(values))


def ratios(groups: Sequence[Group], claim: Claim) -> tuple[list[float], int]:
    """Returns method over MeZO for each model, set and seed, and how many of them are lower bounds.

    The amount is that to the loss which MeZO has at its end. A run that does not get there counts with all
    that it took. Pairs in which MeZO's run with this seed does not get there say nothing and are left out."""
    found, bounds = [], 0
    for group in groups:
        base = {row["seed"]: row for row in group.runs.get(BASE, ())}
        for row in group.runs.get(claim.method, ()):
            if group.target is None or row["seed"] not in base:
                continue
            whole = crossing(base[row["seed"]], claim.axis, group.target)
            part = crossing(row, claim.axis, group.target)
            if not whole:
                continue
            bounds += part is None
            found.append((row["points"][-1][claim.axis] if part is None else part) / whole)
    return found, bounds


def differences(groups: Sequence[Group], method: str) -> list[float]:
    """Returns accuracy of the method minus MeZO's at equal forwards, for each model, set and seed."""
    found = []
    for group in groups:
        base = {row["seed"]: row for row in group.runs.get(BASE, ())}
        for row in group.runs.get(method, ()):
            if row["seed"] in base:
                both = (
                    read_at(one, "forwards", group.budget)["accuracy"] for one in (row, base[row["seed"]])
                )
                found.append(next(both) - next(both))
    return found


def verdict(found: Interval, share: float, bounds: int) -> str:
    """Returns what an interval of a ratio says of a claimed share.
    Lower bounds among the ratios leave its upper end open."""
    if found.low > 1:
        return "not reproduced: it takes more than MeZO"
    if found.high >= 1 or bounds:
        return APART
    return "reproduced" if found.low <= share else "in part: less than MeZO, and more than claimed"


def statement(groups: Sequence[Group], claim: Claim) -> str:
    """Returns a claim and what the rows say of it."""
    if not claim.axis:
        values = differences(groups, claim.method)
        if len(values) < 2:
            return f"{claim.words}: {NOTHING} (pairs: {len(values)}; two are needed)."
        d = interval(values)
        said = "reproduced" if d.low > 0 else "not reproduced: lower than MeZO" if d.high < 0 else APART
        return (
            f"{claim.words}: **{said}**. At equal forwards {100 * d.value:+.1f} points of accuracy "
            f"[{100 * d.low:+.1f}, {100 * d.high:+.1f}] against MeZO, {d.pairs} pairs of a model, set and "
            "seed."
        )
    values, bounds = ratios(groups, claim)
    if len(values) < 2:
        few = f"pairs in which MeZO gets to its own final loss: {len(values)}; two are needed"
        return f"{claim.words}: {NOTHING} ({few})."
    r = Interval(*(math.exp(x) for x in interval([math.log(v) for v in values])[:3]), len(values))
    open_end = (
        f" {bounds} of them end above that loss: their ratio is at least what is counted." if bounds else ""
    )
    what = {"steps": "steps", TIME: "processor time"}[claim.axis]
    return (
        f"{claim.words}: **{verdict(r, claim.share, bounds)}**. Ratio of {what} to the held-out loss that "
        f"MeZO ends with: {r.value:.2f} [{r.low:.2f}, {r.high:.2f}] (geometric mean), claimed "
        f"{claim.share:g}, {r.pairs} pairs.{open_end}"
    )


def among_best(group: Group, at: str) -> set[str]:
    """Returns the methods whose interval overlaps that of the largest fall."""
    found = getattr(group, at)
    best = max(found.values(), key=lambda mean: mean.value, default=None)
    return {name for name, mean in found.items() if mean.overlaps(best)}


def learned(group: Group, at: str) -> bool:
    """Returns whether some method's fall of the held-out loss is told apart from none."""
    return max(mean.low for mean in getattr(group, at).values()) > 0.0


def harmed(groups: Sequence[Group], at: str = "forwards") -> str:
    """Returns which methods raise the held-out loss,
    by an interval that does not hold 0; '' for none."""
    found = [
        (group, [name for name, mean in getattr(group, at).items() if mean.high < 0.0]) for group in groups
    ]
    where = "; ".join(f"{', '.join(names)} ({group.name})" for group, names in found if names)
    return f"The held-out loss rises, at the lr that was found: {where}." if where else ""


@cache
def backpropagates(method: str) -> bool:
    """Returns whether a method takes gradients of some modules or batches, beside its forward passes."""
    made = METHODS[method](nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)))
    return made.estimator.backpropagates


def forward_only(groups: Sequence[Group]) -> list[Group]:
    """Returns the groups with the methods of forward passes alone."""

    def of(found: dict[str, Mean]) -> dict[str, Mean]:
        return {name: mean for name, mean in found.items() if not backpropagates(name)}

    return [replace(group, forwards=of(group.forwards), time=of(group.time)) for group in groups]


def with_gradients(groups: Sequence[Group]) -> str:
    """Returns what methods that back-propagate a part reach at equal time; '' where none has run."""
    found = [
        f"{name} takes {100 * mean.value:.1f} % [{100 * mean.low:.1f}, {100 * mean.high:.1f}] off the "
        f"held-out loss ({group.name})"
        for group in groups
        for name, mean in sorted(group.time.items(), key=lambda item: -item[1].value)
        if backpropagates(name)
    ]
    return f"With back-propagation for a part, at equal time: {'; '.join(found)}." if found else ""


def start_with(groups: Sequence[Group], at: str = "time") -> str:
    """Returns which methods to start with, at equal time or at equal forwards.

    Only groups count in which something was learned. Candidates were run in all of these. Named are those
    that are not told apart from the best of any group, and those that are told apart from it in some
    group."""
    cost = {"time": "equal time", "forwards": "equal forwards"}[at]
    compared = [group for group in groups if len(getattr(group, at)) > 1]
    useful = [group for group in compared if learned(group, at)]
    dull = "; ".join(group.name for group in compared if group not in useful)
    tail = f" No fall of the loss is told apart from none, which says nothing, in: {dull}." if dull else ""
    if not useful:
        why = tail or " No model and set has two methods to compare."
        return f"At {cost} these runs do not say which method to start with.{why}"
    where = "; ".join(group.name for group in useful)
    everywhere = set.intersection(*(set(getattr(group, at)) for group in useful))
    partly = sorted({name for group in useful for name in getattr(group, at)} - everywhere)
    tail = (f" Not run in every group, and not compared here: {', '.join(partly)}." if partly else "") + tail
    scores = {
        name: statistics.fmean(getattr(group, at)[name].value for group in useful) for name in everywhere
    }
    good = [name for name in everywhere if all(name in among_best(group, at) for group in useful)]
    good.sort(key=lambda name: (-scores[name], name))
    worse = sorted(everywhere - set(good))
    if not good:
        return (
            f"At {cost} no method is among the best of every group ({where}): see the table of the group "
            f"that is like yours.{tail}"
        )
    if not worse:
        named = f"{', '.join(good)}, the largest mean fall first"
        return f"At {cost} no method is told apart from the best ({where}): {named}.{tail}"
    first = (
        f"**{good[0]}**"
        if len(good) == 1
        else f"one of **{', '.join(good)}** (not told apart, the largest mean fall first)"
    )
    return (
        f"At {cost} start with {first}: the first takes {scores[good[0]]:.1%} off the held-out loss, mean "
        f"over {where}. Less than the best of a group, with intervals that do not overlap: "
        f"{', '.join(worse)}.{tail}"
    )
