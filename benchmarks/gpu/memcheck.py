"""compute-sanitizer's memcheck over every verb, where the tool exists and takes the device.

Every tensor is an allocation of its own there (PYTORCH_NO_CUDA_MEMORY_CACHING), so that a write beside it
leaves the allocation and not only the tensor.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from . import ROOT
from .checks import check_verb
from .run import Run
from .verbs import VERBS

SUMMARY = re.compile(r"ERROR SUMMARY: (\d+) error")


def smoke(run: Run, backend: str) -> None:
    """Every verb once, small: what memcheck looks at."""
    import torch

    if (found := run.backend(backend)) is None:
        return
    for name in VERBS:
        for dtype in (torch.float32, torch.bfloat16):
            run.check(
                f"{backend}: {name}, {dtype}",
                lambda n=name, d=dtype: check_verb(n, found, run.device, d, True, repeats=1),
            )


def verdict(code: int, output: str, said: str) -> tuple[str, str]:
    """('pass', 'fail' or 'skip', why) from the tool's exit code and output, and what the run under it
    said."""
    summary = SUMMARY.search(output)
    if "not supported" in output or "LibraryNotLoaded" in output:
        line = next(
            line for line in output.splitlines() if "not supported" in line or "LibraryNotLoaded" in line
        )
        return "skip", f"compute-sanitizer cannot work here: {line.strip('= ')}"
    if summary is None:
        return "skip", f"compute-sanitizer ended without a summary (exit {code}): {output.strip()[-300:]}"
    if int(summary[1]):
        first = [line.strip("= ") for line in output.splitlines() if line.startswith("=========")][1:6]
        return "fail", f"{summary[1]} errors: {' / '.join(first)}"
    if said.count('"check"') < 2 * len(VERBS) or code:
        return "fail", f"0 errors, but the run under it ended early (exit {code}): {output.strip()[-300:]}"
    return "pass", ""


def memcheck(run: Run, backend: str) -> None:
    name = f"{backend}: compute-sanitizer memcheck"
    tool = shutil.which("compute-sanitizer") or shutil.which("/usr/local/cuda/bin/compute-sanitizer")
    if tool is None:
        return run.skip(name, "compute-sanitizer is not installed here")
    if run.backend(backend) is None:
        return None
    with tempfile.TemporaryDirectory() as folder:
        said = Path(folder, "said")
        worker = [
            sys.executable,
            "-m",
            "benchmarks.gpu.worker",
            "memcheck:smoke",
            f'{{"backend": "{backend}"}}',
            str(said),
        ]
        command = [
            tool,
            "--tool",
            "memcheck",
            "--error-exitcode",
            "9",
            *worker,
            "--device",
            run.device,
            "--quick",
        ]
        environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        try:
            done = subprocess.run(
                command,
                cwd=ROOT,
                env=environment,
                capture_output=True,
                text=True,
                timeout=max(1.0, min(run.left, 1e6)),
            )
        except subprocess.TimeoutExpired:
            return run.skip(name, "compute-sanitizer did not finish in the time that was left")
        how, why = verdict(
            done.returncode, done.stdout + done.stderr, said.read_text() if said.exists() else ""
        )
    if how == "skip":
        return run.skip(name, why)
    run.say("check", name=name, problem=why or None, seconds=0)
    return None
