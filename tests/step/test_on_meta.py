"""A step on the meta device reads no value, and a few launches do it all, however many layers there are."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from models import batch, next_token_loss, tiny
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import zokern
from benchmarks.on_meta import on_meta
from benchmarks.recorder import Recorder
from zokern.estimator import Estimate, Spsa
from zokern.methods import METHODS

EVALUATIONS: dict[str, Callable[[], Any]] = {
    "master": lambda: "master",
    "inplace": lambda: "inplace",
    "scratch": lambda: zokern.Scratch(check=False),  # a comparison reads losses, in the first step
    "paired": lambda: zokern.Paired(check=False),
}
# methods whose next question depends on what was read, or whose rule keeps numbers on the host
READS = {
    "Hybrid": "an optimizer of torch moves its weights whenever it is called",
    "MeZOGV": "the name of the better draw is an argument of the next launches",
}
OPTIONS: dict[str, dict[str, Any]] = {
    "AdaMeZO": {"window": 2},
    "PGAP": {"rank": 4, "interval": 2},
    "SubZeroPlus": {"queries": 3},
    "EGGROLL": {"queries": 2},
    "Hybrid": {"first_order": "head"},
}


def model_on_meta() -> tuple[nn.Module, Callable[[], Tensor]]:
    model, ids = tiny().to("meta"), batch().to("meta")
    return model, lambda: next_token_loss(model(ids), ids)


def launches(make: Callable[..., Any], model: nn.Module, closure: Callable[[], Tensor]) -> list[str]:
    """Returns the verbs that the third step launched. Raises AssertionError where a step reads a value.

    The first steps make bases and the rule's state."""
    with on_meta():
        recorder = Recorder()
        optimizer = make(model, backend=recorder, paired_check=None, every=1000)
        try:
            for _ in range(3):
                recorder.calls.clear()
                zokern.step(optimizer, closure)
        except (RuntimeError, NotImplementedError) as problem:
            if "meta tensor" not in str(problem):
                raise
            raise AssertionError(f"a step reads a value: {problem}") from problem
    return [call.verb for call in recorder.calls]


# every method by the two that a graph takes, and the others by three kinds of directions
CASES = [(name, way) for name in METHODS for way in EVALUATIONS
         if way in ("master", "paired") or name in ("MeZO", "SubZero", "LOZO")]  # fmt: skip


@pytest.mark.parametrize(("name", "evaluation"), CASES)
def test_a_step_reads_no_value(name: str, evaluation: str) -> None:
    model, closure = model_on_meta()
    loss = closure if name != "DPZO" else lambda: closure().expand(3)
    way = "jvp" if name == "FGD" else EVALUATIONS[evaluation]()
    options = {"evaluation": way, **OPTIONS.get(name, {})}
    make = lambda m, **own: METHODS[name](m, **options, **own)  # noqa: E731
    if name not in READS:
        assert "project" in launches(make, model, loss)
        return
    with pytest.raises(AssertionError, match="a step reads a value"):
        launches(make, model, loss)


FEW = {"master": 5, "inplace": 5, "scratch": 5, "paired": 4}


def llama(layers: int) -> tuple[nn.Module, Callable[[], Tensor]]:
    with torch.device("meta"):
        config = LlamaConfig(
            hidden_size=64, intermediate_size=128, num_hidden_layers=layers, num_attention_heads=4,
            num_key_value_heads=4, vocab_size=512,
        )  # fmt: skip
        model = LlamaForCausalLM(config).eval()
        ids, mask = torch.zeros(1, 8, dtype=torch.int64), torch.zeros(1, 1, 8, 8)
    # a mask is given: without one the model itself looks at values
    return model, lambda: next_token_loss(model(ids, attention_mask=mask, use_cache=False).logits, ids)


def check_few(make: Callable[..., Any], most: int) -> None:
    few, many = (launches(make, *llama(layers)) for layers in (2, 28))
    assert few == many, f"{len(few)} launches with 2 layers, {len(many)} with 28"
    assert len(many) <= most, f"{len(many)} launches, {many}"


@pytest.mark.parametrize("evaluation", EVALUATIONS)
def test_launches_do_not_grow_with_layers(evaluation: str) -> None:
    check_few(lambda m, **own: zokern.MeZO(m, evaluation=EVALUATIONS[evaluation](), **own), FEW[evaluation])


class Peeks(Spsa):
    """Looks at a loss."""

    def __call__(self, oracle: Any, plan: Any) -> Iterator[Estimate]:
        for estimate in super().__call__(oracle, plan):
            estimate.losses[0, 0].item()
            yield estimate


class Looks(zokern.Master):
    """An evaluation that looks at its losses."""

    def losses(self, *given: Any) -> Tensor:
        found = super().losses(*given)
        return found if bool(torch.isfinite(found).all()) else found


class Piecemeal(zokern.Sgd):
    """A launch for every tensor."""

    gated = True

    def update(self, plan: Any, group: Any, *rest: Any) -> Any:
        return sum(
            super(Piecemeal, self).update(plan, group.only([i]), *rest) for i in range(len(group.names))
        )


class Wary(zokern.Sgd):
    """A rule that does not say that it is gated: the host must know whether a step is finite."""


MASTER = {"evaluation": "master"}
WRONG: dict[str, tuple[str, Callable[..., Any]]] = {
    "an estimator that peeks": (
        "reads a value",
        lambda m, **own: zokern.MeZO(m, estimator=Peeks(), **MASTER, **own),
    ),
    "an evaluation that looks": ("reads a value", lambda m, **own: zokern.MeZO(m, evaluation=Looks(), **own)),
    "a rule that is not gated": (
        "reads a value",
        lambda m, **own: zokern.MeZO(m, rule=Wary(), **MASTER, **own),
    ),
    "a launch for each layer": (
        "with 28",
        lambda m, **own: zokern.MeZO(m, rule=Piecemeal(), **MASTER, **own),
    ),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_check_rejects(wrong: str) -> None:
    words, make = WRONG[wrong]
    with pytest.raises(AssertionError, match=words):
        check_few(make, 5)
