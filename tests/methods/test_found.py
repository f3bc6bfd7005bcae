"""A method is one file: exports and the check against its formula find it by themselves."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
from method_check import check_method
from mutant import replaced
from recipes import METHODS

import zokern
from zokern import methods

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
            group["eps"] = self.defaults["eps"] * share
        return super().plan()
'''


def test_every_file_of_the_folder_is_exported() -> None:
    files = {path.stem for path in Path(methods.__file__).parent.glob("[a-z]*.py")}
    assert {method.__module__.rsplit(".", 1)[1] for method in methods.METHODS.values()} == files
    for name, method in methods.METHODS.items():
        assert getattr(zokern, name) is getattr(methods, name) is method
        assert name in zokern.__all__ and name in methods.__all__


def test_a_new_file_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With what it defines, and without what it imports;
    the suite checks it against its formula without being told."""
    (tmp_path / "fourth_order.py").write_text(FILE)
    monkeypatch.setattr(methods, "__path__", [*methods.__path__, str(tmp_path)])
    found = methods.find()
    assert found.keys() - methods.METHODS.keys() == {"Fourth"} and found["MeZO"] is zokern.MeZO
    assert found["Fourth"].__doc__ is None or "MeZO" not in found["Fourth"].__doc__
    METHODS["Fourth"] = partial(found["Fourth"], lr=3e-3, eps=2e-3)
    try:
        check_method("Fourth")
        wrong = replaced(zokern.Spsa, "differences", lambda right, self, losses: right(self, losses) * 12 / 8)
        with wrong, pytest.raises(AssertionError, match="coefficient"):
            check_method("Fourth")
    finally:
        del METHODS["Fourth"]


class Unknown(zokern.Spsa):
    """An estimator whose formula nobody has written."""


def test_a_part_without_a_formula_is_not_passed_over() -> None:
    METHODS["unknown"] = partial(zokern.MeZO, lr=3e-3, estimator=Unknown())
    try:
        with pytest.raises(AssertionError, match="the formula of estimator Unknown is not known"):
            check_method("unknown")
    finally:
        del METHODS["unknown"]
