"""Estimators against their formulas, written out in float64;
each check is shown to reject a wrong estimator."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from typing import Any
from unittest.mock import patch

import pytest
import torch
from hand import EPS, NAMES, SEED, Hand, loss, weights
from torch import Tensor, nn

import zokern
from zokern.estimator import Estimate
from zokern.estimator.blocks import block_of
from zokern.evaluation import THETA, Point
from zokern.stream import RADIUS, draw_word, parameter_id

STEPS = 3
EVALUATIONS = ("master", "paired", "scratch", "inplace")


def radius(step: int, query: int) -> float:
    counter = torch.tensor([[0, parameter_id(""), step, draw_word(query, RADIUS)]])
    return (float(zokern.philox4x32(counter, (SEED, 0))[0, 0]) + 0.5) / 2**31 - 1.0


def by_kernel(hand: Hand, step: int, lr: float, scale: float = 1.0, width: float = 1.0) -> list[float]:
    radii = [radius(step, k) * width for k in range(3)]
    kernel = [scale / width**2 * 15 / 4 * r * (5 - 7 * (r / width) ** 2) for r in radii]
    found = [hand.difference(step, k, r) * weight for k, (r, weight) in enumerate(zip(radii, kernel))]
    hand.move(step, [(k, -lr * c / 3) for k, c in enumerate(found)])
    return found


def by_sign(hand: Hand, step: int, lr: float) -> list[float]:
    found = [math.copysign(1.0, hand.difference(step, k)) for k in range(2)]
    hand.move(step, [(k, -lr * c / 2) for k, c in enumerate(found)])
    return found


def by_ranks(hand: Hand, step: int, lr: float) -> list[float]:
    """Ranks counted: how many losses are less."""
    losses = [[hand.at(step, [(k, sign * EPS)]) for sign in (1, -1)] for k in range(3)]
    every = [value for sides in losses for value in sides]
    ranks = [[sum(other < value for other in every) for value in sides] for sides in losses]
    found = [(a - b) / 2 / math.sqrt((6 * 6 - 1) / 12) for a, b in ranks]
    hand.move(step, [(k, -lr * c / 3) for k, c in enumerate(found)])
    return found


def by_ranks_of_one_side(hand: Hand, step: int, lr: float) -> list[float]:
    losses = [hand.at(step, [(k, EPS)]) for k in range(3)]
    found = [(sum(other < value for other in losses) - 1) / math.sqrt(8 / 12) for value in losses]
    hand.move(step, [(k, -lr * c / 3) for k, c in enumerate(found)])
    return found


def by_the_best(hand: Hand, step: int, lr: float) -> list[float]:
    found = [hand.difference(step, k) for k in range(2)]
    terms = [(k, -lr * c / 2) for k, c in enumerate(found)]
    losses = {
        0.0: hand.at(step, []),
        1.0: hand.at(step, terms),
        -1.0: hand.at(step, [(k, -a) for k, a in terms]),
    }
    best = min(losses, key=lambda factor: losses[factor])
    hand.move(step, [(k, best * a) for k, a in terms])
    return [best * c for c in found]


BLOCKS = (NAMES[:1], NAMES[1:3], NAMES[3:5], NAMES[5:])


def by_blocks(hand: Hand, step: int, lr: float) -> list[float]:
    found = []
    for scope in BLOCKS:
        found.append(hand.difference(step, 0, scope=scope))
        hand.move(step, [(0, -lr * found[-1])], scope)
    return found


def by_filter(
    hand: Hand, step: int, lr: float, average: list[float], q: int = 2, count: int = 3
) -> list[float]:
    """A Kalman filter in its information form: the posterior of all observations at once. The noise of an
    observation follows its residual before it is weighed; its standard deviation is a tenth of the prior's
    at least."""
    sigma = math.sqrt(sum(t.numel() for t in hand.theta.values()) / 1e6)
    average[:] = average if step else [sigma**2]
    base, axes, mean = hand.at(step, []), torch.eye(q).double(), torch.zeros(q).double()
    precision = axes / sigma**2
    for j in range(count):
        along = axes[j] if j < q else torch.linalg.eigh(precision)[1][:, 0]
        along = along * along[along.abs().argmax()].sign()
        y = (hand.at(step, [(k, EPS * float(d)) for k, d in enumerate(along)]) - base) / EPS
        average[0] = 0.9 * average[0] + 0.1 * (y - float(along @ mean)) ** 2
        noise = max(0.1 * sigma, math.sqrt(average[0])) ** 2
        seen = precision @ mean + along * y / noise
        precision = precision + torch.outer(along, along) / noise
        mean = torch.linalg.solve(precision, seen)
    hand.move(step, [(k, -lr * float(m)) for k, m in enumerate(mean)])
    return mean.tolist()


CASES: dict[str, tuple[Callable[[], Any], Callable, float]] = {
    "kernel": (zokern.Kernel, by_kernel, 0.02),
    "kernel, shrinking": (
        lambda: zokern.Kernel(scale=4.0, width=lambda step: 1.0 / (1 + step)),
        lambda hand, step, lr: by_kernel(hand, step, lr, 4.0, 1.0 / (1 + step)), 0.01,
    ),
    "sign": (lambda: zokern.Sign(2), by_sign, 0.02),
    "ranked": (lambda: zokern.Ranked(3), by_ranks, 0.02),
    "ranked, forward": (lambda: zokern.Ranked(3, "forward"), by_ranks_of_one_side, 0.02),
    "conservative": (lambda: zokern.Conservative(2), by_the_best, 0.02),
    "conservative, too far": (lambda: zokern.Conservative(2), by_the_best, 50.0),
    "conservative, forward": (lambda: zokern.Conservative(2), by_the_best, 3.0),
    "blocks": (zokern.Blockwise, by_blocks, 0.1),
    "bayesian": (zokern.Bayesian, partial(by_filter, average=[]), 0.02),
    "bayesian, few": (
        lambda: zokern.Bayesian(3, 2), partial(by_filter, average=[], q=3, count=2), 0.02),
    "bayesian, flat": (zokern.Bayesian, partial(by_filter, average=[]), 0.02),
    "bayesian, two eps": (zokern.Bayesian, partial(by_filter, average=[]), 0.02),
    "kernel, two eps": (zokern.Kernel, by_kernel, 0.02),
}  # fmt: skip


def check(case: str, evaluation: str = "master", estimator: Any = None) -> None:
    """Steps of a run against the formula; AssertionError names what differs."""
    make, formula, lr = CASES[case]
    # so flat a loss takes the noise of a filter to its floor; a steeper one follows
    scales = [1e-4] * 16 + [3e-3] * 2 if case.endswith("flat") else [1.0] * STEPS
    wide = dict.fromkeys(NAMES[4:], 3.0) if case.endswith("two eps") else {}
    params = weights()
    hand = Hand(params, wide=wide)
    groups = [
        {"params": [item for item in params.items() if item[0] in names], "eps": eps}
        for names, eps in ((set(params) - set(wide), EPS), (set(wide), 3.0 * EPS))
        if names
    ]
    optimizer = zokern.MeZO(
        groups,
        lr=lr,
        seed=SEED,
        evaluation=evaluation,
        estimator=make() if estimator is None else estimator,
    )
    for step, hand.scale in enumerate(scales):
        result = zokern.step(optimizer, lambda: hand.scale * loss(params))
        want = formula(hand, step, lr)
        size = max(map(abs, want)) + 1e-3 * hand.scale
        assert len(result.coefficients) == len(want), (
            f"{len(result.coefficients)} coefficients, not {len(want)}"
        )
        for got, right in zip(result.coefficients, want):
            assert abs(got - right) <= 2e-4 * size, f"step {step}: coefficient {got}, not {right}"
        for name, p in params.items():
            bound = 1e-5 * (1 + lr * size) * (4 if evaluation == "inplace" else 1)
            assert (p.double() - hand.theta[name]).abs().max() <= bound, (
                f"step {step}: {name} is not where the formula is"
            )


@pytest.mark.parametrize("evaluation", EVALUATIONS)
@pytest.mark.parametrize("case", CASES)
def test_an_estimator_equals_its_formula(case: str, evaluation: str) -> None:
    check(case, evaluation)


class Jacobi(zokern.Blockwise):
    """Reads all blocks before one moves."""

    def __call__(self, oracle, plan):
        yield from list(super().__call__(oracle, plan))


class Typo(zokern.Kernel):
    """5 - 7 r^3, as in a public re-implementation."""

    def radii(self, plan):
        return [(r, 3.75 * r * (5 - 7 * r**3)) for r, _ in super().radii(plan)]


class Unweighted(zokern.Kernel):
    def radii(self, plan):
        return [(r, 1.0) for r, _ in super().radii(plan)]


class Greedy(zokern.Conservative):
    """Takes the step whatever the three losses are."""

    def __call__(self, oracle, plan):
        yield from zokern.Spsa.__call__(self, oracle, plan)


class Fixed(zokern.Bayesian):
    """A variance of the noise that does not follow the residuals."""

    def __call__(self, oracle, plan):
        self.state.clear()
        yield from super().__call__(oracle, plan)


class Filter(zokern.Bayesian):
    """The filter with another noise, and one eps: noise(average before, after, prior) returns the noise of an
    observation, and the average that is kept. widest: axes are not read first."""

    def __init__(self, noise: Callable[..., tuple[Any, Any]], widest: bool = False) -> None:
        super().__init__()
        self.noise, self.widest = noise, widest

    def __call__(self, oracle, plan):
        prior, eps = sum(t.numel() for t in plan.tensors) / 1e6, plan.groups[0].eps
        mean, spread = torch.zeros(2).double(), torch.eye(2).double() * prior
        average, draws = self.state.get("average", prior), (plan.draw(0), plan.draw(1))
        (base,) = read = oracle.losses([THETA])
        for j in range(3):
            chosen = j == 2 or (self.widest and j)
            along = torch.linalg.eigh(spread)[1][:, -1] if chosen else torch.eye(2).double()[j]
            along = along * along[along.abs().argmax()].sign()
            read = torch.cat((read, oracle.losses([Point(tuple(zip(draws, along.tolist())))])))
            residual = float((read[-1] - base) / eps - along @ mean)
            noise, average = self.noise(average, 0.9 * average + 0.1 * residual**2, prior)
            gain = spread @ along / (along @ spread @ along + noise)
            mean, spread = mean + gain * residual, spread - torch.outer(gain, along @ spread)
        self.state["average"] = average
        yield Estimate(draws, mean.expand(len(plan.groups), -1), read.unsqueeze(0), slopes=mean)


class Backwards(zokern.Ranked):
    """The largest loss has rank 0."""

    def differences(self, losses):
        return -super().differences(losses)


class Unscaled(zokern.Ranked):
    """Ranks between -1/2 and 1/2."""

    def slopes(self, *rest):
        return super().slopes(*rest) / math.sqrt(12)


class WithTheta(zokern.Ranked):
    """The loss of theta is ranked too."""

    def slopes(self, differences, losses, plan):
        ranks = losses.reshape(-1).argsort(stable=True).argsort().double().view(losses.shape)
        return super().slopes(differences, losses, plan) + 0.01 * self.differences(ranks)


class Summed(zokern.Sign):
    """The sum of the queries in place of their mean."""

    def __call__(self, oracle, plan):
        for estimate in super().__call__(oracle, plan):
            yield replace(estimate, count=1)


WRONG = {
    "backwards": ("ranked", lambda: Backwards(3)), "unscaled": ("ranked", lambda: Unscaled(3)),
    "theta is ranked": ("ranked, forward", lambda: WithTheta(3, "forward")),
    "no ranks": ("ranked", lambda: zokern.Spread(3, "central")),
    "typo": ("kernel", Typo), "unweighted": ("kernel", Unweighted),
    "magnitude": ("sign", lambda: zokern.Spsa(2)),
    "summed": ("sign", lambda: Summed(2)), "greedy": ("conservative, too far", lambda: Greedy(2)),
    "jacobi": ("blocks", Jacobi),
    "one block": ("blocks", lambda: zokern.Blockwise(block=lambda name: "")),
    "fixed noise": ("bayesian", Fixed),
    "noise of the observations before": ("bayesian",
        lambda: Filter(lambda old, new, prior: (max(old, 0.01 * prior), new))),
    "a tenth of the variance": ("bayesian, flat",
        lambda: Filter(lambda old, new, prior: (max(new, 0.1 * prior), new))),
    "the floor is kept": ("bayesian, flat",
        lambda: Filter(lambda old, new, prior: (max(new, 0.01 * prior),) * 2)),
    "one eps": ("bayesian, two eps", lambda: Filter(lambda old, new, prior: (max(new, 0.01 * prior), new))),
    "two draws alone": ("bayesian", lambda: zokern.Bayesian(observations=2)),
}  # fmt: skip


@pytest.mark.parametrize("wrong", WRONG)
def test_a_wrong_estimator_is_rejected(wrong: str) -> None:
    case, make = WRONG[wrong]
    with pytest.raises(AssertionError, match="coefficient|not where the formula is"):
        check(case, estimator=make())


@pytest.mark.parametrize("evaluation", EVALUATIONS)
def test_equal_losses_keep_their_order_and_a_step_without_a_finite_loss_is_skipped(evaluation: str) -> None:
    params = weights()
    optimizer = zokern.MeZO(
        params.items(), estimator=zokern.Ranked(2), evaluation=evaluation, paired_check=None, lr=0.0
    )
    scale = 1 / math.sqrt((4 * 4 - 1) / 12)
    result = zokern.step(optimizer, lambda: loss(params) * 0.0 + 1.0)
    assert result.coefficients == pytest.approx([-scale / 2, -scale / 2])
    first = params[NAMES[0]].detach().clone()
    result = zokern.step(
        optimizer, lambda: loss(params) + torch.where((params[NAMES[0]] - first).sum() > 0, torch.inf, 0.0)
    )
    assert result.skipped


def test_radii_have_the_moments_of_the_theorem() -> None:
    """E[r K(r)] = C and E[r^3 K(r)] = 0, from 20,000 radii of the stream, within five standard errors."""
    params = weights()
    optimizer = zokern.MeZO(params.items(), estimator=zokern.Kernel(20_000, scale=2.0), seed=SEED)
    pairs = torch.tensor(optimizer.estimator.radii(optimizer.plan()), dtype=torch.float64)
    r, k = pairs.unbind(1)
    assert r.abs().max() < 1.0 and abs(float(r.mean())) < 5 * 0.577 / len(r) ** 0.5
    for power, want in ((1, 2.0), (3, 0.0)):
        values = r**power * k
        assert abs(float(values.mean()) - want) < 5 * float(values.std()) / len(r) ** 0.5, power


def test_blocks_are_those_of_transformers() -> None:
    names = (
        "model.embed_tokens.weight",
        "model.layers.11.mlp.up_proj.weight",
        "model.layers.11.norm.bias",
        "lm_head.weight",
        "w",
    )
    assert [block_of(name) for name in names] == [
        "model.embed_tokens",
        "model.layers.11",
        "model.layers.11",
        "lm_head",
        "",
    ]


@pytest.mark.parametrize("rule", [zokern.Momentum(0.9), zokern.Adam()])
def test_blocks_go_with_rules_that_keep_state(rule: Any) -> None:
    """A block's state moves with the block: with one block it is the run without blocks, bit for bit."""
    ends = []
    for estimator in (zokern.Spsa(), zokern.Blockwise(block=lambda name: "all")):
        params = weights()
        optimizer = zokern.MeZO(
            params.items(), lr=1e-2, eps=EPS, rule=copy.deepcopy(rule), estimator=estimator
        )
        for _ in range(3):
            zokern.step(optimizer, lambda params=params: loss(params))
        ends.append(params)
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in NAMES)


@pytest.mark.parametrize("evaluation", EVALUATIONS)
def test_a_low_rank_direction_in_blocks(evaluation: str) -> None:
    """Updates of a block are written before the next is read, so none are deferred; the loss falls."""
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 1))
    x = torch.randn(16, 6, generator=torch.Generator().manual_seed(0))
    optimizer = zokern.SubZero(
        model, lr=2e-2, eps=1e-2, rank=3, estimator=zokern.Blockwise(), evaluation=evaluation
    )
    losses = []
    for _ in range(40):
        losses.append(zokern.step(optimizer, lambda: (model(x) - 1.0).square().mean()).loss)
        assert not optimizer.pending
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize("evaluation", EVALUATIONS)
def test_what_an_estimator_learns_is_saved(evaluation: str) -> None:
    def run(resumes: bool) -> dict[str, nn.Parameter]:
        params = weights()
        made = dict(lr=0.02, eps=EPS, evaluation=evaluation)
        optimizer = zokern.MeZO(params.items(), estimator=zokern.Bayesian(), **made)
        for step in range(4):
            if step == 2 and resumes:
                state = copy.deepcopy(optimizer.state_dict())
                optimizer = zokern.MeZO(params.items(), estimator=zokern.Bayesian(), **made)
                optimizer.load_state_dict(state)
            zokern.step(optimizer, lambda: loss(params))
        return params

    straight, resumed = run(False), run(True)
    assert all(torch.equal(straight[name], resumed[name]) for name in NAMES)
    with patch("zokern.optimizer.checkpoint.load_parts", lambda optimizer, own: None):
        forgotten = run(True)
    assert not all(torch.equal(straight[name], forgotten[name]) for name in NAMES)


class Silent(zokern.Spsa):
    def __call__(self, oracle, plan) -> Iterator[Estimate]:
        return iter(())


class Elsewhere(zokern.Spsa):
    def __call__(self, oracle, plan) -> Iterator[Estimate]:
        for estimate in super().__call__(oracle, plan):
            yield replace(estimate, scope=("nothing.weight",))


@pytest.mark.parametrize(
    ("estimator", "message"),
    [(Silent(), "yielded no estimate"), (Elsewhere(), r"scope is \('nothing.weight',\)")],
)
def test_an_estimator_that_yields_nonsense_is_refused(estimator: Any, message: str) -> None:
    params = weights()
    before = {name: p.detach().clone() for name, p in params.items()}
    with pytest.raises((RuntimeError, ValueError), match=message):
        zokern.step(zokern.MeZO(params.items(), estimator=estimator), lambda: loss(params))
    assert all(torch.equal(before[name], params[name]) for name in NAMES)


@pytest.mark.parametrize("evaluation", EVALUATIONS)
def test_after_a_block_without_a_finite_loss_none_moves(evaluation: str) -> None:
    params = weights()
    optimizer = zokern.MeZO(
        params.items(),
        lr=0.1,
        eps=EPS,
        estimator=zokern.Blockwise(),
        evaluation=evaluation,
        paired_check=None,
    )
    first = params[NAMES[1]].detach().clone()
    before = {name: p.detach().clone() for name, p in params.items()}

    def closure() -> Tensor:
        moved = (params[NAMES[1]] - first).abs().max() > 1e-3
        return loss(params) + torch.where(moved, torch.nan, 0.0)

    result = zokern.step(optimizer, closure)
    assert result.skipped and [math.isnan(c) for c in result.coefficients] == [False, True, True, True]
    assert [name for name in NAMES if not torch.allclose(before[name], params[name], atol=1e-5)] == list(
        NAMES[:1]
    )


@pytest.mark.parametrize("evaluation", ["scratch", "paired"])
def test_every_block_is_compared_with_master(evaluation: str) -> None:
    """The second layer is read through memory that no copy stands in for.
    The first block alone would be read right."""
    model = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 4))
    x, beside = torch.randn(8, 5, generator=torch.Generator().manual_seed(0)), model[2].weight.data

    def closure() -> Tensor:
        return (torch.tanh(model[0](x)) @ beside.t() + model[2].bias).square().mean()

    with pytest.raises(zokern.Refused, match="differ.*evaluation='master'"):
        zokern.step(
            zokern.MeZO(model, lr=0.0, eps=1e-2, evaluation=evaluation, estimator=zokern.Blockwise()), closure
        )
    with pytest.warns(RuntimeWarning, match="read by evaluation 'master' from now on"):
        optimizer = zokern.MeZO(model, lr=0.0, eps=1e-2, estimator=zokern.Blockwise(), paired_check=None)
        for _ in range(2):
            zokern.step(optimizer, closure)


def test_parameters_that_a_step_did_not_read_are_named_in_every_block() -> None:
    params = weights()
    optimizer = zokern.MeZO(params.items(), lr=0.0, estimator=zokern.Blockwise(), evaluation="master")
    with pytest.warns(RuntimeWarning, match="did not read 1 trained parameters"):
        result = zokern.step(optimizer, lambda: loss({n: p for n, p in params.items() if n != "head.weight"}))
    assert result.unseen == ("head.weight",)


def test_an_oracle_reads_combinations_of_draws() -> None:
    params = weights()
    optimizer = zokern.MeZO(params.items(), eps=EPS, seed=SEED, evaluation="master")
    found = []

    class Asks(zokern.Spsa):
        def __call__(self, oracle, plan):
            points = [THETA, Point(((plan.draw(0), 0.5), (plan.draw(1), -2.0)))]
            found.extend(oracle.losses(points).tolist())
            yield from super().__call__(oracle, plan)

    optimizer.estimator = Asks()
    hand = Hand(params)
    zokern.step(optimizer, lambda: loss(params))
    want = [hand.at(0, []), hand.at(0, [(0, 0.5 * EPS), (1, -2.0 * EPS)])]
    assert all(abs(a - b) < 1e-6 for a, b in zip(found, want)), (found, want)


BAD = {
    "queries": (lambda: zokern.Spsa(0), "queries is 0"),
    "clip": (lambda: zokern.Spsa(clip=-1.0), "clip is -1.0"),
    "scale": (lambda: zokern.Kernel(scale=0.0), "scale is 0.0"),
    "width": (lambda: zokern.Kernel(width=-1.0), "width is -1.0"),
    "observations": (lambda: zokern.Bayesian(observations=0), "observations is 0"),
    "both": (
        lambda: zokern.MeZO(weights().items(), queries=2, estimator=zokern.Spsa()),
        r"queries is 2 beside an estimator.*zokern.Spsa\(queries=2\)",
    ),
    "kind": (lambda: zokern.MeZO(weights().items(), estimator="sign"), "estimator is 'sign'; expected None"),
}  # fmt: skip


@pytest.mark.parametrize("which", BAD)
def test_bad_arguments_are_refused_by_name(which: str) -> None:
    make, message = BAD[which]
    with pytest.raises((ValueError, TypeError), match=message), nullcontext():
        make()


def test_conservative_refuses_weight_decay() -> None:
    """By value and before a loss is read, in any group, and where a scheduler has set it."""
    params = weights()
    groups = [{"params": [item], "weight_decay": 0.5 * i} for i, item in enumerate(list(params.items())[:2])]
    optimizer, calls = zokern.ZOConservative(groups, lr=0.1, evaluation="master"), []
    before = {name: p.detach().clone() for name, p in params.items()}
    with pytest.raises(ValueError, match=r"weight_decay is 0\.5; .*expected weight_decay=0 in all"):
        zokern.step(optimizer, lambda: calls.append(0) or loss(params))
    assert not calls and all(torch.equal(p, before[name]) for name, p in params.items())
    optimizer.param_groups[1]["weight_decay"] = 0.0
    assert not zokern.step(optimizer, lambda: loss(params)).skipped


def test_conservative_needs_one_lr_and_one_eps() -> None:
    params = weights()
    groups = [{"params": [item], "lr": 0.1 * (1 + i)} for i, item in enumerate(list(params.items())[:2])]
    optimizer = zokern.MeZO(groups, estimator=zokern.Conservative(), evaluation="master")
    with pytest.raises(ValueError, match=r"\(lr, eps\) = .*Conservative needs one pair"):
        zokern.step(optimizer, lambda: loss(params))
