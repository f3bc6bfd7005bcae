"""What zokern.tune promises: a step at its lr takes `share` of the loss off, for every method, and whatever
the unit of the loss is."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import zokern
from zokern.methods import METHODS
from zokern.rule import Averaged

SHARE, STEPS = 0.02, 40
LEFT_OUT = {
    "DPZO": "its bound and its noise are in units of loss",
    "Hybrid": "an optimizer of torch moves a part; see test_tuning.py",
    "MeZOGV": "of one slope in all steps it keeps better and better draws",
}


class Line(nn.Module):
    """L = unit (3 + <b, w>) of two matrices: every step's fall is of first order, and what is left of the
    loss does not matter."""

    def __init__(self, unit: float) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(5)
        self.unit = unit
        self.layers = nn.ParameterDict(
            {name: 0.1 * torch.randn(24, 16, generator=generator) for name in ("v_proj", "q_proj")}
        )
        self.b = [0.05 * torch.randn(24, 16, generator=generator, dtype=torch.float64) for _ in range(2)]

    def forward(self) -> Tensor:
        total = torch.stack([(w.double() * b).sum() for w, b in zip(self.layers.values(), self.b)]).sum()
        return self.unit * (3.0 + total)


def taken(make: Callable[..., Any], unit: float, probes: int, tune: Callable[..., Any]) -> float:
    """The share of the loss that a step takes off, mean over STEPS, after as many in which the parts of a
    method settle."""
    model = Line(unit)
    optimizer, start = make(model, evaluation="master", paired_check=None), float(model().detach())
    # the loss is linear, so that nothing but `reach` would bound lr
    tune(optimizer, model, probes=probes, share=SHARE, reach=math.inf).apply(optimizer)
    losses = []
    for _ in range(2):
        for _ in range(STEPS):
            zokern.step(optimizer, model)
        optimizer.flush()
        losses.append(float(model().detach()))
    return (losses[0] - losses[1]) / STEPS / start


def check_promise(make: Callable[..., Any], probes: int = 32, tune: Callable[..., Any] = zokern.tune) -> None:
    """Within a factor of 2, which 32 probes and 40 steps allow for, and of a loss in another unit."""
    one, other = taken(make, 1.0, probes, tune), taken(make, 100.0, probes, tune)
    assert SHARE / 2 < one < SHARE * 2, f"a step takes {one:.2g} of the loss off, not {SHARE}"
    assert SHARE / 2 < other < SHARE * 2, f"of a loss x 100 a step takes {other:.2g} off, not {SHARE}"


def mezo(estimator: Any = zokern.Spsa, rule: Any = lambda: None) -> Callable[..., Any]:
    return lambda model, **options: zokern.MeZO(model, estimator=estimator(), rule=rule(), **options)


def forward_mode(model: Line, evaluation: str, **options: Any) -> Any:
    """Reads slopes, which has an evaluation of its own."""
    return zokern.FGD(model, **options)


RIGHT: dict[str, Callable[..., Any]] = {
    **{name: METHODS[name] for name in METHODS if name not in LEFT_OUT},
    "FGD": forward_mode, "SubZeroPlus": partial(METHODS["SubZeroPlus"], queries=9),
    "average": mezo(rule=zokern.Momentum),
    "half dampened": mezo(rule=lambda: zokern.Momentum(0.8, 0.5)),
    "window": mezo(rule=lambda: zokern.WindowMomentum(0.9, 5, average=False)),
    "averaged weights": mezo(rule=lambda: Averaged(1.0)),
    "Adam of a kernel": mezo(lambda: zokern.Kernel(3, scale=4.0), zokern.Adam),
    "signs of several": mezo(lambda: zokern.Sign(8), zokern.Momentum),
    "filter in blocks": mezo(lambda: zokern.Blockwise(zokern.Bayesian())),
}  # fmt: skip


@pytest.mark.parametrize("name", RIGHT)
def test_a_step_takes_what_was_promised(name: str) -> None:
    check_promise(RIGHT[name])


def test_a_filter_settles_before_few_probes() -> None:
    check_promise(METHODS["BSZO"], 8)


def test_momentum_has_a_tenth_of_the_lr() -> None:
    model = Line(1.0)
    plain, heavy = (zokern.tune(METHODS[name](model), model) for name in ("MeZO", "ZOMomentum"))
    assert heavy.lr == pytest.approx(0.1 * plain.lr) and heavy.error == pytest.approx(plain.error)


class Slopes(zokern.Ranked):
    """Says that centred ranks are slopes."""

    gain = 1.0


class Unshrunk(zokern.Bayesian):
    """Says that posterior means are slopes."""

    gain = 1.0


class Hasty(zokern.Bayesian):
    """Says that the noise of the first step is that of all."""

    settles = 0


class Light(zokern.Momentum):
    """Says that a heavy ball's steps are as long as SGD's."""

    gain = 1.0


class Full(zokern.WindowMomentum):
    """Says that of its sum."""

    gain = 1.0


WRONG: dict[str, Callable[..., Any]] = {
    "ranks are slopes": mezo(Slopes),
    "posterior means are slopes": mezo(Unshrunk),
    "a heavy ball of one step": mezo(rule=lambda: Light(0.9, 0.0)),
    "a window of one step": mezo(rule=lambda: Full(0.9, 5, average=False)),
}  # fmt: skip


@pytest.mark.parametrize("wrong", WRONG)
def test_a_part_that_misjudges_itself_is_rejected(wrong: str) -> None:
    with pytest.raises(AssertionError, match="a step takes"):
        check_promise(WRONG[wrong])


def test_a_filter_that_has_not_settled_is_rejected() -> None:
    with pytest.raises(AssertionError, match="a step takes"):
        check_promise(mezo(Hasty), 8)


def test_the_length_of_one_draw_is_rejected() -> None:
    """Steps of one length are as long as the mean of several draws."""

    def tune(optimizer: Any, model: Any, **options: Any) -> Any:
        found = zokern.tune(optimizer, model, **options)
        return replace(found, lr=found.lr * math.sqrt(optimizer.estimator.queries))

    with pytest.raises(AssertionError, match="a step takes"):
        check_promise(RIGHT["SubZeroPlus"], tune=tune)
