"""MeZO-SVRG over 20 steps against its formula;
its anchor, its full loss, and what the public code gets wrong."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import pytest
import torch
from method_check import check_method, check_resume
from models import batch, changed, next_token_loss, snapshot, tiny
from mutant import replaced
from torch import nn

import zokern
from zokern.estimator import anchored
from zokern.estimator.anchored import Anchored
from zokern.evaluation import Point

pytestmark = pytest.mark.usefixtures("one_thread")

IDS = batch()


@pytest.mark.parametrize("case", ["mezosvrg", "mezosvrg_queries"])
def test_twenty_steps_equal_the_formula(case: str) -> None:
    check_method(case, steps=20, weight_decay=0.1)


class OtherDraws(zokern.estimator.Oracle):
    """Reads at the anchor along other draws, as the public code does."""

    def losses(self, points, *rest, **more):
        moved = [Point(tuple((word + 7, amount) for word, amount in point.terms)) for point in points]
        return super().losses(moved if self.bases else points, *rest, **more)


def other_draws():
    import sys

    return patch.object(sys.modules["zokern.step"], "Oracle", OtherDraws)


def changed_estimates(change: Any) -> Any:
    """The estimator's estimates, changed where they have two kinds of draws."""

    def call(right, self, oracle, plan):
        for estimate in right(self, oracle, plan):
            yield change(estimate, plan) if isinstance(estimate.draws[0], tuple) else estimate

    return replaced(Anchored, "__call__", call)


WRONG: dict[str, Any] = {
    "different draws": other_draws,
    "the anchor is the current weights": lambda: patch.object(anchored, "_to_anchor", lambda *_: None),
    "G along this step's draw": lambda: changed_estimates(lambda e, plan: replace(e, draws=e.draws[2:] * 2)),
    "G forgotten": lambda: changed_estimates(lambda e,
        plan: replace(e, coefficients=e.coefficients * torch.tensor([0, 0, 1, 1]))),
    "G doubled": lambda: changed_estimates(lambda e,
        plan: replace(e, coefficients=e.coefficients * torch.tensor([2, 2, 1, 1]))),
    "the mean of four": lambda: changed_estimates(lambda e, plan: replace(e, count=4)),
    "ratio forgotten": lambda: replaced(Anchored, "anchor", lambda right, self,
        *rest: right(_plain(self), *rest)),
    "an anchor in every step": lambda: replaced(Anchored, "__call__", lambda right, self, o,
        p: iter([self.anchor(o, p)])),
}  # fmt: skip


def _plain(estimator: Anchored) -> Anchored:
    plain = copy.copy(estimator)
    plain.ratio = 1.0
    return plain


@pytest.mark.parametrize("wrong", WRONG)
def test_a_wrong_version_is_rejected(wrong: str) -> None:
    with (
        WRONG[wrong](),
        pytest.raises(AssertionError, match="against|away from the formula|losses, not|coefficient of"),
    ):
        check_method("mezosvrg_queries", steps=6)


def test_the_full_loss_is_read_where_the_anchor_is_set() -> None:
    """In steps 0, 3 and 6 alone, and its difference is kept until the next."""
    model = tiny()
    calls: list[int] = []

    def full():
        calls.append(optimizer.steps)
        return 2.0 * next_token_loss(model(IDS), IDS)

    optimizer = zokern.MeZOSVRG(
        model, lr=0.0, eps=1e-2, seed=3, full=full, interval=3, evaluation="master", paired_check=None
    )
    results = [zokern.step(optimizer, lambda: next_token_loss(model(IDS), IDS)) for _ in range(7)]
    assert calls == [0, 0, 3, 3, 6, 6]
    assert (
        results[0].loss > 1.9 * results[1].loss
        and len(results[0].losses[0]) == 2
        and len(results[1].losses[0]) == 4
    )
    assert results[1].coefficients[0] == results[2].coefficients[0] == results[0].coefficients[0]
    # at lr = 0 the weights are the anchor, and the two differences the same
    assert results[1].coefficients[1] == 0.0


def test_the_control_variate_takes_the_noise_of_batches_away() -> None:
    """Batches with slopes of +-10 around a full slope: c moves within 1 of it, where MeZO's c moves by 10.
    Other draws add up instead."""
    shifts = torch.randn(64, generator=torch.Generator().manual_seed(0)) * 10
    spread = {}
    for name in ("mezo", "svrg", "svrg, other draws"):
        p = nn.Parameter(torch.zeros(1))

        def loss_at(shift: Any, p: Any = p) -> Any:
            return (p.square() * 0.05 + p * (1.0 + shift)).sum()

        if name == "mezo":
            optimizer: Any = zokern.MeZO([("w", p)], lr=1e-3, eps=1e-2, evaluation="master")
        else:
            optimizer = zokern.MeZOSVRG(
                [("w", p)],
                lr=1e-3,
                eps=1e-2,
                full=lambda p=p: loss_at(0.0, p),
                interval=64,
                evaluation="master",
            )
        found = []
        with other_draws() if name == "svrg, other draws" else patch.dict({}):
            for step, shift in enumerate(shifts):
                before = float(p.detach())
                zokern.step(optimizer, lambda shift=shift, p=p: loss_at(shift, p))
                z = float(zokern.draw("normal", (1,), seed=0, who="w", step=step))
                if step:
                    own = float(p.detach()) - before
                    first = float(zokern.draw("normal", (1,), seed=0, who="w", step=0))
                    full = optimizer.estimator.state["full"][0] / 1e-2 * first if name != "mezo" else 0.0
                    found.append((own / -1e-3 - full) / z)
        spread[name] = float(torch.tensor(found).std())
    assert spread["svrg"] < 1.0 < 8.0 < spread["mezo"] and spread["svrg, other draws"] > 8.0, spread


@pytest.mark.parametrize("rounding", ["nearest", "stochastic", "residual"])
@pytest.mark.parametrize("after", [2, 3])
def test_a_resumed_run_has_the_same_bits(after: int, rounding: str) -> None:
    """Within an interval of 3, and at its end."""
    check_resume(
        lambda m: zokern.MeZOSVRG(m, lr=1e-3, eps=1e-2, seed=5, interval=3, rounding=rounding), 6, after
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lr_0_changes_no_bit(dtype: torch.dtype) -> None:
    model = tiny(dtype)
    with torch.no_grad():
        model.head.weight[0] = -0.0
    before = snapshot(model)
    optimizer = zokern.MeZOSVRG(model, lr=0.0, eps=1e-2, interval=2)
    for _ in range(5):
        zokern.step(optimizer, lambda: next_token_loss(model(IDS), IDS))
    assert not changed(model, before)


def test_a_parameter_without_an_anchor_sets_one() -> None:
    model = tiny()
    optimizer = zokern.MeZOSVRG(model, lr=1e-3, eps=1e-2, interval=100, evaluation="master")
    model.up.weight.requires_grad_(False)
    sides = []
    for step in range(4):
        if step == 2:
            model.up.weight.requires_grad_(True)
        sides.append(len(zokern.step(optimizer, lambda: next_token_loss(model(IDS), IDS)).losses[0]))
    assert sides == [2, 4, 2, 4] and optimizer.estimator.state["step"] == 2


def test_a_loss_that_is_not_finite_leaves_no_anchor() -> None:
    """The step is skipped, and the next one sets the anchor."""
    model = tiny()
    optimizer = zokern.MeZOSVRG(
        model, lr=1e-3, eps=1e-2, interval=100, evaluation="master", paired_check=None
    )
    bad = iter([True] * 2 + [False] * 20)
    results = [
        zokern.step(
            optimizer, lambda: next_token_loss(model(IDS), IDS) * (float("nan") if next(bad) else 1.0)
        )
        for _ in range(3)
    ]
    assert [r.skipped for r in results] == [True, False, False] and [len(r.losses[0]) for r in results] == [
        2,
        2,
        4,
    ]


def test_stochastic_rounding_spends_the_bits_of_its_own_step() -> None:
    """Those of the anchor's step would round every step of an interval alike."""
    p = nn.Parameter(torch.ones(512, dtype=torch.bfloat16))
    optimizer = zokern.MeZOSVRG(
        [("w", p)], lr=1e-3, eps=0.1, interval=50, rounding="stochastic", evaluation="master"
    )
    zokern.step(optimizer, lambda: p.float().sum())
    ends = []
    for _ in range(3):
        with torch.no_grad():
            p.fill_(1.0)
        zokern.step(optimizer, lambda: p.float().sum() * 1.0)
        ends.append(p.detach().clone())
    assert not torch.equal(ends[0], ends[1]) and not torch.equal(ends[1], ends[2])
    steps = []
    with replaced(
        zokern.group.Group,
        "axpy_",
        lambda right, self, noise, *rest: steps.append(noise.draws) or right(self, noise, *rest),
    ):
        zokern.step(optimizer, lambda: p.float().sum())
    assert steps == [[(0, 0), (4, 0)]]


def test_what_it_cannot_do_is_refused() -> None:
    model = tiny()
    before = snapshot(model)
    optimizer = zokern.SubZero(model, rank=2, estimator=Anchored())
    with pytest.raises(ValueError, match="estimator Anchored with direction 'subspace'.*expected a dense z"):
        zokern.step(optimizer, lambda: next_token_loss(model(IDS), IDS))
    assert not changed(model, before)
    with pytest.raises(TypeError, match="full is 3; expected a function"):
        zokern.MeZOSVRG(model, full=3)
    with pytest.raises(ValueError, match="interval is 0"):
        zokern.MeZOSVRG(model, interval=0)
    optimizer = zokern.MeZOSVRG(model)
    zokern.step(optimizer, lambda: next_token_loss(model(IDS), IDS))
    state: dict[str, Any] = copy.deepcopy(optimizer.state_dict())
    state["state"][0]["anchor"] = torch.zeros(2, 2)
    with pytest.raises(ValueError, match="state 'anchor' of parameter 'gain' is float32\\[2, 2\\]"):
        zokern.MeZOSVRG(model).load_state_dict(state)


@pytest.mark.parametrize("rule", [zokern.Momentum(0.5), zokern.Adam()])
def test_rules_with_state_take_its_draws(rule: Any) -> None:
    model = tiny()
    lr = 3e-3 if rule.name == "momentum" else 5e-3
    optimizer = zokern.MeZOSVRG(model, lr=lr, eps=1e-2, interval=4, rule=rule)

    def closure():
        return next_token_loss(model(IDS), IDS)

    start = float(closure().detach())
    for _ in range(60):
        zokern.step(optimizer, closure)
    assert float(closure().detach()) < start - 0.1
