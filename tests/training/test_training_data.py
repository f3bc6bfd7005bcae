"""Rows of files: what is read, what is refused and how, what is held out, and which batch a step gets."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
from folders import table, texts

from zokern.training.data import Batches, Raw, Row, names_of, numbered, read, split


def written(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.write_text(text)
    return path


def test_the_kinds_of_files_hold_the_same_rows(tmp_path):
    rows = texts(12)
    lines = "".join(json.dumps({"label": label, "text": text}) + "\n" for text, label in rows)
    tabs = "text\tlabel\n" + "".join(f"{text}\t{label}\n" for text, label in rows)
    for path in (
        table(tmp_path / "rows.csv", 12),
        written(tmp_path, "rows.jsonl", lines + "\n"),
        written(tmp_path, "rows.tsv", "\ufeff" + tabs),
    ):
        found, labelled = read("--data", path, "text", "label", True)
        assert labelled and [(row.text, row.label) for row in found] == rows
    plain = written(tmp_path, "rows.txt", "\n\n".join(text for text, _ in rows) + "\n")
    found, labelled = read("--data", plain, "text", "label", False)
    assert not labelled and [row.text for row in found] == [text for text, _ in rows]
    assert [row.line for row in found[:2]] == [1, 3]


def test_a_column_of_labels_is_optional_only_where_nobody_asked_for_it(tmp_path):
    path = written(tmp_path, "rows.csv", 'text,kind\n"a, b",x\n,y\n')
    found, labelled = read("--data", path, "text", "label", False)
    assert found == [Raw("a, b", None, 2)] and not labelled  # rows without text are left out


@pytest.mark.parametrize(
    "name, text, arguments, complaint",
    [
        ("none.csv", None, {}, "there is no such file"),
        ("rows.parquet", "x", {}, "expected a file whose name ends with one of .csv"),
        ("rows.csv", "", {}, "holds no row with text"),
        ("rows.csv", "text,label\n", {}, "holds no row with text"),
        (
            "rows.csv",
            "body,label\na,1\n",
            {},
            "--text-column is 'text'; rows.csv has the columns body, label",
        ),
        (
            "rows.csv",
            "text,kind\na,1\n",
            {},
            "--label-column is 'label'; rows.csv has the columns text, kind",
        ),
        ("rows.csv", "text,label\na,1\nb,\n", {}, "line 3 has no 'label'"),
        ("rows.csv", "text,label\na,b,c\n", {}, "line 2 has more columns"),
        ("rows.jsonl", '{"text": "a", "label": 1}\n[1]\n', {}, "line 2 is '[1]'; expected a JSON object"),
        ("rows.jsonl", '{"text"\n', {}, "line 1 is"),
        ("rows.txt", "a\n", {}, "which has no columns, and labels are asked for"),
    ],
)
def test_a_file_that_cannot_be_used_is_refused_by_its_flag(tmp_path, name, text, arguments, complaint):
    path = tmp_path / name
    if text is not None:
        path.write_text(text)
    with pytest.raises(ValueError) as error:
        read("--data", path, "text", "label", True)
    assert complaint in str(error.value) and str(error.value).startswith("--")


def test_labels_are_numbered_in_their_order():
    rows = [Raw("a", label, n) for n, label in enumerate(["10", "9", "x", "9", "10", "x"])]
    names = names_of(rows, Path("rows.csv"), "label")
    assert names == ["9", "10", "x"]
    assert [row.label for row in numbered(rows, names, "--data", Path("rows.csv"))] == [1, 0, 2, 0, 1, 2]
    with pytest.raises(
        ValueError, match="--eval-file is 'o.csv': line 7 has the label 'y'; expected one of 9, 10"
    ):
        numbered([Raw("a", "y", 7)], names, "--eval-file", Path("o.csv"))
    for wrong in (rows[:1] * 4, rows[:3]):  # one label; as many labels as rows
        with pytest.raises(ValueError, match="--label-column is 'label', which has"):
            names_of(wrong, Path("rows.csv"), "label")


def check_split(function) -> None:
    """Each row is on one side; equal texts stay together; other rows make no difference to a row's side."""
    rows = [Row(text) for text, _ in texts(400)]
    rows += rows[1:]
    kept, held_out = function(rows, 0.2)
    assert Counter(kept + held_out) == Counter(rows) and not {*kept} & {*held_out}
    assert 0.1 < len(held_out) / len(rows) < 0.3
    assert {*function(rows[100:300], 0.2)[1]} == {*held_out} & {*rows[100:300]}


def test_held_out_rows_are_never_trained_on():
    check_split(split)
    assert split([Row("a")], 0.0) == ([Row("a")], [])
    with pytest.raises(ValueError, match="--held-out is 0.1, which holds out 0 of 1 rows"):
        split([Row("b")], 0.1)


@pytest.mark.parametrize(
    "wrong",
    [
        lambda rows, share: (rows[int(share * len(rows)) :], rows[: int(share * len(rows))]),
        lambda rows, share: (rows, rows[::5]),
        lambda rows, share: (rows[1::5] + rows[2::5] + rows[3::5] + rows[4::5], rows[::5]),
    ],
    ids=["by place", "trained on too", "every fifth"],
)
def test_a_wrong_split_is_rejected(wrong):
    with pytest.raises(AssertionError):
        check_split(wrong)


def check_batches(make) -> None:
    """An epoch has every row once, in an order of its own; a batch is a function of the seed and the step."""
    rows = [Row(str(n)) for n in range(10)]
    batches = make(rows, 4, 3)
    drawn = [row for step in range(5) for row in batches.at(step)]
    assert sorted(drawn[:10]) == sorted(drawn[10:]) == sorted(rows) and drawn[:10] != drawn[10:]
    again = make(rows, 4, 3)
    assert [again.at(step) for step in (3, 0, 1000, 3)] == [batches.at(step) for step in (3, 0, 1000, 3)]
    assert [row for step in range(5) for row in make(rows, 4, 4).at(step)] != drawn


def test_batches():
    check_batches(Batches)
    assert len(Batches([Row("a")], 3, 0).at(7)) == 3  # fewer rows than a batch has


class OneOrder(Batches):
    def _epoch(self, number):
        return super()._epoch(0)


class Stateful(Batches):
    """Counts its calls: a resumed run would begin anew."""

    calls = 0

    def at(self, step):
        self.calls += 1
        return super().at(self.calls - 1)


class Unseeded(Batches):
    def __init__(self, rows, size, seed):
        super().__init__(rows, size, 0)


@pytest.mark.parametrize("wrong", [OneOrder, Stateful, Unseeded])
def test_wrong_batches_are_rejected(wrong):
    with pytest.raises(AssertionError):
        check_batches(wrong)
