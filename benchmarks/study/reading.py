"""What the rows of a study say: readings at equal cost,
crossings of a target, and their means over seeds."""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from examples.demo.significance import wilson

from .order import BASE, main_first
from .seeds import Mean, moderated

Row = Mapping[str, Any]
TIME = "processor_seconds"
# of the loss before training, that MeZO's must fall by to make a target: less is noise of a few rows
LEAST_FALL = 0.05


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


def accuracy(found: Mean, rows: int) -> Mean:
    """Returns a mean of accuracies with an interval for held-out rows (Wilson) and seeds, whose squares add.

    All seeds are judged by the same rows, so that more seeds do not narrow Wilson's part.
    found  with the interval of its seeds;  rows  held out"""
    low, high = wilson(round(found.value * rows), rows)
    seeds = found.high - found.value if math.isfinite(found.high) else 0.0
    return found._replace(
        low=found.value - math.hypot(found.value - min(low, found.value), seeds),
        high=found.value + math.hypot(max(high, found.value) - found.value, seeds),
    )


@dataclass(frozen=True)
class Group:
    """The runs of one model and one set that went through.

    runs      rows by method;  budget  of forwards;  machines  that they are of
    forwards  fall of the held-out loss at equal forwards, as a share of the loss before training, of each
              method; the held-out rows are those of all methods, so that only seeds part them
    time      the same within the time that MeZO takes for its forwards; a method that has done its own
              before is read at its end. Of methods that ran on MeZO's machine alone
    against   fall of a method minus MeZO's, at equal forwards, seed by seed, of each other method
    accuracy  at equal forwards, of each method
    limit     that time, in processor seconds; None: MeZO has not run, or on several machines
    target    held-out loss that MeZO has at the end, mean over its seeds; None where it did not fall by
              LEAST_FALL"""

    model: str
    data: str
    runs: dict[str, list[Row]]
    budget: int
    machines: list[str]
    forwards: dict[str, Mean]
    time: dict[str, Mean]
    against: dict[str, Mean]
    accuracy: dict[str, Mean]
    limit: float | None
    target: float | None

    @property
    def name(self) -> str:
        return f"{self.model}, {self.data}"


def steady(rows: Sequence[Row]) -> list[Row]:
    """Returns rows of a method whose time goes with their forwards, at the rate of the seed that was
    quickest: what else ran on the machine made others slower."""
    rate = min(row["points"][-1][TIME] / row["points"][-1]["forwards"] for row in rows)
    return [
        {**row, "points": [{**point, TIME: rate * point["forwards"]} for point in row["points"]]}
        for row in rows
    ]


def fall(row: Row, axis: str, limit: float) -> float:
    """Returns the fall of the held-out loss where `axis` reaches a limit."""
    return 1.0 - read_at(row, axis, limit)["loss"] / row["points"][0]["loss"]


def falls(runs: Mapping[str, Sequence[Row]], axis: str, limit: float) -> dict[str, Mean]:
    """Returns the fall of the held-out loss of each method where `axis` reaches a limit."""
    return moderated({name: [fall(row, axis, limit) for row in rows] for name, rows in runs.items()})


def against(runs: Mapping[str, Sequence[Row]], budget: int) -> dict[str, Mean]:
    """Returns the fall of each other method minus MeZO's with the same seed, which has the same batches and,
    for many methods, the same z: what a seed does to both is no difference between them."""
    base = {row["seed"]: fall(row, "forwards", budget) for row in runs.get(BASE, ())}
    pairs = {
        name: [fall(row, "forwards", budget) - base[row["seed"]] for row in rows if row["seed"] in base]
        for name, rows in runs.items()
        if name != BASE
    }
    return moderated({name: found for name, found in pairs.items() if found})


def accuracies(runs: Mapping[str, Sequence[Row]], axis: str, limit: float) -> dict[str, Mean]:
    """Returns the accuracy of each method where `axis` reaches a limit."""
    shares = {name: [read_at(row, axis, limit)["accuracy"] for row in rows] for name, rows in runs.items()}
    rows = next(iter(runs.values()))[0]["points"][0]["rows"]
    return {name: accuracy(found, rows) for name, found in moderated(shares).items()}


def group(model: str, data: str, rows: Sequence[Row], budget: int) -> Group:
    """Returns the group of rows without errors, main methods first."""
    by_method: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        by_method[row["method"]].append(row)
    runs = {name: steady(by_method[name]) for name in main_first(by_method)}
    machines, base = sorted({row["machine"] for row in rows}), runs.get(BASE)
    there = {row["machine"] for row in base or ()}
    limit = base[0]["points"][-1][TIME] if base and len(there) == 1 else None
    timed = {name: some for name, some in runs.items() if {row["machine"] for row in some} == there}
    target = statistics.fmean(row["points"][-1]["loss"] for row in base) if base else None
    if base and target is not None and target > (1 - LEAST_FALL) * base[0]["points"][0]["loss"]:
        target = None
    return Group(
        model, data, runs, budget, machines,
        forwards=falls(runs, "forwards", budget),
        time={} if limit is None else falls(timed, TIME, limit),
        against=against(runs, budget),
        accuracy=accuracies(runs, "forwards", budget),
        limit=limit, target=target,
    )  # fmt: skip


def groups(rows: Iterable[Row], budgets: Mapping[str, int]) -> list[Group]:
    """Returns a group for each model and set of which a run went through, in the order of the rows."""
    found: dict[tuple[str, str], list[Row]] = defaultdict(list)
    for row in rows:
        if "error" not in row:
            found[row["model"], row["data"]].append(row)
    return [group(model, data, some, budgets[model]) for (model, data), some in found.items()]
