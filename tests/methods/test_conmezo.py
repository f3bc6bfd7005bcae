"""ConMeZO over 20 steps against its formula, and what its momentum keeps."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import pytest
import torch
from method_check import check_method, check_resume
from models import batch, changed, next_token_loss, snapshot, tiny
from mutant import replaced

import zokern
from zokern.estimator import Base
from zokern.rule import cone
from zokern.rule.cone import Cone, warming

pytestmark = pytest.mark.usefixtures("one_thread")

IDS = batch()


@pytest.mark.parametrize("case", ["conmezo", "conmezo_number"])
def test_twenty_steps_equal_the_formula(case: str) -> None:
    check_method(case, steps=20, weight_decay=0.1)


def one_sided(self, point):
    """Tilts both sides the same way."""
    far = tuple((word, abs(amount)) for word, amount in point.terms)
    return (Base(self.tilt, far), point.scaled(math.sin(self.angle))) if point.terms else (None, point)


def with_numbers(change: Any) -> Any:
    """The update of changed numbers: the rule's own attributes while it runs."""

    def update(right, self, *rest):
        wrong = copy.copy(self)
        vars(wrong).update(change(self))
        return right(wrong, *rest)

    return replaced(Cone, "update", update)


def measured(right, self, plan, group, members, *rest):
    """l is the root mean square of each parameter's m."""
    count, states = right(self, plan, group, members, *rest), rest[-1]
    for i in members:
        state = states[group.tensors[i]]
        state["length"] = float(state["momentum"].double().square().mean().sqrt())
    return count


def forgetful(right, self, plan, *rest):
    right(self, plan, *rest)
    for group in plan.groups:
        for tensor in group.tensors:
            if plan.step == 0:
                rest[-1][tensor]["momentum"].zero_()


def along_u(right, self, plan, members, weights, rule, scalars, states):
    return right(self, plan, members, weights, rule, lambda: (*scalars()[:2], 0.0, 1.0), states)


WRONG: dict[str, Any] = {
    "read along u": lambda: patch.object(Cone, "base", lambda self, point: (None, point)),
    "draw not shortened": lambda: patch.object(Cone, "base", lambda self,
        p: (Base(self.tilt, p.terms) if p.terms else None, p)),
    "both sides one way": lambda: patch.object(Cone, "base", one_sided),
    "sine and cosine": lambda: with_numbers(lambda rule: {"angle": math.pi / 2 - rule.angle}),
    "beta on the new": lambda: with_numbers(lambda rule: {"beta": 1.0 - rule.beta}),
    "norms measured": lambda: replaced(Cone, "_move", measured),
    "first momentum 0": lambda: replaced(Cone, "prepare", forgetful),
    "no step along m": lambda: replaced(cone.Group, "update_", along_u),
}  # fmt: skip


@pytest.mark.parametrize("wrong", WRONG)
def test_a_wrong_cone_is_rejected(wrong: str) -> None:
    with WRONG[wrong](), pytest.raises(AssertionError, match="against|away from the formula"):
        check_method("conmezo_number", steps=6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lr_0_changes_no_bit_and_the_momentum_moves(dtype: torch.dtype) -> None:
    """As where lr is not 0: both ways to the next m are the same sum."""
    moments = []
    for lr in (0.0, 1e-12):
        model = tiny(dtype)
        with torch.no_grad():
            model.head.weight[0] = -0.0
        before = snapshot(model)
        optimizer = zokern.ConMeZO(model, lr=lr, eps=1e-2, beta=0.9)
        for _ in range(5):
            zokern.step(optimizer, lambda model=model: next_token_loss(model(IDS), IDS))
        assert lr or not changed(model, before)
        moments.append(optimizer.state[model.up.weight])
    # losses in float32 decide c
    assert torch.allclose(moments[0]["momentum"], moments[1]["momentum"], rtol=1e-3, atol=1e-4)
    assert moments[0]["updates"] == 5 and math.isclose(
        moments[0]["length"], moments[1]["length"], rel_tol=1e-5
    )


@pytest.mark.parametrize("rounding", ["nearest", "stochastic", "residual"])
def test_a_resumed_run_has_the_same_bits(rounding: str) -> None:
    check_resume(lambda m: zokern.ConMeZO(m, lr=1e-3, eps=1e-2, seed=5, beta=0.7, rounding=rounding), 6, 3)


def test_the_length_is_that_of_the_momentum() -> None:
    """l against the root mean square of 40,000 numbers, over 15 steps: five standard errors, twice that for
    what sums over steps."""
    p = torch.nn.Parameter(torch.zeros(200, 200))
    target = torch.randn(200, 200, generator=torch.Generator().manual_seed(0))
    optimizer = zokern.ConMeZO([("w", p)], lr=1e-5, beta=0.8, evaluation="master")
    for _ in range(15):
        zokern.step(optimizer, lambda: (p - target).square().sum() / 100)
        state = optimizer.state[p]
        share = float(state["momentum"].square().mean().sqrt()) / state["length"]
        assert abs(share - 1.0) < 10 / math.sqrt(2 * 40_000), f"m is {share} times as long as l"


def test_a_parameter_that_was_frozen_has_a_length_of_its_own() -> None:
    model = tiny()
    optimizer = zokern.ConMeZO(model, lr=1e-3, eps=1e-2)
    for step in range(4):
        model.up.weight.requires_grad_(step not in (1, 2))
        zokern.step(optimizer, lambda: next_token_loss(model(IDS), IDS))
    lengths = {n: optimizer.state[p]["length"] for n, p in model.named_parameters()}
    assert len(set(lengths.values())) == 2 and lengths["up.weight"] != lengths["up.bias"] == lengths["gain"]
    assert optimizer.state[model.up.weight]["updates"] == 2


def check_warming(beta: Callable[[int], float]) -> None:
    """0.1 to step 200; by the published line to step 2000; 0.99 from there on."""
    assert beta(0) == beta(200) == 0.99 - 0.89 and beta(2000) == 0.99 - 0.89 / 9**3
    assert math.isclose(beta(1100), 0.99 - 0.89 / (1 + 8 * 0.5**1.8) ** 3)
    assert all(beta(t) < beta(t + 100) for t in range(200, 2000, 100))
    assert beta(2001) == beta(10**6) == 0.99


def test_beta_warms_up() -> None:
    check_warming(Cone().beta)
    with pytest.raises(AssertionError):
        check_warming(Cone(beta=lambda step: warming(min(step, 2000))).beta)


def test_several_queries_and_low_rank_directions_are_refused() -> None:
    model = tiny()
    before = snapshot(model)
    optimizer = zokern.MeZO(model, rule=zokern.Cone(), queries=2, evaluation="master")
    with pytest.raises(ValueError, match="an estimate has 2 draws with rule 'cone'; expected queries of 1"):
        zokern.step(optimizer, lambda: next_token_loss(model(IDS), IDS))
    assert not changed(model, before)
    with pytest.raises(ValueError, match="rule is 'cone' with direction 'subspace'; expected a dense z"):
        zokern.SubZero(model, rule=zokern.Cone())
    for angle in (0.0, math.pi / 2, "wide"):
        with pytest.raises(ValueError, match="angle is .*expected 0 < angle < pi/2"):
            zokern.Cone(angle)
    with pytest.raises(ValueError, match="beta is 1.0"):
        zokern.Cone(beta=1.0)


def test_state_that_cannot_be_a_momentum_is_refused() -> None:
    model = tiny()
    optimizer = zokern.ConMeZO(model)
    zokern.step(optimizer, lambda: next_token_loss(model(IDS), IDS))
    state: dict[str, Any] = copy.deepcopy(optimizer.state_dict())
    state["state"][0]["length"] = -1.0
    resumed = zokern.ConMeZO(model)
    resumed.load_state_dict(state)
    before = snapshot(model)
    with pytest.raises(ValueError, match="length is -1.0; expected a finite number > 0"):
        zokern.step(resumed, lambda: next_token_loss(model(IDS), IDS))
    assert not changed(model, before)
    state["state"][0]["momentum"] = torch.zeros(3)
    with pytest.raises(ValueError, match="state 'momentum' of parameter"):
        zokern.ConMeZO(model).load_state_dict(state)


def test_the_loss_falls() -> None:
    model = tiny()
    optimizer = zokern.ConMeZO(model, lr=1e-2, eps=1e-2, beta=0.9)

    def closure():
        return next_token_loss(model(IDS), IDS)

    start = float(closure().detach())
    for _ in range(60):
        zokern.step(optimizer, closure)
    assert float(closure().detach()) < start - 0.15
