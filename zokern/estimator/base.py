"""The contract of an estimator: it asks for losses, as often as it likes, and yields estimates of the gradient.

    for estimate in estimator(oracle, plan):
        rule.update(plan.only(estimate), ...)

An estimator is written in tensor operations on float64 losses, in a fixed order and without a Python branch on a value. The same code
then runs on a host, on a device without a synchronisation, and in a captured graph.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from ..evaluation import Evaluation, Point
from ..plan import Plan

# lr of optimizers that are given none: for coefficients in units of loss per weight, and for coefficients of about 1.
SLOPES: float = 2e-5
ONES: float = 2e-4


@dataclass(frozen=True)
class Estimate:
    """g = (1 / count) sum_k coefficients[k] z_k, an estimate of the gradient.

    draws         draw word of each z_k
    coefficients  float64 (parameter groups of the plan, draws), in units of loss per weight
    losses        float64 (queries, losses of a query): what was read
    count         what the sum is divided by
    scope         names of the parameters that move; None: all of the plan
    each          whether coefficients has a row for each parameter, in the plan's order, in place of each group
    slopes        float64 (draws): the loss's derivative along each z_k as read, with the first group's eps; None: not known"""

    draws: tuple[int, ...]
    coefficients: Tensor
    losses: Tensor
    count: int = 1
    scope: tuple[str, ...] | None = None
    slopes: Tensor | None = None
    each: bool = False


class Oracle:
    """What an estimator asks: the losses at points, in one call of the evaluation. The weights are as before after each answer.

    asked  points, losses and plan of the last question"""

    def __init__(self, evaluation: Evaluation, plan: Plan, closure: Callable[[], Any]) -> None:
        self.evaluation, self.plan, self.closure = evaluation, plan, closure
        self.asked: tuple[list[Point], Tensor, Plan] = [], torch.empty(0, dtype=torch.float64, device="cpu"), plan

    def losses(self, points: Sequence[Point], scope: Collection[str] | Plan | None = None) -> Tensor:
        """Returns the losses at the points, float64 [len(points)].

        scope  names of the parameters that are moved, or a plan of theirs; None: all"""
        plan = scope if isinstance(scope, Plan) else self.plan.only(scope)
        try:
            found = self.evaluation.losses(plan, points, self.closure)
        except StopIteration as problem:  # which would end the estimator, a generator, and lose its notes
            error = RuntimeError(f"the closure raised {problem!r}, as an iterator at its end does")
            error.__notes__ = list(getattr(problem, "__notes__", ()))  # type: ignore[attr-defined]
            raise error from problem
        self.asked = list(points), found, plan
        return found


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
