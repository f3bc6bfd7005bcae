"""Points and estimates along draws of earlier steps."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
from family import EVALUATIONS, loss, weights
from models import snapshot, tiny
from torch import Tensor

import zokern
from zokern.estimator import Guided
from zokern.evaluation import Point

pytestmark = pytest.mark.usefixtures("one_thread")


def test_a_point_may_lie_along_draws_of_earlier_steps() -> None:
    """Every evaluation reads the same loss there, dense and low-rank, and the record names the draws."""
    found: dict[str, list[float]] = {}

    class Asks(zokern.Spsa):
        def __call__(self, oracle: Any, plan: Any) -> Any:
            if plan.step == 2:
                points = [
                    Point((((0, 0), 1.0),)),
                    Point((((1, 0), 0.5), (plan.draw(0), -1.0))),
                    Point((((0, 0), -1.0), ((1, 0), 1.0))),
                ]
                found.setdefault(name, []).extend(oracle.losses(points).tolist())
            for estimate in super().__call__(oracle, plan):
                if plan.step == 2:
                    estimate = replace(
                        estimate,
                        draws=((0, 0), plan.draw(0)),
                        coefficients=torch.tensor([[0.5, -0.5]]).double(),
                        slopes=None,
                    )
                yield estimate

    for method in (zokern.MeZO, zokern.TeZO):
        found.clear()
        ends = []
        for name in EVALUATIONS:
            model, ids = tiny(), torch.arange(10).view(2, 5)
            optimizer = method(model, lr=0.0, eps=0.05, estimator=Asks(), evaluation=name)
            for step in range(3):
                optimizer.param_groups[0]["lr"] = 0.1 * (step == 2)
                result = zokern.step(optimizer, lambda model=model, ids=ids: model(ids).square().mean())
            optimizer.flush()
            assert result.draws == ((0, 0), (2, 0))
            ends.append(snapshot(model))
        for name in EVALUATIONS[1:]:
            assert found[name] == pytest.approx(found["master"], rel=1e-5) and len({*found[name]}) == 3
        assert all(torch.allclose(ends[0][n], end[n], atol=1e-5) for end in ends[1:] for n in ends[0])


def draws_of(draws: Callable[[Any], tuple]) -> zokern.Spsa:
    """An estimator that moves along other draws than it read."""

    class Other(zokern.Spsa):
        def __call__(self, oracle: Any, plan: Any) -> Any:
            for estimate in super().__call__(oracle, plan):
                named = draws(plan)
                yield replace(
                    estimate, draws=named, coefficients=torch.ones(len(plan.groups), len(named)).double()
                )

    return Other()


@pytest.mark.parametrize(
    ("method", "draws", "message"),
    [
        (
            zokern.MeZO,
            lambda plan: (plan.draw(0), (plan.step - 1, 0)),
            "draws is .*expected one of this step at the end",
        ),
        (zokern.MeZO, lambda plan: (), "draws is .*expected one of this step at the end"),
        (
            zokern.LOZO,
            lambda plan: ((0, 0), plan.draw(0)),
            r"draw \(0, 0\) is of step 0, and step 2 has another basis",
        ),
    ],
)
def test_draws_that_are_no_directions_are_refused(method: Any, draws: Callable, message: str) -> None:
    model, ids = tiny(), torch.arange(10).view(2, 5)
    options = {"interval": 2} if method is zokern.LOZO else {}
    optimizer = method(model, lr=0.0, evaluation="master", **options)
    for step in range(3):
        if step == 2:
            optimizer.estimator, optimizer.param_groups[0]["lr"] = draws_of(draws), 0.1
        with pytest.raises(ValueError, match=message) if step == 2 else nullcontext():
            zokern.step(optimizer, lambda: model(ids).square().mean())


@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize("factor", [math.nan, math.inf])
def test_a_skipped_step_of_a_guide_keeps_what_was_kept(factor: float, maximize: bool) -> None:
    """Whether the kept draw or the new one has the better loss: both occur."""
    better = set()
    for seed in range(6):
        params, calls = weights(), [0] * 4
        optimizer = zokern.MeZOGV(
            list(params.items()), lr=1e-3, evaluation="master", seed=seed, maximize=maximize
        )
        for _ in range(3):
            zokern.step(optimizer, lambda params=params: loss(params))
        kept = copy.deepcopy(optimizer.estimator.state)
        calls.clear()

        def closure(params: Any = params, calls: list[int] = calls) -> Tensor:
            """Finite along the draws, inf or NaN along the guide."""
            calls.append(0)
            return loss(params) * (factor if len(calls) > 2 else 1.0)

        result = zokern.step(optimizer, closure)
        assert result.skipped and optimizer.estimator.state == kept and len(calls) == 4
        better.add(result.losses[0][0] < result.losses[0][1])
    assert better == {False, True}


def test_a_guide_keeps_nothing_of_a_step_that_back_propagation_skips() -> None:
    """Its own four losses are finite there. So they are where lr times the coefficient is too large."""
    for changes in ({"estimator": zokern.Mixed(0.5, Guided())}, {"estimator": Guided(), "lr": 1e38}):
        params = weights()
        optimizer = zokern.MeZO(list(params.items()), evaluation="master", **{"lr": 0.0, **changes})
        optimizer.param_groups[0]["lr"] = 0.0
        for _ in range(2):
            zokern.step(optimizer, lambda params=params: loss(params))
        kept = copy.deepcopy(optimizer.estimator.state)
        optimizer.param_groups[0]["lr"] = changes.get("lr", 1e-3)
        for seed in range(4):
            optimizer.run.seed = seed
            first_order = (lambda params=params: loss(params) * math.nan) if "lr" not in changes else None
            result = zokern.step(optimizer, lambda params=params: loss(params) * 1e3, first_order)
            assert result.skipped and optimizer.estimator.state == kept


def check_jacobi(inner: Any) -> None:
    """No block has moved when the next is read, so what is kept of a move is not known."""
    with pytest.raises(ValueError, match="order is 'jacobi' with .*asks whether its last estimate moved"):
        zokern.Blockwise(inner, order="jacobi")
    assert zokern.Blockwise(inner).follows


class Unseen(Guided):
    """Asks, and does not say so."""

    follows = False


def test_guided_is_refused_in_jacobi_order() -> None:
    check_jacobi(Guided())
    with pytest.raises(pytest.fail.Exception):
        check_jacobi(Unseen())
