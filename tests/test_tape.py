"""Closures that turn autograd on: for nothing, or to differentiate by their inputs, as a physics-informed loss does."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from unittest.mock import patch

import models
import pytest
import torch
from models import build, changed, next_token_loss, one_thread, snapshot, tiny  # noqa: F401 (a fixture)
from mutant import mutant
from recipes import METHODS
from torch import Tensor, nn

import zokern
from zokern.evaluation import copies, substitution

pytest.importorskip("greenlet")
IDS = models.batch()
DIRECTIONS: dict[str, Callable] = {"dense": zokern.MeZO, **{name: METHODS[name] for name in ("subzero", "lozo", "tezo")}}


class Field(nn.Module):
    """u(x): what a loss differentiates twice."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.middle, self.out = nn.Linear(2, 16), nn.Linear(16, 16), nn.Linear(16, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.tanh(self.middle(torch.tanh(self.up(x)))))


def residual(model: nn.Module, points: Tensor) -> Tensor:
    """Mean square of laplacian u - u, over points that need a gradient."""
    with torch.enable_grad():
        x = points.clone().requires_grad_()
        u = model(x)
        (slope,) = torch.autograd.grad(u.sum(), x, create_graph=True)
        bend = sum(torch.autograd.grad(slope[:, i].sum(), x, retain_graph=True)[0][:, i] for i in range(2))
    return (bend - u[:, 0]).square().mean().detach()


def losses(make: Callable, evaluation: object, build_model: Callable, closure_of: Callable) -> list:
    model = build(build_model)
    before = snapshot(model)
    optimizer = make(model, lr=0.0, eps=3e-2, seed=5, queries=2, evaluation=evaluation)
    with patch.object(copies, "RESIDENT", 16), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "the loss did not read")
        result = zokern.step(optimizer, lambda: closure_of(model))
    if evaluation != "walk":
        assert changed(model, before) == [] and result.evaluation == ("scratch" if evaluation == "scratch" else "paired")
    return [loss for sides in result.losses for loss in sides]


def check(make: Callable, evaluation: object, build_model: Callable, closure_of: Callable) -> None:
    """The losses of weights that were moved in place, where autograd sees nothing unusual."""
    found, expected = (losses(make, e, build_model, closure_of) for e in (evaluation, "walk"))
    assert max(abs(a - b) / abs(b) for a, b in zip(found, expected)) < 2e-5, (found, expected)
    assert max(abs(a - b) for a in expected for b in expected) > 1e-3 * abs(expected[0])


def evaluations() -> dict[str, Callable]:
    return {"scratch": lambda: "scratch", "paired": lambda: zokern.Paired(check=False)}


def physics(model: nn.Module) -> Tensor:
    return residual(model, torch.linspace(-1, 1, 22).view(11, 2))


def recorded(model: nn.Module) -> Tensor:
    with torch.enable_grad():
        return next_token_loss(model(IDS), IDS).detach()


@pytest.mark.parametrize("evaluation", evaluations().values(), ids=evaluations())
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_derivatives_by_the_inputs(direction: str, evaluation: Callable) -> None:
    check(DIRECTIONS[direction], evaluation(), Field, physics)


@pytest.mark.parametrize("evaluation", evaluations().values(), ids=evaluations())
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_autograd_on_for_nothing(direction: str, evaluation: Callable) -> None:
    check(DIRECTIONS[direction], evaluation(), tiny, recorded)


def test_an_objective_that_differentiates() -> None:
    """Rows of all sides in one call of the model, and a tape through it."""

    class Slope(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.field = Field()

        def forward(self, x: Tensor) -> Tensor:
            with torch.enable_grad():
                x = x.clone().requires_grad_()
                return torch.autograd.grad(self.field(x).sum(), x)[0].detach()

    batch = {"x": torch.linspace(-1, 1, 22).view(11, 2)}
    found = []
    for evaluation in (zokern.Paired(check=False), "walk"):
        model = build(Slope)
        optimizer = zokern.MeZO(model, lr=0.0, eps=3e-2, seed=5, evaluation=evaluation)
        objective = zokern.Objective(model, batch, lambda slopes, batch: slopes.square().mean())
        with patch.object(copies, "RESIDENT", 16):
            found.append(zokern.step(optimizer, objective).losses[0])
    assert found[0] == pytest.approx(found[1], rel=2e-5) and found[0][0] != pytest.approx(found[0][1], rel=1e-3)


@pytest.mark.parametrize("right, instead", [("taped = is_taped(self.copies.table, args, kwargs)", "taped = False"), (" and not taped\n", "\n")],
                         ids=["products into given memory", "copies that do not outlive the call"])  # fmt: skip
def test_wrong_versions_are_rejected(right: str, instead: str) -> None:
    """A tape that keeps copies of the arena would read what is written there later."""
    broken = mutant(substitution.Substitution, "_substitute", right, instead)
    with patch.object(substitution.Substitution, "_substitute", broken), pytest.raises((AssertionError, RuntimeError)):
        check(zokern.MeZO, "scratch", Field, physics)
