"""What does transformers' Trainer add to a step? `python -m benchmarks.trainer`

A Trainer and a loop by hand train two models of one shape, and take turns step by step in one process: the
loop's step runs between two steps of the Trainer. `outside` is the time between two steps without the time in
zokern.step: the loader, the schedule, callbacks and logs. Inside a step the closures differ: Trainer prepares
its inputs and sets the train flag at every reading. Times are those of the processor, of one thread: they are
the wall's where nothing else runs.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Iterator
from statistics import median
from typing import Any
from unittest.mock import patch

import torch
import transformers

import zokern
from zokern import hf

from .models import model
from .steps import EPS, LR

BATCH, LENGTH, FIRST = 1, 8, 3  # the first steps choose an evaluation


class Clock:
    """Counts the seconds of a function's calls."""

    def __init__(self, call: Callable[..., Any]) -> None:
        self.call, self.seconds = call, 0.0

    def __call__(self, *given: Any) -> Any:
        start = time.process_time()
        result = self.call(*given)
        self.seconds += time.process_time() - start
        return result

    def take(self) -> float:
        seconds, self.seconds = self.seconds, 0.0
        return seconds


def loop(module: Any, rows: list[dict], steps: int, clock: Clock, evaluation: str) -> Iterator[None]:
    """Takes a step of the loop by hand each time that it is asked for one."""
    opt = zokern.MeZO(module, lr=LR, eps=EPS, dead_limit=None, evaluation=evaluation)
    schedule = torch.optim.lr_scheduler.LinearLR(opt, 1.0, 0.0, total_iters=steps)
    for batch in torch.utils.data.DataLoader(rows, batch_size=BATCH, shuffle=True):
        clock(opt, lambda batch=batch: module(**batch).loss)
        schedule.step()
        yield


class Turns(transformers.TrainerCallback):
    """After each step of the Trainer, times it and takes one of the loop.

    times  of a step: (outside, inside) of the Trainer, and of the loop, in seconds"""

    def __init__(self, theirs: Clock, ours: Clock, other: Iterator[None]) -> None:
        self.theirs, self.ours, self.other = theirs, ours, other
        self.times: list[tuple[float, float, float, float]] = []
        self.began = time.process_time()

    def on_step_end(self, *given: Any, **rest: Any) -> None:
        now = time.process_time()
        inside = self.theirs.take()
        next(self.other)
        after, own = time.process_time(), self.ours.take()
        self.times.append((now - self.began - inside, inside, after - now - own, own))
        self.began = time.process_time()


def measure(name: str, steps: int, evaluation: str) -> list[float]:
    """Returns medians in ms: outside and inside zokern.step, of the Trainer, and of the loop."""
    ids = torch.randint(4, 500, (BATCH * (steps + 1), LENGTH), generator=torch.Generator().manual_seed(1))
    rows = [{"input_ids": row, "labels": row} for row in ids]
    theirs, ours = Clock(zokern.step), Clock(zokern.step)
    turns = Turns(theirs, ours, loop(model(name, "fp32").train(), rows, steps, ours, evaluation))
    with tempfile.TemporaryDirectory() as folder, patch.object(hf, "step", theirs):
        args = transformers.TrainingArguments(
            folder, learning_rate=LR, max_steps=steps, per_device_train_batch_size=BATCH, use_cpu=True,
            logging_steps=10, save_strategy="no", report_to=[], disable_tqdm=True,
        )  # fmt: skip
        zo = {"eps": EPS, "dead_limit": None, "evaluation": evaluation}
        trainer = hf.ZerothOrderTrainer(
            model(name, "fp32"), args, train_dataset=rows, callbacks=[turns], zo=zo
        )
        trainer.remove_callback(transformers.trainer_callback.PrinterCallback)
        trainer.train()
    return [1e3 * median(column) for column in zip(*turns.times[FIRST:])]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", default="Llama-narrow", help="a name of benchmarks/models.py")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--evaluation", default="master")
    options = parser.parse_args()
    torch.set_num_threads(1)
    outside, inside, own_outside, own_inside = measure(options.model, options.steps, options.evaluation)
    print(
        f"{options.model}, {BATCH} x {LENGTH} tokens, {options.evaluation}, medians of {options.steps} steps"
    )
    for what, theirs, ours in (("outside", outside, own_outside), ("inside", inside, own_inside)):
        print(f"{what} zokern.step: Trainer {theirs:.2f} ms, loop {ours:.2f} ms: {theirs - ours:+.2f} ms")


if __name__ == "__main__":
    main()
