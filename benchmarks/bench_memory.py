"""Extra peak memory of a step over the weights and one forward, each case in a fresh process.

The processes return every large block to the system (a fixed MALLOC_MMAP_THRESHOLD_, glibc's): what is counted is memory in use. With
glibc's moving threshold the peak of the same forward differs by 80 MB between processes, by which freed blocks were kept.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch

from .goals import MIB
from .report import ROOT

CASES = [
    ("fp32", 4, 128, "64"), ("fp32", 4, 128, "16"), ("bf16", 1, 128, "64"), ("fp32", 4, 128, "inplace"), ("fp32", 4, 128, "master"),
    ("fp32", 4, 128, "eager"),
    ("fp32", 1, 128, "doubled"), ("fp32", 1, 128, "SubZero"), ("fp32", 1, 128, "LOZO"), ("fp32", 1, 128, "TeZO"),
    ("fp32", 1, 128, "eager SubZero"), ("fp32", 1, 128, "eager LOZO"),
]  # fmt: skip


def bench_memory(benchmark, report) -> None:
    pytest.importorskip("transformers")
    rows = []

    def measure() -> None:
        for dtype, batch, length, budget in CASES[:3] if report.quick else CASES:
            command = [
                sys.executable,
                "-m",
                "benchmarks.memory",
                dtype,
                str(batch),
                str(length),
                budget,
                str(torch.get_num_threads()),
            ]
            exact = os.environ | {"MALLOC_MMAP_THRESHOLD_": str(1 << 17)}
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, env=exact)
            if done.returncode:
                raise RuntimeError(f"{' '.join(command)}: {done.stderr[-2000:]}")
            found = json.loads(done.stdout.splitlines()[-1])
            extra = (found["step"] - found["forward"]) / MIB
            label = "eager loop" if budget == "eager" else f"{budget} MB" if budget.isdecimal() else budget
            report.figure(f"memory {dtype} {label}", extra)
            rows.append(
                (f"OPT-125M {dtype} {batch}x{length}, {label}", found["forward"] / MIB, extra, found["scratch_bytes"] / MIB)
            )
            if not found["exact"]:
                report.notes.append(
                    "memory: the high-water mark could not be set back here; extra memory below the loading peak is unseen"
                )

    benchmark.group = "memory"
    benchmark.pedantic(measure, rounds=1, iterations=1)
    if not report.quick:
        twice, factored = (report.figures[f"memory fp32 {label}"] for label in ("doubled", "SubZero"))
        report.figure("memory SubZero beyond activations", factored - twice)
    report.memory = rows
