"""An error of torch.vmap is refused by name, and 'auto' goes on with another way; an error of the closure is
raised as it is."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from models import build, same_bits, snapshot
from torch import Tensor, nn

import zokern
from zokern.evaluation import Isolation

pytestmark = pytest.mark.usefixtures("one_thread")

X = torch.linspace(-1.0, 1.0, 48).view(8, 6)


def made() -> nn.Module:
    return build(lambda: nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 1)))


def loss_of(model: nn.Module) -> Tensor:
    return model(X).square().mean()


def added(model: nn.Module) -> Tensor:
    total = torch.zeros(())
    total += loss_of(model)
    return total


def copied(model: nn.Module) -> Tensor:
    total = torch.zeros(8, 1)
    total.copy_(model(X))
    return total.square().mean()


def assigned(model: nn.Module) -> Tensor:
    total = torch.zeros(8)
    total[:] = model(X)[:, 0]
    return total.square().mean()


def disguised(model: nn.Module) -> Tensor:
    """A model that turns torch's error into one of its own."""
    loss = loss_of(model)
    try:
        assert loss.item() < 100.0
    except RuntimeError:
        raise AssertionError("the loss is no number") from None
    return loss


REFUSED: dict[str, Callable[[nn.Module], Any]] = {
    "item": lambda m: loss_of(m) * 0 + loss_of(m).item(),
    "a branch": lambda m: loss_of(m) if loss_of(m) > 0.1 else loss_of(m) * 2,
    "an addition in place": added,
    "copy_": copied,
    "a slice": assigned,
    "a mask": lambda m: m(X)[m(X) > -9.0].square().mean(),
    "float": lambda m: float(loss_of(m)),
    "a list": lambda m: sum(row[0] ** 2 for row in m(X).tolist()) / 8,
    "a text": lambda m: float(f"{loss_of(m):.6f}"),
    "an error of another kind": disguised,
    "a copy of the model": lambda m: loss_of(copy.deepcopy(m)),
}


def check_refused(evaluation: Any, loss: Callable[[nn.Module], Any]) -> None:
    model = made()
    before = snapshot(model)
    with pytest.raises(zokern.Refused, match="cannot map the closure.*use evaluation='master'") as refused:
        zokern.step(zokern.MeZO(model, evaluation=evaluation), lambda: loss(model))
    assert isinstance(refused.value.__cause__, Exception)
    assert all(same_bits(before[name], t) for name, t in snapshot(model).items())


@pytest.mark.parametrize("case", REFUSED)
def test_what_vmap_cannot_map_is_refused_by_name(case: str) -> None:
    check_refused("paired", REFUSED[case])


@pytest.mark.parametrize("case", REFUSED)
@pytest.mark.filterwarnings("ignore:this closure is read by evaluation 'scratch'")
def test_auto_reads_what_master_reads(case: str) -> None:
    losses = []
    for evaluation in ("auto", "master"):
        model = made()
        optimizer = zokern.MeZO(model, lr=1e-3, evaluation=evaluation)
        results = [zokern.step(optimizer, lambda model=model: REFUSED[case](model)) for _ in range(3)]
        losses.append([loss for result in results for side in result.losses for loss in side])
        assert [r.evaluation for r in results[1:]] == ["scratch" if evaluation == "auto" else "master"] * 2
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


# The closure's own ------------------------------------------------------------------------------------------


class Own(Exception):
    pass


def raised(error: Exception) -> Any:
    raise error


OWN: dict[str, tuple[type[Exception], Callable[[nn.Module], Any]]] = {
    "a class of its own": (Own, lambda m: raised(Own("mine"))),
    "after a forward": (KeyError, lambda m: {}[loss_of(m)]),
    "inside torch": (RuntimeError, lambda m: m(X[:, :3]).mean()),
    "a file": (FileNotFoundError, lambda m: torch.load("/no/such/file")),
    "about vmap": (RuntimeError, lambda m: raised(RuntimeError("vmap: BatchedTensor"))),
    "a vector": (ValueError, lambda m: m(X).square()),
    "nothing": (TypeError, lambda m: None),
}


class Output(dict):
    loss = 1.0


@pytest.mark.parametrize(
    "output, words",
    [(Output(), "return its .loss$"), ({"loss": 1.0}, r"\['loss'\]"), ((1.0, 2.0), "a tuple")],
)
@pytest.mark.parametrize("evaluation", ["master", "paired"])
def test_a_whole_output_is_no_loss(evaluation: str, output: Any, words: str) -> None:
    with pytest.raises(TypeError, match="the closure returned .*return its .loss") as found:
        zokern.step(zokern.MeZO(made(), evaluation=evaluation), lambda: output)
    assert re.search(words, str(found.value))


def test_a_python_bool_is_a_loss_as_a_bool_tensor_is() -> None:
    losses = []
    for kind in (bool, torch.tensor):
        model = made()
        optimizer = zokern.MeZO(model, evaluation="master", eps=1.0)
        losses.append(zokern.step(optimizer, lambda m=model, k=kind: k(bool(m(X)[0, 0] > 0.1))).losses)
    assert losses[0] == losses[1]


def check_own(evaluation: Any, case: str) -> None:
    """The error is raised with its type, without a cause, and the way stays."""
    error, fails = OWN[case]
    model = made()
    optimizer = zokern.MeZO(model, lr=1e-3, evaluation=evaluation)
    zokern.step(optimizer, lambda: loss_of(model))
    used = zokern.step(optimizer, lambda: loss_of(model)).evaluation
    with pytest.raises(Exception) as found:
        zokern.step(optimizer, lambda: fails(model))
    assert type(found.value) is error, f"{found.value!r} is not the closure's"
    assert found.value.__cause__ is None, f"{found.value!r} is not the closure's"
    assert zokern.step(optimizer, lambda: loss_of(model)).evaluation == used, "the way is blamed"


@pytest.mark.parametrize("case", OWN)
@pytest.mark.parametrize("evaluation", ["paired", "scratch", "auto"])
def test_an_error_of_the_closure_is_its_own(evaluation: str, case: str) -> None:
    check_own(evaluation, case)


@pytest.mark.parametrize("evaluation", ["paired", "scratch", "auto"])
def test_an_error_that_comes_once_is_the_closures(evaluation: str) -> None:
    """As of a network that fails now and then: no other way is taken, and the caller sees the error."""
    model, errors = made(), [Own("now and then")]
    optimizer = zokern.MeZO(model, lr=1e-3, evaluation=evaluation)
    used = [zokern.step(optimizer, lambda: loss_of(model)).evaluation for _ in range(2)][-1]
    with pytest.raises(Own) as found:
        zokern.step(optimizer, lambda: raised(errors.pop()) if errors else loss_of(model))
    assert str(found.value) == "now and then"
    assert zokern.step(optimizer, lambda: loss_of(model)).evaluation == used


@pytest.mark.parametrize("evaluation", ["master", "scratch"])
def test_a_copy_of_the_model_has_no_copy_of_a_plan(evaluation: str, monkeypatch) -> None:
    """Inputs of the copy are measured as those of the model."""
    rows = []
    right = Isolation._measure

    def noted(self: Isolation, *given: Any) -> None:
        right(self, *given)
        rows.append(self.rows)

    monkeypatch.setattr(Isolation, "__deepcopy__", lambda self, memo: pytest.fail("copied"), raising=False)
    monkeypatch.setattr(Isolation, "_measure", noted)
    model = made()
    zokern.step(zokern.MeZO(model, evaluation=evaluation), lambda: loss_of(copy.deepcopy(model)))
    assert {*rows} == {8}


class Blind(zokern.Paired):
    """Takes every error for the closure's."""

    def _fails_alone(self, *given: Any) -> bool:
        return False


class Eager(zokern.Paired):
    """Takes every error for its own."""

    def _fails_alone(self, *given: Any) -> bool:
        return True


def test_checks_reject_a_way_that_does_not_ask() -> None:
    with pytest.raises(RuntimeError, match="vmap: It looks like") as found:
        check_refused(Blind(), REFUSED["item"])
    assert not isinstance(found.value, zokern.Refused)
    with pytest.raises(AssertionError, match="is not the closure's"):
        check_own(Eager(), "inside torch")
