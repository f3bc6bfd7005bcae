"""KerZOO's kernels: exact moments, the order of the bias, the factor of the variance;
each check rejects a wrong kernel."""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy
import pytest
import torch
from hand import EPS, NAMES, SEED, Hand, loss, radius_of, weights
from models import at_use, batch, next_token_loss, tiny
from torch import Tensor, nn

import zokern
from zokern.estimator import kernel
from zokern.estimator.kernel import KERNELS
from zokern.evaluation import Point

FACTORS = {1: Fraction(9, 5), 3: Fraction(25, 4), 5: Fraction(11025, 832), 7: Fraction(99225, 4352)}
# E[r^(order + 2) K(r)] / C
NEXT = {1: Fraction(3, 5), 3: Fraction(-5, 21), 5: Fraction(35, 429), 7: Fraction(-63, 2431)}
MISNORMALISED = {5: (195 / 64, (35.0, -126.0, 99.0))}
TYPO = {3: (3.75, (5.0, 0.0, -7.0))}  # 5 - 7 r^3, to which the nearest odd kernel is 5 - 7 r^4


def mean_of_power(power: int) -> Fraction:
    """E[r^power], r uniform in (-1, 1)."""
    return Fraction(1, power + 1) if power % 2 == 0 else Fraction(0)


def check_moments(order: int, factor: float, coefficients: tuple[float, ...]) -> None:
    """A kernel's moments in rational numbers; the floats of the table are exact."""
    terms = {2 * i + 1: Fraction(factor) * Fraction(c) for i, c in enumerate(coefficients)}

    def moment(power: int) -> Fraction:
        return sum((c * mean_of_power(power + p) for p, c in terms.items()), Fraction(0))

    assert moment(1) == 1, f"E[r K] is {moment(1)}"
    for power in range(order + 1):
        assert power == 1 or moment(power) == 0, f"E[r^{power} K] is {moment(power)}"
    assert moment(order + 2) == NEXT[order], f"E[r^{order + 2} K] is {moment(order + 2)}"
    squares = sum(a * b * mean_of_power(p + q + 2) for p, a in terms.items() for q, b in terms.items())
    assert squares == FACTORS[order], f"E[r^2 K^2] is {squares}"


@pytest.mark.parametrize("order", KERNELS)
def test_moments_are_exact(order: int) -> None:
    check_moments(order, *KERNELS[order])


@pytest.mark.parametrize("wrong", [MISNORMALISED, TYPO], ids=["195/64", "typo"])
def test_wrong_moments_are_rejected(wrong: dict) -> None:
    ((order, table),) = wrong.items()
    with pytest.raises(AssertionError, match="E\\[r"):
        check_moments(order, *table)


# The estimator with every radius in its place ---------------------------------------------------------------

NODES, WEIGHTS = numpy.polynomial.legendre.leggauss(24)  # exact for polynomials of degree 47


class Line:
    """An oracle of a loss of one weight at 0, along z = 1."""

    def __init__(self, function: Callable[[float], float], eps: float) -> None:
        self.function, self.eps = function, eps

    def losses(self, points: list[Point], scope: Any = None) -> Tensor:
        where = [self.eps * sum(amount for _, amount in point.terms) for point in points]
        return torch.tensor([self.function(x) for x in where], dtype=torch.float64)


def expected(estimator: zokern.Kernel, function: Callable[[float], float], eps: float) -> float:
    """E[c] over the radii, by quadrature: the estimator's own coefficients at Gauss's nodes."""
    optimizer = zokern.MeZO([("w", nn.Parameter(torch.zeros(1)))], eps=eps, estimator=estimator)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernel, "_units", lambda *_: [NODES.tolist()])
        (estimate,) = estimator(Line(function, eps), optimizer.plan())  # type: ignore[arg-type]
    return float((estimate.coefficients[0] * torch.from_numpy(WEIGHTS)).sum() / 2)


def check_bias(order: int, estimator: zokern.Kernel) -> None:
    """With a strong cubic term and all others up to x^(order + 2):
    the bias falls as eps^(order + 1), at its predicted size."""

    def function(x: float) -> float:
        return 3.0 + x + sum(5.0 * x**power for power in range(2, order + 3))

    scales = [0.5, 0.7, 1.0]
    biases = [expected(estimator, function, eps) - 1.0 for eps in scales]
    for eps, bias in zip(scales, biases):
        want = 5.0 * float(NEXT[order]) * eps ** (order + 1)
        assert abs(bias - want) <= 0.02 * abs(want), f"the bias at eps = {eps} is {bias}, not {want}"
    slope = math.log(biases[-1] / biases[0]) / math.log(scales[-1] / scales[0])
    assert abs(slope - (order + 1)) < 0.05, f"the bias falls as eps^{slope}"


class Printed(zokern.Kernel):
    """Kernels other than the estimator's own table."""

    def __init__(self, table: dict, **options: Any) -> None:
        super().__init__(len(NODES), **options)
        self.table = table[self.order]

    def weighted(self, plan, units):
        (factor, coefficients) = self.table
        return [(x, factor * x * sum(c * x ** (2 * i) for i, c in enumerate(coefficients))) for x in units]


class Typo(zokern.Kernel):
    """5 - 7 r^3, as in a public re-implementation."""

    def weighted(self, plan, units):
        return [(x, 3.75 * x * (5 - 7 * x**3)) for x in units]


@pytest.mark.parametrize("order", KERNELS)
def test_bias_cancels_to_its_order(order: int) -> None:
    check_bias(order, zokern.Kernel(len(NODES), order=order))


WRONG_BIAS = {
    "195/64": (5, lambda: Printed(MISNORMALISED, order=5)), "typo": (3, lambda: Typo(len(NODES))),
    "no cancellation": (3, lambda: zokern.Kernel(len(NODES), order=1)),
    "a lower order": (5, lambda: zokern.Kernel(len(NODES))),
    "C forgotten": (3, lambda: zokern.Kernel(len(NODES), scale=2.0)),
    "not rescaled": (3, lambda: zokern.Kernel(len(NODES), width=0.5, rescale=False)),
}  # fmt: skip


@pytest.mark.parametrize("wrong", WRONG_BIAS)
def test_a_wrong_bias_is_rejected(wrong: str) -> None:
    order, make = WRONG_BIAS[wrong]
    with pytest.raises(AssertionError, match="bias"):
        check_bias(order, make())


@pytest.mark.parametrize(("width", "order"), [(0.5, 3), (0.1, 5)])
def test_a_kernel_follows_its_width(width: float, order: int) -> None:
    """E[r K] stays C and the moments stay cancelled; as published they do not: 15 (5 d^2/3 - 7 d^4/5) for C =
    4."""
    right = zokern.Kernel(len(NODES), order=order, width=width)
    published = zokern.Kernel(len(NODES), scale=4.0, width=width, rescale=False)
    assert abs(expected(right, lambda x: x, 1e-2) - 1.0) < 1e-6
    assert abs(expected(right, lambda x: x**3, 1.0)) < 1e-7
    want = 15 * (5 * width**2 / 3 - 7 * width**4 / 5)
    assert abs(expected(published, lambda x: x, 1e-2) - want) < 1e-6 * want
    assert abs(expected(published, lambda x: x**3, 1.0) - 15 * (width**4 - width**6)) < 1e-6


# Radii of the stream ----------------------------------------------------------------------------------------


def check_variance(order: int, estimator: zokern.Kernel) -> None:
    """The mean of (r K)^2 over 20,000 radii of the stream is the kernel's factor,
    within five standard errors."""
    optimizer = zokern.MeZO(weights().items(), estimator=estimator, seed=SEED)
    r, k = torch.tensor(estimator.radii(optimizer.plan()), dtype=torch.float64).unbind(1)
    squares = (r * k).square()
    error = float(squares.std()) / len(r) ** 0.5
    assert abs(float(squares.mean()) - float(FACTORS[order])) < 5 * error, (
        f"{squares.mean()} with an error of {error}"
    )
    assert abs(float((r * k).mean()) - 1.0) < 5 * float(FACTORS[order]) ** 0.5 / len(r) ** 0.5, (
        f"E[r K] is {(r * k).mean()}"
    )


@pytest.mark.parametrize("order", KERNELS)
def test_the_variance_has_its_factor(order: int) -> None:
    check_variance(order, zokern.Kernel(20_000, order=order))


@pytest.mark.parametrize("table", [MISNORMALISED, {3: KERNELS[1]}], ids=["195/64", "plain"])
def test_a_wrong_variance_is_rejected(table: dict) -> None:
    (order,) = table
    wrong = Printed(table, order=order)
    wrong.queries = 20_000
    with pytest.raises(AssertionError, match="error of|E\\[r K\\]"):
        check_variance(order, wrong)


# A radius for each parameter, and norms ---------------------------------------------------------------------


def by_tensor(
    hand: Hand, step: int, lr: float, clip: float | None = None, one: bool = False
) -> list[list[float]]:
    """The published estimator with C = 4 and K(r) = 15 r (5 - 7 r^2), r from a shrinking interval; returns
    each parameter's c."""
    width = 1.0 / (1 + step)
    radii = {n: [width * radius_of(n if not one else NAMES[0], step, k) for k in range(3)] for n in NAMES}
    found: dict[str, list[float]] = {n: [] for n in NAMES}
    for k in range(3):
        sides = []
        for sign in (1, -1):
            moved = {n: t + sign * EPS * radii[n][k] * hand.z(n, step, k) for n, t in hand.theta.items()}
            sides.append(float(loss(moved)))
        for n in NAMES:
            found[n].append((sides[0] - sides[1]) / (2 * EPS) * 15 * radii[n][k] * (5 - 7 * radii[n][k] ** 2))
    for n, coefficients in found.items():
        g = sum(c / 3 * hand.z(n, step, k) for k, c in enumerate(coefficients))
        factor = 1.0 if clip is None else min(1.0, clip / (float(g.norm()) + 1e-8))
        found[n] = [c * factor for c in coefficients]
        hand.theta[n] = hand.theta[n] - lr * factor * g
    return list(found.values())


def check_tensors(
    estimator: zokern.Kernel, clip: float | None = None, evaluation: str = "master", **hand_options: Any
) -> None:
    params = weights()
    hand, lr = Hand(params), 0.005
    optimizer = zokern.MeZO(
        params.items(), lr=lr, eps=EPS, seed=SEED, evaluation=evaluation, estimator=estimator
    )
    for step in range(3):
        result = zokern.step(optimizer, lambda: loss(params))
        want = by_tensor(hand, step, lr, clip, **hand_options)
        size = max(abs(c) for row in want for c in row) + 1e-3
        for got, right in zip(result.coefficients, want[0]):
            assert abs(got - right) <= 5e-4 * size, f"step {step}: coefficient {got}, not {right}"
        assert result.predicted_fall is None
        for name, p in params.items():
            bound = 1e-5 * (1 + lr * size) * (4 if evaluation == "inplace" else 1)
            assert (p.double() - hand.theta[name]).abs().max() <= bound, (
                f"step {step}: {name} is not where the formula is"
            )


def published(**options: Any) -> zokern.Kernel:
    return zokern.Kernel(
        scale=4.0, width=lambda step: 1.0 / (1 + step), rescale=False, **{"scope": "tensor", **options}
    )


@pytest.mark.parametrize("evaluation", ["master", "paired", "scratch", "inplace", "auto"])
def test_a_radius_for_each_parameter(evaluation: str) -> None:
    check_tensors(published(), evaluation=evaluation)


@pytest.mark.parametrize("kind", [zokern.Scratch, zokern.Paired])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_radii_of_parameters_beside_the_product(kind: type, dtype: torch.dtype) -> None:
    """Where no memory is left for copies of the matrices: the losses of 'master'."""
    read = []
    for evaluation in (zokern.Master(), at_use(kind(check=False))):
        model = tiny(dtype, width=48)
        estimator = zokern.Kernel(scale=4.0, scope="tensor")
        optimizer = zokern.MeZO(
            model, lr=0.0, eps=5e-2, seed=SEED, evaluation=evaluation, estimator=estimator
        )
        result = zokern.step(optimizer, lambda model=model: next_token_loss(model(batch()), batch()))
        read.append(torch.tensor(result.losses))
    spread = float((read[0][:, 0] - read[0][:, 1]).abs().max())
    assert (
        spread > 0.05
        and float((read[0] - read[1]).abs().max()) < (1e-4 if dtype == torch.float32 else 0.15) * spread
    )


def test_norms_are_clipped_parameter_by_parameter() -> None:
    check_tensors(published(clip_norm=2.0), clip=2.0)


class Neighbour(zokern.Kernel):
    """The radii of the next parameter."""

    def radii_of_tensors(self, plan):
        found = super().radii_of_tensors(plan)
        return [*found[1:], found[0]]


class Whole(zokern.Kernel):
    """All parameters clipped by the first one's norm."""

    def clipped(self, plan, estimate):
        found = super().clipped(plan, estimate)
        factor = found.coefficients[0, 0] / estimate.coefficients[0, 0]
        return type(found)(**{**vars(found), "coefficients": estimate.coefficients * factor})


WRONG_TENSORS = {
    "one radius": (lambda: published(scope="query"), {}),
    "one radius, in the formula": (published, {"one": True}),
    "rescaled": (lambda: zokern.Kernel(scale=4.0, width=lambda step: 1.0 / (1 + step), scope="tensor"), {}),
    "neighbour": (lambda: Neighbour(scale=4.0, width=lambda step: 1.0 / (1 + step), rescale=False,
        scope="tensor"), {}),
    "not clipped": (published, {"clip": 2.0}),
    "clipped by one norm": (lambda: Whole(scale=4.0, width=lambda s: 1.0 / (1 + s), rescale=False,
        scope="tensor", clip_norm=2.0), {"clip": 2.0}),
}  # fmt: skip


@pytest.mark.parametrize("wrong", WRONG_TENSORS)
def test_wrong_radii_are_rejected(wrong: str) -> None:
    make, options = WRONG_TENSORS[wrong]
    with pytest.raises(AssertionError, match="coefficient|not where the formula is|predicted_fall"):
        check_tensors(make(), **options)


def test_norms_of_long_parameters_are_summed_by_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """And where one radius is for all parameters: g of each has the length clip_norm, along the same line."""
    ends = []
    for piece in (1 << 20, 48):
        monkeypatch.setattr(kernel, "PIECE", piece)
        params = {"a": nn.Parameter(torch.zeros(20, 16)), "b": nn.Parameter(torch.zeros(7))}
        optimizer = zokern.MeZO(
            params.items(), lr=1.0, seed=SEED, evaluation="master", estimator=zokern.Kernel(clip_norm=1e-3)
        )
        zokern.step(
            optimizer,
            lambda params=params: params["a"].sum() + 3 * params["b"].square().sum() + params["b"][0],
        )
        assert all(abs(float(p.detach().norm()) - 1e-3) < 1e-8 for p in params.values())
        ends.append(params)
    assert torch.allclose(ends[0]["a"], ends[1]["a"], rtol=1e-6, atol=0.0)


@pytest.mark.parametrize("evaluation", ["master", "paired", "scratch"])
def test_a_low_rank_direction_with_a_radius_for_each_parameter(evaluation: str) -> None:
    """The losses are those of the weights at the radii, and updates may wait."""
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 1))
    x = torch.randn(16, 6, generator=torch.Generator().manual_seed(0))
    optimizer = zokern.SubZero(
        model, lr=2e-2, eps=1e-2, rank=3, estimator=zokern.Kernel(scope="tensor"), evaluation=evaluation
    )
    losses = [zokern.step(optimizer, lambda: (model(x) - 1.0).square().mean()).loss for _ in range(30)]
    assert losses[-1] < 0.5 * losses[0]
    with pytest.raises(ValueError, match="clip_norm is 1.0 with a low-rank direction"):
        zokern.step(
            zokern.SubZero(model, estimator=zokern.Kernel(clip_norm=1.0)), lambda: model(x).square().mean()
        )


BAD = {
    "order": (lambda: zokern.Kernel(order=2), r"order is 2; expected one of \[1, 3, 5, 7\]"),
    "scope": (lambda: zokern.Kernel(scope="layer"), "scope is 'layer'; expected 'query'"),
    "rescale": (lambda: zokern.Kernel(rescale=1), "rescale is 1; expected True or False"),
    "clip_norm": (lambda: zokern.Kernel(clip_norm=0.0), "clip_norm is 0.0"),
}  # fmt: skip


@pytest.mark.parametrize("which", BAD)
def test_bad_arguments_are_refused_by_name(which: str) -> None:
    make, message = BAD[which]
    with pytest.raises(ValueError, match=message):
        make()
