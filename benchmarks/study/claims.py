"""Sentences that the rows carry: which method to start with,
and what was reproduced of the papers' claims."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cache
from typing import NamedTuple

from torch import nn

from zokern.methods import METHODS

from .order import BASE
from .reading import TIME, Group, crossing, read_at
from .seeds import Mean, of_values, told_apart

NOTHING = "not measured"
APART = "not told apart from MeZO"
FEW = 3  # groups, of a model and a set, that a statement over groups needs


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


def ratios(groups: Iterable[Group], claim: Claim) -> tuple[list[float], int]:
    """Returns the method's amount over MeZO's for each model and set, and how many runs are lower bounds.

    An amount is what a run takes to the loss which MeZO's seeds end with, on average; all that it takes, if
    it does not get there. The mean over seeds is geometric. Lower bounds are such runs of the method, beyond
    those of MeZO. Times of several machines are not compared."""
    found, bounds = [], 0
    for group in groups:
        base, runs = group.runs.get(BASE), group.runs.get(claim.method)
        if group.target is None or not base or not runs:
            continue
        if claim.axis == TIME and claim.method not in group.time:
            continue
        amounts, missed = {}, {}
        for name, rows in ((BASE, base), (claim.method, runs)):
            parts = [crossing(row, claim.axis, group.target) for row in rows]
            ends = [row["points"][-1][claim.axis] for row in rows]
            missed[name] = parts.count(None)
            amounts[name] = statistics.geometric_mean(
                end if part is None else part for part, end in zip(parts, ends)
            )
        bounds += max(0, missed[claim.method] - missed[BASE])
        found.append(amounts[claim.method] / amounts[BASE])
    return found, bounds


def differences(groups: Iterable[Group], method: str) -> list[float]:
    """Returns accuracy of the method minus MeZO's at equal forwards, mean over seeds,
    for each model and set."""
    found = []
    for group in groups:
        if group.runs.get(BASE) and group.runs.get(method):
            ours, base = (
                statistics.fmean(
                    read_at(row, "forwards", group.budget)["accuracy"] for row in group.runs[name]
                )
                for name in (method, BASE)
            )
            found.append(ours - base)
    return found


def verdict(found: Mean, share: float, bounds: int) -> str:
    """Returns what an interval of a ratio says of a claimed share.
    Lower bounds among the ratios leave its upper end open."""
    claimed = "the claimed {:g} lies {} the interval".format(
        share, "in" if found.low <= share <= found.high or (bounds and share > found.high) else "outside"
    )
    if found.low > 1:
        return f"not reproduced: it takes more than MeZO; {claimed}"
    if found.high >= 1 or bounds:
        return f"{APART}; {claimed}"
    return "reproduced" if found.low <= share else f"in part: less than MeZO; {claimed}"


def statement(groups: Sequence[Group], claim: Claim) -> str:
    """Returns a claim and what the rows say of it."""
    values, bounds = ratios(groups, claim) if claim.axis else (differences(groups, claim.method), 0)
    if len(values) < FEW:
        need = ", whose held-out loss MeZO lowers" if claim.axis else ""
        return f"{claim.words}: {NOTHING} (models and sets{need}: {len(values)}; {FEW} are needed)."
    over = f"mean over {len(values)} models and sets"
    if not claim.axis:
        d = of_values(values)
        said = "reproduced" if d.low > 0 else "not reproduced: lower than MeZO" if d.high < 0 else APART
        return (
            f"{claim.words}: **{said}**. At equal forwards {100 * d.value:+.1f} points of accuracy "
            f"[{100 * d.low:+.1f}, {100 * d.high:+.1f}] against MeZO, {over}."
        )
    logs = of_values([math.log(v) for v in values])
    r = logs._replace(value=math.exp(logs.value), low=math.exp(logs.low), high=math.exp(logs.high))
    open_end = (
        f" Runs that end above that loss: {bounds}; they count with all that they took." if bounds else ""
    )
    what = {"steps": "steps", TIME: "processor time"}[claim.axis]
    return (
        f"{claim.words}: **{verdict(r, claim.share, bounds)}**. Ratio of {what} to the held-out loss that "
        f"MeZO ends with: {r.value:.2f} [{r.low:.2f}, {r.high:.2f}], geometric {over}.{open_end}"
    )


@cache
def backpropagates(method: str) -> bool:
    """Returns whether a method takes gradients of some modules or batches, beside its forward passes."""
    made = METHODS[method](nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)))
    return made.estimator.backpropagates


def forward_only(groups: Iterable[Group]) -> list[Group]:
    """Returns the groups with the methods of forward passes alone."""

    def of(found: Mapping[str, Mean]) -> dict[str, Mean]:
        return {name: mean for name, mean in found.items() if not backpropagates(name)}

    return [
        replace(group, **{at: of(getattr(group, at)) for at in ("forwards", "time", "against")})
        for group in groups
    ]


def with_gradients(groups: Iterable[Group]) -> str:
    """Returns what methods that back-propagate a part reach at equal forwards; '' where none has run."""
    found = [
        f"{name} takes {percents(mean)} off the held-out loss ({group.name})"
        for group in groups
        for name, mean in sorted(group.forwards.items(), key=lambda item: -item[1].value)
        if backpropagates(name)
    ]
    return f"With back-propagation for a part: {'; '.join(found)}." if found else ""


def percents(mean: Mean, sign: str = "", unit: str = " %") -> str:
    """Returns a share in percent with its interval, where one is known."""
    value, low, high = (f"{100 * x:{sign}.1f}" for x in (mean.value, mean.low, mean.high))
    return f"{value}{unit}" + (f" [{low}, {high}]" if math.isfinite(mean.low) else "")


def learned(group: Group) -> bool:
    """Returns whether some method's fall of the held-out loss is told apart from none."""
    return any(group.forwards[name].value > 0 for name in told_apart(group.forwards))


def harmed(group: Group) -> list[str]:
    """Returns which methods raise the held-out loss, told apart from 0."""
    return sorted(name for name in told_apart(group.forwards) if group.forwards[name].value < 0)


def sides(means: Mapping[str, Mean]) -> tuple[list[str], list[str]]:
    """Returns the methods that are told apart from MeZO,
    (above, below) it, the largest difference first."""
    apart = sorted(told_apart(means), key=lambda name: -abs(means[name].value))
    return [n for n in apart if means[n].value > 0], [n for n in apart if means[n].value < 0]


def compared(group: Group) -> str:
    """Returns what the runs of one model and set say of methods against MeZO."""
    several = max((len(mean.seeds) for mean in group.forwards.values()), default=0) > 1
    if not several:
        return f"{group.name}: one seed, so no interval; another seed may change the order."
    bad = harmed(group)
    raised = f" The held-out loss rises by {', '.join(bad)}, at the lr that was found." if bad else ""
    if not learned(group):
        return f"{group.name}: no fall of the loss is told apart from none, which says nothing.{raised}"
    if not group.against:
        return f"{group.name}: nothing to compare with MeZO.{raised}"
    above, below = (
        ", ".join(f"{name} {percents(group.against[name], '+', ' points')}" for name in names) or "none"
        for names in sides(group.against)
    )
    return (
        f"{group.name}, {len(group.against)} methods against MeZO with the same seeds: larger fall of the "
        f"loss: {above}; smaller: {below}.{raised}"
    )


def overall(groups: Sequence[Group]) -> dict[str, Mean]:
    """Returns the fall of a method minus MeZO's, each model and set as one value; of the methods that have
    run in FEW of them or more."""
    names = {name for group in groups for name in group.against}
    values = {
        name: [group.against[name].value for group in groups if name in group.against] for name in names
    }
    return {name: of_values(found) for name, found in sorted(values.items()) if len(found) >= FEW}


def start_with(groups: Sequence[Group]) -> str:
    """Returns which method to start with: those whose fall is told apart from MeZO's, larger over all models
    and sets or in one, and smaller in none. All of these comparisons are one family."""
    useful = [group for group in groups if learned(group)]
    tables = {group.name: group.against for group in useful} | {"over all": overall(useful)}
    apart = told_apart({(at, name): one for at, table in tables.items() for name, one in table.items()})
    below = {name for at, name in apart if tables[at][name].value < 0}
    below |= {name for group in groups for name in harmed(group)}
    where: dict[str, list[str]] = {}
    for at, table in tables.items():
        for name in table:
            if (at, name) in apart and name not in below:
                where.setdefault(name, []).append(at)
    if not where:
        return (
            f"**No choice of method is supported by these rows: start with {BASE}.** Spend the forwards on "
            "lr (`zokern.tune`, then shares of what it finds): the tables of tuning show what a factor of 3 "
            "does."
        )
    best = sorted(where, key=lambda name: (-len(where[name]), name))
    named = "; ".join(f"{name} ({'; '.join(where[name])})" for name in best)
    return f"**Start with {BASE} or one of these, whose fall of the loss is told apart as larger: {named}.**"
