"""A step of every method over two bare forwards, beside the eager loop of that method; K queries in one pass; the refresh of a basis.

Two forwards are the bound of a step that reads its weights twice. A step that reads them once for both sides can be below it.
--all or ZOKERN_BENCH_ALL=1 adds models, dtypes and batches (about two hours on two cores).
"""

from __future__ import annotations

import copy
import gc
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import nn

import zokern

from . import eager
from .eager_methods import LOOPS
from .measure import Case, Group

LR, EPS = 1e-6, 1e-3
QUERIES = 8
ROUNDS = {4: 12, 32: 10, 128: 8, 512: 4, 2048: 3, 4096: 3}  # by tokens: fewer where a round takes minutes
SMALL = 2048  # tokens from which sides run two at a time: 16 of them would hold 16 sets of logits
BOUND = "two forwards: the bound"


@dataclass(frozen=True)
class Shape:
    model: str
    dtype: str
    batch: int
    length: int
    eager: bool = True  # with the eager loops; without them it is a point of the plot

    @property
    def tokens(self) -> int:
        return self.batch * self.length

    def __str__(self) -> str:
        return f"{self.model} {self.dtype} {self.batch}x{self.length}"


QUICK = [Shape("OPT-tiny", "fp32", 1, 4), Shape("OPT-tiny", "fp32", 1, 32), Shape("OPT-tiny", "bf16", 1, 32)]
DEFAULT = [
    Shape("OPT-125M", "fp32", 1, 4), Shape("OPT-125M", "fp32", 1, 32, False), Shape("OPT-125M", "fp32", 1, 128, False),
    Shape("OPT-125M", "fp32", 4, 128, False), Shape("OPT-125M", "bf16", 1, 128),
    Shape("OPT-350M", "fp32", 1, 32, False), Shape("Qwen2-0.5B", "fp32", 1, 32, False),
]  # fmt: skip
BATCHES = {4: (1, 4), 32: (1, 32), 128: (1, 128), 512: (4, 128), 2048: (4, 512), 4096: (8, 512)}
ALL = [
    Shape(model, dtype, *BATCHES[tokens])
    for model, largest in (("OPT-125M", 4096), ("OPT-350M", 512), ("Qwen2-0.5B", 512))
    for dtype in ("fp32", "bf16")
    for tokens in BATCHES
    if tokens <= largest
]


def pytest_generate_tests(metafunc) -> None:
    if "shape" in metafunc.fixturenames:
        report = metafunc.config.zokern_report
        shapes = QUICK if report.quick else ALL if report.all else DEFAULT
        metafunc.parametrize("shape", shapes, ids=str)


def method(name: str, module: nn.Module, shape: Shape, **options: Any) -> zokern.SubZero:
    """Published defaults, with MeZO's lr and eps: a step costs what it costs."""
    if shape.tokens >= SMALL:
        options.setdefault("evaluation", zokern.Paired(sides=2))
    return getattr(zokern, name)(module, lr=LR, eps=EPS, dead_limit=None, **options)


def stepper(name: str, module: nn.Module, shape: Shape, **options: Any) -> Callable[[], Any]:
    from .models import loss_of

    optimizer = method(name, module, shape, **options)
    loss = loss_of(module, shape.batch, shape.length)
    for _ in range(2):  # the first step looks at the closure, the second compares the evaluation that was chosen
        zokern.step(optimizer, loss)
    return lambda: zokern.step(optimizer, loss)


@pytest.mark.alone
@pytest.mark.filterwarnings("ignore:rounding to nearest")
def bench_methods(benchmark, report, shape: Shape) -> None:
    pytest.importorskip("transformers")
    from .models import loss_of, model, same_weights

    module = model(shape.model, shape.dtype)
    loss = loss_of(module, shape.batch, shape.length)

    @torch.no_grad()
    def forwards() -> None:
        loss()
        loss()

    rounds = 2 if report.quick else min(ROUNDS[shape.tokens], 12 if shape.model == "OPT-125M" else 5)
    seldom = max(1, rounds // 2)
    cases = [Case(BOUND, forwards)]
    for evaluation in ("inplace", "master", "scratch", "paired"):
        chosen = zokern.Paired(sides=2) if evaluation == "paired" and shape.tokens >= SMALL else evaluation
        loop = "eager MeZO" if shape.eager else ""
        cases.append(Case(f"MeZO {evaluation}", stepper("MeZO", module, shape, evaluation=chosen), eager=loop))
    for name in LOOPS:
        # updates wait in small matrices, and any other forward of the module would have them written: a module each
        own = module if name == "FZOO" else copy.deepcopy(module)
        # a step of FZOO's loop takes most of a minute; so does P-GAP's in 16 bits where torch multiplies them in a plain loop
        slow = name == "FZOO" or (name == "PGAP" and shape.dtype == "bf16")
        compared = shape.eager and (not slow or report.all or report.quick)
        cases.append(Case(name, stepper(name, own, shape), eager=f"eager {name}" if compared else ""))
    refreshed = {"SubZero": 2000, "LOZO": 50} | ({"PGAP": 100} if report.all or report.quick else {})  # P-GAP's takes minutes
    for name in refreshed:
        # interval 1: every step draws a basis and writes the weights
        call = stepper(name, same_weights(module), shape, interval=1)
        cases.append(Case(f"{name}, a step that refreshes and writes", call, every=seldom, warm=name != "PGAP"))
    if shape.eager:
        cases += eager_cases(module, shape, seldom, [case.name for case in cases if case.eager == f"eager {case.name}"])
    group = Group(f"methods, {shape}", cases).run(benchmark, rounds)
    figures = {}
    for name, interval in refreshed.items():
        line = f"{name}, a refresh every {interval} steps included"
        share = lambda step, refresh, n=interval: step + (refresh - step) / n  # noqa: E731
        group.derive(line, share, name, f"{name}, a step that refreshes and writes")
        figures[f"{line}, {shape} / forwards"] = group.ratio(line, BOUND)
    ratios = {case.name: group.ratio(case.name, BOUND) for case in group.cases if case.name != BOUND}
    figures |= {
        f"{name} {shape} / forwards": ratios[name]
        for name in ("MeZO inplace", "MeZO master", "MeZO scratch", "MeZO paired", *LOOPS)
    }
    if shape.eager:
        figures |= {
            f"{name} {shape} / eager": group.ratio(f"eager {name}", name) for name in LOOPS if f"eager {name}" in group.by_name
        }
        figures[f"MeZO paired {shape} / eager"] = group.ratio("eager MeZO", "MeZO paired")
    report.add(group, **figures)
    report.steps.append({"model": shape.model, "dtype": shape.dtype, "tokens": shape.tokens, "ratios": ratios})
    del module, cases, group
    gc.collect()


def eager_cases(module: nn.Module, shape: Shape, every: int, names: list[str]) -> list[Case]:
    """The loops drift by their roundings, so they have weights of their own, and share them."""
    from .models import loss_of

    twin = copy.deepcopy(module)
    parameters = [p for p in twin.parameters() if p.requires_grad]
    loss, seeds = loss_of(twin, shape.batch, shape.length), itertools.count()
    cases = [Case("eager MeZO", lambda: eager.step(parameters, loss, next(seeds), LR, EPS), every=every, warm=False)]
    for name in names:
        step = LOOPS[name](parameters, LR, EPS).step
        cases.append(Case(f"eager {name}", lambda step=step: step(loss, next(seeds)), every=every, warm=False))
    return cases


def bench_queries(benchmark, report) -> None:
    """K queries in one pass, each weight read once, against K steps of one query."""
    pytest.importorskip("transformers")
    from .models import model

    shape = Shape("OPT-tiny" if report.quick else "OPT-125M", "fp32", 1, 4)
    module = model(shape.model, shape.dtype)

    def times(call: Callable[[], Any]) -> Callable[[], None]:
        def repeat() -> None:
            for _ in range(QUERIES):
                call()

        return repeat

    k = f"K={QUERIES}"
    signs = dict(direction="rademacher", stencil="forward", evaluation="paired")
    single = {"SubZero": ("SubZero", {}), "FZOO": ("MeZO", signs)}  # FZOO's signs, read one at a time
    cases, pairs = [], {}
    for name, (one, options) in single.items():
        own = copy.deepcopy(module) if name == "SubZero" else module
        many = Case(f"{name} {k} in one pass", stepper(name, own, shape, queries=QUERIES))
        own = copy.deepcopy(module) if name == "SubZero" else module
        label = name if one == name else f"{one} rademacher one-sided"
        steps = Case(f"{label}, {QUERIES} steps", times(stepper(one, own, shape, **options)))
        cases += [many, steps]
        pairs[f"{name} {k} {shape} / steps"] = many.name, steps.name
    group = Group(f"methods, {k} queries, {shape}", cases).run(benchmark, 2 if report.quick else 8)
    report.add(group, **{figure: group.ratio(*pair) for figure, pair in pairs.items()})


def bench_estimate(benchmark, report, shape: Shape) -> None:
    """P-GAP's new basis, both ways: h dense probes, and the decomposition of every matrix. Minutes in the eager way: --all."""
    if not (report.all or report.quick) or shape.model not in ("OPT-tiny", "OPT-125M") or shape.tokens != 32:
        pytest.skip("only in --all and --quick, OPT-125M 1x32")
    pytest.importorskip("transformers")
    from .models import loss_of, model

    module = model(shape.model, shape.dtype)
    twin = copy.deepcopy(module)
    loss, loop = loss_of(twin, shape.batch, shape.length), LOOPS["PGAP"](list(twin.parameters()), LR, EPS)
    eagerly = "eager PGAP: probes, dense sum, full decompositions"
    cases = [
        Case("PGAP, a step that refreshes and writes", stepper("PGAP", module, shape, interval=1), warm=False, eager=eagerly),
        Case(eagerly, lambda: loop.estimate(loss, 0), warm=False),
    ]
    group = Group(f"methods, a basis of P-GAP, {shape}", cases).run(benchmark, 1)
    report.add(group, **{f"PGAP basis {shape} / eager": group.ratio(eagerly, cases[0].name)})
