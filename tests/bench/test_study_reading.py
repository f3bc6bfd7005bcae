"""What a study says: readings and statements on rows made by hand."""

from __future__ import annotations

import math
import statistics
from dataclasses import replace
from unittest.mock import patch

import pytest
from study_rows import BUDGETS, FALL, LINE, ROWS, row

from benchmarks.study import claims, reading
from benchmarks.study.claims import (
    CLAIMS,
    Interval,
    among_best,
    differences,
    forward_only,
    harmed,
    interval,
    ratios,
    start_with,
    statement,
    verdict,
    with_gradients,
)
from benchmarks.study.order import BASE, SEEDS, SETS, SMALL
from benchmarks.study.reading import (
    TIME,
    Mean,
    accuracy,
    crossing,
    group,
    groups,
    mean,
    read_at,
    spread,
    student,
)
from examples.demo.significance import wilson

# Readings ---------------------------------------------------------------------------------------------------


def check_crossing(function) -> None:
    fall = row("A", LINE, [1.0, 0.8, 0.5, 0.9, 0.4])
    assert function(fall, "forwards", 0.8) == 25
    assert function(fall, "forwards", 0.65) == pytest.approx(37.5)  # between two checks
    assert function(fall, "forwards", 0.5) == 50  # the first time, not the last
    assert function(fall, "steps", 0.5) == 25 and function(fall, TIME, 0.5) == 50
    assert function(fall, "forwards", 0.3) is None and function(fall, "forwards", 1.1) == 0


def last_crossing(found, axis, target):
    hit = [point[axis] for point in found["points"] if point["loss"] <= target]
    return hit[-1] if hit else None


def check_read_at(function) -> None:
    """A method of three seconds a forward is read at a third
    of its run in the time that another takes for all of it."""
    fast, slow = row("A", LINE, FALL), row("B", LINE, FALL, per=3.0)
    assert function(fast, "forwards", 50) == pytest.approx({"accuracy": 0.4, "loss": 0.8})
    assert (
        function(fast, TIME, 100.0)
        == function(slow, TIME, 300.0)
        == pytest.approx({"accuracy": 0.6, "loss": 0.6})
    )
    assert function(slow, TIME, 112.5) == pytest.approx({"accuracy": 0.35, "loss": 0.85})
    assert function(fast, TIME, 1e9) == pytest.approx({"accuracy": 0.6, "loss": 0.6})  # it had ended
    assert function(slow, TIME, 0.0) == pytest.approx({"accuracy": 0.2, "loss": 1.0})


def check_mean(function) -> None:
    """Student's interval; nothing is known of one seed."""
    assert function([0.5], 0.0, 0) == Mean(0.5, -math.inf, math.inf, 1)
    half = 2.571 * 0.1 / math.sqrt(2)
    assert function([0.4, 0.6], 0.1, 5) == pytest.approx(Mean(0.5, 0.5 - half, 0.5 + half, 2))


def check_accuracy(function) -> None:
    """Wilson's sides for the rows and Student's for the seeds, whose squares add.
    More seeds do not make more rows."""
    low, high = wilson(100, ROWS)
    assert function([0.5], ROWS, 0.0, 0) == pytest.approx(Mean(0.5, low, high, 1))
    assert function([0.5] * 3, ROWS, 0.0, 4) == pytest.approx(Mean(0.5, low, high, 3))
    found = function([0.4, 0.6], ROWS, 0.1, 5)
    seeds = 2.571 * 0.1 / math.sqrt(2)
    assert found == pytest.approx(
        Mean(0.5, 0.5 - math.hypot(0.5 - low, seeds), 0.5 + math.hypot(high - 0.5, seeds), 2)
    )


def check_spread(function) -> None:
    """The pooled deviation: methods of one seed say nothing."""
    assert function([[0.5], [0.7]]) == (0.0, 0)
    deviation, freedom = function([[0.4, 0.6], [0.1, 0.2, 0.3], [0.9]])
    assert freedom == 3 and deviation == pytest.approx(math.sqrt((0.02 + 0.02) / 3))


CHECKS = {
    check_crossing: crossing,
    check_read_at: read_at,
    check_mean: mean,
    check_accuracy: accuracy,
    check_spread: spread,
}


@pytest.mark.parametrize("check", CHECKS)
def test_readings(check) -> None:
    check(CHECKS[check])


@pytest.mark.parametrize(
    "check, wrong",
    [
        pytest.param(check_crossing, last_crossing, id="the last crossing"),
        pytest.param(check_crossing, lambda r, axis, t: crossing(r, "forwards", t), id="another axis"),
        pytest.param(
            check_crossing,
            lambda r, axis, t: crossing(r, axis, t) or r["points"][-1][axis],
            id="the end where it does not",
        ),
        pytest.param(
            check_read_at,
            lambda r, axis, limit: read_at(r, "forwards", limit),
            id="equal forwards for equal time",
        ),
        pytest.param(check_read_at, lambda r, axis, limit: read_at(r, axis, math.inf), id="always the end"),
        pytest.param(check_mean, lambda v, d, f: mean(v, d * math.sqrt(len(v)), f), id="of one seed"),
        pytest.param(check_mean, lambda v, d, f: mean(v, d, f or 1), id="one seed is certain"),
        pytest.param(check_accuracy, lambda s, n, d, f: accuracy(s, n * len(s), d, f), id="seeds as rows"),
        pytest.param(check_accuracy, lambda s, n, d, f: accuracy(s, n, 0.0, 0), id="no seeds"),
        pytest.param(
            check_accuracy,
            lambda s, n, d, f: accuracy(s, n, d * math.sqrt(len(s)), f),
            id="deviation of one seed",
        ),
        pytest.param(
            check_spread,
            lambda v: (statistics.stdev(x for some in v for x in some), 3),
            id="methods as seeds",
        ),
        pytest.param(check_spread, lambda v: spread([some[:2] for some in v]), id="two seeds"),
    ],
)
def test_wrong_readings_are_rejected(check, wrong) -> None:
    with pytest.raises(AssertionError):
        check(wrong)


def test_student() -> None:
    """Never narrower than the exact quantile, and equal to it where it is listed."""
    stats = pytest.importorskip("scipy.stats")
    for freedom in range(1, 200):
        exact = stats.t.ppf(0.975, freedom)
        assert exact - 5e-4 <= student(freedom) <= 1.03 * exact + 5e-4
    assert all(
        value == pytest.approx(stats.t.ppf(0.975, freedom), abs=5e-4)
        for freedom, value in reading.STUDENT.items()
    )


def test_a_group_reads_at_the_cost_of_mezo() -> None:
    """Equal time is MeZO's mean, the target its mean final loss;
    rows with errors are none; no fall, no target."""
    rows = [
        row(BASE, LINE, FALL, per=1.0), row(BASE, LINE, [1.0, 0.9, 0.8, 0.7, 0.5], seed=1, per=3.0),
        row("FZOO", LINE, FALL, per=8.0), row("LOZO", LINE, FALL) | {"error": "ValueError: no"},
        row("LOZO", LINE, FALL, data="reviews"),
    ]  # fmt: skip
    news, reviews = groups(rows, BUDGETS)
    assert list(news.runs) == [BASE, "FZOO"] and list(reviews.runs) == ["LOZO"]
    assert news.limit == 200.0 and news.target == pytest.approx(0.55)
    assert news.time["FZOO"].value == pytest.approx(0.1) and news.forwards["FZOO"].value == pytest.approx(0.4)
    assert news.accuracy["FZOO"].value == pytest.approx(0.6) and news.forwards[BASE].seeds == 2
    assert reviews.limit is reviews.target is None and reviews.time == {}
    assert group(SMALL, "news", [row(BASE, LINE, FALL[::-1])], 100).target is None
    assert group(SMALL, "news", [row(BASE, LINE, [1.0, 1.0, 1.0, 1.0, 0.96])], 100).target is None


# Statements -------------------------------------------------------------------------------------------------


def of_seeds(spread: float, of: dict[str, tuple[list[float], list[float]]]) -> list[reading.Group]:
    """Groups of both sets and three seeds, that differ by a share of the loss: accuracies and losses by
    method."""
    rows = [
        row(
            name,
            shares,
            [losses[0], *(x * (1 + spread * (seed - 1)) for x in losses[1:])],
            data=data,
            seed=seed,
        )
        for name, (shares, losses) in of.items()
        for data in SETS
        for seed in SEEDS
    ]
    return groups(rows, BUDGETS)


def many(**of: tuple[list[float], list[float]]) -> list[reading.Group]:
    return of_seeds(0.0, of)


def apart(**of: tuple[list[float], list[float]]) -> list[reading.Group]:
    return of_seeds(0.01, of)


def ending(loss: float) -> list[float]:
    return [1.0, 0.9, 0.8, 0.8, loss]


def check_verdict(function) -> None:
    assert function(Interval(0.2, 0.1, 0.3, 6), 0.19, 0) == "reproduced"
    assert function(Interval(0.1, 0.05, 0.15, 6), 0.19, 0) == "reproduced"  # even less than claimed
    assert function(Interval(0.6, 0.4, 0.8, 6), 0.19, 0).startswith("in part")
    assert function(Interval(0.6, 0.1, 1.1, 6), 0.19, 0) == claims.APART
    assert function(Interval(0.2, 0.1, 0.3, 6), 0.19, 1) == claims.APART  # some are lower bounds
    assert function(Interval(1.5, 1.1, 2.0, 6), 0.19, 0).startswith("not reproduced")
    assert function(Interval(1.5, 1.1, 2.0, 6), 0.19, 2).startswith("not reproduced")


def check_ratios(function) -> None:
    """MeZO gets to its final loss at its end:
    a method that is there at a quarter has a ratio of a quarter."""
    quick = [1.0, 0.6, 0.6, 0.6, 0.6]
    found, bounds = function(many(MeZO=(LINE, FALL), PGAP=(LINE, quick)), CLAIMS[0])
    assert found == pytest.approx([12 / 50] * 6) and bounds == 0
    found, bounds = function(many(MeZO=(LINE, FALL), PGAP=(LINE, [1.0, 0.9, 0.8, 0.7, 0.65])), CLAIMS[0])
    assert found == pytest.approx([1.0] * 6) and bounds == 6
    assert function(many(MeZO=(LINE, FALL), LOZO=(LINE, quick)), CLAIMS[0]) == ([], 0)
    assert function(many(PGAP=(LINE, quick)), CLAIMS[0]) == ([], 0)


def check_among_best(function) -> None:
    """Intervals of three seeds are about 2 points of the loss to each side."""
    one, _ = apart(A=(LINE, ending(0.5)), B=(LINE, ending(0.51)), C=(LINE, ending(0.6)))
    assert function(one, "forwards") == {"A", "B"}
    assert function(one, "time") == set()  # MeZO has not run
    (alone,) = groups([row("A", LINE, ending(0.5)), row("C", LINE, ending(0.6))], BUDGETS)
    assert function(alone, "forwards") == {"A", "C"}  # one seed tells nothing apart


def check_start_with(function) -> None:
    better, good, bad, none = ending(0.5), ending(0.51), ending(0.7), [1.0] * 5
    text = function(apart(MeZO=(LINE, good), SubZero=(LINE, better), PGAP=(LINE, bad)), "time")
    assert (
        "At equal time start with one of **SubZero, MeZO** (not told apart" in text
        and "the first takes 50.0% off the held-out loss" in text
    )
    assert text.endswith("do not overlap: PGAP.")
    assert "start with **SubZero**: the first takes 50.0%" in function(
        apart(MeZO=(LINE, bad), SubZero=(LINE, better)), "forwards"
    )
    assert (
        "no method is told apart from the best (MiniLM, news; MiniLM, reviews): SubZero, MeZO, the largest"
        in function(apart(MeZO=(LINE, good), SubZero=(LINE, better)), "time")
    )
    assert "do not say which method" in function(apart(MeZO=(LINE, good)), "time")
    assert "do not say which method" in function([], "time")
    dull = function(apart(MeZO=(LINE, ending(1.3)), LOZO=(LINE, none)), "time")
    # though they differ
    assert "do not say which method" in dull and "No fall of the loss is told apart from none" in dull
    mixed = [
        row(name, LINE, [1.0, *(x + 0.001 * seed for x in found[1:])], data=data, seed=seed)
        for data, sides in (("news", (better, bad)), ("reviews", (bad, better)))
        for name, found in zip((BASE, "LOZO"), sides)
        for seed in SEEDS
    ]
    assert "no method is among the best of every group" in function(groups(mixed, BUDGETS), "time")
    some = apart(MeZO=(LINE, good), LOZO=(LINE, bad))[:1] + apart(MeZO=(LINE, good), FZOO=(LINE, better))[1:]
    assert "Not run in every group, and not compared here: FZOO, LOZO." in function(some, "time")


def check_harmed(function) -> None:
    """A rise of 20 % is told apart from none, one of 1 % is not."""
    found = apart(MeZO=(LINE, ending(1.2)), LOZO=(LINE, ending(1.01)), FZOO=(LINE, FALL))
    assert function(found[:1]).endswith("at the lr that was found: MeZO (MiniLM, news).")
    assert function(apart(LOZO=(LINE, ending(1.01)), FZOO=(LINE, FALL))) == ""


def check_forward_only(function) -> None:
    """A method that back-propagates a part is named apart, however far it goes."""
    found = apart(MeZO=(LINE, ending(0.7)), LOZO=(LINE, ending(0.6)), Hybrid=(LINE, ending(0.3)))
    assert "start with **LOZO**" in start_with(function(found), "time")
    assert "Hybrid takes 70.0 %" in with_gradients(found) and "LOZO" not in with_gradients(found)
    assert with_gradients(function(found)) == ""


STATEMENTS = {
    check_forward_only: forward_only,
    check_harmed: harmed,
    check_verdict: verdict,
    check_ratios: ratios,
    check_among_best: among_best,
    check_start_with: start_with,
}


@pytest.mark.parametrize("check", STATEMENTS)
def test_statements(check) -> None:
    check(STATEMENTS[check])


def highest(found: reading.Group, at: str) -> set[str]:
    """The highest accuracy alone, whatever the intervals."""
    values = getattr(found, at)
    return {max(values, key=lambda name: values[name].value)} if values else set()


def with_dull_groups(found, at):
    """Compares methods that learned nothing."""
    with patch.object(claims, "learned", lambda one, at: True):
        return start_with(found, at)


def by_name(found, at):
    """Names the method that is first in the alphabet."""
    with patch.object(claims, "among_best", lambda one, at: {min(one.runs)}):
        return start_with(found, at)


@pytest.mark.parametrize(
    "check, wrong",
    [
        pytest.param(
            check_verdict,
            lambda i, share, b: verdict(i._replace(low=i.value, high=i.value), share, b),
            id="without intervals",
        ),
        pytest.param(check_verdict, lambda i, share, b: verdict(i, share, 0), id="bounds as ratios"),
        pytest.param(
            check_verdict, lambda i, share, b: verdict(i, 1.0, b), id="any saving is the claimed one"
        ),
        pytest.param(check_forward_only, list, id="gradients are no forward passes"),
        pytest.param(check_ratios, lambda g, c: ratios(g, c._replace(method="LOZO")), id="another method"),
        pytest.param(check_ratios, lambda g, c: (ratios(g, c)[0], 0), id="bounds not counted"),
        pytest.param(
            check_ratios, lambda g, c: ([1 / x for x in ratios(g, c)[0]], ratios(g, c)[1]), id="upside down"
        ),
        pytest.param(
            check_ratios, lambda g, c: ratios([replace(one, target=0.9) for one in g], c), id="another target"
        ),
        pytest.param(check_among_best, highest, id="without intervals"),
        pytest.param(
            check_harmed,
            lambda g: harmed(
                [
                    replace(one, forwards={n: m._replace(high=m.value) for n, m in one.forwards.items()})
                    for one in g
                ]
            ),
            id="without intervals",
        ),
        pytest.param(check_harmed, lambda g: harmed(g[:0]), id="none of them"),
        pytest.param(check_among_best, lambda g, at: {*getattr(g, at)}, id="all of them"),
        pytest.param(check_start_with, by_name, id="by name"),
        pytest.param(check_start_with, lambda g, at: start_with(g[:1], at), id="the first group alone"),
        pytest.param(check_start_with, with_dull_groups, id="where nothing was learned"),
    ],
)
def test_wrong_statements_are_rejected(check, wrong) -> None:
    with pytest.raises(AssertionError):
        check(wrong)


def test_claims_in_words() -> None:
    """Nothing without pairs; what the rows carry with them."""
    assert "two are needed" in statement([], CLAIMS[0]) and "not measured (pairs: 0" in statement(
        [], CLAIMS[2]
    )
    quick, high = [1.0, 0.6, 0.6, 0.6, 0.6], [*LINE[:4], 0.8]
    found = many(MeZO=(LINE, FALL), PGAP=(LINE, quick), SubZero=(high, FALL), KerZOO=(LINE, [1.0] * 5))
    assert "-81 % iterations (P-GAP): **in part" in statement(
        found, CLAIMS[0]
    ) and "0.24 [0.24, 0.24]" in statement(found, CLAIMS[0])
    assert f"**{claims.APART}**" in statement(found, CLAIMS[1]) and "6 of them end above" in statement(
        found, CLAIMS[1]
    )
    assert differences(found, "SubZero") == pytest.approx([0.2] * 6)
    assert "higher accuracy (SubZero): **reproduced**. At equal forwards +20.0 points" in statement(
        found, CLAIMS[2]
    )
    worse = many(MeZO=(high, FALL), SubZero=(LINE, FALL))
    assert "not reproduced: lower than MeZO" in statement(worse, CLAIMS[2])
    assert claims.APART in statement(many(MeZO=(LINE, FALL), SubZero=(LINE, FALL)), CLAIMS[2])


def test_interval() -> None:
    assert interval([0.3]) == Interval(0.3, -math.inf, math.inf, 1)
    assert interval([1.0, 3.0]) == pytest.approx((2.0, 2.0 - 12.706, 2.0 + 12.706, 2))
