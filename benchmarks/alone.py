"""Alone: benchmarks marked `alone` run in a process of their own, as a training run does.

In a process that has run others before, the allocator keeps memory which a fresh one asks the system for at every large temporary, so
that the eager loops, which make one for each z, were up to a third faster there (SubZero's in bfloat16 0.75 s, `make bench` at 027e728;
1.13 s, at 7cee2c2). The process is the same pytest command for one benchmark; it hands what it measured back in a file.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from .report import Report


def run(item: pytest.Function, report: Report) -> None:
    """The benchmark `item` in a process of its own, and what it measured in this one's report."""
    with tempfile.TemporaryDirectory() as folder:
        part = Path(folder) / "part.json"
        options = [f"--{name}" for name, given in (("quick", report.quick), ("all", report.all)) if given]
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            item.nodeid,
            "--benchmark-only",
            "--benchmark-quiet",
            f"--part={part}",
            *options,
        ]

        def call() -> subprocess.CompletedProcess:
            return subprocess.run(command, cwd=item.config.rootpath, capture_output=True, text=True)

        done = item.funcargs["benchmark"].pedantic(call, rounds=1, iterations=1, warmup_rounds=0)
        if done.returncode:
            pytest.fail(
                f"{' '.join(command)} ended with {done.returncode}:\n{done.stdout[-4000:]}{done.stderr[-4000:]}", pytrace=False
            )
        if not part.exists():
            pytest.skip(f"nothing was measured: {done.stdout[-300:].strip()}")
        report.merge(json.loads(part.read_text()))


__all__ = ["run"]
