"""Threads, the quick mode, and the report that all groups share.

--quick or ZOKERN_BENCH_QUICK=1 (under 2 minutes: small tensors, few rounds; nothing is recorded in the repository)
ZOKERN_BENCH_THREADS (default 2)
"""

from __future__ import annotations

import os

THREADS = int(os.environ.get("ZOKERN_BENCH_THREADS", "2"))
os.environ["OMP_NUM_THREADS"] = str(THREADS)  # read when torch is loaded, below

import pytest  # noqa: E402
import torch  # noqa: E402

from .report import Report  # noqa: E402


def pytest_addoption(parser) -> None:
    parser.addoption("--quick", action="store_true", help="small tensors and few rounds, nothing recorded")


def pytest_configure(config) -> None:
    config.addinivalue_line("python_functions", "bench_")
    torch.set_num_threads(THREADS)
    quick = config.getoption("--quick") or os.environ.get("ZOKERN_BENCH_QUICK", "0") not in ("", "0")
    config.zokern_report = Report(quick)


@pytest.fixture
def report(request) -> Report:
    return request.config.zokern_report


def pytest_terminal_summary(terminalreporter, config) -> None:
    report: Report = config.zokern_report
    if not report.groups and not report.memory:
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
