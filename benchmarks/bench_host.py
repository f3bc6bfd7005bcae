"""Host time: what a step costs over its two bare forwards where the products themselves cost next to nothing.

A narrow Llama of 28 layers reads 8 tokens on one thread, so that what is measured is Python, launches and bookkeeping.
A closure that generates 24 tokens runs the model 24 times a reading.
An evaluation that this zokern does not have is left out, with a note.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import zokern
from zokern.evaluation import EVALUATIONS

from .measure import Case, Group

LR, EPS = 1e-6, 1e-3
TOKENS, GENERATED = 8, 24
BOUND = "two forwards: the bound"


@dataclass(frozen=True)
class Row:
    """A step whose host time is measured; `evaluation` None is the method's default."""

    method: str
    evaluation: str | None = None

    @property
    def name(self) -> str:
        return " ".join(filter(None, (self.method, self.evaluation)))

    @property
    def is_known(self) -> bool:
        return self.evaluation is None or self.evaluation in EVALUATIONS

    def optimizer(self, module: nn.Module) -> Any:
        options = {} if self.evaluation is None else {"evaluation": self.evaluation}
        return getattr(zokern, self.method)(module, lr=LR, eps=EPS, dead_limit=None, **options)


ROWS = (Row("MeZO", "paired"), Row("MeZO", "master"), Row("MeZO", "inplace"), Row("MeZO", "scratch"), Row("SubZero"))


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def twice(call: Callable[[], Any]) -> Callable[[], None]:
    @torch.no_grad()
    def both() -> None:
        call()
        call()

    return both


def stepper(row: Row, module: nn.Module, loss: Callable[[nn.Module], Callable[[], Any]]) -> Callable[[], Any]:
    """Return a step of a module of the row's own, whose weights no other row writes and whose hooks no other row runs."""
    module = copy.deepcopy(module)
    optimizer, closure = row.optimizer(module), loss(module)
    for _ in range(3):  # choices are made in the first step, and compared in the second
        result = zokern.step(optimizer, closure)
    assert row.evaluation in (None, result.evaluation), f"{row.name} was read by {result.evaluation}"
    return lambda: zokern.step(optimizer, closure)


def measure(benchmark, report, title: str, rows: dict[str, Row], bound: str, module: nn.Module, loss, rounds: int) -> None:
    """`rows` by the key of their figure: the median of time(step) / time(bound), round by round."""
    cases = [Case(bound, twice(loss(module)))]
    keys = {}
    for key, row in rows.items():
        if not row.is_known:
            report.notes.append(f"{row.name} was left out: this zokern has no evaluation {row.evaluation!r}")
            continue
        keys[key] = f"zokern.step: {row.name}"
        cases.append(Case(keys[key], stepper(row, module, loss)))
    group = Group(title, cases).run(benchmark, rounds)
    report.add(group, **{key: group.ratio(name, bound) for key, name in keys.items()})


@pytest.mark.alone
def bench_host(benchmark, report) -> None:
    pytest.importorskip("transformers")
    from .models import loss_of, model

    rows = {f"host {row.name} / forwards": row for row in ROWS}
    title = f"host time, a Llama of 28 layers of width 64, fp32 1x{TOKENS}, one thread"
    rounds = 10 if report.quick else 60
    measure(benchmark, report, title, rows, BOUND, model("Llama-narrow", "fp32"), lambda m: loss_of(m, 1, TOKENS), rounds)


def rating_of(module: Any, length: int) -> Callable[[], Tensor]:
    """Return a closure that generates greedily and rates the result: the share of even tokens."""
    limits = {"max_new_tokens": length, "min_new_tokens": length, "do_sample": False, "pad_token_id": 1}
    ids = torch.randint(4, module.config.vocab_size, (1, TOKENS), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)

    def rating() -> Tensor:
        made = module.generate(input_ids=ids, attention_mask=mask, **limits)[:, TOKENS:]
        assert made.shape[1] == length
        return (made % 2 == 0).double().mean()

    return rating


@pytest.mark.alone
def bench_generate(benchmark, report) -> None:
    pytest.importorskip("transformers")
    from .models import model

    name = "OPT-tiny" if report.quick else "OPT-125M"
    rows = {f"host generate {name} / generations": Row("MeZO")}
    title = f"{GENERATED} generated tokens in the closure, {name} fp32, one thread"
    loss = lambda m: rating_of(m, GENERATED)  # noqa: E731
    measure(benchmark, report, title, rows, "two generations: the bound", model(name, "fp32"), loss, 2 if report.quick else 6)
