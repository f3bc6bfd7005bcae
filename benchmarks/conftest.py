"""Threads, the quick mode, and the report that all groups share.

--quick or ZOKERN_BENCH_QUICK=1 (under 2 minutes: small tensors, few rounds; nothing is recorded in the repository)
--all or ZOKERN_BENCH_ALL=1 (hours: every model, dtype and batch of bench_methods.py)
ZOKERN_BENCH_THREADS (default 2)
"""

from __future__ import annotations

import os

THREADS = int(os.environ.get("ZOKERN_BENCH_THREADS", "2"))
os.environ["OMP_NUM_THREADS"] = str(THREADS)  # read when torch is loaded, below

import pytest  # noqa: E402
import torch  # noqa: E402

from . import alone  # noqa: E402
from .report import Report  # noqa: E402


def pytest_addoption(parser) -> None:
    parser.addoption("--quick", action="store_true", help="small tensors and few rounds, nothing recorded")
    parser.addoption("--all", action="store_true", help="every model, dtype and batch of the step benchmarks")
    parser.addoption("--part", help="a file for what was measured, and no page: this is a process of one benchmark (alone.py)")


def pytest_configure(config) -> None:
    config.addinivalue_line("python_functions", "bench_")
    config.addinivalue_line("markers", "alone: in a process of its own")
    torch.set_num_threads(THREADS)
    quick, everything = (
        config.getoption(f"--{name}") or os.environ.get(f"ZOKERN_BENCH_{name.upper()}", "0") not in ("", "0")
        for name in ("quick", "all")
    )
    config.zokern_report = Report(quick, everything)


def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    """A benchmark marked `alone` runs in another process, unless this is that process."""
    if pyfuncitem.get_closest_marker("alone") is None or pyfuncitem.config.getoption("--part"):
        return None
    alone.run(pyfuncitem, pyfuncitem.config.zokern_report)
    return True


@pytest.fixture
def report(request) -> Report:
    return request.config.zokern_report


def pytest_terminal_summary(terminalreporter, config) -> None:
    report: Report = config.zokern_report
    if not report.groups and not report.memory:
        return
    if part := config.getoption("--part"):
        report.write_part(part)
        return
    folder = report.write()
    for line in report.lines():
        terminalreporter.write_line(line)
    terminalreporter.write_line("")
    for note in report.notes:
        terminalreporter.write_line(f"note: {note}")
    for what, bound, value, verdict in report.goals():
        terminalreporter.write_line(f"{what:86} {bound:>10} {value:>10}  {verdict}")
    terminalreporter.write_line(f"written to {folder}")
