"""Wrong versions of the dense methods, each told from its formula over 20 steps."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import pytest
from method_check import check_method
from mutant import misread, replaced, together

import zokern
from zokern import plan
from zokern.estimator import Spsa
from zokern.rule import WindowAdam, WindowMomentum, adam, momentum, window

pytestmark = pytest.mark.usefixtures("one_thread")


def asks(kind: type, wrong: Callable):
    """An estimator that asks otherwise: wrong(right, self, oracle, plan) yields its estimates."""
    return replaced(kind, "__call__", wrong)


def with_options(estimator: type, **options: Any):
    """An estimator that asks with other numbers than it says it has."""

    def wrong(right, self, *rest):
        before = dict(vars(self))
        vars(self).update({key: value(self) for key, value in options.items()})
        yield from right(self, *rest)
        vars(self).update(before)

    return asks(estimator, wrong)


def keeps_the_worse(right, self, oracle, plan):
    pair = [self.state.get("best", [plan.step, 1]), [plan.step, 0]]
    yield from right(self, oracle, plan)
    self.state["best"] = pair[1 - pair.index(self.state["best"])]


def at_first_elements(right, *rest):
    """Pieces that all begin at number 0."""
    for pieces in right(*rest):
        yield [(rows, span._replace(first=0), low) for rows, span, low in pieces]


def in_pieces(*patches: Any):
    return together([patch.object(window, "PIECE", 100), *patches])


def at_step(kind: type, name: str, of: Callable[[int], int]):
    """A method of an estimator that is told of another step."""
    return replaced(kind, name, lambda right, self, plan: right(self, replace(plan, step=of(plan.step))))


WRONG: dict[str, tuple[str, Callable]] = {
    "oldest_is_newest": ("window_average",
        lambda: replaced(WindowMomentum, "shares", lambda right, *rest: right(*rest)[::-1])),
    "window_without_end": ("window_average", lambda: misread(WindowMomentum, lambda rule: {"length": 99})),
    "sum_for_average": ("window_average", lambda: misread(WindowMomentum, lambda rule: {"average": False})),
    "average_for_sum": ("zomomentum_window", lambda: misread(WindowMomentum, lambda rule: {"average": True})),
    "window_betas_swapped": ("adamezo",
        lambda: misread(WindowAdam, lambda rule: {"betas": rule.betas[::-1]})),
    "no_warmup": ("adamezo", lambda: misread(WindowAdam, lambda rule: {"warmup": False})),
    "adamezo_unscaled": ("adamezo", lambda: misread(WindowAdam, lambda rule: {"scale": 1.0})),
    "a_step_too_long": ("adamezo_early",
        lambda: misread(WindowAdam, lambda rule: {"length": rule.length + 1})),
    "pieces_at_the_first_element": ("adamezo",
        lambda: in_pieces(replaced(window, "_pieces", at_first_elements))),
    "earlier_draws_of_this_step": ("mezogv_unit",
        lambda: replaced(plan.Plan, "named", lambda right, self, draw: (self.step, right(self, draw)[1]))),
    "worse_is_kept": ("mezogv_unit", lambda: asks(zokern.Guided, keeps_the_worse)),
    "guide_not_matched": ("MeZOGV", lambda: with_options(zokern.Guided, norm=lambda self: "unit")),
    "draw_of_an_old_basis": ("mezogv_lozo",
        lambda: patch.object(plan.Plan, "reaches", lambda self, step: True)),
    "layers_of_the_next_step": ("lezo", lambda: at_step(zokern.Layers, "chosen", lambda step: step + 1)),
    "one_layer_more": ("lezo",
        lambda: with_options(zokern.Layers, sparsity=lambda self: self.sparsity - 0.17)),
    "jacobi_moves_before_it_reads": ("blockmezo_jacobi",
        lambda: with_options(zokern.Blockwise, order=lambda self: "gauss-seidel")),
    "gauss_seidel_reads_before_it_moves": ("blockmezo",
        lambda: with_options(zokern.Blockwise, order=lambda self: "jacobi")),
    "one_block": ("blockmezo", lambda: with_options(zokern.Blockwise, block=lambda self: lambda name: "")),
    "mean_of_all": ("RLOO",
        lambda: replaced(Spsa, "estimate", lambda right, *rest: right(*rest[:-1], rest[-1] * 0.75))),
    "unclipped": ("dpzo",
        lambda: with_options(zokern.Private,
            bound=lambda self: 1.0, noise=lambda self: self.noise * self.bound)),
    "clipped_mean": ("dpzo", lambda: with_options(zokern.Private, batch=lambda self: 1)),
    "noise_forgotten": ("dpzo", lambda: with_options(zokern.Private, noise=lambda self: 0.0)),
    "noise_of_the_first_step": ("dpzo", lambda: at_step(zokern.Private, "draws", lambda step: 0)),
    "gaussian_for_laplace": ("dpzo_laplace",
        lambda: with_options(zokern.Private, kind=lambda self: "gaussian")),
    "magnitude": ("ZOSignSGD", lambda: patch.object(zokern.Sign, "slopes", Spsa.slopes)),
    "whatever_the_losses": ("zoconservative",
        lambda: replaced(zokern.Conservative, "__call__", lambda right, *rest: Spsa.__call__(*rest))),
    "noise_of_a_filter_that_stays": ("bszo",
        lambda: asks(zokern.Bayesian, lambda right, self, *rest: self.state.clear() or right(self, *rest))),
    "momentum_dampened": ("ZOMomentum",
        lambda: misread(momentum.Momentum, lambda rule: {"dampening": rule.beta})),
    "adam_uncorrected": ("ZOAdam", lambda: misread(adam.Adam, lambda rule: {"bias_correction": False})),
}  # fmt: skip


@pytest.mark.parametrize("wrong", WRONG)
def test_check_rejects_wrong_method(wrong: str) -> None:
    name, mistake = WRONG[wrong]
    with mistake(), pytest.raises(AssertionError, match="away from the formula|against|on paper|not of"):
        check_method(name, steps=20)


def test_pieces_of_any_size_change_no_bit() -> None:
    """Moments are made 100 elements at a time, of tensors that 100 does not divide."""
    with in_pieces():
        check_method("adamezo", steps=6)
