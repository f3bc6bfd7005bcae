"""What the rows of a study say: readings at equal cost,
crossings of a target, means over seeds and their intervals."""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from examples.demo.significance import wilson

from .order import BASE, main_first

Row = Mapping[str, Any]
# 0.975 quantiles of Student's t by degrees of freedom; between two of them the fewer degrees are taken.
STUDENT = {
    1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262, 10: 2.228,
    12: 2.179, 15: 2.131, 20: 2.086, 30: 2.042, 60: 2.000, 120: 1.980,
}  # fmt: skip
TIME = "processor_seconds"
# of the loss before training, that MeZO's must fall by to make a target: less is noise of a few rows
LEAST_FALL = 0.05


def student(freedom: int) -> float:
    """Returns the 0.975 quantile of Student's t for at least one degree of freedom,
    or one that is slightly larger."""
    return STUDENT[max(known for known in STUDENT if known <= freedom)]


def read_at(row: Row, axis: str, limit: float) -> dict[str, float]:
    """Returns accuracy and loss where `axis` reaches a limit,
    linear between two points; at the end where it does not."""
    points = row["points"]
    before = after = points[0]
    for after in points:
        if after[axis] >= limit:
            break
        before = after
    width = after[axis] - before[axis]
    part = (limit - before[axis]) / width if width and after[axis] > limit else 1.0
    return {
        "accuracy": (before["right"] + part * (after["right"] - before["right"])) / after["rows"],
        "loss": before["loss"] + part * (after["loss"] - before["loss"]),
    }


def crossing(row: Row, axis: str, target: float) -> float | None:
    """Returns where the held-out loss first falls to a target,
    linear between two points; None where it does not."""
    before = row["points"][0]
    if before["loss"] <= target:
        return 0.0
    for after in row["points"][1:]:
        if after["loss"] <= target:
            part = (before["loss"] - target) / (before["loss"] - after["loss"])
            return before[axis] + part * (after[axis] - before[axis])
        before = after
    return None


class Mean(NamedTuple):
    """A mean over seeds with a 95 % interval."""

    value: float
    low: float
    high: float
    seeds: int

    def overlaps(self, other: Mean) -> bool:
        """Returns whether the two are not told apart."""
        return self.low <= other.high and other.low <= self.high


def spread(values: Iterable[Sequence[float]]) -> tuple[float, int]:
    """Returns the standard deviation of seeds, pooled over methods,
    and its degrees of freedom (0: not known)."""
    several = [found for found in values if len(found) > 1]
    freedom = sum(len(found) - 1 for found in several)
    squares = sum((len(found) - 1) * statistics.variance(found) for found in several)
    return (math.sqrt(squares / freedom) if freedom else 0.0), freedom


def half_width(count: int, deviation: float, freedom: int) -> float:
    """Returns half of Student's interval for the mean of `count` seeds; infinite where no deviation is known.

    deviation, freedom  of seeds, as `spread` returns them"""
    return student(freedom) * deviation / math.sqrt(count) if freedom else math.inf


def mean(values: Sequence[float], deviation: float, freedom: int) -> Mean:
    """Returns the mean over seeds with Student's interval."""
    value, half = statistics.fmean(values), half_width(len(values), deviation, freedom)
    return Mean(value, value - half, value + half, len(values))


def accuracy(shares: Sequence[float], rows: int, deviation: float, freedom: int) -> Mean:
    """Returns the mean of accuracies with an interval for
    held-out rows (Wilson) and seeds (Student), whose squares add.

    All seeds are judged by the same rows, so that more seeds do not narrow Wilson's part.
    rows  held out"""
    value = statistics.fmean(shares)
    low, high = wilson(round(value * rows), rows)
    seeds = half_width(len(shares), deviation, freedom) if freedom else 0.0
    return Mean(
        value,
        value - math.hypot(value - min(low, value), seeds),
        value + math.hypot(max(high, value) - value, seeds),
        len(shares),
    )


@dataclass(frozen=True)
class Group:
    """The runs of one model and one set that went through.

    runs      rows by method;  budget  of forwards
    forwards  fall of the held-out loss at equal forwards, as a share of the loss before training, of each
              method; the held-out rows are those of all methods, so that only seeds part them
    time      the same at equal time: the processor seconds that MeZO's runs take for their forwards (None: it
              has not run)
    accuracy  at equal forwards, of each method
    target    held-out loss that MeZO has at the end, mean over its seeds; None where it did not fall by
              LEAST_FALL"""

    model: str
    data: str
    runs: dict[str, list[Row]]
    budget: int
    forwards: dict[str, Mean]
    time: dict[str, Mean]
    accuracy: dict[str, Mean]
    limit: float | None
    target: float | None

    @property
    def name(self) -> str:
        return f"{self.model}, {self.data}"


def falls(runs: Mapping[str, Sequence[Row]], axis: str, limit: float) -> dict[str, Mean]:
    """Returns the fall of the held-out loss of each method where `axis` reaches a limit."""
    found = {
        name: [1.0 - read_at(row, axis, limit)["loss"] / row["points"][0]["loss"] for row in rows]
        for name, rows in runs.items()
    }
    return {name: mean(values, *spread(found.values())) for name, values in found.items()}


def accuracies(runs: Mapping[str, Sequence[Row]], axis: str, limit: float) -> dict[str, Mean]:
    """Returns the accuracy of each method where `axis` reaches a limit."""
    shares = {name: [read_at(row, axis, limit)["accuracy"] for row in rows] for name, rows in runs.items()}
    rows = next(iter(runs.values()))[0]["points"][0]["rows"]
    return {name: accuracy(found, rows, *spread(shares.values())) for name, found in shares.items()}


def group(model: str, data: str, rows: Sequence[Row], budget: int) -> Group:
    """Returns the group of rows without errors, main methods first."""
    by_method: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        by_method[row["method"]].append(row)
    runs = {name: by_method[name] for name in main_first(by_method)}
    base = runs.get(BASE)
    limit = statistics.fmean(row["points"][-1][TIME] for row in base) if base else None
    target = statistics.fmean(row["points"][-1]["loss"] for row in base) if base else None
    if base and target is not None and target > (1 - LEAST_FALL) * base[0]["points"][0]["loss"]:
        target = None
    time = {} if limit is None else falls(runs, TIME, limit)
    forwards, shares = falls(runs, "forwards", budget), accuracies(runs, "forwards", budget)
    return Group(model, data, runs, budget, forwards, time, shares, limit, target)


def groups(rows: Iterable[Row], budgets: Mapping[str, int]) -> list[Group]:
    """Returns a group for each model and set of which a run went through, in the order of the rows."""
    found: dict[tuple[str, str], list[Row]] = defaultdict(list)
    for row in rows:
        if "error" not in row:
            found[row["model"], row["data"]].append(row)
    return [group(model, data, some, budgets[model]) for (model, data), some in found.items()]
