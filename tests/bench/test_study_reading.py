"""What a study says: readings and statements on rows made by hand."""

from __future__ import annotations

import math
from dataclasses import replace
from unittest.mock import patch

import pytest
from study_rows import BUDGETS, FALL, LINE, ROWS, row

from benchmarks.study import claims, reading
from benchmarks.study.claims import (
    CLAIMS,
    compared,
    differences,
    forward_only,
    harmed,
    overall,
    ratios,
    start_with,
    statement,
    verdict,
    with_gradients,
)
from benchmarks.study.order import BASE, MODELS, SEEDS, SETS, SMALL
from benchmarks.study.reading import (
    TIME,
    accuracy,
    against,
    crossing,
    group,
    groups,
    read_at,
    steady,
)
from benchmarks.study.seeds import Mean
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


def check_accuracy(function) -> None:
    """Wilson's sides for the rows and Student's for the seeds, whose squares add.
    More seeds do not make more rows."""
    low, high = wilson(100, ROWS)
    alone = Mean(0.5, -math.inf, math.inf, 1.0, (0.5,))
    assert function(alone, ROWS)[:3] == pytest.approx((0.5, low, high))
    found = function(Mean(0.5, 0.3, 0.7, 0.01, (0.4, 0.6)), ROWS)
    assert found[:3] == pytest.approx(
        (0.5, 0.5 - math.hypot(0.5 - low, 0.2), 0.5 + math.hypot(high - 0.5, 0.2))
    )


def check_steady(function) -> None:
    """Time goes with forwards, at the rate of the quickest seed; losses stay."""
    rows = function([row("A", LINE, FALL, per=per, seed=seed) for seed, per in enumerate((2.0, 1.0, 5.0))])
    assert [[point[TIME] for point in r["points"]] for r in rows] == [[0.0, 25.0, 50.0, 75.0, 100.0]] * 3
    assert all([point["loss"] for point in r["points"]] == FALL for r in rows)


def check_against(function) -> None:
    """Seeds that move both methods alike are no difference between them; a seed without its pair is none."""
    swings = (0.1, 0.0, 0.3)
    rows = {
        name: [row(name, LINE, [1.0, 0.9, 0.8, 0.7, 0.6 - gain - s], seed=n) for n, s in enumerate(swings)]
        for name, gain in ((BASE, 0.0), ("LOZO", 0.1), ("FZOO", 0.0))
    }
    found = function(rows, 100)
    assert set(found) == {"LOZO", "FZOO"} and found["LOZO"].seeds == pytest.approx((0.1, 0.1, 0.1))
    assert found["FZOO"].value == pytest.approx(0.0, abs=1e-12)
    assert len(function({**rows, BASE: rows[BASE][1:]}, 100)["LOZO"].seeds) == 2
    assert function({"LOZO": rows["LOZO"]}, 100) == {}


CHECKS = {
    check_crossing: crossing,
    check_read_at: read_at,
    check_accuracy: accuracy,
    check_steady: steady,
    check_against: against,
}


def shifted(runs):
    """Each seed of MeZO's as the next one."""
    base = [{**r, "seed": (r["seed"] + 1) % len(SEEDS)} for r in runs.get(BASE, ())]
    return {**runs, **({BASE: base} if base else {})}


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
        pytest.param(check_accuracy, lambda m, n: accuracy(m, n * len(m.seeds)), id="seeds as rows"),
        pytest.param(check_accuracy, lambda m, n: accuracy(m._replace(high=math.inf), n), id="no seeds"),
        pytest.param(check_steady, list, id="each at its own rate"),
        pytest.param(check_steady, lambda rows: steady(rows[:1]) * 3, id="the first seed's"),
        pytest.param(check_against, lambda runs, n: against(shifted(runs), n), id="of another seed"),
        pytest.param(check_against, lambda runs, n: reading.falls(runs, "forwards", n), id="of none"),
    ],
)
def test_wrong_readings_are_rejected(check, wrong) -> None:
    with pytest.raises(AssertionError):
        check(wrong)


def test_a_group_reads_at_the_cost_of_mezo() -> None:
    """MeZO's time is that of its quickest seed, the target its mean final loss;
    rows with errors are none; no fall, no target; no time of several machines."""
    rows = [
        row(BASE, LINE, FALL, per=1.0), row(BASE, LINE, [1.0, 0.9, 0.8, 0.7, 0.5], seed=1, per=3.0),
        row("FZOO", LINE, FALL, per=8.0), row("LOZO", LINE, FALL) | {"error": "ValueError: no"},
        row("LOZO", LINE, FALL, data="reviews"),
    ]  # fmt: skip
    news, reviews = groups(rows, BUDGETS)
    assert list(news.runs) == [BASE, "FZOO"] and list(reviews.runs) == ["LOZO"]
    assert news.limit == 100.0 and news.target == pytest.approx(0.55)
    assert news.time["FZOO"].value == pytest.approx(0.05) and news.forwards["FZOO"].value == pytest.approx(
        0.4
    )
    assert news.accuracy["FZOO"].value == pytest.approx(0.6) and len(news.forwards[BASE].seeds) == 2
    assert reviews.limit is reviews.target is None and reviews.time == {}
    two = group(SMALL, "news", [rows[0], rows[2] | {"machine": "another"}], 100)
    assert two.limit == 100.0 and [*two.time] == [BASE] and two.machines == ["a processor", "another"]
    both = group(SMALL, "news", [rows[0], rows[1] | {"machine": "another"}, rows[2]], 100)
    assert both.limit is None and both.time == {}  # whose MeZO ran on both
    assert group(SMALL, "news", [row(BASE, LINE, FALL[::-1])], 100).target is None
    assert group(SMALL, "news", [row(BASE, LINE, [1.0, 1.0, 1.0, 1.0, 0.96])], 100).target is None


# Statements -------------------------------------------------------------------------------------------------


def made(spread: float, models=MODELS[:2], **of: tuple[list[float], list[float]]) -> list[reading.Group]:
    """Groups of both sets and three seeds: accuracies and losses by method. Seeds differ by a share of the
    loss, each method's in another order."""
    rows = [
        row(
            name,
            shares,
            [losses[0], *(x * (1 + spread * ((seed + number) % len(SEEDS) - 1)) for x in losses[1:])],
            model=model,
            data=data,
            seed=seed,
        )
        for number, (name, (shares, losses)) in enumerate(of.items())
        for model in models
        for data in SETS
        for seed in SEEDS
    ]
    return groups(rows, BUDGETS)


def many(**of: tuple[list[float], list[float]]) -> list[reading.Group]:
    return made(0.0, **of)


def apart(**of: tuple[list[float], list[float]]) -> list[reading.Group]:
    return made(0.01, **of)


def ending(loss: float) -> list[float]:
    return [1.0, 0.9, 0.8, 0.8, loss]


def of(value: float, low: float, high: float) -> Mean:
    return Mean(value, low, high, 0.5, ())


def check_verdict(function) -> None:
    assert function(of(0.2, 0.1, 0.3), 0.19, 0) == "reproduced"
    assert function(of(0.1, 0.05, 0.15), 0.19, 0) == "reproduced"  # even less than claimed
    assert (
        function(of(0.6, 0.4, 0.8), 0.19, 0)
        == "in part: less than MeZO; the claimed 0.19 lies outside the interval"
    )
    assert function(of(0.6, 0.1, 1.1), 0.19, 0) == f"{claims.APART}; the claimed 0.19 lies in the interval"
    assert function(of(0.6, 0.3, 1.1), 0.19, 0).endswith("outside the interval")
    assert function(of(0.2, 0.1, 0.3), 0.19, 1).startswith(claims.APART)  # some are lower bounds
    assert function(of(1.5, 1.1, 2.0), 0.19, 0).startswith("not reproduced")
    assert function(of(1.5, 1.1, 2.0), 0.19, 2).startswith("not reproduced")


QUICK = [1.0, 0.6, 0.6, 0.6, 0.6]


def check_ratios(function) -> None:
    """MeZO gets to its final loss at its end: a method that is there at a quarter has a ratio of a quarter,
    once for each model and set, whichever of MeZO's seeds get there."""
    found, bounds = function(many(MeZO=(LINE, FALL), PGAP=(LINE, QUICK)), CLAIMS[0])
    assert found == pytest.approx([12 / 50] * 4) and bounds == 0
    uneven = made(0.05, MeZO=(LINE, FALL), PGAP=(LINE, [1.0, 0.5, 0.5, 0.5, 0.5]))
    assert function(uneven, CLAIMS[0])[0] == pytest.approx([12 / 50] * 4, rel=0.25)
    found, bounds = function(many(MeZO=(LINE, FALL), PGAP=(LINE, [1.0, 0.9, 0.8, 0.7, 0.65])), CLAIMS[0])
    assert found == pytest.approx([1.0] * 4) and bounds == 12
    assert function(many(MeZO=(LINE, FALL), LOZO=(LINE, QUICK)), CLAIMS[0]) == ([], 0)
    turns = (LINE, [1.0, 0.8, 0.7, 0.72, 0.75])  # it is at its end's loss before its end
    assert function(many(MeZO=turns, PGAP=turns), CLAIMS[0]) == (pytest.approx([1.0] * 4), 0)
    assert function(many(PGAP=(LINE, QUICK)), CLAIMS[0]) == ([], 0)
    timed = many(MeZO=(LINE, FALL), KerZOO=(LINE, QUICK))
    assert function(timed, CLAIMS[1])[0] == pytest.approx([0.25] * 4)
    assert function([replace(one, time={}) for one in timed], CLAIMS[1]) == ([], 0)  # several machines


def check_start_with(function) -> None:
    """Those told apart from MeZO in some model and set, and less in none; MeZO where there is none."""
    better, good, bad = ending(0.5), ending(0.55), ending(0.7)
    text = function(apart(MeZO=(LINE, good), SubZero=(LINE, better), PGAP=(LINE, bad)))
    assert "Start with MeZO or one of these" in text and "PGAP" not in text
    assert (
        "SubZero (MiniLM, news; MiniLM, reviews; SmolLM2-135M, news; SmolLM2-135M, reviews; over all)" in text
    )
    sides = [apart(MeZO=(LINE, good), SubZero=(LINE, ending(0.55 + side))) for side in (0.004, -0.004)]
    alike = function([*sides[0][:2], *sides[1][2:]])
    assert "No choice of method is supported by these rows: start with MeZO" in alike
    assert "No choice" in function([]) and "No choice" in function(apart(MeZO=(LINE, good)))
    mixed = [
        row(name, LINE, [1.0, *(x + 0.001 * seed for x in found[1:])], data=data, seed=seed)
        for data, sides in (("news", (better, bad)), ("reviews", (bad, better)))
        for name, found in zip((BASE, "LOZO"), sides)
        for seed in SEEDS
    ]
    assert "No choice" in function(groups(mixed, BUDGETS))  # better in one, worse in the other
    one_seed = [row(name, LINE, ending(x)) for name, x in ((BASE, 0.7), ("LOZO", 0.5))]
    assert "No choice" in function(groups(one_seed, BUDGETS))
    dull = function(apart(MeZO=(LINE, ending(1.3)), LOZO=(LINE, [1.0] * 5)))
    assert "No choice" in dull  # LOZO only does no harm


def check_compared(function) -> None:
    better, bad, none = ending(0.5), ending(0.7), [1.0] * 5
    alike = (LINE, ending(0.599))
    one = apart(MeZO=(LINE, ending(0.6)), TeZO=alike, SubZero=(LINE, better), PGAP=(LINE, bad))
    text = function(one[0])
    assert text.startswith("MiniLM, news, 3 methods against MeZO") and "TeZO" not in text
    assert (
        "larger fall of the loss: SubZero +10.0 points [+" in text
        and "; smaller: PGAP -10.0 points [-" in text
    )
    dull = function(apart(MeZO=(LINE, ending(1.2)), LOZO=(LINE, none))[0])
    assert "which says nothing. The held-out loss rises by MeZO" in dull
    assert "one seed, so no interval" in function(groups([row(BASE, LINE, FALL)], BUDGETS)[0])
    assert "nothing to compare" in function(apart(LOZO=(LINE, better))[0])


def check_overall(function) -> None:
    """Each model and set counts once; two of them are too few."""
    found = apart(MeZO=(LINE, ending(0.6)), LOZO=(LINE, ending(0.5)))
    assert function(found)["LOZO"].value == pytest.approx(0.1, abs=0.01)
    assert len(function(found)["LOZO"].seeds) == 4 and function(found[:2]) == {}


def check_harmed(function) -> None:
    """A rise of 20 % is told apart from none, one of 1 % is not."""
    found = apart(MeZO=(LINE, ending(1.2)), LOZO=(LINE, ending(1.01)), FZOO=(LINE, FALL))
    assert function(found[0]) == ["MeZO"]


def check_forward_only(function) -> None:
    """A method that back-propagates a part is named apart, however far it goes."""
    found = apart(MeZO=(LINE, ending(0.7)), LOZO=(LINE, ending(0.6)), Hybrid=(LINE, ending(0.3)))
    assert "LOZO" in start_with(function(found)) and "Hybrid" not in start_with(function(found))
    assert "Hybrid takes 70.0 %" in with_gradients(found) and "LOZO" not in with_gradients(found)
    assert with_gradients(function(found)) == ""


STATEMENTS = {
    check_forward_only: forward_only,
    check_harmed: harmed,
    check_verdict: verdict,
    check_ratios: ratios,
    check_start_with: start_with,
    check_compared: compared,
    check_overall: overall,
}


@pytest.mark.parametrize("check", STATEMENTS)
def test_statements(check) -> None:
    check(STATEMENTS[check])


def by_size(means):
    """Told apart are all that differ."""
    return {name for name, mean in means.items() if abs(mean.value) > 1e-4}


def with_(told, function):
    """The function, where another rule tells means apart."""

    def wrong(found):
        with patch.object(claims, "told_apart", told):
            return function(found)

    return wrong


@pytest.mark.parametrize(
    "check, wrong",
    [
        pytest.param(
            check_verdict,
            lambda m, share, b: verdict(m._replace(low=m.value, high=m.value), share, b),
            id="without intervals",
        ),
        pytest.param(check_verdict, lambda m, share, b: verdict(m, share, 0), id="bounds as ratios"),
        pytest.param(
            check_verdict, lambda m, share, b: verdict(m, 1.0, b), id="any saving is the claimed one"
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
        pytest.param(
            check_ratios,
            lambda g, c: ratios([replace(one, time=one.forwards) for one in g], c),
            id="times of several machines",
        ),
        pytest.param(check_harmed, with_(by_size, harmed), id="without intervals"),
        pytest.param(check_harmed, lambda g: [], id="none of them"),
        pytest.param(check_start_with, with_(by_size, start_with), id="without intervals"),
        pytest.param(check_start_with, lambda g: start_with(g[:1]), id="the first group alone"),
        pytest.param(check_compared, with_(by_size, compared), id="without intervals"),
        pytest.param(check_overall, lambda g: overall([*g, *g]), id="groups counted twice"),
        pytest.param(check_overall, lambda g: g[0].against, id="one group for all"),
    ],
)
def test_wrong_statements_are_rejected(check, wrong) -> None:
    with pytest.raises(AssertionError):
        check(wrong)


def test_claims_in_words() -> None:
    """Nothing without three models and sets; what the rows carry with them."""
    assert "not measured (models and sets, whose held-out loss MeZO lowers: 0; 3 are" in statement(
        [], CLAIMS[0]
    )
    assert "not measured (models and sets: 0; 3 are needed)" in statement([], CLAIMS[2])
    high = [*LINE[:4], 0.8]
    found = many(MeZO=(LINE, FALL), PGAP=(LINE, QUICK), SubZero=(high, FALL), KerZOO=(LINE, [1.0] * 5))
    assert "two" not in statement(found[:2], CLAIMS[0]) and "not measured" in statement(found[:2], CLAIMS[0])
    steps = statement(found, CLAIMS[0])
    assert (
        "-81 % iterations (P-GAP): **in part" in steps and "0.24 [0.24, 0.24], geometric mean over 4" in steps
    )
    time = statement(found, CLAIMS[1])
    assert f"**{claims.APART}; the claimed" in time and "Runs that end above that loss: 12" in time
    assert differences(found, "SubZero") == pytest.approx([0.2] * 4)
    assert "higher accuracy (SubZero): **reproduced**. At equal forwards +20.0 points" in statement(
        found, CLAIMS[2]
    )
    worse = many(MeZO=(high, FALL), SubZero=(LINE, FALL))
    assert "not reproduced: lower than MeZO" in statement(worse, CLAIMS[2])
    assert claims.APART in statement(many(MeZO=(LINE, FALL), SubZero=(LINE, FALL)), CLAIMS[2])
