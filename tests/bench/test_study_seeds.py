"""Means over seeds: intervals by hand, how often they hold the truth, and how often equal methods are told
apart."""

from __future__ import annotations

import math
import random
import statistics

import pytest

pytest.importorskip("scipy", reason="scipy is not installed: pip install 'zokern[test]'")

from benchmarks.study.seeds import LEVEL, Mean, mean, moderated, of_values, prior, told_apart


def check_mean(function) -> None:
    """Student's interval and chance; nothing is known of one seed."""
    assert function([0.5], 0.0, 0) == Mean(0.5, -math.inf, math.inf, 1.0, (0.5,))
    half = 2.5706 * 0.1 / math.sqrt(2)
    found = function([0.4, 0.6], 0.1, 5)
    assert found[:3] == pytest.approx((0.5, 0.5 - half, 0.5 + half), abs=1e-5)
    assert function([half, half], 0.1, 5).p == pytest.approx(LEVEL, abs=1e-4)  # 0 is at its edge


@pytest.mark.parametrize(
    "wrong",
    [
        lambda v, d, f: mean(v, d * math.sqrt(len(v)), f),
        lambda v, d, f: mean(v, d, f or 1),
        lambda v, d, f: mean(v, d, 1e9),
    ],
)
def test_mean(wrong) -> None:
    check_mean(mean)
    with pytest.raises(AssertionError):
        check_mean(wrong)
    assert of_values([1.0, 3.0])[:3] == pytest.approx((2.0, 2 - 12.7062, 2 + 12.7062), abs=1e-3)
    assert of_values([0.3])[:3] == (0.3, -math.inf, math.inf)


def drawn(generator: random.Random, freedom: float, methods: int, seeds: int = 3) -> dict[str, list[float]]:
    """Seeds of methods whose true mean is 0. Their variances are scaled inverse chi-squared: the fewer the
    degrees of freedom, the more they differ."""
    found = {}
    for number in range(methods):
        variance = freedom / (2 * generator.gammavariate(freedom / 2, 1.0))
        found[str(number)] = [generator.gauss(0.0, math.sqrt(variance)) for _ in range(seeds)]
    return found


def test_prior_is_found() -> None:
    """The common variance is 1, worth as many degrees of freedom as it was drawn with."""
    generator = random.Random(0)
    for freedom in (2.0, 6.0):
        values = drawn(generator, freedom, 4000).values()
        common, worth = prior([statistics.variance(v) for v in values], [2] * 4000)
        assert common == pytest.approx(1.0, rel=0.1) and worth == pytest.approx(freedom, rel=0.35)
    same = [statistics.variance([generator.gauss(0, 2) for _ in range(3)]) for _ in range(4000)]
    common, worth = prior(same, [2] * 4000)
    assert worth > 20 and (math.isinf(worth) or common == pytest.approx(4.0, rel=0.3))


def check_cover(function) -> None:
    """95 % of the intervals hold the truth: of all methods, and of the quarter whose seeds scatter most."""
    generator, all_of_them, scattered, width, own_width = random.Random(1), [], [], 0.0, 0.0
    for _ in range(60):
        values = drawn(generator, 4.0, 28)
        means = function(values)
        held = {name: one.low <= 0.0 <= one.high for name, one in means.items()}
        wide = sorted(values, key=lambda name: statistics.variance(values[name]))[-7:]
        all_of_them += held.values()
        scattered += [held[name] for name in wide]
        width += statistics.median(one.high - one.low for one in means.values())
        own_width += statistics.median(2 * 4.303 * statistics.stdev(v) / 3**0.5 for v in values.values())
    assert statistics.fmean(all_of_them) == pytest.approx(0.95, abs=0.02)
    assert statistics.fmean(scattered) > 0.88
    assert width < 0.9 * own_width  # what the others say of a variance is used


def pooled(values):
    """One deviation for all methods, whatever each one's seeds do."""
    deviation = math.sqrt(statistics.fmean(statistics.variance(v) for v in values.values()))
    return {name: mean(v, deviation, 2 * len(values)) for name, v in values.items()}


def test_intervals_hold_the_truth() -> None:
    check_cover(moderated)


@pytest.mark.parametrize(
    "wrong",
    [pooled, lambda values: {name: of_values(v) for name, v in values.items()}],
    ids=["pooled", "alone"],
)
def test_wrong_intervals_are_rejected(wrong) -> None:
    with pytest.raises(AssertionError):
        check_cover(wrong)


def test_few_seeds() -> None:
    """One seed each says nothing; one method alone has its own variance; seeds that agree to the bit have
    no width."""
    assert moderated({"A": [0.1], "B": [0.2]})["A"].low == -math.inf
    assert moderated({"A": [1.0, 3.0]})["A"] == of_values([1.0, 3.0])
    assert moderated({"A": [0.1, 0.1], "B": [0.2, 0.2]})["B"][:4] == (0.2, 0.2, 0.2, 0.0)
    assert moderated({}) == {}
    some = moderated({"A": [1.0, 2.0, 3.0], "B": [1.0, 2.0, 2.5], "C": [1.5]})
    assert math.isfinite(some["C"].low) or some["C"].p == 1.0


def check_told_apart(function) -> None:
    """Of studies of 28 equal methods at most about one in twenty names any; a clear difference is named."""
    generator, wrong = random.Random(2), 0
    for _ in range(200):
        wrong += bool(function(moderated(drawn(generator, 8.0, 28))))
    assert wrong <= 0.09 * 200
    clear = moderated({**drawn(generator, 8.0, 9), "clear": [20.0, 21.0, 19.0]})
    assert function(clear) == {"clear"}


def test_told_apart() -> None:
    check_told_apart(told_apart)


@pytest.mark.parametrize(
    "wrong",
    [lambda means: {n for n, m in means.items() if m.p <= LEVEL}, lambda means: set()],
    ids=["each by itself", "none"],
)
def test_wrong_telling_is_rejected(wrong) -> None:
    with pytest.raises(AssertionError):
        check_told_apart(wrong)
