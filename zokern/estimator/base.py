"""The contract of an estimator: it asks for losses, as often as it likes, and yields estimates of the gradient.

    for estimate in estimator(oracle, plan):
        rule.update(plan.only(estimate), ...)

An estimator is written in tensor operations on float64 losses, in a fixed order and without a Python branch on a value. The same code
then runs on a host, on a device without a synchronisation, and in a captured graph.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from ..evaluation import Evaluation, Point
from ..evaluation.loss import mean_of
from ..plan import Draw, Plan

# lr of optimizers that are given none: for coefficients in units of loss per weight, and for coefficients of about 1.
SLOPES: float = 2e-5
ONES: float = 2e-4


@dataclass(frozen=True)
class Estimate:
    """g = (1 / count) sum_k coefficients[k] z_k, an estimate of the gradient.

    draws         of each z_k: a draw word of this step, or (step, draw word) of an earlier one; the last is one of this step
    coefficients  float64 (parameter groups of the plan, draws), in units of loss per weight
    losses        float64 (queries, losses of a query): what was read
    count         what the sum is divided by
    scope         names of the parameters that move; None: all of the plan
    slopes        float64 (draws): the loss's derivative along each z_k as read, with the first group's eps; None: not known"""

    draws: tuple[Draw, ...]
    coefficients: Tensor
    losses: Tensor
    count: int = 1
    scope: tuple[str, ...] | None = None
    slopes: Tensor | None = None


class Oracle:
    """What an estimator asks: the losses at points, in one call of the evaluation. The weights are as before after each answer.

    asked    points, losses and plan of the last question
    closure  of one loss: the one that was given, or the mean of its examples"""

    def __init__(self, evaluation: Evaluation, plan: Plan, closure: Callable[[], Any]) -> None:
        self.evaluation, self.plan, self.given, self.closure = evaluation, plan, closure, closure
        self.asked: tuple[list[Point], Tensor, Plan] = [], torch.empty(0, dtype=torch.float64, device="cpu"), plan

    def losses(self, points: Sequence[Point], scope: Collection[str] | None = None) -> Tensor:
        """Returns the losses at the points, float64 [len(points)]. scope: names of the parameters that are moved; None: all."""
        plan = self.plan if scope is None else self.plan.only(scope)
        found = self._read(plan, points, self.closure)
        self.asked = list(points), found, plan
        return found

    def examples(self, points: Sequence[Point], scope: Collection[str] | None = None) -> Tensor:
        """Returns the loss of each example at the points, float64 [len(points), examples], of a closure that returns a vector of them."""
        plan = self.plan if scope is None else self.plan.only(scope)
        found = self._read(replace(plan, rows=True), points, self.given)
        self.asked, self.closure = (list(points), found.mean(1), plan), mean_of(self.given)
        return found

    def _read(self, plan: Plan, points: Sequence[Point], closure: Callable[[], Any]) -> Tensor:
        try:
            return self.evaluation.losses(plan, points, closure)
        except StopIteration as problem:  # which would end the estimator, a generator, and lose its notes
            error = RuntimeError(f"the closure raised {problem!r}, as an iterator at its end does")
            error.__notes__ = list(getattr(problem, "__notes__", ()))  # type: ignore[attr-defined]
            raise error from problem


class Estimator(Protocol):
    """An object that asks and yields. Its attributes are options, which a state_dict compares; `state` is what it learns.

    queries  draws of a step
    lr       of an optimizer that is given none; SLOPES where an estimator has no such attribute
    state    plain values and tensors that a resumed run continues with; an empty dict where nothing is kept"""

    queries: int
    state: dict[str, Any]

    def __call__(self, oracle: Oracle, plan: Plan) -> Iterator[Estimate]:
        """Yields one estimate or several; each moves the weights before the next question."""


__all__ = ["ONES", "SLOPES", "Estimate", "Estimator", "Oracle"]
