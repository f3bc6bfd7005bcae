"""What a step costs: time and peak memory of a bare forward, a step of the method and an eager MeZO step."""

from __future__ import annotations

import argparse
import ctypes
import gc
import random
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..hf import LabelWords, Row
from ..step import StepResult, step
from .training import Batches, Task, build


class EagerMeZO:
    """The yardstick: MeZO in plain PyTorch, in place. z is drawn anew, parameter by parameter, from a seed for each pass.

    theta + eps z, loss, theta - 2 eps z, loss, theta + eps z (back), theta - lr c z: four passes. Malladi et al. 2023,
    Algorithm 1; `add_(alpha=)` spares a temporary that the published code pays for."""

    def __init__(self, model: nn.Module, lr: float, eps: float, seed: int) -> None:
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.lr, self.eps = lr, eps
        self.random = random.Random(seed)

    def move(self, seed: int, distance: float) -> None:
        generator = torch.Generator("cpu").manual_seed(seed)
        for parameter in self.parameters:
            z = torch.normal(0.0, 1.0, parameter.shape, generator=generator, dtype=parameter.dtype, device="cpu")
            parameter.add_(z, alpha=distance)

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor]) -> None:
        seed = self.random.getrandbits(32)
        self.move(seed, self.eps)
        plus = float(closure())
        self.move(seed, -2 * self.eps)
        minus = float(closure())
        self.move(seed, self.eps)
        self.move(seed, -self.lr * (plus - minus) / (2 * self.eps))


class Peak:
    """Highest resident memory of this process while the block runs (VmHWM, Linux), in bytes; None where it cannot be reset."""

    bytes: int | None = None

    def __enter__(self) -> Peak:
        gc.collect()
        with suppress(OSError, AttributeError):  # glibc only: what the allocator kept for later would hide the next block's use
            ctypes.CDLL(None).malloc_trim(0)
        try:
            Path("/proc/self/clear_refs").write_text("5")  # 5: the high-water mark falls to what is resident now
            self.known = True
        except OSError:
            self.known = False
        return self

    def __exit__(self, *exception: object) -> None:
        if self.known:
            (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")]
            self.bytes = int(line.split()[1]) * 1024


def cost(model: nn.Module, words: LabelWords, rows: Sequence[Row], options: argparse.Namespace) -> dict[str, Any]:
    """Rounds of a bare forward, a zokern step and an eager step, all on one batch. Moves the weights."""
    from tqdm.auto import tqdm

    zo = build(model, options.seed, options)
    eager = EagerMeZO(model, 0.0, options.eps, options.seed)  # its cost does not depend on lr
    task = Task(model, words, Batches(rows, options.batch, options.seed).next())
    records: list[StepResult] = []

    def forward() -> None:
        with torch.no_grad():
            float(task())

    kinds: dict[str, Callable[[], object]] = {
        "forward": forward,
        "step": lambda: records.append(step(zo, task)),
        "eager": lambda: eager.step(task),
    }
    seconds: dict[str, list[float]] = {kind: [] for kind in kinds}
    peaks: dict[str, list[int | None]] = {kind: [] for kind in kinds}
    forward()
    for n in tqdm(range(options.rounds + 1), desc="cost", unit="round", disable=options.quiet):
        for kind, run in kinds.items():
            with Peak() as peak:
                started = time.perf_counter()
                run()
                elapsed = time.perf_counter() - started
            zo.flush()  # what waits is written now, and not by the next forward
            peaks[kind].append(peak.bytes)
            if n:  # the first round warms up: its first step brings in the pages of the scratch
                seconds[kind].append(elapsed)
    median = {kind: statistics.median(values) for kind, values in seconds.items()}
    # The scratch stays resident between steps. So zokern is held against the forward before its first step, and the eager loop,
    # which shares the process with that scratch, against the forward of its own round.
    bare = [peaks["forward"][0]] * len(peaks["step"])
    extra = [a - b for a, b in zip(peaks["step"], bare) if a is not None and b is not None]
    eager_extra = [a - b for a, b in zip(peaks["eager"], peaks["forward"]) if a is not None and b is not None]
    estimator: Any = zo.estimator
    offsets = estimator.stencil.offsets
    forwards = estimator.queries * sum(offset != 0.0 for offset in offsets) + (0.0 in offsets)
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
