"""Timers. On a device: CUDA events around a call, with cold caches and a queue that never runs dry.

    wait   a kernel that spins while the host enqueues everything below, so that no launch is waited for
           between the events
    flush  writes twice the L2, so that the call finds none of its data there
    start, call, stop

A call that waits for the device itself, as a step does, is timed by the wall clock from an idle device to an
idle device.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

from ..measure import Group, wall
from .run import Run, synchronize

L2 = 64 << 20  # bytes, where the driver does not tell
# seconds of spinning: a call that takes the host longer is bound by the host, and shows it
LONGEST_WAIT = 0.03


class Events:
    """Seconds on the device. How long the host takes for the same call is kept by call: `host`."""

    def __init__(self) -> None:
        properties = torch.cuda.get_device_properties(0)
        size = 2 * max(L2, getattr(properties, "L2_cache_size", L2))
        self.flush = torch.empty(size, dtype=torch.uint8, device="cuda")
        self.host: dict[Callable[[], Any], float] = {}
        self.cycles = self._cycles()

    def _cycles(self) -> float:
        """Cycles of a spinning second."""
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
        torch.cuda._sleep(10_000_000)
        marks[0].record()
        torch.cuda._sleep(10_000_000)
        marks[1].record()
        torch.cuda.synchronize()
        return 1e7 / (marks[0].elapsed_time(marks[1]) / 1e3)

    def __call__(self, call: Callable[[], Any]) -> float:
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(int(self.cycles * min(LONGEST_WAIT, 1.3 * self.host.get(call, 0.001) + 1e-4)))
        self.flush.zero_()
        start.record()
        begun = time.perf_counter()
        call()
        self.host[call] = time.perf_counter() - begun
        stop.record()
        torch.cuda.synchronize()
        return start.elapsed_time(stop) / 1e3


class IdleToIdle:
    """The wall clock around a call, the device idle before and after it. What the host takes until the call
    returns is kept by call: `host`."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.host: dict[Callable[[], Any], float] = {}

    def __call__(self, call: Callable[[], Any]) -> float:
        synchronize(self.device)
        begun = time.perf_counter()
        call()
        self.host[call] = time.perf_counter() - begun
        synchronize(self.device)
        return time.perf_counter() - begun


def timer_of(run: Run) -> Callable[[Callable[[], Any]], float]:
    return Events() if run.device == "cuda" else wall


def measure(run: Run, group: Group, rounds: int, seconds: float) -> Group:
    """Rounds until there are enough or the time is up; three at least. The group is said, with its GB/s.

    Every case is called once before that; one that cannot run is said and left out, and the others are
    measured."""
    for case in list(group.cases):
        if not run.attempt(f"{group.title}: {case.name}", lambda case=case: group.timer(case.call)):
            group.drop(case.name)
    if not group.cases:
        return group
    stop = time.monotonic() + min(seconds, max(0.0, run.left))
    while group.rounds < 3 or (group.rounds < rounds and time.monotonic() < stop):
        group.round()
    rows = group.rows()
    host = getattr(group.timer, "host", {})
    for row, case in zip(rows, group.cases):
        if case.elements and case.traffic:
            row["gb_per_s"] = case.elements * case.traffic / row["ms"] / 1e6
        if case.call in host:
            row["host_ms"] = host[case.call] * 1e3
    run.say("group", title=group.title, rows=rows)
    return group


def in_time(run: Run, bodies: Mapping[str, Callable[[], Any]]) -> None:
    """Groups one after the other; one that cannot run is said, and so is what there is no time for."""
    for name, body in bodies.items():
        if run.left < 3:
            run.skip(f"times of {name}", "the part's time was up")
            continue
        run.attempt(f"times of {name}", body)
        if run.device == "cuda":
            torch.cuda.empty_cache()


def figure(run: Run, group: Group, key: str, over: str, under: str, scale: float = 1.0) -> float | None:
    """Says the ratio of two cases' times, where both ran."""
    if over not in group.by_name or under not in group.by_name:
        return None
    run.figure(key, value := scale * group.ratio(over, under))
    return value
