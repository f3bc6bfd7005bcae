"""A method is one file: exports and the check against its formula find it by themselves."""

from __future__ import annotations

import math
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from method_check import check_method
from mutant import replaced
from recipes import METHODS

import zokern
from zokern import methods

HOME = [*methods.__path__]
FILE = '''
"""A method of its own: differences of fourth order, eps falls along a cosine."""

import math
from typing import Any

from zokern.estimator import Spsa, Stencil
from zokern.methods.mezo import MeZO
from zokern.optimizer import ZerothOrder

FOURTH = Stencil("fourth", (2.0, 1.0, -1.0, -2.0), (-1 / 12, 8 / 12, -8 / 12, 1 / 12))


class Fourth(ZerothOrder):
    def __init__(self, params: Any, lr: float = 1e-6, eps: float = 1e-3, **options: Any) -> None:
        super().__init__(params, lr=lr, eps=eps, estimator=Spsa(stencil=FOURTH), **options)

    def plan(self):
        share = 0.55 + 0.45 * math.cos(math.pi * min(self.steps, 100) / 100)
        for group in self.param_groups:
            group["eps"] = group.setdefault("first_eps", group["eps"]) * share
        return super().plan()
'''
# what the file should say, told apart from it; and files that say something else
EPS = [2e-3 * (1 + 9 * math.cos(0.5 * math.pi * t / 100) ** 2) / 10 for t in range(5)]
WRONG = {
    "second order": ("(-1 / 12, 8 / 12, -8 / 12, 1 / 12)", "(-0.05, 0.6, -0.6, 0.05)", "offsets\\^3"),
    "a line": ("math.cos(math.pi * min(self.steps, 100) / 100)", "(1 - min(self.steps, 50) / 50)", "eps"),
    "a step early": ("min(self.steps, 100)", "min(self.steps + 1, 100)", "eps"),
    "of the last step": ('group.setdefault("first_eps", group["eps"])', 'group["eps"]', "eps"),
}


def found_in(folder: Path, text: str, monkeypatch: pytest.MonkeyPatch) -> dict[str, type]:
    """Returns the methods of the package with one more file."""
    folder.mkdir(exist_ok=True)
    (folder / "fourth_order.py").write_text(text)
    monkeypatch.setattr(methods, "__path__", [*HOME, str(folder)])
    sys.modules.pop("zokern.methods.fourth_order", None)
    return methods.find()


def check_fourth(method: type) -> None:
    """The suite's own check, and the schedule, which no check can read off the parts."""
    METHODS["Fourth"] = partial(method, lr=3e-3, eps=2e-3)
    try:
        check_method("Fourth")
    finally:
        del METHODS["Fourth"]
    theta = torch.nn.Parameter(torch.ones(3))
    optimizer = method([("theta", theta)], eps=2e-3)
    for eps in EPS:
        zokern.step(optimizer, lambda: theta.square().sum())
        now = optimizer.param_groups[0]["eps"]
        assert math.isclose(now, eps, rel_tol=1e-12), f"eps is {now}, not {eps}"


def test_every_file_of_the_folder_is_exported() -> None:
    files = {path.stem for path in Path(methods.__file__).parent.glob("[a-z]*.py")}
    assert {method.__module__.rsplit(".", 1)[1] for method in methods.METHODS.values()} == files
    for name, method in methods.METHODS.items():
        assert getattr(zokern, name) is getattr(methods, name) is method
        assert name in zokern.__all__ and name in methods.__all__


def test_a_new_file_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With what it defines, and without what it imports;
    the suite checks it against its formula without being told."""
    found = found_in(tmp_path, FILE, monkeypatch)
    assert found.keys() - methods.METHODS.keys() == {"Fourth"} and found["MeZO"] is zokern.MeZO
    assert found["Fourth"].__doc__ is None or "MeZO" not in found["Fourth"].__doc__
    check_fourth(found["Fourth"])
    wrong = replaced(zokern.Spsa, "differences", lambda right, self, losses: right(self, losses) * 12 / 8)
    with wrong, pytest.raises(AssertionError, match="coefficient"):
        check_fourth(found["Fourth"])


@pytest.mark.parametrize("kind", WRONG)
def test_a_wrong_file_is_rejected(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right, wrong, words = WRONG[kind]
    assert right in FILE
    found = found_in(tmp_path, FILE.replace(right, wrong), monkeypatch)
    with pytest.raises(AssertionError, match=words):
        check_fourth(found["Fourth"])


class Unknown(zokern.Spsa):
    """An estimator whose formula nobody has written."""


def test_a_part_without_a_formula_is_not_passed_over() -> None:
    METHODS["unknown"] = partial(zokern.MeZO, lr=3e-3, estimator=Unknown())
    try:
        with pytest.raises(AssertionError, match="the formula of estimator Unknown is not known"):
            check_method("unknown")
    finally:
        del METHODS["unknown"]
