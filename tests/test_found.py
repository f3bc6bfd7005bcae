"""A method is one file: exports find it by themselves."""

from __future__ import annotations

from pathlib import Path

import pytest

import zokern
from zokern import methods

FILE = '''
"""A method of its own."""

from typing import Any

from zokern.estimator import Spsa, Stencil
from zokern.methods.mezo import MeZO
from zokern.optimizer import ZerothOrder

FOURTH = Stencil("fourth", (2.0, 1.0, -1.0, -2.0), (-1 / 12, 8 / 12, -8 / 12, 1 / 12))


class Fourth(ZerothOrder):
    def __init__(self, params: Any, lr: float = 1e-6, eps: float = 1e-3, **options: Any) -> None:
        super().__init__(params, lr=lr, eps=eps, estimator=Spsa(stencil=FOURTH), **options)
'''


def test_every_file_of_the_folder_is_exported() -> None:
    files = {path.stem for path in Path(methods.__file__).parent.glob("[a-z]*.py")}
    assert {method.__module__.rsplit(".", 1)[1] for method in methods.METHODS.values()} == files
    for name, method in methods.METHODS.items():
        assert getattr(zokern, name) is getattr(methods, name) is method
        assert name in zokern.__all__ and name in methods.__all__


def test_a_new_file_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With what it defines, and without what it imports."""
    (tmp_path / "fourth_order.py").write_text(FILE)
    monkeypatch.setattr(methods, "__path__", [*methods.__path__, str(tmp_path)])
    found = methods.find()
    assert found.keys() - methods.METHODS.keys() == {"Fourth"} and found["MeZO"] is zokern.MeZO
    assert found["Fourth"].__doc__ is None or "MeZO" not in found["Fourth"].__doc__
