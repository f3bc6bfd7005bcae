"""Times MeZO by each evaluation over two bare forwards, beside its eager loop."""

from __future__ import annotations

import pytest

from zokern.evaluation import EVALUATIONS

from .steps import Shape, Step, bench, pytest_generate_tests

MEZO = [
    Step("MeZO"),
    *(Step("MeZO", name) for name in EVALUATIONS if name not in ("auto", "jvp")),
]  # auto is the default, jvp reads losses as master


def bench_step(benchmark, report, shape: Shape) -> None:
    pytest.importorskip("transformers")
    bench(benchmark, report, "MeZO by evaluation", shape, [*MEZO, Step("MeZO", eager=True)])


__all__ = ["bench_step", "pytest_generate_tests"]
