"""The study: its order, the file of rows, and the whole line on a model of a few hundred weights."""

from __future__ import annotations

import json
from dataclasses import replace
from unittest.mock import patch

import pytest
import torch
from study_rows import BUDGETS, FALL, LINE, ROWS, row

import zokern
from benchmarks.study import __main__ as study
from benchmarks.study import problems, train
from benchmarks.study.order import BASE, LARGE, MAIN, MODELS, SEEDS, SETS, SMALL, Run, order
from benchmarks.study.page import lacking, of_lr, page, to_target
from benchmarks.study.reading import crossing, groups
from benchmarks.study.store import Store
from benchmarks.study.train import counted
from examples.demo.data import Row as Text
from examples.demo.data import split
from zokern import methods
from zokern.methods import METHODS

# Order ------------------------------------------------------------------------------------------------------


def check_order(function) -> None:
    """Each run once; all methods on both sets of the small model first, main ones first; then main ones on
    the large model; then further seeds."""
    names = ["Another", *reversed(MAIN)]
    runs = function(names)
    count, large = len(names), len(MAIN) * (len(MODELS) - 1)
    assert len(runs) == len({*runs}) == (count + large) * len(SETS) * len(SEEDS)
    assert [run.method for run in runs[:count]] == [*MAIN, "Another"]
    assert {(run.model, run.data, run.seed) for run in runs[: 2 * count]} == {
        (SMALL, data, 0) for data in SETS
    }
    assert {(run.model, run.seed) for run in runs[2 * count : 2 * count + 2 * len(MAIN)]} == {(LARGE, 0)}
    assert {run.method for run in runs if run.model != SMALL} == {*MAIN}
    seeds = [run.seed for run in runs]
    assert seeds.index(1) == seeds.count(0) == len(runs) // len(SEEDS)


def test_order() -> None:
    check_order(order)


@pytest.mark.parametrize(
    "wrong", [lambda names: sorted(order(names)), lambda names: order(names)[1:], lambda n: order(n)[::-1]]
)
def test_wrong_order_is_rejected(wrong) -> None:
    with pytest.raises(AssertionError):
        check_order(wrong)


# The file ---------------------------------------------------------------------------------------------------

SETTINGS = {"forwards": BUDGETS, "batch": 6}


def check_resumption(make, tmp_path) -> None:
    """A run that is done is kept; one that was killed while its line was written is not;
    other settings are refused."""
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


# The line ---------------------------------------------------------------------------------------------------

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
        Text(f"{'x' * (n % 11 + 1)} {'y' * (n // 11 % 11 + 1)} {WORDS[label]}", label)
        for n in range(40)
        for label in range(3)
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
    monkeypatch.setattr(
        study, "order", lambda names: [r for r in order(names) if r.model == SMALL and r.seed == 0]
    )


def test_the_whole_line(two, tmp_path, capsys) -> None:
    """Four runs; page and plot; again, and nothing is run; the loss falls."""
    code, rows = run(tmp_path)
    assert code == 0 and [Run.of(r) for r in rows] == [
        Run(SMALL, data, name, 0) for data in SETS for name in ("MeZO", "FZOO")
    ]
    assert not [r["error"] for r in rows if "error" in r]
    for found in rows:
        at = [point["forwards"] for point in found["points"]]
        assert at[0] == 0 and at == sorted({*at}) and 40 - found["last_step_forwards"] < at[-1] <= 40
        assert len(at) == (
            5 if found["method"] == "MeZO" else 4
        )  # a step of nine losses passes two quarters at once
        assert all(a >= 10 * k for k, a in enumerate(at[:4]))
        assert found["points"][-1]["loss"] < found["points"][0]["loss"]
        assert found["lr"] != found["default_lr"] and found["tune_forwards"] >= 43 + 3 * 9
        tried = {trial["lr"]: trial["loss"] for trial in found["trials"]}
        assert len(tried) == 3 and train.wanted(found) is None
        decide = {trial["lr"]: trial["loss"] for trial in found["whole"]} or tried
        assert decide[found["lr"]] == min(decide.values())
    assert [r["last_step_forwards"] for r in rows] == [2, 9, 2, 9]
    text = (tmp_path / "study.md").read_text()
    assert "| MeZO | 2 | 20 |" in text and "-81 % iterations (P-GAP): not measured" in text
    assert "MiniLM, news: one seed, so no interval" in text
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
    Store(
        tmp_path / "study.jsonl",
        json.loads((tmp_path / "study.jsonl").read_text().splitlines()[0])["settings"],
    ).append(hour)
    assert len(run(tmp_path, "--hours", "0.9")[1]) == 1


def test_a_method_that_raises_is_a_row(two, tmp_path) -> None:
    def broken(*args, **options):
        raise ValueError("it has no eps")

    with patch.dict(methods.METHODS, {"FZOO": broken}):
        code, rows = run(tmp_path)
    assert code == 0 and [r.get("error") for r in rows] == [None, "ValueError: it has no eps"] * 2
    assert (
        "FZOO on MiniLM, news, seed 0 failed: ValueError: it has no eps"
        in (tmp_path / "study.md").read_text()
    )
    with patch.object(
        study, "measure", side_effect=AssertionError("a run that failed was run again, and nobody asked")
    ):
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
    assert code == 0 and all("diverges at every lr" in r["error"] for r in rows)


def check_tuning(tuned, tmp_path) -> None:
    """The lr is the best one tried, by rows that neither train nor are held out; further seeds take it."""
    with patch.object(study, "tuned", tuned):
        rows = run(tmp_path, "--only", "MeZO", "--sets", "news")[1]
    assert [r["seed"] for r in rows] == [0, 1, 2] and len({r["lr"] for r in rows}) == 1
    assert all(r["trials"] == rows[0]["trials"] for r in rows) and rows[0]["points"] != rows[1]["points"]


@pytest.fixture
def seeds(two, monkeypatch):
    monkeypatch.setattr(study, "order", lambda names: [r for r in order(names) if r.model == SMALL])


def test_tuning_is_shared_by_seeds(seeds, tmp_path) -> None:
    check_tuning(study.tuned, tmp_path)


@pytest.mark.parametrize(
    "wrong",
    [lambda r, rows: None, lambda r, rows: rows[-1] | {"trials": rows[-1]["trials"][-1:]} if rows else None],
)
def test_wrong_sharing_is_rejected(wrong, seeds, tmp_path) -> None:
    """Tuning anew finds another lr by another seed's weights; an lr of other trials is another one."""
    with pytest.raises(AssertionError):
        check_tuning(wrong, tmp_path)


def trials_of(short: dict[float, float | None], whole: dict[float, float | None], asked: list | None = None):
    """Returns a trial whose loss is known by the share of the lr that zokern.tune gave, 1e-3."""

    def trial(self, eps, lr, forwards):
        share = round(lr / 1e-3, 2)
        if forwards == 40 and asked is not None:
            asked.append(share)
        return {"lr": lr, "loss": (whole if forwards == 40 else short)[share], "forwards": forwards}

    return trial


SHORT = {1.0: 0.5, 0.33: 0.6, 0.1: 0.7}


def check_settle(settle) -> None:
    """Where the largest lr is the best of the short trials, larger ones are tried over all of the forwards,
    and these decide; where all of them diverge, smaller ones."""
    trainer = train.Trainer.__new__(train.Trainer)
    trainer.budget = 40
    for short, whole, best, count in (
        ({}, {1.0: 0.4, 3.0: 0.45}, 1.0, 2),
        ({}, {1.0: 0.4, 3.0: None}, 1.0, 2),
        ({}, {1.0: 0.6, 3.0: 0.55, 9.0: 0.65}, 3.0, 3),
        ({}, {1.0: 0.4, 3.0: 0.3, 9.0: 0.2}, 9.0, 3),  # no further
        ({}, {1.0: None, 0.33: 0.45}, 0.33, 2),
        ({1.0: 0.65}, {}, 0.33, 0),
        ({1.0: None}, {}, 0.33, 0),
    ):
        with patch.object(train.Trainer, "trial", trials_of(SHORT | short, whole)):
            trials = [trainer.trial(1e-3, share * 1e-3, 13) for share in train.SHARES]
            given = {"eps": 1e-3, "tune_lr": 1e-3, "trials": trials, "whole": [], "tune_forwards": 86}
            found = settle(trainer, given)
        assert found["lr"] == pytest.approx(best * 1e-3, rel=0.02) and len(found["whole"]) == count
        assert found["tune_forwards"] == 86 + 40 * count and given["whole"] == []
    with patch.object(train.Trainer, "trial", trials_of({}, {1.0: None, 0.33: None, 0.11: None})):
        with pytest.raises(ArithmeticError, match="it diverges at every lr"):
            settle(trainer, given | {"trials": [{"lr": 1e-3, "loss": 0.5}]})


def never(self, tuning):
    """Takes the best of the short trials."""
    return tuning | {"lr": train.best_of(tuning["trials"])["lr"]}


def last(self, tuning):
    """Takes the largest lr that was tried."""
    found = train.Trainer.settle(self, tuning)
    return found | {"lr": train.tried(found)[0]["lr"]}


def by_all(self, tuning):
    """Takes the best of all trials, short ones too, whose losses are of other weights."""
    found = train.Trainer.settle(self, tuning)
    return found | {"lr": train.best_of([*found["trials"], *found["whole"]])["lr"]}


def test_a_larger_lr_is_tried_while_the_largest_is_the_best() -> None:
    check_settle(train.Trainer.settle)


@pytest.mark.parametrize("wrong", [never, last, by_all])
def test_wrong_trials_are_rejected(wrong) -> None:
    with pytest.raises(AssertionError):
        check_settle(wrong)


def check_goes_on(tmp_path, larger: float) -> None:
    """Rows whose largest lr was the best are tuned on by the same command: once for all seeds. Where the
    larger lr is better they are run again, and else they stay."""
    given = ("--only", "MeZO", "--sets", "news")
    right = zokern.tune
    tuned = patch.object(zokern, "tune", lambda *args, **more: replace(right(*args, **more), lr=1e-3))
    with tuned, patch.object(train.Trainer, "settle", never):
        with patch.object(train.Trainer, "trial", trials_of(SHORT, {})):
            before = run(tmp_path, *given)[1]
    asked: list[float] = []
    with patch.object(train.Trainer, "trial", trials_of({}, {1.0: 0.4, 3.0: larger, 9.0: 0.9}, asked)):
        after = run(tmp_path, *given)[1][len(before) :]
    is_better = larger < 0.4
    assert asked == ([1.0, 3.0, 9.0] if is_better else [1.0, 3.0])
    assert [Run.of(r) for r in after] == [Run.of(r) for r in before]
    for old, new in zip(before, after):
        assert old["lr"] == pytest.approx(1e-3) and new["lr"] == pytest.approx(3e-3 if is_better else 1e-3)
        assert (new["points"] == old["points"]) != is_better and len(new["whole"]) == len(asked)
        assert (new["wall_seconds"] == old["wall_seconds"]) != is_better
    with patch.object(study, "measure", side_effect=AssertionError("a settled run was run again")):
        run(tmp_path, *given)


@pytest.mark.parametrize("larger", [0.3, 0.55])
def test_rows_at_the_edge_are_tuned_on(larger, seeds, tmp_path) -> None:
    check_goes_on(tmp_path, larger)


@pytest.mark.parametrize(
    "name, wrong",
    [
        ("done", lambda store, retry: store.done(retry)),
        (
            "tuned",
            lambda run, rows: next((r for r in rows if Run.of(r) == run), None),
        ),  # each seed for itself
    ],
)
def test_wrong_going_on_is_rejected(name, wrong, seeds, tmp_path) -> None:
    with patch.object(study, name, wrong), pytest.raises(AssertionError):
        check_goes_on(tmp_path, 0.3)


def test_a_trial_that_diverges_is_not_taken(two, tmp_path) -> None:
    right = zokern.tune
    with patch.object(zokern, "tune", lambda *args, **given: replace(right(*args, **given), lr=1e4)):
        with patch.object(train, "SHARES", (1e26, 1e-8)):
            rows = run(tmp_path, "--only", "MeZO", "--sets", "news")[1]
    assert [trial["loss"] is None for trial in rows[0]["trials"]] == [True, False]
    assert rows[0]["lr"] == pytest.approx(1e-4)


def test_rows_aside_train_nothing() -> None:
    settings = study.parser().parse_args(["--batch", "6"])
    trainer = train.Trainer(Run(SMALL, "news", "MeZO", 0), tiny(SMALL, "news", 12, 30), settings, 20)
    drawn = {text for _ in range(20) for text in trainer.batches.next()}
    assert len(trainer.aside) == train.ASIDE and len(drawn) == 120 - 30 - train.ASIDE
    assert not drawn & {*trainer.aside} and not {*trainer.aside} & {*trainer.held_out}


def test_runs_of_a_seed_start_alike_and_seeds_differ(two, tmp_path) -> None:
    settings = study.parser().parse_args(["--batch", "6"])
    task = tiny(SMALL, "news", 12, 30)
    before = train.score(task.model, task.words, task.rows.held_out)
    kept = [p.clone() for p in task.model.parameters()]
    found = [
        train.measure(Run(SMALL, "news", "MeZO", seed), task, before, settings, 20, lambda n: None)
        for seed in (0, 0, 1)
    ]
    losses = [[point["loss"] for point in r["points"]] for r in found]
    assert losses[0] == losses[1] != losses[2]
    assert all(torch.equal(a, b) for a, b in zip(kept, task.model.parameters()))


def check_count(counting) -> None:
    """Two losses of a central difference, nine of FZOO; P-GAP's first step has its probes, the next has not;
    a derivative is two."""
    model = torch.nn.Linear(6, 5)
    for name, steps in (
        ("MeZO", [2, 2]),
        ("FZOO", [9, 9]),
        ("PGAP", [22, 2]),
        ("DPZO", [2, 2]),
        ("FGD", [2, 2]),
    ):
        optimizer = METHODS[name](model, lr=0.0, **({"rank": 2} if name == "PGAP" else {}))
        read = []
        for _ in steps:
            with counting() as count:
                rows = 1 if name == "DPZO" else None
                zokern.step(optimizer, lambda rows=rows: model(torch.ones(2, 6)).square().sum(rows))
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


# The page ---------------------------------------------------------------------------------------------------

PAGE_SETTINGS = {"forwards": BUDGETS, "batch": 10, "held_out": ROWS, "words": 12}


def test_the_page_says_what_is_missing() -> None:
    names = [BASE, "LOZO"]
    rows = [row(BASE, LINE, FALL, data=data, seed=seed) for data in SETS for seed in SEEDS] + [
        row("LOZO", LINE, FALL)
    ]
    text = "\n".join(lacking(rows, names))
    assert "7 of 36 runs" in text and f"{LARGE}, news: nothing was run" in text
    assert f"{SMALL}, news: fewer than 3 seeds: LOZO." in text and f"{SMALL}, reviews: not run: LOZO." in text
    everything = [row(r.method, LINE, FALL, model=r.model, data=r.data, seed=r.seed) for r in order(names)]
    assert lacking(everything, names) == ["36 of 36 runs of a full study are done."]
    edge = {"trials": [{"lr": 1e-4, "loss": 0.6}, {"lr": 3e-5, "loss": 0.7}]}
    text = "\n".join(lacking([row(BASE, LINE, FALL) | edge, row("LOZO", LINE, FALL)], names))
    assert (
        f"- {SMALL}, news: lr is the largest that was tried, and a larger one may suit: {BASE}.\n"
        in f"{text}\n"
    )


def test_the_page_says_where_and_how() -> None:
    """Each model and set says its machine, its commits and its load; a fall of one seed has no interval."""
    rows = [row(BASE, LINE, FALL), row("LOZO", LINE, FALL) | {"load": 9.0}]
    other = row(BASE, LINE, FALL, data="reviews") | {"machine": "another", "commit": "def5678+changes"}
    text = page(PAGE_SETTINGS, [*rows, other], [BASE, "LOZO"])
    assert "Measured on 2026-01-01, torch 2.13, threads 1, by\n\n- `python -m benchmarks.study`\n" in text
    assert (
        "Measured on a processor, of commits abc1234; load average when a run began 4.8, up to 9.0." in text
    )
    assert "Measured on another, of commits def5678+changes" in text and "were not committed" in text
    assert "60.0 [53.1, 66.5]" in text  # Wilson, 120 of 200
    assert "| LOZO | 40.0 | 40.0 | +0.0 | 40.0 | 0.600 |" in text
    assert "| LOZO | 2 | 50 | 2.00 | 2.00 | 100.0 | 1 | paired |" in text
    assert "| LOZO | 1.0e-04 | 1e-03 | 0.33 | diverges | 0.6000 | 0.7000 | - | 90 |" in text
    whole = {"lr": 9e-4, "whole": [{"lr": 9e-4, "loss": 0.5}, {"lr": 3e-4, "loss": 0.55}]}
    wide = page(PAGE_SETTINGS, [row("LOZO", LINE, FALL) | whole], [BASE])
    assert "| 3 | diverges | 0.6000 | 0.7000 | 0.5000 at 3, 0.5500 at 1 | 90 |" in wide
    several = page(PAGE_SETTINGS, [rows[0], rows[1] | {"machine": "another"}], [BASE])
    assert "| LOZO | 40.0 | 40.0 | +0.0 | - | 0.600 |" in several and "were not committed" not in several
    assert "MeZO takes 100.0 s of the processor for its forwards, on a processor." in several
    assert page(PAGE_SETTINGS, [], [BASE])  # nothing was run


def check_of_lr(function) -> None:
    """Between the trials of a method, and between the best ones of methods; one that diverged is none."""
    rows = [
        row(name, LINE, FALL)
        | {"trials": [{"lr": lr, "loss": x} for lr, x in enumerate((best, best + far, None))]}
        for name, best, far in (
            ("A", 0.1, 0.3),
            ("B", 0.2, 0.3),
            ("C", 0.3, 0.3),
            ("D", 0.4, 5.0),
            ("E", 0.5, 0.1),
        )
    ]
    (group,) = groups(rows, BUDGETS)
    assert "differ by 0.300 (median over methods)" in function(group)
    assert "by 0.300 (the middle half)" in function(group)
    assert function(groups(rows[:3], BUDGETS)[0]) == ""


def test_what_lr_changes() -> None:
    check_of_lr(of_lr)

    def whole(group):
        """The largest difference of all."""
        return of_lr(replace(group, runs=dict.fromkeys(group.runs, group.runs["D"])))

    with pytest.raises(AssertionError):
        check_of_lr(whole)


def check_to_target(function) -> None:
    """The median over seeds; one that does not get there is the longest."""
    quick, never = [1.0, 0.6, 0.6, 0.6, 0.6], [1.0] * 5
    ends = {"LOZO": [quick, quick, never], "FZOO": [quick, never, never], "PGAP": [quick] * 3}
    rows = [row(BASE, LINE, FALL, seed=seed) for seed in SEEDS]
    rows += [row(name, LINE, found[seed], seed=seed) for name, found in ends.items() for seed in SEEDS]
    (group,) = groups(rows, BUDGETS)
    told = {name: function(group, group.runs[name]) for name in group.runs}
    assert told == {BASE: "100", "LOZO": "25 (2 of 3)", "FZOO": "> 100 (1 of 3)", "PGAP": "25"}
    assert function(replace(group, target=None), rows) == "-"


def those_that_arrive(group, rows):
    """The mean of the runs that get there."""
    arrived = [row for row in rows if crossing(row, "forwards", group.target or 0.0) is not None]
    return to_target(group, arrived or rows)


def test_forwards_to_target() -> None:
    check_to_target(to_target)
    with pytest.raises(AssertionError):
        check_to_target(those_that_arrive)
