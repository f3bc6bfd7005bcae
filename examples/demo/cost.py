"""What a step costs: time and peak memory of a bare forward, a step of the method, an eager MeZO step, and a
step of back-propagation with AdamW."""

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
from zokern.devices import free_memory
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
    """Rounds of a bare forward and a zokern step, then of a forward and an eager step, then of a forward and
    a step of AdamW, on one batch. Moves the weights.

    AdamW is left out, and None stands for its figures, where the memory for it is not free."""
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

    def descend() -> None:
        adamw.zero_grad()
        task().backward()
        adamw.step()

    # The eager loop comes after zokern: it puts new tensors into the parameters, and a step would look at
    # all of them again. AdamW comes last: its gradients and moments stay.
    kinds: dict[str, Callable[[], object]] = {"step": take, "eager": lambda: eager.step(task, options.seed)}
    trained = [p for p in model.parameters() if p.requires_grad]
    if 4 * sum(p.nbytes for p in trained) < free_memory(trained[0].device):  # gradients, moments, activations
        adamw = torch.optim.AdamW(trained, lr=1e-6)
        kinds["adamw"] = descend
    seconds: dict[str, list[float]] = {kind: [] for kind in ("forward", *kinds)}
    extra: dict[str, list[int | None]] = {}
    forward()
    for kind, run in kinds.items():
        if kind == "eager":  # from its first step on the weights are others than those that zokern holds
            run()
        # What a step keeps stays resident: it is held against the forward before the first of its kind.
        before, extra[kind] = peak_of(forward)[1], []
        for n in tqdm(range(options.rounds + 1), desc=f"cost, {kind}", unit="round", disable=options.quiet):
            for name, call in (("forward", forward), (kind, run)):
                elapsed, peak = peak_of(call)
                zo.flush()  # deferred updates are written now, and not by the next forward
                if name == kind:
                    extra[kind].append(None if peak is None or before is None else peak - before)
                if n:  # the first round warms up: its first step brings in the pages of the scratch
                    seconds[name].append(elapsed)
    median = {kind: statistics.median(values) for kind, values in seconds.items()}
    peaks = {kind: None if None in values else max(values) for kind, values in extra.items()}
    forwards = max(1, sum(asked))  # a step that asks for slopes alone reads one loss
    return {
        "forwards": forwards,
        "step_seconds": median["step"],
        "forward_seconds": median["forward"],
        "rest_seconds": median["step"] - forwards * median["forward"],
        "eager_step_seconds": median["eager"],
        "adamw_step_seconds": median.get("adamw"),
        "peak_extra_bytes": peaks["step"],
        "later_peak_extra_bytes": extra["step"][-1] if len(extra["step"]) > 2 else None,
        "eager_peak_extra_bytes": peaks["eager"],
        "adamw_peak_extra_bytes": peaks.get("adamw"),
        "scratch_bytes": max(record.scratch_bytes for record in records),
        "backend": records[-1].backend,
    }
