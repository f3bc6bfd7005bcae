"""The table and the pages of methods: printed from docstrings and runs,
complete, and the same as in the documents."""

from __future__ import annotations

import inspect
import itertools
import re
import sys
import textwrap
from functools import cache
from pathlib import Path

import pytest
import torch

import zokern
from zokern import cli, methods
from zokern.cli import methods as cli_methods
from zokern.methods.mezo import MeZO

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "docs"))
import list_methods  # noqa: E402

PAGE = ROOT / "docs" / "methods.md"
HOW = "write it with: make methods"


def test_the_document_is_what_the_command_prints(capsys) -> None:
    assert cli.main(["methods", "--markdown"]) == 0
    assert PAGE.read_text() == capsys.readouterr().out, HOW


def check_readme(readme: str) -> None:
    """Its table has rows of docs/methods.md, as they stand there; other methods are named below it."""
    head, _, *rows = cli_methods.markdown_table().splitlines()
    below = readme.split(f"{head}\n", 1)[1].splitlines()
    shown = list(itertools.takewhile(lambda line: line.startswith("|"), below))[1:]
    assert len(shown) >= 8 and set(shown) <= set(rows), "copy rows of docs/methods.md into README.md"
    also = readme.split("\nAlso ", 1)[1].split("## ")[0].split(". [")[0]
    named = [re.match(r"\| `(\w+)`", row)[1] for row in shown] + re.findall(r"`(\w+)`", also)
    assert sorted(named) == sorted(methods.METHODS), f"README.md names each method once; {HOW}"


def test_the_readme_has_the_main_methods_and_names_all() -> None:
    readme = (ROOT / "README.md").read_text()
    check_readme(readme)
    row = next(line for line in cli_methods.markdown_table().splitlines() if line.startswith("| `MeZO`"))
    for change in (
        (row, row.replace("| 2 |", "| 3 |")),
        (f"{row}\n", ""),
        ("`BSZO`, ", ""),
        ("`BSZO`, ", "`BSZO`, `Nothing`, "),
    ):
        with pytest.raises(AssertionError):
            check_readme(readme.replace(*change))


def test_the_list_of_the_readme_is_written(monkeypatch) -> None:
    """As it stands; with a method more; and what lost one gets it again, on lines of 110 columns."""
    readme = (ROOT / "README.md").read_text()
    assert list_methods.listed(readme, methods.METHODS) == readme, HOW
    more = list_methods.listed(readme, [*methods.METHODS, "Zeroth"])
    assert more.count("`Zeroth`") == 1 and max(map(len, more.split("\nAlso ")[1][:900].splitlines())) <= 110
    assert list_methods.listed(readme.replace("`BSZO`, ", ""), methods.METHODS) == readme
    source = Path(methods.__file__).read_text()
    assert list_methods.exported(source, methods.METHODS) == source, HOW
    found = methods.METHODS | {"Zeroth": type("Zeroth", (), {"__module__": "zokern.methods.zeroth"})}
    wider = list_methods.exported(source, found)
    assert "    from .zeroth import Zeroth\n" in wider and '"Zeroth",' in wider
    monkeypatch.setitem(methods.METHODS, "Zeroth", zokern.MeZO)
    check_readme(more)


@pytest.mark.parametrize("name", methods.METHODS)
def test_a_page_is_complete(name, capsys) -> None:
    """Formula, paper with a year, when to use it,
    every argument of the constructor or where it is told, and short lines."""
    page = cli_methods.page(name)
    assert "<-" in page.formula[0] and any(c in page.paper for c in ("19", "20")) and page.use
    assert {"params"} <= {names for names, _ in page.arguments} and all(text for _, text in page.arguments)
    assert cli.main(["methods", name.upper()]) == 0 and capsys.readouterr().out.startswith(f"## {name}\n")


def check_cost(cost) -> None:
    """Losses and bytes that are counted by hand, of a matrix of SIZE x SIZE."""
    side = cli_methods.SIZE
    known = {
        "MeZO": (2, 0.0),
        "FZOO": (9, 0.0),
        "LOZO": (2, 2 * 4 / side),
        "SubZero": (2, 2 * 8 * 4 / side),
        "TeZO": (2, 2 * 32 * 4 / side),
        "SparseMeZO": (2, 1.0),
        "HiZOO": (3, 4.0),
    }
    assert {name: tuple(cost(name)[:2]) for name in known} == known
    assert cost("FZOO").lr == 2e-4 and cost("MeZO").eps == 1e-3


def test_costs() -> None:
    check_cost(cli_methods.cost)


def check_mean(cost, names=tuple(methods.METHODS)) -> None:
    """The losses of a whole interval, at a method's own one where a step's number changes in it; of three
    intervals of 3 steps elsewhere."""
    for name in names:
        one = cost(name)
        with_interval = "interval" in inspect.signature(methods.METHODS[name]).parameters
        assert one.interval == 1 or with_interval, f"{name} has an interval, and no argument for it"
        interval = one.interval if name in ("DiZO", "MeZOSVRG", "PGAP") else 3
        counts = counted(name, {"interval": interval} if with_interval else {}, 3 * interval)[interval:]
        mean = one.usual + (one.first - one.usual) / interval
        assert abs(sum(counts) / len(counts) - mean) < 1e-9, f"{name} reads {counts} losses, not {mean}"
        if interval == one.interval:
            assert abs(one.losses - mean) < 1e-9, f"{name} reads {mean} losses a step, not {one.losses}"
        assert one.first != one.usual or one.losses == one.usual


@cache
def _tiny(name: str, options: tuple, steps: int) -> list[int]:
    torch.manual_seed(0)
    model = torch.nn.Sequential(*[torch.nn.Linear(8, 8, bias=False) for _ in range(2)])
    x, counts = torch.ones(1, 8), list[int]()
    optimizer = methods.METHODS[name](
        model, evaluation=cli_methods._Counted(), paired_check=0, **dict(options)
    )
    for _ in range(steps):
        optimizer.evaluation.asked = 0
        result = zokern.step(optimizer, lambda: model(x).square().mean(1))
        counts.append(optimizer.evaluation.asked + (result.first_order_loss is not None))
    return counts


def counted(name: str, options: dict, steps: int) -> list[int]:
    """Returns the losses that each of a method's steps reads."""
    return _tiny(name, tuple(options.items()), steps)


@pytest.mark.filterwarnings("ignore")
def test_losses_are_those_of_a_whole_interval() -> None:
    check_mean(cli_methods.cost)
    assert cli_methods.cost("PGAP").told == "2.2 (22 in one step of 100, else 2)"


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("which", ["usual", "first"])
@pytest.mark.parametrize("name", ["DiZO", "MeZOSVRG", "PGAP"])
def test_a_count_of_one_step_alone_is_rejected(name: str, which: str) -> None:
    right = cli_methods.cost(name)
    one = getattr(right, which)
    with pytest.raises(AssertionError, match=rf"{name} reads \["):
        check_mean(lambda _: right._replace(losses=float(one), usual=one, first=one), [name])
    with pytest.raises(AssertionError, match=f"{name} reads .* losses a step, not"):
        check_mean(lambda _: right._replace(losses=float(one)), [name])


def test_state_of_a_rule_is_counted(monkeypatch) -> None:
    monkeypatch.setitem(methods.METHODS, "WithAdam", lambda m, **o: MeZO(m, rule=zokern.Adam(), **o))
    assert cli_methods.cost("WithAdam").state == 8.0


@pytest.mark.parametrize("change", [{"losses": 3}, {"state": 4.0}, {"lr": 1e-6}], ids=str)
def test_wrong_costs_are_rejected(change) -> None:
    with pytest.raises(AssertionError):
        check_cost(lambda name: cli_methods.cost(name)._replace(**change))


@pytest.mark.parametrize(
    "docstring, missing",
    [
        ("theta <- f\n\nUse it.\n\nparams  a module", None),
        ("theta <- f\n\nText.\n\nparams  a module", "paragraph 'Use it ...'"),
        ("theta <- f\n\nUse it.\n\nparams a module", "arguments"),
    ],
)
def test_a_docstring_without_its_parts_is_refused(monkeypatch, docstring, missing) -> None:
    made = type("Made", (MeZO,), {"__doc__": textwrap.dedent(docstring), "__module__": MeZO.__module__})
    monkeypatch.setitem(methods.METHODS, "Made", made)
    if missing is None:
        assert cli_methods.page("Made").arguments == [("params", "a module")]
        return
    with pytest.raises(ValueError, match=missing):
        cli_methods.page("Made")


NUMBER = re.compile(r"\b\d(?:\.\d)?e-\d\b")
SOURCE = re.compile(r"[Pp]ublished|reference|paper|ZO-Bench")


def check_rates(text: str, docstring) -> None:
    """A row for each method: its published numbers are in the docstring, and its lr in the row."""
    rows = re.findall(r"(?m)^\| ([A-Z][\w-]+)[^|]*\|([^|]*)\|([^|]*)\|", text)
    found = {name.replace("-", ""): f"{every} {adapters}" for name, every, adapters in rows}
    assert sorted(found) == sorted(methods.METHODS), "a row for each method"
    for name, row in found.items():
        told, arguments = docstring(name)
        lrs = " ".join(text for names, text in arguments if "lr" in re.split(r"\W+", names))
        lrs = re.sub(r"None: (lr )?\S+", "", lrs)  # the default
        published = NUMBER.findall((SOURCE.split(lrs, 1) + [""])[1])
        unknown = sorted(set(NUMBER.findall(row)) - set(NUMBER.findall(told)))
        assert not unknown, f"{name}: {unknown} of docs/learning-rates.md is not in its docstring"
        assert set(published[:1]) <= set(NUMBER.findall(row)), f"{name}: lr {published[0]} is published"


def docstring_of(name: str) -> tuple[str, list[tuple[str, str]]]:
    return inspect.getdoc(methods.METHODS[name]), cli_methods.page(name).arguments


RATES = (ROOT / "docs" / "learning-rates.md").read_text()


def test_published_learning_rates_are_those_of_the_docstrings() -> None:
    check_rates(RATES, docstring_of)


def test_other_published_learning_rates_are_rejected() -> None:
    def without(name: str) -> tuple[str, list[tuple[str, str]]]:
        told, arguments = docstring_of(name)
        return NUMBER.sub("", told) if name == "HiZOO" else told, arguments

    with pytest.raises(AssertionError, match="HiZOO: .* is not in its docstring"):
        check_rates(RATES, without)
    for row, wrong, message in (
        ("| HiZOO | 1e-6 (OPT-13B), eps 1e-3 |", "| HiZOO | none found |", "HiZOO: lr 1e-6 is published"),
        ("| ConMeZO | 1e-7,", "| ConMeZO | 3e-7,", r"ConMeZO: \['3e-7'\]"),
        ("| LeZO |", "| Lezo |", "a row for each method"),
    ):
        assert row in RATES
        with pytest.raises(AssertionError, match=message):
            check_rates(RATES.replace(row, wrong), docstring_of)


def test_an_unknown_name_is_refused(capsys) -> None:
    assert cli.main(["methods", "nothing"]) == 2
    assert f"nothing is no method; expected one of {', '.join(methods.METHODS)}" in capsys.readouterr().err


def test_a_method_that_is_left_out_has_its_reason(capsys) -> None:
    for name, reason in cli_methods.LEFT_OUT.items():
        assert name.lower() not in {known.lower() for known in methods.METHODS}
        assert cli.main(["methods", name.lower()]) == 2
        assert reason in capsys.readouterr().err
        assert reason in " ".join(cli_methods.markdown().split())
