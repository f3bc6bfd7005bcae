"""What a run trains: rows to a loss, and to answers that are right or wrong.

    words   next-token logits of one word per label, after a template (words.py)
    head    a sequence-classification head
    text    the next token of every text

A task has `batch(rows) -> (inputs, labels)`, `losses(model, inputs, labels) -> float32 [rows]`, the loss of
each row, and `right(...)`, whether each answer is right. The loss of a batch is the mean over its rows; of
text it is the mean over its tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .data import Row
from .words import LabelWords, padded

EVALUATED = 32  # rows of a forward that judges

Inputs = dict[str, Tensor]


class Read(NamedTuple):
    """What a forward says of rows.

    losses   float32 [rows], each the mean over `weights` parts;  weights  float32 [rows]: 1, or tokens
    right    bool [rows]; None: the task has no answers"""

    losses: Tensor
    weights: Tensor
    right: Tensor | None


class Task(Protocol):
    def batch(self, rows: Sequence[Row]) -> tuple[Inputs, Tensor]: ...
    def read(self, model: nn.Module, inputs: Inputs, labels: Tensor) -> Read: ...
    def length(self, row: Row) -> int: ...


class Words:
    """Label words after a template.  words: in the order of the labels; see LabelWords."""

    def __init__(self, words: LabelWords) -> None:
        self.words = words

    def length(self, row: Row) -> int:
        return len(row.text)

    def batch(self, rows: Sequence[Row]) -> tuple[Inputs, Tensor]:
        return self.words.batch(rows)

    def read(self, model: nn.Module, inputs: Inputs, labels: Tensor) -> Read:
        return _classified(self.words.logits(model, inputs), labels)


class _Rows:
    """Rows as tokens, with padding on the right.  limit: tokens of a row; what is longer loses its end."""

    def __init__(self, tokenizer: Any, limit: int) -> None:
        self.tokenizer, self.limit = tokenizer, limit

    def length(self, row: Row) -> int:
        return len(row.text)

    def inputs(self, rows: Sequence[Row]) -> Inputs:
        texts = [row.text for row in rows]
        found = self.tokenizer(texts, truncation=True, max_length=self.limit)["input_ids"]
        return padded(found, self.tokenizer.pad_token_id, left=False)


class Head(_Rows):
    """A sequence-classification head."""

    def batch(self, rows: Sequence[Row]) -> tuple[Inputs, Tensor]:
        labels = torch.tensor([row.label for row in rows], dtype=torch.int64, device="cpu")
        return self.inputs(rows), labels

    def read(self, model: nn.Module, inputs: Inputs, labels: Tensor) -> Read:
        return _classified(model(**inputs).logits.float(), labels)


class Text(_Rows):
    """The next token of every text."""

    def batch(self, rows: Sequence[Row]) -> tuple[Inputs, Tensor]:
        """Returns (inputs, labels). Labels are the next tokens, and -100 where there is none."""
        inputs = self.inputs(rows)
        labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
        return inputs, F.pad(labels[:, 1:], (0, 1), value=-100)

    def read(self, model: nn.Module, inputs: Inputs, labels: Tensor) -> Read:
        logits = model(**inputs, use_cache=False).logits.float()
        losses = F.cross_entropy(logits.transpose(1, 2), labels, ignore_index=-100, reduction="none")
        counts = (labels != -100).sum(1).float()
        return Read(losses.sum(1) / counts.clamp(min=1.0), counts, None)


def _classified(logits: Tensor, labels: Tensor) -> Read:
    losses = F.cross_entropy(logits, labels, reduction="none")
    return Read(losses, torch.ones_like(losses), logits.argmax(1) == labels)


class Closure:
    """Computes the loss of one batch, as zokern.step reads it: the batch is made once, and reads no value of
    a tensor."""

    def __init__(self, task: Task, model: nn.Module, rows: Sequence[Row], device: torch.device) -> None:
        self.task, self.model = task, model
        self.inputs, self.labels = moved(task.batch(rows), device)

    def __call__(self) -> Tensor:
        found = self.task.read(self.model, self.inputs, self.labels)
        return (found.losses * found.weights).sum() / found.weights.sum()

    def rows(self) -> Tensor:
        """Returns the loss of each row, for estimators that ask for it."""
        return self.task.read(self.model, self.inputs, self.labels).losses

    def of(self, optimizer: Any) -> Callable[[], Tensor]:
        """Returns the closure that an optimizer's estimator asks for."""
        return self.rows if optimizer.estimator.rows else self


def moved(batch: tuple[Inputs, Tensor], device: torch.device) -> tuple[Inputs, Tensor]:
    inputs, labels = batch
    return {name: value.to(device) for name, value in inputs.items()}, labels.to(device)


class Score(NamedTuple):
    """loss: mean over rows, or tokens;  accuracy: share of right answers, None where there are none."""

    loss: float
    accuracy: float | None
    rows: int

    def __str__(self) -> str:
        right = "" if self.accuracy is None else f", accuracy {self.accuracy:.1%}"
        return f"loss {self.loss:.4f}{right} on {self.rows} rows"


@torch.no_grad()
def score(task: Task, model: nn.Module, rows: Sequence[Row], device: torch.device) -> Score:
    """Returns loss and accuracy on rows. Batches hold rows of like lengths, which saves padding."""
    order = sorted(rows, key=task.length)
    loss, weight, right = 0.0, 0.0, 0
    answers = True
    for first in range(0, len(order), EVALUATED):
        inputs, labels = moved(task.batch(order[first : first + EVALUATED]), device)
        found = task.read(model, inputs, labels)
        loss += float((found.losses.double() * found.weights.double()).sum())
        weight += float(found.weights.sum())
        answers = answers and found.right is not None
        right += 0 if found.right is None else int(found.right.sum())
    return Score(loss / max(weight, 1.0), right / len(order) if answers else None, len(order))
