"""Measures the peak memory of a step, each in a fresh process.

The first group sets a step beside a bare forward, the eager loop, and back-propagation with AdamW.
Model, batch and dtype are the same. The second group
has the memory of steps over the weights and one forward.

The processes return every large block to the system, by a fixed MALLOC_MMAP_THRESHOLD_ of glibc.
So memory in use is counted. With glibc's moving threshold
a forward's peak differs by 80 MB between processes.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest
import torch

from .goals import MIB
from .report import ROOT

LARGE, SMALL, SIXTEEN = ("fp32", 4, 128), ("fp32", 1, 128), ("bf16", 1, 128)
BESIDE = ("forward", "MeZO", "MeZO first steps", "eager MeZO", "AdamW")
PEAKS = [(*shape, what) for shape in (LARGE, SIXTEEN) for what in BESIDE]
EXTRA = [
    (*LARGE, "MeZO scratch 64"), (*LARGE, "MeZO scratch 16"), (*SIXTEEN, "MeZO scratch 64"),
    (*LARGE, "MeZO inplace"), (*LARGE, "MeZO master"), (*SMALL, "doubled"), (*SMALL, "SubZero"),
    (*SMALL, "LOZO"), (*SMALL, "TeZO"), (*SMALL, "eager SubZero"), (*SMALL, "eager LOZO"),
]  # fmt: skip
EXPLAINED = {
    "forward": "bare forward",
    "doubled": "a forward of twice the batch",
    "AdamW": "backward + AdamW",
}


def peak(report, model: str, dtype: str, batch: int, length: int, what: str) -> dict[str, Any]:
    """Returns the row of one process."""
    arguments = [model, dtype, str(batch), str(length), what, str(torch.get_num_threads())]
    command = [sys.executable, "-m", "benchmarks.memory", *arguments]
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": str(1 << 17)}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, env=environment)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr[-2000:]}")
    found = json.loads(done.stdout.splitlines()[-1])
    if not found["exact"]:
        report.note(
            "memory: the high-water mark could not be set back; what stays below the peak of loading is "
            "unseen"
        )
    return {
        "name": f"{model} {dtype} {batch}x{length}, {EXPLAINED.get(what, what)}",
        "peak_mb": found["step"] / MIB,
        "forward_mb": found["forward"] / MIB,
        "extra_mb": (found["step"] - found["forward"]) / MIB,
        "scratch_mb": found["scratch_bytes"] / MIB,
    }


@pytest.mark.parametrize(
    "title, cases", [("peak memory of a step", PEAKS), ("extra memory of a step", EXTRA)]
)
def bench_memory(benchmark, report, title: str, cases: list[tuple[str, int, int, str]]) -> None:
    pytest.importorskip("transformers")
    rows, figures = [], {}

    def measure() -> None:
        for dtype, batch, length, what in cases:
            rows.append(peak(report, "OPT-tiny" if report.quick else "OPT-125M", dtype, batch, length, what))
            figures[f"memory {dtype} {batch}x{length} {what}"] = rows[-1]["extra_mb"]

    benchmark.group = "memory"
    benchmark.pedantic(measure, rounds=1, iterations=1)
    if cases is EXTRA:
        twice, factored = (figures[f"memory fp32 1x128 {what}"] for what in ("doubled", "SubZero"))
        figures["memory SubZero beyond activations"] = factored - twice
    report.rows(f"{title}, a fresh process each (MB, VmHWM)", rows, figures)
