"""Times steps over bare forwards, a process for each step and one bound for every group; or one over another.

A group asks `times` for each of its steps, so a configuration has one ratio in whichever groups show it.
A process times one step against two bare forwards, its bound, which take turns round by round.
Both read the same weights: the bare module has the same parameter objects and no optimizer.

Why so. A second copy of the weights lies on other pages, and a process that holds six of them evicts and
translates more: two groups had bounds 31 % apart for one configuration. A process that ran other loops
before keeps their freed memory, and eager loops were up to a third faster in it. A run of training holds
one set of weights and runs one loop, and so does each process here. Ratios of two steps are quotients of
their ratios to the bound, so the drift of the machine between two processes cancels.

The bound is timed again in each process, under the same conditions. `disagreements` names the shapes
for which it moved by more than NOISE: their ratios are uncertain by as much.

`turns` times steps that are compared with one another: each has such a process too, and the processes take
turns, round by round.
"""

from __future__ import annotations

import itertools
import math
import multiprocessing
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import cache
from multiprocessing.connection import Connection
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

import zokern

from .eager_methods import LOOPS
from .measure import Case, Group, wall

Timer = Callable[[Callable[[], Any]], float]  # the seconds of one call
LR, EPS = 1e-6, 1e-3
BOUND = "two forwards: the bound"
NOISE = 1.1  # largest over smallest median of one bound
MANY = 2048  # tokens from which two sides are read at a time: 16 of them would hold 16 sets of logits
SECONDS = 15.0  # for the rounds of one process; 0 in the quick mode
MOST, PATIENCE = 20, 40.0  # rounds of processes that take turns; seconds of a round that is not repeated


@dataclass(frozen=True)
class Shape:
    """Names a model, its dtype and its batch.

    generated  the closure generates this many tokens and rates them; 0: it returns the loss of the batch
    threads    of torch, in the process that times
    """

    model: str
    dtype: str
    batch: int
    length: int
    generated: int = 0
    threads: int = field(default_factory=torch.get_num_threads)

    @property
    def tokens(self) -> int:
        return self.batch * self.length

    def closure(self, module: nn.Module) -> Callable[[], Tensor]:
        from .models import loss_of, rating_of

        if self.generated:
            return rating_of(module, self.length, self.generated)
        return loss_of(module, self.batch, self.length)

    def __str__(self) -> str:
        made = f", {self.generated} tokens generated" if self.generated else ""
        return f"{self.model} {self.dtype} {self.batch}x{self.length}{made}"


def loop_of(method: str, module: nn.Module, **options: Any) -> Any:
    """Returns the eager loop of a method, with MeZO's lr and eps."""
    trained = {name: p for name, p in module.named_parameters() if p.requires_grad}
    return LOOPS[method](list(trained.values()), LR, EPS, list(trained), **options)


@dataclass(frozen=True)
class Step:
    """Names a step: a method of zokern with options, or its eager loop.

    evaluation  a name; '' is the method's default
    refresh     every step draws a new basis and writes the weights; an eager loop estimates its basis
    options     further keyword arguments; of `estimator`, the name of a class without arguments; `sides`: the
                points that 'paired' reads in one pass
    """

    method: str
    evaluation: str = ""
    eager: bool = False
    refresh: bool = False
    options: tuple[tuple[str, Any], ...] = ()

    @property
    def name(self) -> str:
        words = [
            "eager" * self.eager,
            self.method,
            self.evaluation,
            *(f"{key}={value}" for key, value in self.options),
        ]
        return " ".join(filter(None, words)) + ", a new basis" * self.refresh

    def optimizer(self, module: nn.Module, shape: Shape) -> Any:
        """Returns the method with its published defaults. lr and eps are MeZO's: a step costs the same."""
        options = dict(self.options) | ({"interval": 1} if self.refresh else {})
        if self.evaluation:
            options["evaluation"] = self.evaluation
        reads_losses = self.method != "FGD"  # alone, which is what zokern.Paired reads
        if shape.tokens >= MANY and self.evaluation in ("", "paired") and reads_losses:
            options["evaluation"] = zokern.Paired(sides=2)
        if "sides" in options:
            options["evaluation"] = zokern.Paired(sides=options.pop("sides"))
        if "estimator" in options:
            options["estimator"] = getattr(zokern, options["estimator"])()
        return getattr(zokern, self.method)(module, lr=LR, eps=EPS, dead_limit=None, **options)

    def start(self, module: nn.Module, shape: Shape) -> tuple[Callable[[], Any], str]:
        """Returns a call that takes a step, and the evaluation that it takes."""
        closure, seeds = shape.closure(module), itertools.count()
        if self.eager:
            loop = loop_of(self.method, module, **dict(self.options))
            loop.ready()
            step = loop.estimate if self.refresh else loop.step
            return lambda: step(closure, next(seeds)), ""
        optimizer = self.optimizer(module, shape)
        # The first step chooses the evaluation, and the second compares its losses. A window fills. Of layers
        # that move in some steps alone, 999 of 1000 have had their comparison.
        still = getattr(optimizer.estimator, "sparsity", 0.0)
        rare = math.ceil(math.log(1e-3) / math.log(still)) if still else 0
        for _ in range(max(2, getattr(optimizer.rule, "length", 0), rare)):
            result = zokern.step(optimizer, closure)
        return lambda: zokern.step(optimizer, closure), result.evaluation


@dataclass(frozen=True)
class Forwards:
    """Names the bare forwards of a step: as many as it reads losses, without an optimizer."""

    step: Step

    def start(self, module: nn.Module, shape: Shape) -> tuple[Callable[[], Any], str]:
        """Returns a call that takes them, and their number. A derivative along z counts as two, and a
        back-propagation as three."""
        from .study.train import BACKWARD, counted

        call, _ = self.step.start(module, shape)
        with counted() as count:
            result = call()
        number = count.total + BACKWARD * (result.first_order_loss is not None)
        del call, result
        forward = shape.closure(module)

        @torch.no_grad()
        def forwards() -> None:
            for _ in range(number):
                forward()

        forwards()
        return forwards, str(number)


@dataclass
class Times:
    """Holds the seconds of the bound and of the step, a pair for each round, and the evaluation."""

    bound: list[float]
    step: list[float]
    evaluation: str

    @property
    def ratio(self) -> float:
        """Returns the median over the rounds of time(step) / time(bound)."""
        return median(step / bound for step, bound in zip(self.step, self.bound))


def measure(shape: Shape, step: Step, seconds: float, timer: Timer = wall) -> Times:
    """Times a step and its bound in this process, after everything is built and has run.

    Rounds go on for `seconds`. There are at most 60 and at least 5,
    or 2 of an eager loop and of a new basis, which are long.
    """
    from .models import model, same_weights

    torch.set_num_threads(shape.threads)
    warnings.simplefilter("ignore")  # of a training run: rounding, padding rows
    module = model(shape.model, shape.dtype)
    forward = shape.closure(same_weights(module))

    @torch.no_grad()
    def forwards() -> None:
        forward()
        forward()

    call, evaluation = step.start(module, shape)
    if not step.eager:
        call()
    forwards()
    least, start = 2 if step.eager or step.refresh or not seconds else 5, time.monotonic()
    pairs: list[tuple[float, float]] = []
    while len(pairs) < least or (len(pairs) < 60 and time.monotonic() < start + seconds):
        pairs.append((timer(forwards), timer(call)))
    return Times([bound for bound, _ in pairs], [taken for _, taken in pairs], evaluation)


@cache
def times(shape: Shape, step: Step, seconds: float, timer: Timer = wall) -> Times:
    """Returns what `measure` finds in a process of its own; the same object for the same arguments."""
    with ProcessPoolExecutor(1, forked()) as pool:
        return pool.submit(measure, shape, step, seconds, timer).result()


def forked() -> Any:
    """Returns what makes processes: forks of one that has imported the libraries and computed nothing."""
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload([__name__, "transformers.models.opt.modeling_opt"])
    return server


def serve(pipe: Connection, shape: Shape, step: Step | Forwards, timer: Timer) -> None:
    """Sends the evaluation of a step, and then the seconds that it takes, as often as it is told to."""
    from .models import model

    try:
        torch.set_num_threads(shape.threads)
        warnings.simplefilter("ignore")
        call, evaluation = step.start(model(shape.model, shape.dtype), shape)
        pipe.send(evaluation)
        while True:
            pipe.recv()
            pipe.send(timer(call))
    except EOFError:  # it is over
        return
    except Exception as error:
        pipe.send(error)


def turns(shape: Shape, steps: Sequence[Step | Forwards], seconds: float, timer: Timer = wall) -> list[Times]:
    """Times steps, each in a process of its own, which take turns: in a round each step is taken once.

    Rounds go on for `seconds`, of 2 to 20 rounds; there is 1 where it takes more than PATIENCE. Of three or
    more the first warms up."""
    server, pipes, processes = forked(), [], []

    def heard(pipe: Connection) -> Any:
        found = pipe.recv()
        if isinstance(found, Exception):
            raise found
        return found

    try:
        for step in steps:
            mine, theirs = server.Pipe()
            pipes.append(mine)
            processes.append(server.Process(target=serve, args=(theirs, shape, step, timer), daemon=True))
            processes[-1].start()
            theirs.close()
        evaluations, rounds, begun = [heard(pipe) for pipe in pipes], list[list[float]](), time.monotonic()
        while True:
            rounds.append([])
            for pipe in pipes:
                pipe.send(True)
                rounds[-1].append(heard(pipe))
            spent = time.monotonic() - begun
            enough = len(rounds) > 1 or spent > PATIENCE
            if len(rounds) == MOST or (enough and spent * (1 + 1 / len(rounds)) > seconds):
                break
    finally:
        for pipe, process in zip(pipes, processes):
            pipe.close()
            process.terminate()
            process.join()
    kept = rounds[1:] if len(rounds) > 2 else rounds
    return [Times([], list(taken), evaluation) for taken, evaluation in zip(zip(*kept), evaluations)]


def ran() -> None:
    """Does nothing: another process has timed the call."""


class Steps(Group):
    """Holds steps of one shape. The row of their bound pools its times in all processes."""

    def __init__(self, title: str, shape: Shape, found: dict[Step, Times]) -> None:
        self.shape, self.found = shape, {step.name: each for step, each in found.items()}
        cases = [Case(BOUND, ran, times=[second for each in self.found.values() for second in each.bound])]
        for step, each in found.items():
            loop = Step(step.method, eager=True, refresh=step.refresh)
            compared = loop in found and not step.options and not step.eager
            cases.append(Case(step.name, ran, eager=loop.name if compared else "", times=list(each.step)))
        super().__init__(title, cases)

    def ratio(self, over: str, under: str) -> float:
        """Returns time(over) / time(under), each as a multiple of its own bound."""
        above, below = (1.0 if name == BOUND else self.found[name].ratio for name in (over, under))
        return above / below

    def rows(self) -> list[dict[str, Any]]:
        rows = super().rows()
        for row in rows[1:]:
            each = self.found[row["name"]]
            row |= {
                "over_forwards": each.ratio,
                "bound_ms": median(each.bound) * 1e3,
                "evaluation": each.evaluation,
            }
        return rows


def bench(benchmark, report, title: str, shape: Shape, steps: Iterable[Step]) -> Steps:
    """Adds a group of steps to the report."""
    found: dict[Step, Times] = {}

    def run() -> None:
        for step in steps:
            found[step] = times(shape, step, 0.0 if report.quick else SECONDS)
            report.say(f"{shape}: {step.name} {found[step].ratio:.2f} of its two forwards")

    benchmark.group = title
    benchmark.pedantic(run, rounds=1, iterations=1, warmup_rounds=0)
    group = Steps(f"{title}, {shape}", shape, found)
    report.add(group)
    return group


def disagreements(groups: Iterable[dict[str, Any]]) -> list[str]:
    """Names the shapes whose bound differs between processes, of one group or of two, by more than NOISE."""
    bounds: dict[str, set[float]] = {}  # a process in two groups counts once
    for group in groups:
        if "shape" in group:
            bounds.setdefault(group["shape"]["name"], set()).update(
                r["bound_ms"] for r in group["rows"] if "bound_ms" in r
            )
    return [
        f"two forwards of {shape} took {min(ms):.4g} to {max(ms):.4g} ms (medians of {len(ms)} processes): "
        "ratios of this shape are uncertain by as much"
        for shape, ms in bounds.items()
        if ms and max(ms) > NOISE * min(ms)
    ]


# The shapes of bench_step.py and bench_methods.py.

QUICK = [Shape("OPT-tiny", "fp32", 1, 4), Shape("OPT-tiny", "bf16", 1, 32)]
DEFAULT = [
    Shape("OPT-125M", "fp32", 1, 4), Shape("OPT-125M", "fp32", 1, 32),
    Shape("OPT-125M", "fp32", 1, 128), Shape("OPT-125M", "fp32", 4, 128),
    Shape("OPT-125M", "bf16", 1, 128), Shape("OPT-350M", "fp32", 1, 32),
    Shape("Qwen2-0.5B", "fp32", 1, 32),
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
    """Runs each benchmark with an argument `shape` at every shape; a file of benchmarks imports this."""
    if "shape" in metafunc.fixturenames:
        report = metafunc.config.zokern_report
        metafunc.parametrize("shape", QUICK if report.quick else ALL if report.all else DEFAULT, ids=str)
