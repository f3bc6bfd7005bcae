"""benchmarks.tuning: which runs are taken, and what the page says of them. Training is made up."""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from benchmarks import tuning  # noqa: E402
from benchmarks.report import Report  # noqa: E402

BEST = {"MeZO": 3.0, "SubZero": 9.0, "ZOSignSGD": 1.0}  # times the lr of tune


class Machine:
    """Stands for what a command asks of the demo and of zokern, and notes the runs that are trained."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
        self.runs, self.left, self.commit = list[tuple[str, float, int]](), math.inf, "aaaaaaa"
        model = torch.nn.Linear(1, 1)
        rows = SimpleNamespace(train=[], held_out=[])
        monkeypatch.setattr(tuning.demo, "task", lambda held_out: (model, None, rows))
        monkeypatch.setattr(tuning, "score", lambda *_: SimpleNamespace(loss=1.0))
        monkeypatch.setattr(tuning, "Batches", lambda *_: SimpleNamespace(next=list))
        monkeypatch.setattr(tuning, "Task", lambda *_: None)
        monkeypatch.setattr(tuning.zokern, "tune", lambda optimizer, closures: SimpleNamespace(lr=1e-3))
        monkeypatch.setattr(tuning, "measure", self.measure)
        monkeypatch.setattr(Report, "folder", lambda report: folder)
        machine = tuning.Report

        def report(quick: bool) -> Report:
            made = machine(quick)
            made.machine |= {"commit": self.commit, "date": "2026-01-02"}
            return made

        monkeypatch.setattr(tuning, "Report", report)

    def measure(
        self, name: str, model: Any, words: Any, rows: Any, run: argparse.Namespace
    ) -> dict[str, Any]:
        if not self.left:
            raise KeyboardInterrupt
        self.left -= 1
        factor = run.lr / 1e-3
        self.runs.append((name, round(factor, 3), run.steps))
        steps = run.steps if math.isinf(run.seconds) else min(run.steps, int(run.seconds))
        loss = math.nan if factor > 8 and name == "MeZO" else 0.5 + abs(math.log(factor / BEST[name]))
        return {"loss": loss, "steps": steps}


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Machine:
    return Machine(monkeypatch, tmp_path)


def rows_of(folder: Path) -> dict[str, list[str]]:
    lines = (folder / "tuning.md").read_text().splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| ")]
    return {row[0]: row[1:] for row in cells[1:]}


def test_three_methods_are_held_against_a_grid(machine: Machine, tmp_path: Path) -> None:
    """An lr is good where the best of the grid is within a factor of 3. A run that diverged is never best."""
    tuning.main([])
    found = rows_of(tmp_path)
    assert {name: row[6:8] for name, row in found.items()} == {
        "MeZO": ["x 3", "yes"], "SubZero": ["x 9", "no"], "ZOSignSGD": ["x 1", "yes"]
    }  # fmt: skip
    assert found["MeZO"][1:6] == ["3.796", "2.697", "1.599", "0.500", "nan"]


def test_time_is_bounded_by_the_steps_of_the_first_run(machine: Machine, tmp_path: Path) -> None:
    """The others take as many, or their losses could not be compared."""
    tuning.main(["--only", "SubZero", "--seconds", "200"])
    assert [steps for _, _, steps in machine.runs] == [100, 40, 40, 40, 40] and machine.runs[0][1] == 1.0
    assert rows_of(tmp_path)["SubZero"][8] == "40"


def test_a_command_that_was_ended_goes_on(machine: Machine, tmp_path: Path) -> None:
    machine.left = 7
    with pytest.raises(KeyboardInterrupt):
        tuning.main([])
    found = rows_of(tmp_path)
    assert found["MeZO"][7] == "yes" and found["SubZero"][6:8] == ["", ""] and "ZOSignSGD" not in found
    assert [cell != "" for cell in found["SubZero"][1:6]] == [False, True, True, False, False]
    machine.left, machine.runs = math.inf, []
    tuning.main([])
    assert [name for name, *_ in machine.runs] == 3 * ["SubZero"] + 5 * ["ZOSignSGD"]
    machine.runs = []
    tuning.main([])
    assert not machine.runs, "all is known at this commit"


def test_another_commit_measures_anew_and_keeps_other_rows(machine: Machine, tmp_path: Path) -> None:
    tuning.main([])
    machine.commit, machine.runs = "bbbbbbb", []
    tuning.main(["--only", "SubZero"])
    assert len(machine.runs) == 5
    assert {name: row[9] for name, row in rows_of(tmp_path).items()} == {
        "MeZO": "aaaaaaa", "SubZero": "bbbbbbb", "ZOSignSGD": "aaaaaaa"
    }  # fmt: skip
