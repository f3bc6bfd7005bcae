"""One run: tune, train to a number of forwards, and judge at quarters of it.

zokern.tune gives eps and an lr. Of some shares of this lr the best one is taken: each trains a third of the
run's forwards, and is judged by training rows that are set aside. Where the largest share is the best, larger
ones are tried, over all of the run's forwards: what wins a third of them may diverge later. Further seeds
take what the first found.
"""

from __future__ import annotations

import argparse
import functools
import math
import os
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
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
SHARES = (1.0, 1 / 3, 0.1)  # of its lr that are tried
WIDER, MOST = 3.0, 9.0  # one trial's lr over another's, beyond SHARES; the largest share
TRIAL = 3  # a trial takes this part of the run's forwards
TUNED = (  # what a row has of its tuning
    "default_lr", "default_eps", "eps", "lr", "tune_lr", "tune_error", "trials", "whole", "tune_forwards",
)  # fmt: skip
Row = Mapping[str, Any]
ASIDE = 60  # training rows that judge trials, and train nothing


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


def best_of(trials: Sequence[Row]) -> Row:
    """Returns the trial with the least loss; the first one, where all diverge."""
    return min(trials, key=lambda trial: math.inf if trial["loss"] is None else trial["loss"])


def tried(tuning: Row) -> Sequence[Row]:
    """Returns the trials that decide on lr, the largest first: those over all of the run's forwards, where
    there are any."""
    return tuning.get("whole") or tuning["trials"]


def at_edge(tuning: Row) -> bool:
    """Returns whether the best lr is the largest that was tried, so that a larger one may be better."""
    best = best_of(tried(tuning))
    return best["loss"] is not None and best["lr"] == max(trial["lr"] for trial in tried(tuning))


def wanted(tuning: Row) -> float | None:
    """Returns lr of the next trial over all of the run's forwards; None: lr is settled.

    The first one is the best of the short trials, where it is the largest of them. Then lr grows while that
    is better, and falls while all trials diverge."""
    whole, best = tuning.get("whole"), best_of(tried(tuning))
    if not whole:
        return best["lr"] if at_edge(tuning) else None
    lr = WIDER * whole[0]["lr"] if at_edge(tuning) else whole[-1]["lr"] / WIDER
    is_wanted = at_edge(tuning) or best["loss"] is None
    return lr if is_wanted and 0.99 * SHARES[-1] <= lr / tuning["tune_lr"] <= 1.01 * MOST else None


class Trainer:
    """The training of one run. `row` is its record,
    and is complete after `train`, or after an exception as far as it came."""

    def __init__(self, run: Run, problem: Problem, settings: argparse.Namespace, forwards: int) -> None:
        self.run, self.problem, self.settings, self.budget = run, problem, settings, forwards
        self.words, self.held_out = problem.words, problem.rows.held_out
        self.rows, self.aside = problem.rows.train[:-ASIDE], problem.rows.train[-ASIDE:]
        self.model = problem.fresh()
        self.batches = Batches(self.rows, settings.batch, run.seed)
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

    def optimizer(self, eps: float | None = None, lr: float | None = None) -> Any:
        """Returns the method at its defaults, or at an eps and an lr of the first group."""
        made: Any = zokern.methods.METHODS[self.run.method](self.model, seed=self.run.seed)
        first = dict(made.param_groups[0])
        for group in made.param_groups:
            for name, value in (("eps", eps), ("lr", lr)):
                if value is not None:
                    group[name] = value * (float(group[name]) / first[name] if first[name] else 1.0)
        return made

    def tune(self) -> dict[str, Any]:
        """Returns eps and lr for a row, and what they were chosen from."""
        optimizer = self.optimizer()
        group = optimizer.param_groups[0]
        others = Batches(self.rows, self.settings.batch, TUNE_SEED)
        closures = [self.closure(optimizer, others) for _ in range(TUNE_BATCHES)]
        found = zokern.tune(optimizer, closures, reach=REACH)
        trials = [self.trial(found.eps, share * found.lr, self.budget // TRIAL) for share in SHARES]
        return self.settle({
            "default_lr": group["lr"], "default_eps": group["eps"], "eps": found.eps, "tune_lr": found.lr,
            "tune_error": found.error, "trials": trials, "whole": [],
            "tune_forwards": found.forwards + sum(trial["forwards"] for trial in trials),
        })  # fmt: skip

    def settle(self, tuning: Row) -> dict[str, Any]:
        """Returns a tuning with the best lr, after the trials that are wanted."""
        tuning = dict(tuning)
        while (lr := wanted(tuning)) is not None:
            trial = self.trial(tuning["eps"], lr, self.budget)
            tuning["whole"] = sorted([trial, *tuning["whole"]], key=lambda one: -one["lr"])
            tuning["tune_forwards"] += trial["forwards"]
        best = best_of(tried(tuning))
        if best["loss"] is None:
            raise ArithmeticError(f"it diverges at every lr of {[trial['lr'] for trial in tried(tuning)]}")
        return tuning | {"lr": best["lr"]}

    def trial(self, eps: float, lr: float, forwards: int) -> dict[str, Any]:
        """Trains, and returns the loss of the rows aside, None where it is no number, and the forwards."""
        short = Trainer(self.run._replace(seed=TUNE_SEED), self.problem, self.settings, max(1, forwards))
        optimizer = short.optimizer(eps, lr)
        used = [so_far for so_far, _, _ in short.steps(optimizer)]
        optimizer.flush()
        loss = score(short.model, self.words, self.aside).loss
        return {"lr": lr, "loss": loss if math.isfinite(loss) else None, "forwards": used[-1]}

    def judge(self, before: Score | None = None, forwards: int = 0) -> None:
        """Adds a point: what the weights answer to the held-out rows now."""
        found = before or score(self.model, self.words, self.held_out)
        where = {"forwards": forwards, "steps": len(self.seconds)}
        times = {"seconds": sum(self.seconds), "processor_seconds": sum(self.processor)}
        self.row["points"].append(point(found, **where, **times))

    def forward(self) -> None:
        """A bare forward, beyond whose memory a step's is counted."""
        task = Task(self.model, self.words, Batches(self.rows, self.settings.batch, self.run.seed).next())
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

    def steps(self, optimizer: Any) -> Iterator[tuple[int, int, Any]]:
        """Takes steps while one of the last step's cost fits the budget; the first one always is taken.
        Yields the forwards so far, those of the step, and its result."""
        used = last = 0
        while used + last <= self.budget:
            with counted() as count:
                result = self.step(optimizer)
            last = count.total + BACKWARD * (getattr(result, "first_order_loss", None) is not None)
            if not last:
                raise RuntimeError(f"a step of {self.run.method} read no loss")
            used += last
            yield used, last, result

    def train(
        self, before: Score, tell: Callable[[int], None], known: Row | None = None, old: Row | None = None
    ) -> None:  # fmt: skip
        """Tunes and trains.

        known  a row of this or another seed, whose eps and lr are taken, after larger lrs where those are due
        old    the row that this one replaces. It is kept, with what was tried, where its lr stays the best"""
        self.judge(before)
        self.forward()
        tuning = self.tune() if known is None else self.settle({name: known.get(name, []) for name in TUNED})
        if old is not None and "error" not in old and old["lr"] == tuning["lr"]:
            self.row = {**old, **tuning}
            return
        self.row |= tuning
        optimizer = self.optimizer(self.row["eps"], self.row["lr"])
        reset_high_water()
        for used, last, result in self.steps(optimizer):
            tell(min(last, self.budget))
            self.row |= {"evaluation": result.evaluation, "why": result.why, "last_step_forwards": last}
            done = used + last > self.budget
            if done or used * QUARTERS >= len(self.row["points"]) * self.budget:
                optimizer.flush()
                self.peak()
                self.judge(forwards=used)
                reset_high_water()
        self.row |= {
            "step_seconds": statistics.median(self.seconds),
            "step_processor_seconds": statistics.median(self.processor),
        }  # fmt: skip


def measure(
    run: Run, problem: Problem, before: Score, settings: argparse.Namespace, forwards: int, tell: Any,
    known: Row | None = None, old: Row | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Returns the row of a run. A method that raises has the reason in its row,
    under 'error', and is not run again.

    known, old  see Trainer.train"""
    started = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = Trainer(run, problem, settings, forwards)
        try:
            trainer.train(before, tell, known, old)
        except Exception as problem_of_method:
            trainer.row["error"] = f"{type(problem_of_method).__name__}: {problem_of_method}"[:300]
    return {"wall_seconds": time.perf_counter() - started} | trainer.row
