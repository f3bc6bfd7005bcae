"""Hardware counters of our kernels, by Nsight Compute where it is installed: what a shortfall is made of.

One launch of each kernel is profiled, after a first one that compiles and uploads. The clocks are
left as they are.
"""

from __future__ import annotations

import csv
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch

from . import ROOT
from .dense import DRAWS, Passes, weights
from .factors import ours
from .pool import read
from .run import Run

SECTIONS = (
    "SpeedOfLight",
    "ComputeWorkloadAnalysis",
    "SchedulerStats",
    "Occupancy",
    "LaunchStats",
    "MemoryWorkloadAnalysis",
)
SHOWN = (
    "Duration",
    "DRAM Throughput",
    "Compute (SM) Throughput",
    "Issue Slots Busy",
    "Achieved Occupancy",
    "Registers Per Thread",
)  # on the page
RESERVE = 2.0  # seconds for reading what the tool wrote
FOREIGN = ("at::", "cub::", "void at", "Memset", "memcpy")  # torch's own kernels between ours


def probes(run: Run, chosen: str) -> dict[str, Callable[[], object]]:
    """Label, and a call that launches one kernel of ours, on one backend."""
    n = 1 << 12 if run.quick else 1 << 28
    w = weights(run, n, torch.bfloat16)
    sides = [[torch.empty_like(w)] for _ in "+-"]
    side = 64 if run.quick else 4096
    ws = list(weights(run, 4 * side * side, torch.bfloat16).view(4, side, side).unbind())
    factors = {rank: [torch.randn(side, rank, device=run.device) for _ in ws] for rank in (16, 128)}
    calls: dict[str, Callable[[], object]] = {}
    for name, backend in run.backends().items():
        if name != chosen:
            continue
        passes = Passes(backend, [w])
        calls |= {
            f"axpy_ normal {name}": passes.axpy(),
            f"axpy_ normal K={DRAWS} {name}": passes.axpy(terms=DRAWS),
            f"axpy_ stochastic {name}": passes.axpy(rounding="stochastic"),
            f"axpy_ rademacher {name}": passes.axpy("rademacher"),
            f"perturb both sides {name}": passes.perturb(sides),
            f"draw normal {name}": passes.draw(sides[0]),
            **{f"lowrank_ r={rank} {name}": ours(backend, ws, us, us) for rank, us in factors.items()},
        }
    return calls


def probe(run: Run, backend: str) -> None:
    """What is profiled."""
    for name, call in probes(run, backend).items():
        call()
        if run.device == "cuda":
            torch.cuda.synchronize()
            torch.cuda.profiler.start()
            call()
            torch.cuda.synchronize()
            torch.cuda.profiler.stop()
        run.say("probe", name=name)


def parse(text: str, labels: list[str]) -> list[dict]:
    """Kernels of ours in the tool's CSV, in order, with their metrics; labelled where there is one kernel for
    each label."""
    lines = text.splitlines()
    start = next((i for i, line in enumerate(lines) if line.startswith('"ID"')), None)
    if start is None:
        return []
    kernels: dict[str, dict] = {}
    for row in csv.DictReader(io.StringIO("\n".join(lines[start:]))):
        kernel = row.get("Kernel Name") or ""
        if row.get("Metric Name") and not any(part in kernel for part in FOREIGN):
            found = kernels.setdefault(row["ID"], {"name": kernel, "metrics": {}})
            found["metrics"][row["Metric Name"]] = f"{row['Metric Value']} {row['Metric Unit']}".strip()
    ordered = [kernels[key] for key in sorted(kernels, key=int)]
    for found, label in zip(ordered, labels if len(labels) == len(ordered) else []):
        found["name"] = f"{label}: {found['name']}"
    return ordered


def counters(run: Run) -> None:
    """Profiles one backend after the other. What the tool has written is kept when its time is up."""
    tool = shutil.which("ncu") or shutil.which("/usr/local/cuda/bin/ncu")
    if tool is None:
        return run.skip("hardware counters", "ncu (Nsight Compute) is not installed here")
    for name in run.backends():
        profile(run, tool, name)
    return None


def profile(run: Run, tool: str, name: str) -> None:
    """Runs the tool on the probes of a backend, with its output in a file, and says what stands there."""
    with tempfile.TemporaryDirectory() as folder:
        said, log = Path(folder, "said"), Path(folder, "log")
        worker = [sys.executable, "-m", "benchmarks.gpu.worker", "counters:probe",
                  json.dumps({"backend": name}), str(said), "--device", run.device]  # fmt: skip
        sections = [word for section in SECTIONS for word in ("--section", section)]
        command = [tool, "--csv", "--page", "details", "--clock-control", "none",
                   "--profile-from-start", "off", "--log-file", str(log), *sections, *worker]  # fmt: skip
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        try:
            output, how = process.communicate(timeout=max(1.0, min(run.left - RESERVE, 1e6)))[0], "ended"
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            output, how = process.communicate()[0], "did not finish in the time that was left"
        labels = [fields["name"] for kind, fields in read(said) if kind == "probe"]
        found = parse(log.read_text() if log.exists() else "", labels)
    for kernel in found:
        run.say("counters", **kernel)
    if how != "ended":
        run.skip(f"hardware counters of {name}", f"ncu {how}; {len(found)} kernels are kept")
    elif not found:
        run.skip(
            f"hardware counters of {name}",
            f"ncu gave none (exit {process.returncode}): {output.strip()[-300:]}",
        )
