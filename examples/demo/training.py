"""Rows in, losses and answers out: what the demo trains and how it is judged."""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zokern import StepResult, methods, step
from zokern.optimizer import ZerothOrder
from zokern.training.words import LabelWords

from .data import Row, labels_of
from .significance import mcnemar, rise_interval, wilson

RECENT = 20  # steps in the running mean of the loss


@dataclass(frozen=True)
class Score:
    """Held-out rows: logits [rows, labels], and the labels [rows] that are right. margins, auc and against()
    are of two labels."""

    loss: float
    logits: Tensor
    labels: Tensor

    @property
    def margins(self) -> Tensor:
        """Logit of label 1 minus logit of label 0, [rows]."""
        return self.logits[:, 1] - self.logits[:, 0]

    @property
    def right(self) -> Tensor:
        return self.logits.argmax(1) == self.labels

    @property
    def accuracy(self) -> float:
        return self.right.double().mean().item()

    @property
    def auc(self) -> float:
        return (
            (self.margins[self.labels == 1][:, None] > self.margins[self.labels == 0]).double().mean().item()
        )

    @property
    def interval(self) -> tuple[float, float]:
        return wilson(int(self.right.sum()), self.right.numel())

    def against(self, before: Score) -> dict[str, Any]:
        """What changed: the paired test on the same rows."""
        righted = int((self.right & ~before.right).sum())
        wronged = int((before.right & ~self.right).sum())
        return {
            "accuracy": self.accuracy,
            "interval": self.interval,
            "loss": self.loss,
            "auc": self.auc,
            "rise_interval": rise_interval(righted, wronged, self.right.numel()),
            "p_value": mcnemar(righted, wronged),
        }


@torch.no_grad()
def score(model: nn.Module, words: LabelWords, rows: Sequence[Row], batch: int = 25) -> Score:
    """Loss and answers on rows; batches of like lengths, so that little is spent on padding."""
    order = [row for _, row in sorted(zip(words.lengths(rows), rows))]
    logits, labels = [], []
    for at in range(0, len(order), batch):
        inputs, targets = words.batch(order[at : at + batch])
        logits.append(words.logits(model, inputs))
        labels.append(targets)
    answers, target = torch.cat(logits), torch.cat(labels)
    return Score(F.cross_entropy(answers, target).item(), answers, target)


class Batches:
    """Balanced batches of training rows, without replacement within an epoch,
    in an order named by the seed."""

    def __init__(self, rows: Sequence[Row], size: int, seed: int) -> None:
        self.by_label = [[row for row in rows if row.label == label] for label in labels_of(rows)]
        count, enough = len(self.by_label), min(map(len, self.by_label))
        self.each = size // count
        if size < count or size % count or self.each > enough:
            raise ValueError(
                f"batch is {size}; expected a multiple of {count} from {count} to {count * enough}"
            )
        self.random = random.Random(seed)
        self.left: list[list[Row]] = [[] for _ in self.by_label]

    def next(self) -> list[Row]:
        rows = []
        for number, pool in enumerate(self.by_label):
            if len(self.left[number]) < self.each:
                self.left[number] = self.random.sample(pool, len(pool))
            rows += [self.left[number].pop() for _ in range(self.each)]
        return rows


class Task:
    """The loss of one batch as a closure. It reads no number of a tensor, so that all points of a step can be
    mapped in one pass."""

    def __init__(self, model: nn.Module, words: LabelWords, rows: Sequence[Row]) -> None:
        self.model, self.words = model, words
        self.inputs, self.labels = words.batch(rows)

    def __call__(self) -> Tensor:
        return F.cross_entropy(self.words.logits(self.model, self.inputs), self.labels)

    def examples(self) -> Tensor:
        """Returns the loss of each row, for estimators that ask for it."""
        return F.cross_entropy(self.words.logits(self.model, self.inputs), self.labels, reduction="none")


def build(model: nn.Module, seed: int, options: argparse.Namespace) -> ZerothOrder:
    """Returns the optimizer of options.method; what is not given is the method's default."""
    given = {
        name: getattr(options, name)
        for name in ("lr", "eps", "queries")
        if getattr(options, name) is not None
    }
    return methods.METHODS[options.method](model, seed=seed, **given)


def train(
    model: nn.Module, words: LabelWords, rows: Sequence[Row], seed: int, options: argparse.Namespace
) -> tuple[list[float], list[float]]:
    """Fine-tunes all weights, learning rate falling linearly to 0. Returns loss and seconds of every step."""
    from tqdm.auto import tqdm

    optimizer = build(model, seed, options)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda n: 1 - n / options.steps)
    batches = Batches(rows, options.batch, seed)
    losses: list[float] = []
    seconds: list[float] = []
    with tqdm(range(options.steps), desc=f"seed {seed}", unit="step", disable=options.quiet) as bar:
        for _ in bar:
            task = Task(model, words, batches.next())
            started = time.perf_counter()
            result: StepResult = step(optimizer, task)
            seconds.append(time.perf_counter() - started)
            schedule.step()
            losses.append(result.loss)
            bar.set_postfix(loss=f"{statistics.fmean(losses[-RECENT:]):.3f}")
    optimizer.flush()
    return losses, seconds
