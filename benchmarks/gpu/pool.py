"""Runs parts as processes: side by side or one by one, until each is through or its time is."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from . import ROOT
from .plan import Part

GRACE = 3.0  # seconds between the time that a part is given and the one at which it is stopped
TICK = 0.05
WORKER = (sys.executable, "-m", "benchmarks.gpu.worker")


@dataclass
class Outcome:
    """How a part ended: 'done', 'stopped' (its time was up), 'failed' (it ended without saying so) or 'not
    started'."""

    part: Part
    how: str
    why: str = ""
    seconds: float = 0.0
    lines: list[tuple[str, dict[str, Any]]] = field(default_factory=list)

    @property
    def failures(self) -> list[str]:
        return [fields["name"] for kind, fields in self.lines if kind == "check" and fields["problem"]]


class Process:
    """One worker, in a process group of its own, so that what it started ends with it."""

    def __init__(
        self,
        part: Part,
        folder: Path,
        number: int,
        seconds: float,
        options: Sequence[str],
        extra: Mapping[str, str],
    ) -> None:
        self.part, self.begun, self.seconds = part, time.monotonic(), seconds
        self.said, self.log = folder / f"{number}.jsonl", folder / f"{number}.log"
        command = [*WORKER, part.call, json.dumps(dict(part.options)), str(self.said)]
        command += ["--seconds", str(max(1.0, seconds - GRACE)), *options]
        command += ["--quick"] if part.quick and "--quick" not in options else []
        with open(self.log, "wb") as log:
            self.process = subprocess.Popen(
                command,
                cwd=ROOT,
                env=os.environ | extra,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def poll(self) -> Outcome | None:
        code, passed = self.process.poll(), time.monotonic() - self.begun
        if code is None and passed < self.seconds:
            return None
        self.stop()
        lines = read(self.said)
        if code is None:
            return Outcome(self.part, "stopped", f"stopped after {passed:.0f} s", passed, lines)
        if lines and lines[-1][0] == "end":
            return Outcome(self.part, "done", "", passed, lines[:-1])
        return Outcome(self.part, "failed", f"exit {code}: {tail(self.log)}", passed, lines)

    def stop(self) -> None:
        try:
            os.killpg(self.process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        self.process.wait()


def read(path: Path) -> list[tuple[str, dict[str, Any]]]:
    """What a part said; a line that it was stopped in the middle of is left out."""
    lines = []
    for text in path.read_text().splitlines() if path.exists() else []:
        try:
            kind, fields = json.loads(text)
        except ValueError:
            break
        lines.append((kind, fields))
    return lines


def tail(path: Path, characters: int = 600) -> str:
    return path.read_bytes()[-characters:].decode(errors="replace").strip()


def run_parts(
    parts: Sequence[Part], seconds: float, folder: Path, options: Sequence[str] = (), workers: int = 1
) -> Iterator[Outcome]:
    """The parts' outcomes, as they end; none goes on beyond `seconds`, and those that could not start say
    so."""
    stop, waiting, running = time.monotonic() + seconds, list(parts), []
    threads = max(1, (os.cpu_count() or 1) // workers)
    try:
        while waiting or running:
            while waiting and len(running) < workers and stop - time.monotonic() > GRACE:
                part = waiting.pop(0)
                limit = min(part.seconds, stop - time.monotonic())
                number = len(list(folder.glob("*.log")))
                running.append(
                    Process(part, folder, number, limit, options, {"OMP_NUM_THREADS": str(threads)})
                )
            if not running:
                break
            time.sleep(TICK)
            for process in list(running):
                if (outcome := process.poll()) is not None:
                    running.remove(process)
                    yield outcome
    finally:
        for process in running:
            process.stop()
    for part in waiting:
        yield Outcome(part, "not started", "no time was left")
