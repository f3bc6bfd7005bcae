"""Threads, the quick mode, and the report that all groups share.

--quick or ZOKERN_BENCH_QUICK=1 (minutes: small tensors, few rounds; nothing is recorded in the repository)
--all or ZOKERN_BENCH_ALL=1 (hours: every model, dtype and batch of bench_methods.py)
--only METHOD, once or more (of the methods beside their eager loops)
ZOKERN_BENCH_THREADS (default 2)
"""

from __future__ import annotations

import os
from pathlib import Path

THREADS = int(os.environ.get("ZOKERN_BENCH_THREADS", "2"))
os.environ["OMP_NUM_THREADS"] = str(THREADS)  # read when torch is loaded, below

import pytest  # noqa: E402
import torch  # noqa: E402

from zokern.methods import METHODS  # noqa: E402

from .report import ROOT, Report  # noqa: E402


def pytest_addoption(parser) -> None:
    parser.addoption("--quick", action="store_true", help="small tensors and few rounds, nothing recorded")
    parser.addoption("--all", action="store_true", help="every model, dtype and batch of the step benchmarks")
    parser.addoption("--only", action="append", default=[], metavar="METHOD", help="beside its eager loop")


def pytest_configure(config) -> None:
    config.addinivalue_line("python_functions", "bench_")
    torch.set_num_threads(THREADS)
    quick, everything = (
        config.getoption(f"--{name}") or os.environ.get(f"ZOKERN_BENCH_{name.upper()}", "0") not in ("", "0")
        for name in ("quick", "all")
    )
    command = " ".join(["python -m pytest", *config.invocation_params.args]).replace(f"{ROOT}{os.sep}", "")
    config.zokern_report, config.zokern_anew = Report(quick, everything, command), True
    config.zokern_only = config.getoption("--only")
    if unknown := {*config.zokern_only} - METHODS.keys():
        raise pytest.UsageError(f"--only has {sorted(unknown)}; expected some of {', '.join(METHODS)}")


def pytest_collection_finish(session) -> None:
    """A run of all benchmarks writes the page anew; a run of some keeps what the page has of the others."""
    files = set(Path(__file__).parent.glob("bench_*.py"))
    if session.config.zokern_only or not files <= {item.path for item in session.items}:
        session.config.zokern_anew = False


def pytest_deselected(items) -> None:
    if items:
        items[0].config.zokern_anew = False


@pytest.fixture
def report(request):
    capture, terminal = map(request.config.pluginmanager.getplugin, ("capturemanager", "terminalreporter"))

    def say(line: str) -> None:
        with capture.global_and_fixture_disabled():
            terminal.write_line(line)

    with request.config.zokern_report.saving() as report:
        report.say = say
        yield report


def pytest_terminal_summary(terminalreporter, config) -> None:
    report: Report = config.zokern_report
    if not report.groups:
        return
    folder = report.write(config.zokern_anew)
    for line in [*report.lines(), "", *(f"note: {note}" for note in report.notes())]:
        terminalreporter.write_line(line)
    for what, bound, value, verdict in report.goals():
        terminalreporter.write_line(f"{what:86} {bound:>10} {value:>10}  {verdict}")
    terminalreporter.write_line(f"written to {folder}")
