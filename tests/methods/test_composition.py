"""Every direction with every estimator, rule and evaluation:
the loss falls, or a sentence says which part lacks what.

All three-fold combinations take two steps. Descent is asked of those that hold every pair of a direction, an
estimator and a rule: an estimator hands the rule numbers, so no part meets more than one other at a time.

The parts are found in their folders, at their defaults. A cell takes lr from the gradient's length |g| and
the size of its coefficients c, read at lr = 0: share L / (|c| |g|), or share L / |g| with a rule whose steps
have one length whatever the slope.
"""

from __future__ import annotations

import inspect
import itertools
import math
import re
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

import zokern
from zokern import directions, estimator, evaluation, rule
from zokern.estimator.base import ONES
from zokern.methods.pgap import Probed

STEPS, SEED, SHARES = 60, 3, (0.01, 0.0025, 0.04, 0.0006)  # of the loss that a step is expected to take off
# Low-rank directions with ranks that fit a small model;
# parts that have no defaults; what is the contract and no part.
MADE: dict[str, Any] = {
    "Subspace": lambda: directions.Subspace(rank=3, interval=7),
    "Lazy": lambda: directions.Lazy(rank=3, interval=7),
    "Diagonal": lambda: directions.Diagonal(rank=8),
    "Masked": lambda: directions.Masked(0.5, every=5),
    "Scaled": lambda: directions.Scaled(lambda name, tensor: 0.5 + torch.ones_like(tensor)),
    "Curved": lambda: directions.Curved(1e-4),
    "Aligned": lambda: Probed(rank=3, interval=7, probes=3),
    "Private": lambda: estimator.Private(noise=1e-3),
    "Mixed": lambda: estimator.Mixed(0.5),
    "Split": lambda: estimator.Split(lambda name: "head" in name),
}
# by estimator: an evaluation that reads what it asks for; Master reads losses
READS = {"ForwardGradient": "Jvp"}
CONTRACTS = {
    "LowRank",
    "Measured",
    "Rule",
    "Estimator",
    "Direction",
    "Evaluation",
    "Source",
    "Matrix",
    "Kept",
    "Drawn",
    "Keeps",
    "Stack",
}
CONTRACTS |= {
    "Base",
    "Isolation",
    "Estimate",
    "Gradient",
    "Oracle",
    "Stencil",
    "Point",
    "Record",
    "Refused",
    "NotRepeatable",
}

REFUSALS = (ValueError, TypeError, NotImplementedError, zokern.Refused)


def parts(module: Any) -> dict[str, Any]:
    """Returns name to constructor of every part that a package exports."""
    found = {}
    for name in module.__all__:
        value = getattr(module, name)
        if inspect.isclass(value) and name not in CONTRACTS and not getattr(value, "_is_protocol", False):
            found[name] = MADE.get(name, value)
    return found


DIRECTIONS, ESTIMATORS, RULES, EVALUATIONS = (
    parts(module) for module in (directions, estimator, rule, evaluation)
)


class Tiny(nn.Module):
    """A regression that a step can improve: an embedding, a matrix, a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(12, 8), nn.Linear(8, 4)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.head(torch.tanh(self.embed(tokens)))


def model() -> Tiny:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        return Tiny()


CELLS = [*itertools.product(DIRECTIONS, ESTIMATORS)]
TOKENS, TARGET = torch.arange(12), torch.sin(torch.arange(48.0)).view(12, 4)


def loss_of(net: Tiny, rows: bool = False) -> torch.Tensor:
    """Returns the mean loss, or the loss of each example;
    small, as the variance is that Bayesian expects of slopes."""
    found = 0.01 * (net(TOKENS) - TARGET).square().mean(1)
    return found if rows else found.mean()


def closure_of(net: Tiny, estimate: str) -> Any:
    return partial(loss_of, net, estimate == "Private")


def gradient() -> float:
    """|g| of the model as it starts."""
    net = model()
    grads = torch.autograd.grad(loss_of(net), list(net.parameters()))
    return float(torch.cat([g.flatten() for g in grads]).double().norm())


LENGTH = gradient()


def build(net: Tiny, direction: str, estimate: str, update: Any, read: str) -> Any:
    """Returns the optimizer of a cell, with lr = 0."""
    made = DIRECTIONS[direction](), ESTIMATORS[estimate](), update() if callable(update) else RULES[update]()
    return zokern.MeZO(
        net,
        lr=0.0,
        eps=1e-3,
        seed=SEED,
        direction=made[0],
        estimator=made[1],
        rule=made[2],
        evaluation=EVALUATIONS[read](),
    )


def outcome(direction: str, estimate: str, update: Any) -> str:
    """Returns 'descends', 'stands', or the sentence of a refusal."""
    for share in SHARES:
        net = model()
        before, read = float(loss_of(net)), list[float]()
        try:
            optimizer = build(net, direction, estimate, update, READS.get(estimate, "Master"))
            for _ in range(8):
                read += zokern.step(optimizer, closure_of(net, estimate)).coefficients
            read = read[len(read) // 2 :]  # what estimators learn has settled
            size = math.sqrt(math.fsum(c * c for c in read) / len(read)) or LENGTH
            one_length = getattr(optimizer.rule, "lr", None)
            own = one_length / ONES if one_length else 1.0 / size
            optimizer.param_groups[0]["lr"] = share * before / LENGTH * own
            for _ in range(STEPS):
                zokern.step(optimizer, closure_of(net, estimate))
        except REFUSALS as error:
            return str(error)
        except RuntimeError:  # a guard: the loss is far away
            continue
        optimizer.flush()
        if float(loss_of(net)) < 0.985 * before:
            return "descends"
    return "stands"


def refusal(direction: str, estimate: str, update: str) -> str | None:
    """Returns the sentence of a refusal within two steps, if any."""
    net = model()
    try:
        optimizer = build(net, direction, estimate, update, READS.get(estimate, "Master"))
        optimizer.param_groups[0]["lr"] = 1e-6
        for _ in range(2):
            zokern.step(optimizer, closure_of(net, estimate))
    except REFUSALS as error:
        return str(error)
    return None


def descending(direction: str, estimate: str) -> list[str]:
    """Returns the rules that a cell has to descend with: two, so that every pair of parts is among them."""
    place = [*DIRECTIONS].index(direction) + [*ESTIMATORS].index(estimate)
    names = [*RULES]
    return [names[(place + far) % len(names)] for far in (0, len(names) // 2)]


def check(direction: str, estimate: str, update: str, found: str) -> None:
    """The cell descends, or a sentence names one of its parts and what that needs."""
    if found != "descends":
        named = [part for part in (direction, estimate, update) if re.search(part, found, re.I)]
        assert (
            found != "stands" and named and re.search(r"expected|needs|goes with|takes|use |without", found)
        ), found


def losses(direction: str, estimate: str, update: str, read: str) -> list[float] | None:
    """Returns the losses of three steps; None where a part is refused."""
    net = model()
    try:
        optimizer = build(net, direction, estimate, update, read)
        closure = closure_of(net, estimate)
        return [x for _ in range(3) for sides in zokern.step(optimizer, closure).losses for x in sides]
    except REFUSALS:
        return None


pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.mark.parametrize("direction, estimate", CELLS)
def test_a_cell_descends_or_is_refused(direction, estimate) -> None:
    failed, asked = {}, descending(direction, estimate)
    for update in RULES:
        ask = outcome if update in asked else refusal
        try:
            check(direction, estimate, update, ask(direction, estimate, update) or "descends")
        except AssertionError as error:
            failed[update] = str(error).split("\n")[0]
    assert not failed


def test_every_pair_of_parts_has_to_descend() -> None:
    asked = [(d, e, r) for d, e in CELLS for r in descending(d, e)]
    assert {(d, r) for d, _, r in asked} == {*itertools.product(DIRECTIONS, RULES)}
    assert {(e, r) for _, e, r in asked} == {*itertools.product(ESTIMATORS, RULES)}


@pytest.mark.parametrize("direction, estimate", CELLS)
def test_every_evaluation_reads_a_cell_alike(direction, estimate) -> None:
    """Rules are told coefficients, and read nothing: with one direction all of them are tried, else SGD."""
    for update in RULES if direction == "Normal" else ("Sgd",):
        expected = losses(direction, estimate, update, READS.get(estimate, "Master"))
        for read in EVALUATIONS if expected is not None else ():
            if (found := losses(direction, estimate, update, read)) is not None:
                assert found == pytest.approx(expected, rel=2e-4), (update, read)


class Flipped(zokern.Master):
    """An evaluation that reads on the other side of theta."""

    def losses(self, plan, points, closure):
        return super().losses(plan, [point.scaled(-1.0) for point in points], closure)


def test_a_wrong_evaluation_is_rejected(monkeypatch) -> None:
    assert all(losses("Normal", "Spsa", "Sgd", read) is not None for read in EVALUATIONS), (
        "nothing is compared where all refuse"
    )
    monkeypatch.setitem(EVALUATIONS, "Paired", Flipped)
    with pytest.raises(AssertionError):
        test_every_evaluation_reads_a_cell_alike("Normal", "Spsa")


class Ascends(zokern.Sgd):
    """A rule that moves the wrong way."""

    def update(self, plan, group, weights, lr, decay, states, defer):
        return super().update(plan, group, [-w for w in weights], lr, decay, states, defer)


class Still(zokern.Sgd):
    """A rule that does not move."""

    def update(self, plan, group, weights, lr, decay, states, defer):
        return 0


@pytest.mark.parametrize("wrong", [Ascends, Still])
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_a_wrong_rule_is_rejected(direction, wrong) -> None:
    reads = "Curvature" if direction == "Curved" else "Spsa"
    assert outcome(direction, reads, zokern.Sgd) == "descends"
    with pytest.raises(AssertionError):
        check(direction, reads, "Sgd", outcome(direction, reads, wrong))


@pytest.mark.parametrize("sentence", ["stands", "no", "rule Sgd is unsuitable", "expected another one"])
def test_a_refusal_that_names_nothing_is_rejected(sentence) -> None:
    with pytest.raises(AssertionError):
        check("Normal", "Spsa", "Sgd", sentence)


def test_all_parts_are_found() -> None:
    assert {
        "Normal",
        "Rademacher",
        "Subspace",
        "Lazy",
        "Diagonal",
        "Aligned",
        "Masked",
        "Scaled",
        "Curved",
    } <= {*DIRECTIONS}
    assert {
        "Spsa",
        "Spread",
        "Sign",
        "Conservative",
        "Blockwise",
        "Bayesian",
        "Kernel",
        "Anchored",
        "Curvature",
    } <= {*ESTIMATORS}
    assert {"Sgd", "Momentum", "Adam", "Averaged", "Cone", "Projected", "SignSgd"} <= {*RULES}
    assert {"Master", "Paired", "Scratch", "InPlace", "Auto"} <= {*EVALUATIONS}
