"""The Python functions that a step calls do not grow with the number of layers."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import zokern

HOME = str(Path(zokern.__file__).parent)
# functions of zokern in a step; a low-rank z is added to real parameters a matrix at a time
MOST = {
    ("MeZO", "master"): 380, ("MeZO", "inplace"): 390, ("MeZO", "scratch"): 400, ("MeZO", "paired"): 345,
    ("SubZero", "scratch"): 520, ("SubZero", "paired"): 445,
    ("LOZO", "paired"): 460, ("TeZO", "paired"): 450,
}  # fmt: skip


def calls(make: Callable[[nn.Module], Any], layers: int, width: int) -> int:
    """Returns how many functions of zokern the fifth step calls; the first ones prepare what is kept."""
    torch.manual_seed(1)
    model = nn.Sequential(*[nn.Linear(width, width) for _ in range(layers)])
    optimizer, closure = make(model), lambda: model[0](torch.ones(1, width)).square().sum()
    found = 0

    def count(frame: Any, event: str, _: Any) -> None:
        nonlocal found
        found += event == "call" and frame.f_code.co_filename.startswith(HOME)

    for _ in range(4):
        zokern.step(optimizer, closure)
    sys.setprofile(count)
    try:
        zokern.step(optimizer, closure)
    finally:
        sys.setprofile(None)
    return found


def check_calls(make: Callable[[nn.Module], Any], most: int, width: int = 8) -> None:
    few, many = calls(make, 10, width), calls(make, 40, width)
    assert few == many, f"{few} calls with 10 layers, {many} with 40"
    assert many <= most, f"{many} calls"


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("method", "way"), MOST)
def test_calls_do_not_grow_with_layers(method: str, way: str) -> None:
    check_calls(lambda m: getattr(zokern, method)(m, lr=1e-4, evaluation=way), MOST[method, way])


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("way", [zokern.Scratch, zokern.Paired])
def test_calls_do_not_grow_with_matrices_that_are_made_at_their_use(way: type) -> None:
    """It depends on the processor which products torch computes, tile by tile: 545 calls on one, 574 on
    another."""
    check_calls(lambda m: zokern.MeZO(m, lr=1e-4, evaluation=way(budget=1 << 20)), 600, width=260)


class Piecewise(zokern.Master):
    """Looks at one parameter after another."""

    def losses(self, plan: Any, points: Any, closure: Any) -> Tensor:
        for tensor in plan.tensors:
            self.look(tensor)
        return super().losses(plan, points, closure)

    def look(self, tensor: Tensor) -> bool:
        return tensor.is_contiguous()


Piecewise.look.__code__ = Piecewise.look.__code__.replace(co_filename=HOME + "/wrong.py")


class Twice(zokern.Master):
    """Reads every loss again."""

    def losses(self, plan: Any, points: Any, closure: Any) -> Tensor:
        for _ in range(2):
            found = super().losses(plan, points, closure)
        return found


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("wrong", [Piecewise, Twice])
def test_check_rejects(wrong: type) -> None:
    with pytest.raises(AssertionError, match=r"\d calls"):
        check_calls(lambda m: zokern.MeZO(m, lr=1e-4, evaluation=wrong()), MOST["MeZO", "master"])
