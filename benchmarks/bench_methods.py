"""Times a step of every method over two bare forwards, beside the eager loop of that method.

A method is a class that zokern.methods exports, so a new one is timed without an entry here.
One that has no loop in eager_methods.py is timed without it, and a note of the page says so.
Steps that read their weights once for both sides can take less than two forwards.
--all or ZOKERN_BENCH_ALL=1 adds models, dtypes and batches: several hours on two cores.
"""

from __future__ import annotations

import inspect

import pytest

import zokern
from zokern import estimator, methods

from .eager_methods import LOOPS
from .steps import Shape, Step, bench, pytest_generate_tests

QUERIES = 8
MANY = 99  # queries of SubZero+


def queries_of(method: str) -> int:
    """Returns the queries of a method by default."""
    queries = inspect.signature(getattr(zokern, method)).parameters.get("queries")
    return queries.default or 1 if queries is not None else 1


# A step of many queries is timed by bench_many alone: it takes as long as all other methods' together.
METHODS = [method for method in methods.__all__ if queries_of(method) < MANY]
# Every class of zokern.estimator that needs no argument and reads losses alone;
# Spsa is what MeZO has without one.
ESTIMATORS = [
    name for name in estimator.__all__
    if isinstance(getattr(estimator, name), type) and name not in (
        "Base", "Estimate", "Estimator", "ForwardGradient", "Gradient", "Mixed", "Oracle", "Split", "Spsa",
        "Stencil",
    )
]  # fmt: skip


def interval_of(method: str) -> int:
    """Returns the default number of steps for which a basis is kept; 0: none is drawn, or it stays."""
    interval = inspect.signature(getattr(zokern, method)).parameters.get("interval")
    return interval.default if interval is not None else 0


def is_slow(method: str, shape: Shape) -> bool:
    """Says whether a step of the eager loop takes about a minute. Some processors multiply bf16 slowly."""
    return method == "FZOO" or (method == "PGAP" and shape.dtype == "bf16")


def bench_methods(benchmark, report, shape: Shape) -> None:
    pytest.importorskip("transformers")
    thorough = report.all or report.quick
    steps = [Step(method) for method in METHODS]
    # P-GAP's new basis takes ten readings and decompositions of all matrices: minutes.
    affordable = [m for m in METHODS if m != "PGAP" or (thorough and shape.tokens <= 32)]
    drawn = {m: n for m in affordable if (n := interval_of(m))}
    steps += [Step(method, refresh=True) for method in drawn]
    for method in METHODS:
        if method not in LOOPS:
            report.note(f"{method} has no eager loop in benchmarks/eager_methods.py: it is timed without one")
        elif method == "MeZO" or (shape.eager and (thorough or not is_slow(method, shape))):
            steps.append(Step(method, eager=True))
    if "PGAP" in drawn:
        steps.append(Step("PGAP", eager=True, refresh=True))
    group = bench(benchmark, report, "methods", shape, steps)
    for method, n in drawn.items():
        step, fresh = (group.found[Step(method, refresh=refresh).name].ratio for refresh in (False, True))
        report.figure(
            f"{method}, a new basis every {n} steps included, {shape} / forwards", step + (fresh - step) / n
        )


def small(report, length: int) -> Shape:
    return Shape("OPT-tiny" if report.quick else "OPT-125M", "fp32", 1, length)


def bench_queries(benchmark, report) -> None:
    """Times K queries in one pass, which reads each weight once, over K steps of one query."""
    pytest.importorskip("transformers")
    signs = ("direction", "rademacher"), ("stencil", "forward")
    many = ("queries", QUERIES)
    pairs = {
        "SubZero": (Step("SubZero", options=(many,)), Step("SubZero")),
        "Rademacher": (
            Step("MeZO", "paired", options=(*signs, many)),
            Step("MeZO", "paired", options=signs),
        ),
    }
    shape = small(report, 4)
    both = [step for pair in pairs.values() for step in pair]
    group = bench(benchmark, report, f"{QUERIES} queries in a step", shape, both)
    for name, (several, one) in pairs.items():
        report.figure(f"{name} K={QUERIES} {shape} / steps", group.ratio(several.name, one.name) / QUERIES)


def bench_many(benchmark, report) -> None:
    """Times SubZero+ with 99 queries on one batch of 4 x 4 tokens, over 100 bare forwards: in passes of 32
    sides and in one."""
    pytest.importorskip("transformers")
    shape = Shape("OPT-tiny" if report.quick else "Llama-narrow", "fp32", 4, 4)
    name = "SubZeroPlus"
    steps = [Step(name, "paired"), Step(name, options=(("sides", MANY + 1),))]
    group = bench(benchmark, report, f"SubZero+, {MANY} queries", shape, steps)
    for step, passes in zip(steps, ("passes of 32 sides", "one pass")):
        ratio = group.found[step.name].ratio * 2 / (MANY + 1)
        report.figure(f"SubZero+ K={MANY} {shape}, {passes} / {MANY + 1} forwards", ratio)


def bench_estimators(benchmark, report) -> None:
    """Times MeZO with every estimator at its defaults. They read different numbers of losses in a step."""
    pytest.importorskip("transformers")
    steps = [Step("MeZO"), *(Step("MeZO", options=(("estimator", name),)) for name in ESTIMATORS)]
    bench(benchmark, report, "estimators", small(report, 32), steps)


__all__ = ["bench_estimators", "bench_many", "bench_methods", "bench_queries", "pytest_generate_tests"]
