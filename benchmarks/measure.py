"""Interleaved measurement: in every round each case of a group runs once,
so all of them see the same machine."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from statistics import median, quantiles
from typing import Any


@dataclass
class Case:
    """One line of the report.

    elements, traffic   how many elements a call works on, and the bytes it must move for each (z moves none)
    yardstick, eager    names of cases in the same group: a copy kernel, and the eager PyTorch that does the
                        same work
    every               run only in every n-th round (slow baselines)
    """

    name: str
    call: Callable[[], Any]
    elements: int = 0
    traffic: int = 0
    yardstick: str = ""
    eager: str = ""
    every: int = 1
    times: list[float | None] = field(default_factory=list)  # seconds, one per round

    @property
    def seconds(self) -> list[float]:
        return [t for t in self.times if t is not None]


def wall(call: Callable[[], Any]) -> float:
    """Seconds of a call that is through when it returns."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


class Group:
    """Cases that take turns; `timer` gives the seconds of one call."""

    def __init__(
        self, title: str, cases: list[Case], timer: Callable[[Callable[[], Any]], float] = wall
    ) -> None:
        self.title, self.cases, self.timer = title, cases, timer
        self.by_name = {case.name: case for case in cases}
        self.rounds = 0

    def round(self) -> None:
        for case in self.cases:
            case.times.append(None if self.rounds % case.every else self.timer(case.call))
        self.rounds += 1

    def drop(self, name: str) -> None:
        """Leaves a case out; what was compared with it is compared with nothing."""
        self.cases.remove(self.by_name.pop(name))
        for case in self.cases:
            case.yardstick = "" if case.yardstick == name else case.yardstick
            case.eager = "" if case.eager == name else case.eager

    def run(self, benchmark, rounds: int) -> Group:
        """All rounds, through pytest-benchmark's runner (its own table times a whole round);
        the first one warms up."""
        self.round()
        self.rounds = 0
        for case in self.cases:
            case.times.clear()
        benchmark.group = self.title
        benchmark.pedantic(self.round, rounds=rounds, iterations=1, warmup_rounds=0)
        return self

    def ratio(self, over: str, under: str) -> float:
        """Median over the rounds of time(over) / time(under)."""
        pairs = zip(self.by_name[over].times, self.by_name[under].times)
        return median(a / b for a, b in pairs if a is not None and b is not None)

    def rows(self) -> list[dict[str, Any]]:
        rows = []
        for case in self.cases:
            t = case.seconds
            deciles = quantiles(t, n=10, method="inclusive") if len(t) > 1 else [t[0]] * 9
            row = {
                "name": case.name,
                "ms": median(t) * 1e3,
                "p10": deciles[0] * 1e3,
                "p90": deciles[-1] * 1e3,
                "rounds": len(t),
            }
            if case.elements:
                row["ns_per_element"] = median(t) * 1e9 / case.elements
                row["bytes_per_element"] = case.traffic
            if case.yardstick:
                of = self.by_name[case.yardstick]
                moved = case.traffic * case.elements / (of.traffic * of.elements)
                row["percent_of_copy"] = 100 * moved * self.ratio(case.yardstick, case.name)
            if case.eager:
                row["times_eager"] = self.ratio(case.eager, case.name)
            rows.append(row)
        return rows
