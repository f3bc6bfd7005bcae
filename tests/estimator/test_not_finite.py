"""A step that reads a loss or a slope of inf or NaN is a skipped one, whatever the estimator makes of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from typing import Any
from unittest.mock import patch

import pytest
import torch
from family import Rows, loss, weights
from models import same_bits
from torch import Tensor

import zokern
from zokern.directions import Curved
from zokern.estimator import Guided, Oracle
from zokern.plan import Plan

pytestmark = pytest.mark.usefixtures("one_thread")

VALUES = (math.inf, -math.inf, math.nan)


class Spoilt(zokern.Master):
    """Answers with `value` in the place of the number `at` of a step, counted from 0."""

    at, value, seen = -1, 0.0, 0

    def spoilt(self, found: Tensor) -> Tensor:
        first, self.seen = self.seen, self.seen + len(found)
        found = found.clone()
        if first <= self.at < self.seen:
            found[self.at - first] = self.value
        return found

    def losses(self, *given: Any) -> Tensor:
        return self.spoilt(super().losses(*given))


class SpoiltSlopes(zokern.Jvp):
    """As Spoilt, with the losses of theta before the slopes."""

    at, value, seen, spoilt = -1, 0.0, 0, Spoilt.spoilt

    def slopes(self, *given: Any) -> tuple[Tensor, Tensor]:
        losses, slopes = super().slopes(*given)
        both = self.spoilt(torch.cat([losses, slopes]))
        return both[: len(losses)], both[len(losses) :]


class Clamps(zokern.Spsa):
    """An estimator of one's own that makes a finite coefficient of any difference."""

    def slopes(self, *given: Any) -> Tensor:
        return super().slopes(*given).nan_to_num(0.0).clamp(-1.0, 1.0)


def bits(value: Any, without: Collection[str] = ()) -> Any:
    """A copy that is compared by ==, NaN and -0.0 included; without some entries of dicts."""
    if isinstance(value, Tensor):
        return value.dtype, value.detach().numpy().tobytes()
    if isinstance(value, dict):
        return {key: bits(one, without) for key, one in value.items() if key not in without}
    return [bits(one, without) for one in value] if isinstance(value, (list, tuple)) else repr(value)


def check(
    make: Callable[[], Any], rule: Any = zokern.Momentum, decay: float = 0.1, after: int = 3,
    evaluation: Any = Spoilt, last: int = 99, learns: bool = False, late: bool = False, **options: Any
) -> None:  # fmt: skip
    """A step with one flaw, in every place: AssertionError where it is no skipped one or changes a bit.

    after   steps before it
    last    the last place that is looked at
    learns  whether the estimator may keep something of such a step
    late    whether the host knows no number, as on a GPU"""
    params = weights()
    optimizer = zokern.MeZO(
        params.items(), lr=1e-3, eps=1e-2, weight_decay=decay, estimator=make(), rule=rule(),
        evaluation=evaluation(), paired_check=None, max_skips=None, **options
    )  # fmt: skip
    reads = optimizer.evaluation
    # updates are counted in every step
    without = ("updates", *(("anchor",) if learns else ()))

    def all_bits() -> Any:
        return bits(
            [params, [*optimizer.state.values()], {} if learns else optimizer.estimator.state], without
        )

    with patch.object(Plan, "knows", lambda *_: False) if late else nullcontext():
        for _ in range(after):
            assert not zokern.step(optimizer, lambda: loss(params)).skipped
        before, tries = all_bits(), 0
        for value in VALUES:
            at = 0
            while at == 0 or at < min(reads.seen, last + 1):
                reads.at, reads.value, reads.seen, optimizer.run.step = at, value, 0, after
                skipped, tries = zokern.step(optimizer, lambda: loss(params)).skipped, tries + 1
                assert skipped and optimizer.guards.skips == tries, f"number {at} is {value}, not skipped"
                assert all_bits() == before, f"number {at} is {value}, a bit has changed"
                at += 1
            assert at > 1, f"number {at} was not read"


def by_name(name: str) -> str:
    return name


CASES: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
    "spsa": (partial(zokern.Spsa, 2), {}),
    "spsa, forward": (partial(zokern.Spsa, 2, "forward"), {}),
    "sign": (zokern.Sign, {}),
    "kernel": (zokern.Kernel, {}),
    "kernel, tensors": (partial(zokern.Kernel, scope="tensor"), {}),
    "kernel, norms": (partial(zokern.Kernel, clip_norm=1e-3), {}),
    "spread": (partial(zokern.Spread, 3), {}),
    "ranked": (partial(zokern.Ranked, 2), {}),
    "leave one out": (zokern.LeaveOneOut, {}),
    "conservative": (zokern.Conservative, {"rule": zokern.Sgd, "decay": 0.0}),
    "curvature": (zokern.Curvature, {"direction": Curved(0.1)}),
    "guided": (Guided, {}),
    "guided, another seed": (Guided, {"seed": 2}),
    "anchored": (zokern.Anchored, {}),
    "an anchor": (zokern.Anchored, {"after": 2, "learns": True}),
    "forward gradient": (partial(zokern.ForwardGradient, 2), {"evaluation": SpoiltSlopes}),
    "clamps": (Clamps, {}),
    "jacobi": (lambda clip: zokern.Blockwise(zokern.Spsa(clip=clip), by_name, "jacobi"), {}),
    "the first block": (lambda clip: zokern.Blockwise(zokern.Spsa(clip=clip), by_name), {"last": 1}),
    "layers": (lambda clip: zokern.Layers(zokern.Spsa(clip=clip)), {"rule": zokern.Sgd}),
    "layers, guided": (lambda clip: zokern.Layers(Guided(clip=clip)), {"rule": zokern.Sgd}),
    "mixed": (lambda clip: zokern.Mixed(0.5, zokern.Spsa(clip=clip)), {"rule": zokern.Sgd}),
    "split": (lambda clip: zokern.Split(["head.weight"], zokern.Spsa(clip=clip)), {"rule": zokern.Sgd}),
    "bayesian": (lambda clip: zokern.Bayesian(), {}),
}


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("clip", [None, 0.5])
@pytest.mark.parametrize("case", CASES)
def test_a_flaw_is_a_skipped_step(case: str, clip: float | None, late: bool) -> None:
    make, how = CASES[case]
    check(lambda: make(clip=clip), late=late, **how)


def test_steps_that_are_skipped_stop_a_run() -> None:
    """By the guard, also where a sign would be taken of NaN; and no weight decays meanwhile."""
    params, bad = weights(), [1.0]
    optimizer = zokern.ZOSignSGD(params.items(), weight_decay=1.0, evaluation="master", max_skips=4)
    zokern.step(optimizer, lambda: loss(params))
    before, bad[0] = bits(params), math.nan
    with pytest.raises(RuntimeError, match="4 steps in a row had a loss"):
        for _ in range(5):
            zokern.step(optimizer, lambda: loss(params) * bad[0])
    assert optimizer.steps == 5 and bits(params) == before


@pytest.mark.parametrize("clip", [None, 0.5])
@pytest.mark.parametrize("value", VALUES)
def test_an_anchor_with_a_flaw_is_not_used(clip: float | None, value: float) -> None:
    """Where the host does not know of it: the step after it is skipped, too."""
    params = weights()
    optimizer = zokern.MeZO(
        params.items(), lr=1e-3, estimator=zokern.Anchored(clip=clip), evaluation=Spoilt(), paired_check=None
    )
    reads = optimizer.evaluation
    with patch.object(Plan, "knows", lambda *_: False):
        zokern.step(optimizer, lambda: loss(params))
        zokern.step(optimizer, lambda: loss(params))
        reads.at, reads.value, reads.seen, before = 0, value, 0, bits(params)
        assert all(zokern.step(optimizer, lambda: loss(params)).skipped for _ in range(2))
        assert bits(params) == before
        assert not zokern.step(optimizer, lambda: loss(params)).skipped


@pytest.mark.parametrize("value", VALUES)
def test_examples_alone_are_bounded_by_their_estimator(value: float) -> None:
    """One of ten moves a private step by its bound; that it is no number may not be seen otherwise."""
    for make in (zokern.Private, lambda: zokern.Blockwise(zokern.Private(), by_name, "jacobi")):
        model, scale = Rows(), torch.ones(10)
        scale[3] = value
        optimizer = zokern.MeZO(model, lr=1e-3, estimator=make(), evaluation="master", paired_check=None)
        before = model.layers[0].weight.detach().clone()
        result = zokern.step(optimizer, lambda model=model, scale=scale: model() * scale)
        assert not result.skipped and all(map(math.isfinite, result.coefficients))
        assert not any(map(math.isfinite, result.losses[0])) and not same_bits(model.layers[0].weight, before)


class PastTheOracle(Clamps):
    """Asks the evaluation itself."""

    def __call__(self, oracle: Any, plan: Any) -> Any:
        losses = oracle.evaluation.losses(plan, self.points(plan), oracle.closure).view(self.queries, -1)
        yield self.estimate(plan, losses, self.differences(losses))


class Cut(Spoilt):
    """An evaluation that answers with numbers in the place of inf and NaN."""

    def losses(self, *given: Any) -> Tensor:
        return super().losses(*given).nan_to_num(1.0, 9.0, -9.0)


class Decays(zokern.Sgd):
    """A rule that decays in a skipped step, too."""

    gated = True

    def update(self, plan: Any, group: Any, *rest: Any) -> Any:
        found = super().update(plan, group, *rest)
        for i in range(len(group.names)):
            group.put(i, group.read(i) * 0.999)
        return found


class Newest(Guided):
    """Keeps the newest draw, also of a skipped step."""

    def __call__(self, oracle: Any, plan: Any) -> Any:
        yield from super().__call__(oracle, plan)
        self.state["best"] = [plan.step, plan.draw(0)]


class Chooses(zokern.Spsa):
    """Chooses by a loss that is in no record."""

    def __call__(self, oracle: Any, plan: Any) -> Any:
        for estimate in super().__call__(oracle, plan):
            (last,) = oracle.losses(self.points(plan)[:1])
            yield replace(estimate, coefficients=estimate.coefficients * torch.where(last > 0, 1.0, 0.5))


WRONG: dict[str, Callable[[], None]] = {
    "asks past the oracle": lambda: check(PastTheOracle),
    "an evaluation that cuts": lambda: check(zokern.Spsa, evaluation=Cut),
    "a rule that decays": lambda: check(zokern.Spsa, rule=Decays),
    "keeps the newest draw": lambda: check(Newest),
    "an earlier block has moved": lambda: check(lambda: CASES["the first block"][0](None), last=2),
}
CUTS: dict[str, Callable[[], Any]] = {
    "clamps": Clamps,
    "sign": zokern.Sign,
    "clip": lambda: zokern.Spsa(clip=0.5),
    "choice": Chooses,
}


@pytest.mark.parametrize("wrong", WRONG)
def test_check_rejects(wrong: str) -> None:
    with pytest.raises(AssertionError, match="number"):
        WRONG[wrong]()


@pytest.mark.parametrize("make", CUTS.values(), ids=CUTS)
def test_check_rejects_an_oracle_that_forgets_its_answers(make: Callable[[], Any]) -> None:
    """Estimators that make finite numbers of inf and NaN depend on it."""
    right = Oracle.losses

    def losses(self: Oracle, *given: Any, **options: Any) -> Tensor:
        found = right(self, *given, **options)
        self.answers.clear()
        return found

    with patch.object(Oracle, "losses", losses), pytest.raises(AssertionError, match="not skipped"):
        check(make)
    check(make)


def test_the_bits_of_finite_numbers_stay() -> None:
    """Beside the largest losses a coefficient of -0.0 is one."""
    largest, params = torch.finfo(torch.float64).max, weights()

    class Signed(zokern.Spsa):
        def __call__(self, oracle: Any, plan: Any) -> Any:
            for estimate in super().__call__(oracle, plan):
                yield replace(estimate, coefficients=torch.tensor([[0.0, -0.0]]).double())

    optimizer = zokern.MeZO(params.items(), estimator=Signed(2), evaluation="master")
    result = zokern.step(optimizer, lambda: sum(map(torch.sum, params.values())).double() * 0.0 + largest)
    assert not result.skipped and [math.copysign(1.0, c) for c in result.coefficients] == [1.0, -1.0]
