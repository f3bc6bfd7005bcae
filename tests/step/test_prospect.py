"""What a step is expected to gain, against losses whose fall is known,
and the warning that lr is far too small."""

from __future__ import annotations

import importlib
import math
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor, nn

import zokern
from zokern import result
from zokern.estimator import Kernel, Sign, Spread, Spsa
from zokern.prospect import Prospect

steps = importlib.import_module("zokern.step")  # zokern.step is the function
SIZES = ((6, 5), (7,), (4, 8))


class Slope(nn.Module):
    """Loss <b, theta> + curvature / 2 |theta|^2 + 3 in float64, of float32 weights that start at 0."""

    def __init__(self, curvature: float = 0.0) -> None:
        super().__init__()
        generator = torch.Generator("cpu").manual_seed(3)
        self.weights = nn.ParameterList([nn.Parameter(torch.zeros(size)) for size in SIZES])
        self.b = [torch.randn(size, generator=generator, dtype=torch.float64) for size in SIZES]
        self.curvature = curvature

    def forward(self) -> Tensor:
        total: Any = 3.0
        for weight, b in zip(self.weights, self.b):
            weight = weight.double()
            total = total + (weight * b).sum() + 0.5 * self.curvature * (weight * weight).sum()
        return total


def bszo(params: Any, lr: float | None = None, **options: Any) -> Any:
    """At an lr of its own: its coefficients are far less than slopes here."""
    return zokern.BSZO(params, lr=None if lr is None else 3e3 * lr, **options)


METHODS: dict[str, Callable[..., Any]] = {
    "bayesian": bszo,
    "bayesian, few": partial(bszo, queries=3, observations=2),
    "mezo": zokern.MeZO,
    "queries": partial(zokern.MeZO, queries=3),
    "forward": partial(zokern.MeZO, queries=2, stencil="forward"),
    "maximize": partial(zokern.MeZO, maximize=True),
    "clip": partial(zokern.MeZO, estimator=Spsa(2, clip=0.5)),
    "sign": partial(zokern.MeZO, estimator=Sign(3)),
    "kernel": partial(zokern.MeZO, estimator=Kernel(3, scale=4.0, width=0.5)),
    "conservative": partial(zokern.MeZO, estimator=zokern.Conservative(2)),
    "blockwise": partial(zokern.MeZO, estimator=zokern.Blockwise(Spsa(2), block=lambda name: name)),
    "spread": partial(zokern.MeZO, estimator=Spread(3, "central")),
    "jacobi": partial(zokern.BlockMeZO, block=lambda name: name, order="jacobi"),
    "lezo": partial(zokern.LeZO, layer=lambda name: name, sparsity=0.4),
    "rloo": zokern.RLOO,
    "guided": zokern.MeZOGV,
    "guided, unit": partial(zokern.MeZOGV, norm="unit"),
    "fzoo": zokern.FZOO,
    "subzero": partial(zokern.SubZero, rank=2),
    "lozo": zokern.LOZO,
    "tezo": partial(zokern.TeZO, rank=2),
    "pgap": partial(zokern.PGAP, rank=2, probes=2),
}


def groups(model: Slope, *options: dict[str, float]) -> list[dict[str, Any]]:
    """A parameter group for each weight."""
    return [{"params": [item], **given} for item, given in zip(model.named_parameters(), options)]


def check_fall(name: str, options: tuple[dict[str, float], ...] = ({},) * 3) -> None:
    """Where the loss is linear its fall is of first order: what the weights did is what was predicted."""
    for seed in range(6):
        model = Slope()
        params = groups(model, *options) if any(options) else model
        optimizer = METHODS[name](params, lr=1e-2, eps=1e-2, seed=seed)
        before = float(model().detach())
        predicted = zokern.step(optimizer, model).predicted_fall
        optimizer.flush()
        assert predicted is not None and abs(predicted) > 1e-6, f"{name}: predicted {predicted}"
        fall = before - float(model().detach())
        assert math.isclose(predicted, fall, rel_tol=1e-4, abs_tol=1e-7), (
            f"{name}: predicted {predicted}, fell by {fall}"
        )


@pytest.mark.parametrize("name", METHODS)
def test_predicted_fall_is_what_a_linear_loss_does(name: str) -> None:
    check_fall(name)


# lr c / eps ~ lr / eps^2
ALIKE = ({"lr": 1e-2, "eps": 1e-2}, {"lr": 4e-2, "eps": 2e-2}, {"lr": 1e-2, "eps": 1e-2})


def test_groups_whose_sum_can_be_told() -> None:
    check_fall("queries", ALIKE)
    check_fall("sign", ({"lr": 1e-2, "eps": 1e-2}, {"lr": 2e-2, "eps": 2e-2}, {}))


def test_no_prediction_where_none_is_known() -> None:
    """Groups that differ, other rules, skipped steps."""
    model = Slope()
    cases = {
        "groups": zokern.MeZO(groups(model, {"lr": 1e-3}, {"lr": 2e-3}, {})),
        "momentum": zokern.MeZO(model, rule=zokern.Momentum()),
        "adam": zokern.TeZO(model, rank=2, rule="adam"),
    }
    for name, optimizer in cases.items():
        assert zokern.step(optimizer, model).predicted_fall is None, name
    skipped = zokern.step(
        zokern.MeZO(model, paired_check=None, evaluation="master"), lambda: model() * math.nan
    )
    assert skipped.skipped and skipped.predicted_fall is None


def check_expectation(queries: int = 1) -> None:
    """Its mean over draws is lr |gradient|^2, curvature or not:
    the central difference of a quadratic is exact."""
    falls = []
    for seed in range(300):
        model = Slope(curvature=2.0)
        falls.append(
            zokern.step(
                zokern.MeZO(model, lr=1e-3, eps=1e-2, seed=seed, queries=queries), model
            ).predicted_fall
        )
    expected = 1e-3 * sum(float(b.square().sum()) for b in model.b)
    error = math.sqrt(2.0 / (300 * queries)) * expected
    assert abs(sum(falls) / 300 - expected) < 4 * error, f"{sum(falls) / 300} against {expected} +- {error}"


def test_predicted_fall_on_average() -> None:
    check_expectation()


def changed(change: Callable[[Any, Any], Any]) -> AbstractContextManager:
    """The rule of predicted_fall, with its result, or what it is told, changed."""
    right = steps._fall

    def fall(plan: Any, lrs: Any) -> Any:
        return lambda slopes, weights: change(right(plan, lrs), (slopes, weights))

    return patch.object(steps, "_fall", fall)


def squares() -> AbstractContextManager:
    """lr mean c^2, with whatever is called c."""
    right = steps._recorded

    def recorded(record: Any, plan: Any, estimate: Any, *rest: Any) -> Any:
        return right(record, plan, replace(estimate, slopes=estimate.coefficients[0]), *rest)

    return patch.object(steps, "_recorded", recorded)


def of_first_group() -> AbstractContextManager:
    right = steps._fall
    return patch.object(
        steps,
        "_fall",
        lambda plan, lrs: (
            lambda slopes, weights: right(replace(plan, groups=plan.groups[:1]), lrs[:1])(slopes, weights[:1])
        ),
    )


def last_alone() -> AbstractContextManager:
    """The fall of a step's last estimate, not the sum."""
    right = result.Numbers.take

    def take(self: Any, numbers: Any) -> None:
        for i, part in enumerate(self.parts[:-1]):
            if part.fall is not None:
                self.parts[i] = part._replace(fall=lambda *given: 0.0)
        right(self, numbers)

    return patch.object(result.Numbers, "take", take)


WRONG: dict[str, tuple[Callable[[], None], Callable[[], AbstractContextManager]]] = {
    "twice": (check_expectation, lambda: changed(lambda right, given: 2.0 * right(*given))),
    "a sum over queries": (
        partial(check_expectation, 3),
        lambda: changed(lambda right, given: 3.0 * right(*given)),
    ),
    "up": (partial(check_fall, "mezo"), lambda: changed(lambda right, given: -right(*given))),
    "maximize forgotten": (
        partial(check_fall, "maximize"),
        lambda: changed(lambda right, given: abs(right(*given))),
    ),
    "squares of signs": (partial(check_fall, "sign"), squares),
    "squares of spreads": (partial(check_fall, "fzoo"), squares),
    "squares of posterior means": (partial(check_fall, "bayesian"), squares),
    "squares of clipped": (partial(check_fall, "clip"), squares),
    "radius forgotten": (partial(check_fall, "kernel"), squares),
    "last block": (partial(check_fall, "blockwise"), last_alone),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_check_rejects_wrong_prediction(wrong: str) -> None:
    check, mistake = WRONG[wrong]
    with mistake(), pytest.raises(AssertionError, match="predicted|against"):
        check()


def test_check_rejects_the_first_group_for_all() -> None:
    """Its lr c^2 is no fall where other groups have another lr."""
    with of_first_group(), pytest.raises(AssertionError, match="predicted"):
        check_fall("mezo", ({"lr": 1e-2}, {"lr": 3e-2}, {"lr": 1e-3}))


# The warning ------------------------------------------------------------------------------------------------


def said(lr: float, count: int = 25, **options: Any) -> list[str]:
    model = Slope(curvature=1.0)
    optimizer = zokern.MeZO(model, lr=lr, eps=1e-2, **options)
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        for _ in range(count):
            zokern.step(optimizer, model)
    return [str(w.message) for w in found if "a fall of 1 % takes" in str(w.message)]


def check_warning() -> None:
    """Once, after 20 steps, with an lr whose steps take off 1 %; not where the loss is seen to fall."""
    assert said(1e-7, count=19) == []
    (message,) = said(1e-7)
    square = sum(float(b.square().sum()) for b in Slope().b)
    least, most = 0.03 / (1e-7 * square) / 2.5, 0.03 / (1e-7 * square) * 2.5  # 20 draws of c^2
    named, tried = float(message.split("about ")[1].split()[0]), float(message.rsplit("lr = ", 1)[1])
    assert least < named < most and least * 1e-7 < tried < most * 1e-7, message
    assert len(said(1e-7, count=45)) == 1
    assert said(1e-5) == [], f"{1e-5 * square:.1e} of {3.0} is more than 1e-4"
    assert said(0.0) == [], "lr = 0 is meant"
    assert said(1e-7, rule=zokern.Momentum()) == []


def test_warning() -> None:
    check_warning()


def other(result: zokern.StepResult, **numbers: float) -> Any:
    """Numbers of a step, changed."""
    return result.numbers.values._replace(**numbers)


WRONG_WARNINGS = {
    "never": lambda right, self, result, lr: None,
    "always": lambda right, self, result, lr: right(self, other(result, predicted_fall=1e-9), lr),
    "every 20 steps": lambda right, self, result,
    lr: (self.seen.clear() if len(self.seen) == 20 else None, right(self, result, lr)),
    "lr as it is": lambda right, self, result, lr: right(self, result, lr * 1e-3),
    "per mille": lambda right, self, result, lr: right(self, other(result, loss=result.loss * 10), lr),
}  # fmt: skip


@pytest.mark.parametrize("wrong", WRONG_WARNINGS)
def test_check_rejects_wrong_warning(wrong: str) -> None:
    right = Prospect.see
    with (
        patch.object(
            Prospect, "see", lambda self, result, lr: WRONG_WARNINGS[wrong](right, self, result, lr)
        ),
        pytest.raises((AssertionError, ValueError)),
    ):
        check_warning()


# lr where none is given -------------------------------------------------------------------------------------


def test_lr_of_the_parts() -> None:
    """One number where coefficients are slopes, another where steps have one length;
    what is given is taken."""
    model = Slope()
    found = {
        name: make(model).param_groups[0]["lr"]
        for name, make in {
            **METHODS,
            "adam": partial(zokern.MeZO, rule=zokern.Adam()),
            "tezo_adam": partial(zokern.TeZO, rule="adam"),
        }.items()
    }
    ones = {name for name, lr in found.items() if lr == zokern.estimator.base.ONES}
    assert ones == {"sign", "spread", "fzoo", "adam", "tezo_adam"}
    assert {lr for name, lr in found.items() if name not in ones} == {zokern.estimator.SLOPES}
    blocks = zokern.MeZO(model, estimator=zokern.Blockwise(Sign()))
    assert blocks.param_groups[0]["lr"] == zokern.estimator.base.ONES
    assert zokern.FZOO(model, lr=5e-5).param_groups[0]["lr"] == 5e-5
