"""A run: steps, a log, held-out scores, and a checkpoint from which it goes on to the same bits."""

from __future__ import annotations

import json
import math
import os
import time
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

import torch
from torch import nn

from .. import methods
from ..step import step
from ..tuning import tune
from .data import Batches, Row
from .tasks import Closure, Task, score

CHECKPOINT, LOG, OPTIONS = "checkpoint.pt", "log.jsonl", "train.json"
TUNED = 4  # batches that `--lr auto` reads
RECENT = 20  # steps in the running mean of the loss
# what a resumed run may be given anew: the other options decide its bits
FREE = {"eval_every", "plot", "json", "quiet", "threads", "output"}
Say = Callable[[str], None]


class Run:
    """Trains a model on rows, from step 0 or from a checkpoint.

    options   of the command line (zokern/cli/train.py): method, lr, eps, seed, steps, output and others. lr
              and eps are set to the numbers that the optimizer has
    held_out  rows that are judged, and not trained on
    say       is called with a line of text

    Construction builds the optimizer and moves nothing."""

    def __init__(
        self, options: Namespace, model: nn.Module, task: Task, rows: Sequence[Row], held_out: Sequence[Row],
        say: Say,
    ) -> None:  # fmt: skip
        self.options, self.model, self.task, self.held_out, self.say = options, model, task, held_out, say
        self.given = {"lr": options.lr, "eps": options.eps}
        self.folder, self.device = Path(options.output), torch.device(options.device)
        self.batches = Batches(rows, options.batch_size, options.seed)
        given = {"lr": None if options.lr == "auto" else options.lr, "eps": options.eps}
        given = {name: value for name, value in given.items() if value is not None}
        if options.evaluation:
            given["evaluation"] = options.evaluation
        make: Any = methods.METHODS[options.method]
        self.optimizer = make(model, seed=options.seed, **given, **dict(options.set))
        if options.lr == "auto" and not options.resume:
            self._tune()
        group = self.optimizer.param_groups[0]
        options.lr, options.eps = float(group["lr"]), float(group["eps"])

    def _tune(self) -> None:
        """Sets lr and eps as zokern.tune finds them on the first batches."""
        closures = [self.closure(number).of(self.optimizer) for number in range(TUNED)]
        found = tune(self.optimizer, closures, say=self.say)
        found.apply(self.optimizer)
        self.say(str(found))

    def closure(self, number: int) -> Closure:
        """Returns the loss of the batch of a step."""
        return Closure(self.task, self.model, self.batches.at(number), self.device)

    def trained(self) -> dict[str, nn.Parameter]:
        """Returns what is trained, by name; tied weights once."""
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    # Checkpoints --------------------------------------------------------------------------------------------

    def save(self) -> None:
        """Writes the checkpoint in place of the one before; a reader finds the one or the other, whole."""
        state = self.optimizer.state_dict()  # writes deferred updates, so it comes before the weights
        kept = {
            "weights": {name: p.detach() for name, p in self.trained().items()},
            "optimizer": state,
            "options": plain(self.options),
            "given": self.given,
        }
        replace(self.folder / CHECKPOINT, lambda path: torch.save(kept, path))

    def resume(self, kept: dict[str, Any]) -> None:
        """Takes weights and state of a checkpoint, and forgets log lines after it."""
        trained = self.trained()
        with torch.no_grad():
            for name, value in kept["weights"].items():
                trained[name].copy_(value)
        self.optimizer.load_state_dict(kept["optimizer"])
        # of the whole run, and not of the step, which a schedule scales
        self.options.lr, self.options.eps = kept["options"]["lr"], kept["options"]["eps"]
        lines = [line for line in entries(self.folder / LOG) if line["step"] <= self.optimizer.steps]
        text = "".join(json.dumps(line) + "\n" for line in lines)
        replace(self.folder / LOG, lambda path: path.write_text(text))
        self.say(f"resumed at step {self.optimizer.steps}")

    # Steps --------------------------------------------------------------------------------------------------

    def train(self, progress: Callable[[range], Any]) -> None:
        """Takes the steps that are left, and logs them.

        progress  wraps a range as tqdm does: it has set_postfix_str and write"""
        options, losses = self.options, list[float]()
        with open(self.folder / LOG, "a") as log:
            if self.optimizer.steps == 0:
                self.judge(log, self.say)
            bar = progress(range(self.optimizer.steps, options.steps))
            for number in bar:
                losses = [*losses[1 - RECENT :], self.take(number, log)]
                bar.set_postfix_str(f"loss {math.fsum(losses) / len(losses):.3f}")
                done, last = number + 1, number + 1 == options.steps
                if options.save_every and (last or done % options.save_every == 0):
                    self.save()
                if last or (options.eval_every and done % options.eval_every == 0):
                    self.judge(log, bar.write)
        self.optimizer.flush()

    def take(self, number: int, log: IO[str]) -> float:
        """Takes one step; its loss."""
        if self.options.schedule == "linear":
            for group in self.optimizer.param_groups:
                group["lr"] = self.options.lr * (1.0 - number / self.options.steps)
        started = time.perf_counter()
        result = step(self.optimizer, self.closure(number).of(self.optimizer))
        entry = {
            "step": number + 1,
            "loss": result.loss,
            "lr": float(self.optimizer.param_groups[0]["lr"]),
            "coefficients": result.coefficients,
            "skipped": result.skipped,
            "evaluation": result.evaluation,
            "seconds": round(time.perf_counter() - started, 4),
        }
        write_line(log, entry)
        return result.loss

    def judge(self, log: IO[str], say: Say) -> None:
        """Logs and says loss and accuracy on the held-out rows, if there are any. The run's bits stay."""
        if self.held_out:
            with self.optimizer.evaluating():
                found = score(self.task, self.model, self.held_out, self.device)
            write_line(log, {"step": self.optimizer.steps, "held_out": found._asdict()})
            say(f"step {self.optimizer.steps}: held out: {found}")


def checkpoint(options: Namespace) -> dict[str, Any] | None:
    """Returns the checkpoint that options.resume goes on from; None for a new run.

    Raises ValueError where there is none, where a new run would overwrite one, and for options that differ
    from those of the run."""
    path = Path(options.output) / CHECKPOINT
    if not options.resume:
        if path.exists() or path.with_name(LOG).exists():
            goes_on = "--resume goes on with it, and another folder" if path.exists() else "another folder"
            raise ValueError(f"--output is {options.output!r}, which holds a run; {goes_on} begins a new one")
        return None
    if not path.exists():
        raise ValueError(
            f"--resume: {options.output} holds no {CHECKPOINT}; leave --resume out to begin, with "
            "--save-every to have checkpoints"
        )
    kept = torch.load(path, map_location="cpu", weights_only=True)
    _compare(options, kept["options"])
    # the optimizer is made as it was: what a rule derives from lr is that of the first one
    given = kept.get("given", kept["options"])
    options.lr, options.eps = given["lr"], given["eps"]
    return kept


def _compare(options: Namespace, old: dict[str, Any]) -> None:
    """Refuses options under which the run would not go on to the same bits; what was chosen by the run itself
    is taken from it."""
    new = plain(options)
    chosen = {"lr", "eps"}
    for name in sorted((new.keys() | old.keys()) - FREE):
        if name in chosen and new.get(name) in (None, "auto"):
            continue
        if name == "steps" and new["schedule"] == "constant":
            continue
        if new.get(name) != old.get(name):
            raise ValueError(
                f"--{name.replace('_', '-')} is {new.get(name)!r}, and the run was begun with "
                f"{old.get(name)!r}; a resumed run keeps it. Begin another one in another --output"
            )


def plain(options: Namespace) -> dict[str, Any]:
    """Returns options as JSON has them, and as a --config file takes them."""
    kept = {name: value for name, value in vars(options).items() if name not in ("config", "resume")}
    return json.loads(json.dumps(kept, default=str))


def entries(path: Path) -> Iterator[dict[str, Any]]:
    """Yields the lines of a log; a last line that was cut short is left out."""
    if path.exists():
        for line in path.read_text().splitlines(keepends=True):
            if line.endswith("\n"):
                yield json.loads(line)


def write_line(log: IO[str], entry: dict[str, Any]) -> None:
    log.write(json.dumps(entry) + "\n")
    log.flush()


def replace(path: Path, write: Callable[[Path], Any]) -> None:
    """Writes a file beside `path` and renames it, so that there is never half of one."""
    new = path.with_name(path.name + ".new")
    write(new)
    with open(new, "rb") as file:
        os.fsync(file.fileno())
    os.replace(new, path)
