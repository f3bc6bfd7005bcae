"""A closure that returns the loss of each example, and what a single example can do to a step."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import pytest
import torch
from family import EVALUATIONS, Rows
from models import same_bits, snapshot
from torch import Tensor

import zokern
from zokern.plan import Plan
from zokern.stream import PRIVACY, draw_word, words

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("evaluation", [*EVALUATIONS, "auto"])
def test_one_example_moves_a_coefficient_by_no_more_than_its_bound(evaluation: str) -> None:
    """An example whose loss is a million times as large, or inf, or NaN."""
    eps, bound, found = 1e-3, 0.05, []
    for factor in (1.0, 1e6, math.inf, math.nan):
        model = Rows()
        scale = torch.ones(10)
        scale[3] = factor
        options = {"clip": bound, "noise": 0.0, "eps": eps, "evaluation": evaluation, "paired_check": None}
        optimizer = zokern.DPZO(model, seed=2, lr=1e-3, **options)
        result = zokern.step(optimizer, lambda model=model, scale=scale: model() * scale)
        assert not result.skipped
        found += result.coefficients
    for got in found[1:]:
        assert abs(got - found[0]) <= 2 * bound / (2 * eps * 10) * (1 + 1e-6)
    assert len({*found[:2]}) == 2


def test_without_a_bound_one_example_decides() -> None:
    clamped = patch.object(Tensor, "clamp", lambda self, *bounds: self)
    with clamped, pytest.raises(AssertionError):
        test_one_example_moves_a_coefficient_by_no_more_than_its_bound("master")


def test_a_step_without_a_finite_example_is_skipped() -> None:
    model = Rows()
    before = snapshot(model)
    assert zokern.step(zokern.DPZO(model, paired_check=None), lambda: model() * math.nan).skipped
    assert all(same_bits(p, before[n]) for n, p in model.named_parameters())


@pytest.mark.parametrize("kind", ["gaussian", "laplace"])
def test_noise_has_its_distribution(kind: str) -> None:
    """Mean, variance, and the share within one unit, of 2000 numbers; each query and step has its own."""
    optimizer = zokern.DPZO(Rows(), kind=kind, queries=2, seed=11)
    plan = optimizer.plan()
    assert (
        len(torch.cat([optimizer.estimator.draws(replace(plan, step=step)) for step in (0, 1)]).unique()) == 4
    )
    many = words(torch.arange(2000), 0, 0, draw_word(0, PRIVACY), 11)
    with patch.object(Plan, "bits", lambda self, purpose, query: many[1000 * query :][:1000]):
        n = optimizer.estimator.draws(plan)
    variance, within = (1.0, math.erf(math.sqrt(0.5))) if kind == "gaussian" else (2.0, 1.0 - math.exp(-1.0))
    assert len(n.unique()) > 1990 and abs(float(n.mean())) < 5 * math.sqrt(variance / len(n))
    assert (
        abs(float(n.var()) / variance - 1.0) < 0.2
        and abs(float((n.abs() < 1.0).double().mean()) - within) < 0.04
    )


REFUSED: dict[str, Callable[[Rows], Any]] = {
    "a mean": lambda model: model().mean(), "a number": lambda model: 1.0,
    "a matrix": lambda model: model().view(2, 5),
    "nothing": lambda model: model()[:0],
}  # fmt: skip


@pytest.mark.parametrize("evaluation", ["master", "scratch"])
@pytest.mark.parametrize("what", REFUSED)
def test_a_closure_without_a_loss_for_each_example_is_refused(what: str, evaluation: str) -> None:
    model = Rows()
    before = snapshot(model)
    with pytest.raises(
        ValueError, match=r"the closure returned .*expected a tensor of shape \[examples\].*reduction='none'"
    ):
        zokern.step(zokern.DPZO(model, evaluation=evaluation), lambda: REFUSED[what](model))
    assert all(same_bits(p, before[n]) for n, p in model.named_parameters())
    with pytest.raises(ValueError, match=r"a tensor of shape \(10,\); expected a scalar"):
        zokern.step(zokern.MeZO(model, evaluation=evaluation), model)


def test_a_loss_for_each_example_goes_with_what_else_reads_losses() -> None:
    """Blocks, the search for an lr, and the second reading of a step.
    Probes, which move weights, are refused (test_dizo.py)."""
    for make in (
        lambda m: zokern.MeZO(m, estimator=zokern.Blockwise(zokern.Private())),
        lambda m: zokern.DPZO(m, paired_check=1),
    ):
        model = Rows()
        optimizer, before = make(model), snapshot(model)
        results = [zokern.step(optimizer, model) for _ in range(2)]
        optimizer.flush()
        assert not results[-1].skipped and not same_bits(model.layers[0].weight, before["layers.0.weight"])
    model = Rows()
    means = zokern.tune(zokern.MeZO(model), lambda: model().mean())
    assert zokern.tune(zokern.DPZO(model), model).lr == pytest.approx(means.lr, rel=1e-3)
