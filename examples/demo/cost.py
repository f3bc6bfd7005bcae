"""What a step costs: time and peak memory of a bare forward, a step of the method and an eager MeZO step."""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from benchmarks.eager_methods.queries import MeZO
from benchmarks.memory import high_water, reset_high_water
from zokern import StepResult, step
from zokern.training.words import LabelWords

from .data import Row
from .training import Batches, Task, build


def peak_of(run: Callable[[], object]) -> tuple[float, int | None]:
    """Returns the seconds of a call, and the process' largest resident memory meanwhile in bytes;
    None where it is not known."""
    known = reset_high_water()
    started = time.perf_counter()
    run()
    return time.perf_counter() - started, high_water() if known else None


def cost(
    model: nn.Module, words: LabelWords, rows: Sequence[Row], options: argparse.Namespace
) -> dict[str, Any]:
    """Rounds of a bare forward and a zokern step,
    then of a forward and an eager step, on one batch. Moves the weights."""
    from tqdm.auto import tqdm

    zo = build(model, options.seed, options)
    # no cost depends on lr
    eager = MeZO([p for p in model.parameters() if p.requires_grad], lr=0.0, eps=options.eps)
    task = Task(model, words, Batches(rows, options.batch, options.seed).next())
    records: list[StepResult] = []
    asked: list[int] = []  # points of each question
    read = zo.evaluation.losses
    zo.evaluation.losses = lambda plan, points, closure: (
        asked.append(len(set(points))) or read(plan, points, closure)
    )

    def forward() -> None:
        with torch.no_grad():
            float(task())

    def take() -> None:
        asked.clear()
        records.append(step(zo, task))

    seconds: dict[str, list[float]] = {kind: [] for kind in ("forward", "step", "eager")}
    peaks: dict[str, list[int | None]] = {kind: [] for kind in seconds}
    forward()
    # The eager loop comes last: it puts new tensors into the parameters,
    # and a step would look at all of them again.
    kinds: list[dict[str, Callable[[], object]]] = [
        {"forward": forward, "step": take},
        {"forward": forward, "eager": lambda: eager.step(task, options.seed)},
    ]
    for part in kinds:
        for n in tqdm(range(options.rounds + 1), desc="cost", unit="round", disable=options.quiet):
            for kind, run in part.items():
                elapsed, peak = peak_of(run)
                zo.flush()  # deferred updates are written now, and not by the next forward
                peaks[kind].append(peak)
                if n:  # the first round warms up: its first step brings in the pages of the scratch
                    seconds[kind].append(elapsed)
    median = {kind: statistics.median(values) for kind, values in seconds.items()}
    # The scratch stays resident between steps. So zokern is held against the forward before its first step,
    # and the eager loop, which shares the process with that scratch, against the forward of its own round.
    extra = [
        a - peaks["forward"][0] for a in peaks["step"] if a is not None and peaks["forward"][0] is not None
    ]
    shared = peaks["forward"][len(peaks["step"]) :]
    eager_extra = [a - b for a, b in zip(peaks["eager"], shared) if a is not None and b is not None]
    forwards = max(1, sum(asked))  # a step that asks for slopes alone reads one loss
    return {
        "forwards": forwards,
        "step_seconds": median["step"],
        "forward_seconds": median["forward"],
        "rest_seconds": median["step"] - forwards * median["forward"],
        "eager_step_seconds": median["eager"],
        "peak_extra_bytes": max(extra, default=None),
        "eager_peak_extra_bytes": statistics.median(eager_extra[1:]) if eager_extra else None,
        "scratch_bytes": max(record.scratch_bytes for record in records),
        "backend": records[-1].backend,
    }
