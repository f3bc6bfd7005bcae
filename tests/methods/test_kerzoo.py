"""KerZOO as a method: the paper's estimator and the published trainer,
over 20 steps, with their averages of weights."""

from __future__ import annotations

import copy
from typing import Any
from unittest.mock import patch

import pytest
import torch
from hand import EPS, NAMES, SEED, Hand, loss, radius_of, weights
from method_check import check_method, check_resume
from models import batch, changed, next_token_loss, snapshot, tiny
from mutant import replaced
from torch import Tensor, nn

import zokern
from zokern.methods.kerzoo import shrinking
from zokern.rule import averaged

pytestmark = pytest.mark.usefixtures("one_thread")

IDS = batch()


@pytest.mark.parametrize("case", ["kerzoo", "kerzoo_5_averaged"])
def test_twenty_steps_equal_the_formula(case: str) -> None:
    check_method(case, steps=20, weight_decay=0.1)


# The published trainer --------------------------------------------------------------------------------------


class Published(Hand):
    """theta, fast weights, and the trainer's step on them, in float64."""

    def __init__(self, params: dict[str, nn.Parameter]) -> None:
        super().__init__(params)
        self.fast = dict(self.theta)

    def step(self, t: int, lr: float, clip: float) -> None:
        share = 1.0 / (1.0 + t / 6)
        y = {n: share * self.fast[n] + (1 - share) * self.theta[n] for n in NAMES}
        d = max(1 - t / 4000, 1e-4)
        g = {n: torch.zeros(1).double() for n in NAMES}
        for k in range(3):
            r = {n: d * radius_of(n, t, k) for n in NAMES}
            sides = [
                float(loss({n: y[n] + s * EPS * r[n] * self.z(n, t, k) for n in NAMES})) for s in (1, -1)
            ]
            for n in NAMES:
                g[n] = (
                    g[n]
                    + (sides[0] - sides[1])
                    / (2 * EPS)
                    * 15
                    * r[n]
                    * (5 - 7 * r[n] ** 2)
                    * self.z(n, t, k)
                    / 3
                )
        for n in NAMES:
            self.fast[n] = self.fast[n] - lr * min(1.0, clip / (float(g[n].norm()) + 1e-8)) * g[n]
            self.theta[n] = share * self.fast[n] + (1 - share) * self.theta[n]


def check_published(evaluation: str = "master", steps: int = 20, clip: float = 4e5, **options: Any) -> None:
    params = weights()
    hand = Published(params)
    optimizer = zokern.KerZOO.published(
        params.items(), lr=2e-3, eps=EPS, seed=SEED, evaluation=evaluation, **options
    )
    for t in range(steps):
        zokern.step(optimizer, lambda: loss(params))
        hand.step(t, 2e-3, clip)
        for name, p in params.items():
            away = (p.double() - hand.theta[name]).abs().max()
            assert away <= 2e-5, f"step {t}: {name} is {away} away from where the formula is"
    start = weights()
    assert all((params[n] - start[n]).abs().max() > 1e-3 for n in NAMES), "too little moved to tell"


@pytest.mark.parametrize("evaluation", ["master", "paired", "scratch", "inplace", "auto"])
def test_the_published_trainer_equals_its_formula(evaluation: str) -> None:
    check_published(evaluation)


def test_its_norms_are_clipped() -> None:
    check_published(clip=1.0, clip_norm=1.0)


def late(right, self, updates):
    return right(self, updates + 1)


WRONG: dict[str, Any] = {
    "read at theta": lambda: patch.object(averaged.Averaged, "base", lambda self, point: (None, point)),
    "beta late": lambda: replaced(averaged.Averaged, "weight", late),
    "span": lambda: replaced(
        averaged.Averaged, "weight", lambda right, self, updates: right(self, 2 * updates)
    ),
    "no average": lambda: patch.object(averaged.Averaged, "weight", lambda self, updates: 1.0),
    "swapped": lambda: replaced(
        averaged.Averaged,
        "weight",
        lambda right, self, updates: 1.0 - right(self, updates) if updates else 1.0,
    ),
    "width stays": lambda: replaced(
        zokern.Kernel, "weighted", lambda right, self, plan, units: right(_wide(self), plan, units)
    ),
}


def _wide(estimator):
    wide = copy.copy(estimator)
    wide.width = 0.5
    return wide


@pytest.mark.parametrize("wrong", WRONG)
def test_a_wrong_trainer_is_rejected(wrong: str) -> None:
    with WRONG[wrong](), pytest.raises(AssertionError, match="away from where the formula is"):
        check_published()


def test_its_options_are_the_published_ones() -> None:
    optimizer = zokern.KerZOO.published(weights().items())
    own = optimizer.estimator
    assert (own.queries, own.scale, own.rescale, own.scope, own.clip_norm, own.order) == (
        3,
        4.0,
        False,
        "tensor",
        4e5,
        3,
    )
    assert [shrinking(t) for t in (0, 1000, 3999, 4000, 9000)] == [1.0, 0.75, 1 - 3999 / 4000, 1e-4, 1e-4]
    assert own.width is shrinking and optimizer.rule.span == 6.0 and optimizer.param_groups[0]["lr"] == 1e-6
    assert (
        zokern.KerZOO.published(weights().items(), scope="query", averaging=False).estimator.scope == "query"
    )


# The average ------------------------------------------------------------------------------------------------

MADE = {
    "paper": zokern.KerZOO, "averaged": lambda model, **o: zokern.KerZOO(model, averaging=True, **o),
    "published": zokern.KerZOO.published,
}  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("made", MADE)
def test_lr_0_changes_no_bit(made: str, dtype: torch.dtype) -> None:
    model = tiny(dtype)
    with torch.no_grad():
        model.head.weight[0] = -0.0
    before = snapshot(model)
    optimizer = MADE[made](model, lr=0.0, eps=1e-2)
    for _ in range(5):
        zokern.step(optimizer, lambda: next_token_loss(model(IDS), IDS))
    assert not changed(model, before)


def test_an_average_that_does_not_see_lr_0_is_rejected() -> None:
    """-0.0 becomes 0.0. Other weights stay: the average of two equal numbers is exact for a w on the grid,
    and for 1/3 it is not."""
    for grid, names in ((averaged.GRID, ["head.weight"]), (3, None)):
        model = tiny()
        with torch.no_grad():
            model.head.weight[0] = -0.0
        before = snapshot(model)
        optimizer = zokern.KerZOO(model, lr=0.0, eps=1e-2, averaging=True)
        with patch.object(averaged, "is_still", lambda lr: False), patch.object(averaged, "GRID", grid):
            for _ in range(5):
                zokern.step(optimizer, lambda model=model: next_token_loss(model(IDS), IDS))
        assert changed(model, before) == names or (names is None and len(changed(model, before)) > 3)


@pytest.mark.parametrize("rounding", ["nearest", "stochastic", "residual"])
@pytest.mark.parametrize("made", MADE)
def test_a_resumed_run_has_the_same_bits(made: str, rounding: str) -> None:
    check_resume(lambda m: MADE[made](m, lr=1e-3, eps=1e-2, seed=5, rounding=rounding), 6, 3)


def test_fast_weights_keep_what_16_bits_lose() -> None:
    """1000 updates of a twentieth of an ulp arrive in the fast weights, and with low bits in their average,
    within two ulps of it.

    Without low bits the average stalls, where w (fast - theta) is below half an ulp."""
    ends = {}
    for rounding in ("nearest", "residual"):
        p = nn.Parameter(torch.ones(64, dtype=torch.bfloat16))
        rule = zokern.Averaged()
        optimizer = zokern.MeZO(
            [("w", p)],
            lr=1e-4,
            eps=0.1,
            rule=rule,
            rounding=rounding,
            direction="rademacher",
            evaluation="master",
        )
        fast = []
        for _ in range(1000):
            zokern.step(optimizer, lambda p=p: p.float().sum())
            fast.append(optimizer.state[p]["fast"].clone())
        assert fast[-1].mean() < 0.95
        mean = torch.ones(64)
        for t, one in enumerate(fast):
            mean += (one - mean) * rule.weight(t)
        ends[rounding] = float((p.detach().float() - mean).abs().max())
    assert ends["residual"] <= 2.0**-7 and ends["nearest"] > 2.0**-5, ends


def test_low_rank_directions_are_refused() -> None:
    with pytest.raises(ValueError, match="rule is 'averaged' with direction 'subspace'; expected a dense z"):
        zokern.SubZero(tiny(), rule=zokern.Averaged())
    with pytest.raises(ValueError, match="span is 0.0"):
        zokern.Averaged(0.0)


def test_state_of_another_shape_is_refused() -> None:
    model = tiny()
    optimizer = zokern.KerZOO(model, averaging=True)
    zokern.step(optimizer, lambda: next_token_loss(model(IDS), IDS))
    state: dict[str, Any] = copy.deepcopy(optimizer.state_dict())
    state["state"][0]["fast"] = torch.zeros(2, 2)
    with pytest.raises(ValueError, match="state 'fast' of parameter 'gain' is float32\\[2, 2\\]"):
        zokern.KerZOO(model, averaging=True).load_state_dict(state)


@pytest.mark.parametrize("made", ["paper", "averaged"])
def test_the_loss_falls(made: str) -> None:
    model = tiny()
    optimizer = MADE[made](model, lr=3e-3, eps=1e-2)

    def closure() -> Tensor:
        return next_token_loss(model(IDS), IDS)

    start = float(closure().detach())
    for _ in range(60):
        zokern.step(optimizer, closure)
    assert float(closure().detach()) < start - 0.1
