"""One run: tune, train to a number of forwards, and judge at quarters of it."""

from __future__ import annotations

import argparse
import functools
import math
import os
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch

import zokern
from benchmarks.memory import high_water, reset_high_water
from examples.demo.training import Batches, Score, Task, score
from zokern.estimator import Oracle

from .order import Run
from .problems import Problem

QUARTERS = 4
# What a reading costs in forwards, by multiplications: a derivative along z carries a tangent beside each
# value; a back-propagation is a forward and twice as much backward.
ALONG, BACKWARD = 2, 3
REACH = 1e-3  # of zokern.tune: a step changes a weight by no more than MeZO's eps, root mean square
TUNE_BATCHES, TUNE_SEED = 8, 1000  # batches that tune reads, in an order of their own


class Count:
    """Forwards that were read."""

    total = 0


@contextmanager
def counted() -> Iterator[Count]:
    """Counts what estimators ask inside: a loss is a forward, and equal points of one question are one."""
    count = Count()

    def costs(name: str, weight: int) -> Callable[..., Any]:
        right = getattr(Oracle, name)

        @functools.wraps(right)
        def ask(self: Oracle, what: Any, *rest: Any, **options: Any) -> Any:
            count.total += weight * len({*what})
            return right(self, what, *rest, **options)

        return ask

    asks = {
        name: costs(name, weight)
        for name, weight in (("losses", 1), ("examples", 1), ("slopes", ALONG))
        if hasattr(Oracle, name)
    }
    with patch.multiple(Oracle, **asks):
        yield count


def point(found: Score, **where: float) -> dict[str, Any]:
    """Returns what a row says of the held-out rows at one moment of a run."""
    if not math.isfinite(found.loss):
        raise ArithmeticError(
            f"the held-out loss is {found.loss} after {where['forwards']:.0f} forwards: the run diverged"
        )
    return {**where, "right": int(found.right.sum()), "rows": found.right.numel(), "loss": found.loss}


class Trainer:
    """The training of one run. `row` is its record,
    and is complete after `train`, or after an exception as far as it came."""

    def __init__(self, run: Run, problem: Problem, settings: argparse.Namespace, forwards: int) -> None:
        self.run, self.words, self.rows, self.budget = run, problem.words, problem.rows, forwards
        self.batch = settings.batch
        self.model = problem.fresh()
        self.batches = Batches(self.rows.train, self.batch, run.seed)
        self.seconds: list[float] = []
        self.processor: list[float] = []
        self.base = 0
        self.row: dict[str, Any] = {
            **run._asdict(), "threads": torch.get_num_threads(), "load": os.getloadavg()[0], "points": [],
        }  # fmt: skip

    def closure(self, optimizer: Any, batches: Batches) -> Callable[[], Any]:
        """Returns the loss of the next batch, or the losses
        of its rows where the estimator asks for these."""
        task = Task(self.model, self.words, batches.next())
        return task.examples if getattr(optimizer.estimator, "rows", False) else task

    def tune(self) -> Any:
        """Returns the optimizer at the eps and the lr of zokern.tune, which the row then holds."""
        optimizer: Any = zokern.methods.METHODS[self.run.method](self.model, seed=self.run.seed)
        group = optimizer.param_groups[0]
        self.row |= {"default_lr": group["lr"], "default_eps": group["eps"]}
        others = Batches(self.rows.train, self.batch, TUNE_SEED + self.run.seed)
        found = zokern.tune(
            optimizer, [self.closure(optimizer, others) for _ in range(TUNE_BATCHES)], reach=REACH
        )
        found.apply(optimizer)
        self.row |= {
            "lr": found.lr,
            "eps": found.eps,
            "tune_error": found.error,
            "tune_forwards": found.forwards,
        }
        return optimizer

    def judge(self, before: Score | None = None, forwards: int = 0) -> None:
        """Adds a point: what the weights answer to the held-out rows now."""
        found = before or score(self.model, self.words, self.rows.held_out)
        where = {"forwards": forwards, "steps": len(self.seconds)}
        times = {"seconds": sum(self.seconds), "processor_seconds": sum(self.processor)}
        self.row["points"].append(point(found, **where, **times))

    def forward(self) -> None:
        """A bare forward, beyond whose memory a step's is counted."""
        task = Task(self.model, self.words, Batches(self.rows.train, self.batch, self.run.seed).next())
        self.row["peak_extra_bytes"] = None
        if reset_high_water():
            with torch.no_grad():
                task()
            self.base = high_water()
            self.row["peak_extra_bytes"] = 0
            reset_high_water()

    def peak(self) -> None:
        """Holds the memory of the steps since the last call."""
        if self.row["peak_extra_bytes"] is not None:
            self.row["peak_extra_bytes"] = max(self.row["peak_extra_bytes"], high_water() - self.base)

    def step(self, optimizer: Any) -> Any:
        closure = self.closure(optimizer, self.batches)
        clock, processor = time.perf_counter(), time.process_time()
        result = zokern.step(optimizer, closure)
        self.seconds.append(time.perf_counter() - clock)
        self.processor.append(time.process_time() - processor)
        return result

    def train(self, before: Score, tell: Callable[[int], None]) -> None:
        """Tunes and trains. A step is taken while one of the last step's cost fits the budget;
        the first one always is."""
        self.judge(before)
        self.forward()
        optimizer = self.tune()
        reset_high_water()
        used = last = 0
        while used + last <= self.budget:
            with counted() as count:
                result = self.step(optimizer)
            last = count.total + BACKWARD * (getattr(result, "first_order_loss", None) is not None)
            if not last:
                raise RuntimeError(f"a step of {self.run.method} read no loss")
            used += last
            tell(min(last, self.budget))
            done = used + last > self.budget
            if done or used * QUARTERS >= len(self.row["points"]) * self.budget:
                optimizer.flush()
                self.peak()
                self.judge(forwards=used)
                reset_high_water()
        self.row |= {
            "evaluation": result.evaluation, "why": result.why, "last_step_forwards": last,
            "step_seconds": statistics.median(self.seconds),
            "step_processor_seconds": statistics.median(self.processor),
        }  # fmt: skip


def measure(
    run: Run, problem: Problem, before: Score, settings: argparse.Namespace, forwards: int, tell: Any
) -> dict[str, Any]:
    """Returns the row of a run. A method that raises has the reason in its row,
    under 'error', and is not run again."""
    started = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = Trainer(run, problem, settings, forwards)
        try:
            trainer.train(before, tell)
        except Exception as problem_of_method:
            trainer.row["error"] = f"{type(problem_of_method).__name__}: {problem_of_method}"[:300]
    return trainer.row | {"wall_seconds": time.perf_counter() - started}
