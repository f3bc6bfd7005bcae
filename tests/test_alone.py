"""A benchmark in a process of its own: what it measured arrives, and a failure of it is one here."""

from __future__ import annotations

import sys
from pathlib import Path
from subprocess import CompletedProcess
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks import alone  # noqa: E402
from benchmarks.measure import Case, Group  # noqa: E402
from benchmarks.report import Report  # noqa: E402


def item() -> SimpleNamespace:
    benchmark = SimpleNamespace(pedantic=lambda call, **_: call())
    return SimpleNamespace(
        nodeid="benchmarks/x.py::bench_x", config=SimpleNamespace(rootpath=ROOT), funcargs={"benchmark": benchmark}
    )


def measured() -> Report:
    group = Group("a group", [Case("one", lambda: None, times=[1.0, 2.0, 3.0])])
    report = Report(quick=True)
    report.add(group, figure=2.5)
    report.memory.append(("case", 1.0, 2.0, 3.0))
    report.notes.append("a note")
    report.steps.append({"model": "m", "dtype": "fp32", "tokens": 4, "ratios": {"MeZO": 1.0}})
    return report


def child(returncode: int, there: Report | None, seen: list[list[str]]):
    def run(command, **options) -> CompletedProcess:
        seen.append(command)
        part = next(word.removeprefix("--part=") for word in command if word.startswith("--part="))
        if there is not None:
            there.write_part(part)
        return CompletedProcess(command, returncode, "what it printed", "and why")

    return run


def test_what_was_measured_arrives(monkeypatch) -> None:
    seen: list[list[str]] = []
    report, there = Report(quick=True), measured()
    report.add(Group("before", [Case("one", lambda: None, times=[1.0])]), earlier=1.0)
    monkeypatch.setattr(alone.subprocess, "run", child(0, there, seen))
    alone.run(item(), report)
    assert report.groups[1:] == there.groups and report.figures == {"earlier": 1.0, "figure": 2.5}
    assert (report.memory, report.notes, report.steps) == (there.memory, there.notes, there.steps)
    assert "benchmarks/x.py::bench_x" in seen[0] and "--quick" in seen[0] and "--all" not in seen[0]


def test_a_failure_there_is_one_here(monkeypatch) -> None:
    report, there = Report(quick=True), measured()
    monkeypatch.setattr(alone.subprocess, "run", child(1, there, []))
    with pytest.raises(pytest.fail.Exception, match=r"(?s)ended with 1.*what it printed.*and why"):
        alone.run(item(), report)
    assert not report.groups


def test_nothing_measured_there_is_a_skip(monkeypatch) -> None:
    report = Report(quick=True)
    monkeypatch.setattr(alone.subprocess, "run", child(0, None, []))
    with pytest.raises(pytest.skip.Exception, match="nothing was measured"):
        alone.run(item(), report)
