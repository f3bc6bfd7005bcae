"""Times a step of every method over the eager loop of that method, and over two bare forwards.

    pytest benchmarks/bench_methods.py -k bench_eager --benchmark-only -q     # one to two minutes a method
    pytest benchmarks/bench_methods.py -k bench_eager --benchmark-only -q --only SubZero --only LOZO

The page is written method by method. A run that was ended, or one with --only, leaves the other rows as they
are. A method is a class that zokern.methods exports and a loop a class of benchmarks/eager_methods, so a new
one is timed without an entry here. Steps that read their weights once for both sides can take less than two
forwards. --all or ZOKERN_BENCH_ALL=1 adds models, dtypes and batches for the other benchmarks of this file:
several hours on two cores.
"""

from __future__ import annotations

import inspect

import pytest

import zokern
from zokern import estimator, methods

from .eager_methods import LOOPS
from .measure import Case, Group
from .steps import Forwards, Shape, Step, Times, bench, ran, turns
from .steps import pytest_generate_tests as by_shape

QUERIES = 8
MANY = 99  # queries of SubZero+
FEW = {"SubZeroPlus": 8}  # queries beside the eager loop, which takes two minutes for 99
TURNS = 12.0  # seconds of a method and its eager loop


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


def bench_eager(benchmark, report, method: str) -> None:
    """Times a step of a method, one of its eager loop, and bare forwards, which take turns: as many forwards
    as the step reads losses. The eager loop over them is what a step that cost nothing else would reach.

    DiZO's search, every 50 steps, and new bases are not in it: the loops of bench_methods have these."""
    pytest.importorskip("transformers")
    if method not in LOOPS:
        pytest.skip(f"{method} has no eager loop in benchmarks/eager_methods")
    options = (("queries", FEW[method]),) if method in FEW else ()
    shape = Shape(*(("OPT-tiny", "bf16", 1, 32) if report.quick else ("OPT-125M", "bf16", 1, 128)))
    both = [Step(method, eager=eager, options=options) for eager in (False, True)]
    timed, found = [*both, Forwards(both[0])], list[Times]()
    benchmark.group = "eager"
    benchmark.pedantic(
        lambda: found.extend(turns(shape, timed, 0.0 if report.quick else TURNS)), rounds=1, iterations=1
    )
    (step, loop, bare), name = found, both[0].name
    cases = [
        Case(name, ran, eager="eager", times=list(step.step)),
        Case("forwards", ran, eager="eager", times=list(bare.step)),
        Case("eager", ran, times=list(loop.step)),
    ]
    row, forwards, eager = Group("", cases).rows()
    row |= {"eager_ms": eager["ms"], "forwards": int(bare.evaluation), "most": forwards["times_eager"]}
    row["evaluation"] = step.evaluation
    report.row(f"methods and their eager loops, {shape}", row, shape, f"least of the methods {shape} / eager")
    report.say(
        f"{name}: {row['ms']:.0f} ms, the eager loop {row['eager_ms']:.0f} ms, {row['times_eager']:.2f}x; "
        f"over {row['forwards']} forwards {row['most']:.2f}x"
    )


def bench_methods(benchmark, report, shape: Shape) -> None:
    pytest.importorskip("transformers")
    steps = [Step(method) for method in METHODS]
    # P-GAP's new basis takes ten readings and decompositions of all matrices: minutes.
    thorough = (report.all or report.quick) and shape.tokens <= 32
    drawn = {m: n for m in METHODS if (n := interval_of(m)) and (m != "PGAP" or thorough)}
    steps += [Step(method, refresh=True) for method in drawn]
    steps += [Step("MeZO", eager=True)]
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


def pytest_generate_tests(metafunc) -> None:
    """Runs a benchmark at every shape, or for every method, or those of --only."""
    by_shape(metafunc)
    if "method" in metafunc.fixturenames:
        metafunc.parametrize("method", metafunc.config.zokern_only or methods.__all__)
