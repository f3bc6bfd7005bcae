"""DiZO over 20 steps against its formula in float64, the search included; an exception in a step that
projects changes nothing."""

from __future__ import annotations

import copy
from typing import Any
from unittest.mock import patch

import pytest
import torch
from hand import EPS, NAMES, SEED, Hand, loss, weights
from method_check import check_method, check_resume
from models import batch, changed, next_token_loss, snapshot, tiny
from mutant import replaced
from torch import Tensor

import zokern
from zokern.rule import projected
from zokern.rule.projected import Projected
from zokern.stream import RADIUS, draw_word

pytestmark = pytest.mark.usefixtures("one_thread")

IDS = batch()
CHOSEN = ("layers.0.up", "layers.1.up", "layers.1.down")
OPTIONS: dict[str, Any] = {
    "projected": ("up", "1.down"),
    "interval": 3,
    "iterations": 4,
    "rate": 0.5,
    "width": 0.1,
    "reach": 0.2,
}


def test_twenty_steps_equal_the_formula() -> None:
    """Given the factors."""
    check_method("dizo", steps=20, weight_decay=0.1)


class Searched(Hand):
    """Weights by hand, with the search."""

    def __init__(self, params: dict[str, Any]) -> None:
        super().__init__(params)
        self.start = dict(self.theta)

    def at_gamma(self, gamma: dict[str, float]) -> dict[str, Tensor]:
        """The weights at distances gamma from the start."""
        away = {n: t - self.start[n] for n, t in self.theta.items()}
        return {
            n: t if n not in gamma else self.start[n] + gamma[n] * away[n] / away[n].norm()
            for n, t in self.theta.items()
        }

    def search(self, step: int) -> dict[str, float]:
        """Returns gamma, as published: a z of its own for each matrix, in the units of gamma."""
        rate, width, reach = (OPTIONS[key] for key in ("rate", "width", "reach"))
        t = {n: float((self.theta[n] - self.start[n]).norm()) for n in CHOSEN}
        gamma = dict(t)
        for iteration in range(OPTIONS["iterations"]):
            word = draw_word((1 << 22) + iteration, RADIUS)
            z = {
                n: float(zokern.draw("normal", (1,), seed=SEED, who=n, step=step, draw=word)) for n in CHOSEN
            }
            z = {n: max(-reach / width * t[n], min(reach / width * t[n], x)) for n, x in z.items()}
            sides = [
                float(loss(self.at_gamma({n: gamma[n] + s * width * z[n] for n in CHOSEN}))) for s in (1, -1)
            ]
            g = (sides[0] - sides[1]) / (2 * width)
            gamma = {n: gamma[n] - rate * t[n] * g * z[n] for n in CHOSEN}
            gamma = {n: max((1 - reach) * t[n], min((1 + reach) * t[n], gamma[n])) for n in CHOSEN}
        return gamma


def check_search(evaluation: str = "master", steps: int = 20, lr: float = 0.05) -> list[dict[str, float]]:
    params = weights()
    hand, found = Searched(params), []
    optimizer = zokern.DiZO(params.items(), lr=lr, eps=EPS, seed=SEED, evaluation=evaluation, **OPTIONS)
    for step in range(steps):
        zokern.step(optimizer, lambda: loss(params))
        if step and step % 3 == 0:
            gamma = hand.search(step)
            factors = {n: x / float((hand.theta[n] - hand.start[n]).norm()) for n, x in gamma.items()}
            assert optimizer.rule.factors.keys() == factors.keys(), (
                f"step {step}: {optimizer.rule.factors} was projected"
            )
            for n, f in factors.items():
                assert abs(optimizer.rule.factors[n] - f) < 2e-4, (
                    f"step {step}: {n} has factor {optimizer.rule.factors[n]}, not {f}"
                )
            hand.theta = hand.at_gamma(gamma)
            found.append(factors)
        hand.move(step, [(0, -lr * hand.difference(step, 0))])
        for n, p in params.items():
            away = float((p.double() - hand.theta[n]).abs().max())
            assert away < 1e-4, f"step {step}: {n} is {away} away from where the formula is"
    return found


def check_names(chosen: Any) -> None:
    """Published: weights, and no biases, of keys and values; with LoRA every factor and nothing else."""
    attention = [f"l.0.self_attn.{part}_proj.{what}" for part in "qkv" for what in ("weight", "bias")]
    assert chosen(["embed.weight", *attention]) == (attention[2], attention[4]), "k and v"
    factors = ("l.0.q_proj.lora_A.default.weight", "l.0.v_proj.lora_B.default.weight", "l.0.fc.lora_A")
    assert chosen([*factors, "classifier.k_proj.weight", "head.weight"]) == factors, "LoRA"


def test_the_names_are_the_published_ones() -> None:
    check_names(Projected().chosen)


@pytest.mark.parametrize("parts", [("k_proj", "v_proj"), ("lora_",), ("k_proj.weight", "v_proj.weight")])
def test_other_names_are_rejected(parts: tuple[str, ...]) -> None:
    def chosen(names: list[str]) -> tuple[str, ...]:
        return tuple(name for name in names if any(part in name for part in parts)) or tuple(names)

    with pytest.raises(AssertionError):
        check_names(chosen)


@pytest.mark.parametrize("lr", [0.005, 0.15])
def test_the_search_equals_its_formula_near_and_far_from_the_start(lr: float) -> None:
    """z is cut where ||W - W0|| is small, and steps are short where it is large."""
    check_search(steps=10, lr=lr)


@pytest.mark.parametrize("evaluation", ["master", "paired", "scratch", "inplace", "auto"])
def test_the_search_equals_its_formula(evaluation: str) -> None:
    found = check_search(evaluation)
    assert len(found) == 6 and max(abs(f - 1.0) for factors in found for f in factors.values()) > 0.02


def test_some_factors_reach_the_bound_of_a_long_step() -> None:
    with patch.dict(OPTIONS, rate=50.0):
        params = weights()
        optimizer = zokern.DiZO(params.items(), lr=0.05, eps=EPS, seed=SEED, evaluation="master", **OPTIONS)
        for _ in range(4):
            zokern.step(optimizer, lambda: loss(params))
        assert any(f in (0.8, 1.2) for f in optimizer.rule.factors.values())


def searching_with(change: Any) -> Any:
    def search(right, self, *rest):
        wrong = copy.copy(self)
        vars(wrong).update(change(self))
        right(wrong, *rest)
        self._factors = wrong._factors

    return replaced(Projected, "_search", search)


WRONG: dict[str, Any] = {
    "uphill": lambda: searching_with(lambda rule: {"rate": -rule.rate}),
    "step of the width": lambda: searching_with(lambda rule: {"rate": rule.rate * rule.width}),
    "an iteration too few": lambda: searching_with(lambda rule: {"iterations": rule.iterations - 1}),
    "z in units of f": lambda: replaced(Projected, "_search", lambda right, self, part, lengths,
        oracle: right(self, part, dict.fromkeys(lengths, 1.0), oracle)),
    "one length for all": lambda: replaced(Projected, "_search", lambda right, self, part, lengths,
        oracle: right(self, part, dict.fromkeys(lengths, max(lengths.values())), oracle)),
    "the length of W": lambda: replaced(projected, "_length", lambda right, x: right(x) + 1.0),
    "one z for all": lambda: replaced(projected, "_normals", lambda right, plan,
        word: right(plan, word)[:1] * len(plan.names)),
    "z of the step's own draws": lambda: replaced(projected, "_normals", lambda right, plan,
        word: right(plan, 0)),
    "not written": lambda: replaced(Projected, "update", lambda right, self,
        *rest: self._due.clear() or right(self, *rest)),
    "losses read before": lambda: patch.object(Projected, "base", lambda self, point: (None, point)),
    "around 0": lambda: patch.object(projected, "_project", around_0),
    "every parameter": lambda: patch.object(Projected, "chosen", lambda self, names: tuple(names)),
}  # fmt: skip


def around_0(group, states, factors):
    known = dict(factors)
    for i, name in enumerate(group.names):
        if name in known:
            group.put(i, group.read(i) * known[name])


@pytest.mark.parametrize("wrong", WRONG)
def test_a_wrong_version_is_rejected(wrong: str) -> None:
    with WRONG[wrong](), pytest.raises(AssertionError, match="has factor|away from where|was projected"):
        check_search(steps=8)


@pytest.mark.parametrize("when", [1, 9, 11])  # in the search, in its last reading, and in the step's own
@pytest.mark.parametrize("evaluation", ["master", "paired", "scratch", "inplace"])
def test_an_exception_in_a_step_that_projects_changes_nothing(evaluation: str, when: int) -> None:
    model = tiny(torch.bfloat16 if evaluation != "inplace" else torch.float32)
    rounding = "residual" if evaluation != "inplace" else "nearest"
    optimizer = zokern.DiZO(
        model,
        lr=1e-2,
        eps=1e-2,
        projected=("up", "down"),
        interval=3,
        iterations=5,
        evaluation=evaluation,
        rounding=rounding,
    )
    calls = [-(10**6)]

    def closure() -> Tensor:
        calls[0] += 1
        if calls[0] == when:
            raise ArithmeticError("here")
        return next_token_loss(model(IDS), IDS)

    for _ in range(3):
        zokern.step(optimizer, closure)
    before = snapshot(model)
    low = {n: s["residual"].clone() for n, s in optimizer.state.items() if "residual" in s}
    calls[0] = 0
    with pytest.raises(ArithmeticError):
        zokern.step(optimizer, closure)
    if evaluation != "inplace" or when < 11:  # whose own reading comes back up to rounding
        assert not changed(model, before)
    assert all(torch.equal(bits, optimizer.state[p]["residual"]) for p, bits in low.items())
    zokern.step(optimizer, closure)
    assert optimizer.rule.factors and changed(model, before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lr_0_changes_no_bit(dtype: torch.dtype) -> None:
    model = tiny(dtype)
    with torch.no_grad():
        model.head.weight[0] = -0.0
    before = snapshot(model)
    optimizer = zokern.DiZO(model, lr=0.0, eps=1e-2, projected=None, interval=2, iterations=2)
    for _ in range(5):
        zokern.step(optimizer, lambda: next_token_loss(model(IDS), IDS))
    assert not changed(model, before)


@pytest.mark.parametrize("rounding", ["nearest", "stochastic", "residual"])
@pytest.mark.parametrize("after", [2, 4])
def test_a_resumed_run_has_the_same_bits(after: int, rounding: str) -> None:
    options: dict = {
        "lr": 3e-3,
        "eps": 1e-2,
        "seed": 5,
        "projected": None,
        "interval": 2,
        "iterations": 2,
        "rounding": rounding,
    }
    check_resume(lambda m: zokern.DiZO(m, **options), 7, after)


@pytest.mark.parametrize("evaluation", ["scratch", "paired"])
def test_a_search_is_no_comparison(evaluation: str) -> None:
    """Its readings of theta alone compare nothing with 'master', so that the next comparison stays due."""
    params = weights()
    optimizer = zokern.DiZO(
        params.items(), lr=0.05, eps=EPS, projected=None, interval=4, iterations=1, evaluation=evaluation
    )
    trust = optimizer.evaluation.trust
    for step in range(6):
        if step == 4:
            trust.step = -1
        zokern.step(optimizer, lambda: loss(params))
    assert trust.step == 4
    compared = []
    with replaced(
        type(trust),
        "verify",
        lambda right, self, e, plan, points, c: compared.append(points) or right(self, e, plan, points, c),
    ):
        for step in range(6, 9):
            if step == 8:
                trust.step = -1
            zokern.step(optimizer, lambda: loss(params))
    assert [bool(points[0].terms) for points in compared] == [False, False, True]


def test_only_projected_weights_are_kept() -> None:
    params = weights()
    optimizer = zokern.DiZO(params.items(), **OPTIONS)
    zokern.step(optimizer, lambda: loss(params))
    assert [n for n in NAMES if "start" in optimizer.state[params[n]]] == list(CHOSEN)


def test_what_it_cannot_do_is_refused() -> None:
    model = tiny()
    with pytest.raises(
        ValueError, match=r"names is \('q_proj',\), which no trained parameter has in its name"
    ):
        zokern.step(zokern.DiZO(model, projected=["q_proj"]), lambda: next_token_loss(model(IDS), IDS))
    assert (
        Projected().chosen(["a.c_attn.w", "b"])
        == ("a.c_attn.w", "b")
        == Projected([""]).chosen(["a.c_attn.w", "b"])
    )
    for options, message in (
        ({"projected": "up"}, "names is 'up'"),
        ({"reach": 1.0}, "reach is 1.0"),
        ({"interval": 0}, "interval is 0"),
    ):
        with pytest.raises(ValueError, match=message):
            zokern.DiZO(model, **options)


def test_the_loss_falls() -> None:
    model = tiny()
    optimizer = zokern.DiZO(model, lr=1e-2, eps=1e-2, projected=None, interval=10)

    def closure() -> Tensor:
        return next_token_loss(model(IDS), IDS)

    start = float(closure().detach())
    for _ in range(60):
        zokern.step(optimizer, closure)
    assert float(closure().detach()) < start - 0.15


@pytest.mark.parametrize("evaluation", ["master", "paired", "scratch"])
def test_a_low_rank_direction_is_projected(evaluation: str) -> None:
    """Its updates do not wait, and the loss falls."""
    model = tiny()
    rule = zokern.Projected(("up", "down"), interval=4, iterations=2)
    optimizer = zokern.SubZero(model, lr=1e-2, eps=1e-2, rank=4, rule=rule, evaluation=evaluation)
    losses = []
    for _ in range(40):
        losses.append(zokern.step(optimizer, lambda: next_token_loss(model(IDS), IDS)).loss)
        assert not optimizer.pending
    assert losses[-1] < losses[0] - 0.1 and rule.factors.keys() == {"up.weight", "up.bias", "down.weight"}


@pytest.mark.parametrize("made", [
    lambda model: zokern.DPZO(model, rule=zokern.Projected()),
    lambda model: zokern.PGAP(model, rank=3, estimator=zokern.Private()),
    lambda model: zokern.MeZO(model, rule=zokern.Projected(), estimator=zokern.Blockwise(zokern.Private())),
])  # fmt: skip
def test_nothing_reads_losses_beside_private_ones(made: Any) -> None:
    """A search, or probes, would move the weights by losses without noise:
    they are refused in the first step."""
    model = tiny()
    before = snapshot(model)
    with pytest.raises(
        ValueError, match="reads losses of its own, and estimator Private is there to read none without noise"
    ):
        zokern.step(
            made(model), lambda: torch.stack([next_token_loss(model(row[None]), row[None]) for row in IDS])
        )
    assert not changed(model, before)
