"""The contract of an estimator: it asks for losses, as often as it likes, and yields estimates of the
gradient.

    for estimate in estimator(oracle, plan):
        rule.update(plan.only(estimate), ...)

An estimator is written in tensor operations on float64 losses, in a fixed order and without a Python branch
on a value. The same code then runs on a host, on a device without a synchronisation, and in a captured graph.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..evaluation import THETA, Evaluation, Point
from ..group import Draw, Group
from ..part import Part
from ..plan import Plan

# lr of optimizers that are given none: for coefficients in units of loss per weight, and for coefficients of
# about 1.
SLOPES: float = 2e-5
ONES: float = 2e-4


@dataclass(frozen=True)
class Gradient:
    """weight * grad L1, a term that is back-propagated at theta when a step writes (zokern/first_order.py).

    weight     in the units of the loss
    names      of the parameters that it moves; None: all of the step
    optimizer  torch's, which moves them and has a state and an lr of its own; None: the rule writes each as
               its gradient arrives, together with its draws, and the gradient is freed"""

    weight: float = 1.0
    names: tuple[str, ...] | None = None
    optimizer: torch.optim.Optimizer | None = None


@dataclass(frozen=True)
class Estimate:
    """Holds an estimate of the gradient along draws, which an estimator yields and a rule moves along.

        g = (1 / count) sum_k coefficients[k] z_k, and a back-propagated gradient where there is one

    draws         of each z_k: a draw word of this step, or (step, draw word) of an earlier one; the last is
                  one of this step
    coefficients  float64 (groups of the plan, draws), in units of loss per weight. Groups that are parts of
                  one parameter group, with one eps, take the row of the first
    losses        float64 (queries, losses of a query): what was read
    count         what the sum is divided by
    scope         names of the parameters that move along z; None: all of the plan
    each          whether coefficients has a row for each parameter, in the plan's order, in place of each
                  group
    slopes        float64 (draws): the loss's derivative along each z_k as read, with the first group's eps;
                  None: not known
    curvatures    float64 (parameter groups, draws): |z_k^T H z_k| as read, for a direction that learns its
                  factors; None: not read
    gradient      a back-propagated term beside the draws; None: there is none

    zokern.tune and StepResult.predicted_fall need `slopes`. Raises ValueError, in the step, where the last
    draw is none of this step. Spall 1992, for the form."""

    draws: tuple[Draw, ...]
    coefficients: Tensor
    losses: Tensor
    count: int = 1
    scope: tuple[str, ...] | None = None
    slopes: Tensor | None = None
    each: bool = False
    curvatures: Tensor | None = None
    gradient: Gradient | None = None


class Base(NamedTuple):
    """Other weights, in whose place losses are read.

    write     write(group, states, argument) puts them into the group's tensors (Group.read, Group.put);
              states[tensor] is the optimizer's state of a parameter
    argument  what tells bases with one `write` apart; it is compared"""

    write: Callable[[Group, Any, Any], None]
    argument: Any = None


class Asked(NamedTuple):
    """A question of an estimator, and what was read."""

    points: list[Point]
    losses: Tensor
    plan: Plan
    bases: tuple[Base, ...]
    closure: Callable[[], Any]


class Oracle:
    """Answers an estimator: returns the losses at points, in one call of the evaluation. The weights are as
    before after each answer. Spall 1992, for the form.

    states  the optimizer's state of each parameter
    lens    a rule's view of a point: the weights that stand in for theta (None: theta), and the point
            relative to them
    rows    whether the estimator asks for the losses of examples alone, as zokern.Private: then no other
            part reads losses, which would move the weights by numbers without noise
    asked   the last question
    answers
            losses and slopes that the next estimate is made of. Where one is inf or NaN, the step is
            skipped, whatever the estimator makes of it. The losses of examples alone are not among them:
            their estimator bounds what one of them can do
    finite  of the last estimate: 1.0 where its numbers were finite, so that weights moved, or 0.0, 0-d; None:
            there was none"""

    def __init__(
        self,
        evaluation: Evaluation,
        plan: Plan,
        closure: Callable[[], Any],
        states: Any = None,
        lens: Callable[[Point], tuple[Base | None, Point]] | None = None,
        rows: bool = False,
    ) -> None:
        self.evaluation, self.plan, self.closure, self.states, self.lens = (
            evaluation,
            plan,
            closure,
            states,
            lens,
        )
        self.rows = rows
        self.bases: tuple[Base, ...] = ()  # of at(), the outermost first
        self.answers: list[Tensor] = []
        self.finite: Tensor | None = None
        self.asked = Asked([], torch.empty(0, dtype=torch.float64, device="cpu"), plan, (), self.closure)

    def check_public(self) -> None:
        """Raises ValueError where the estimator asks for losses of examples: none are read beside them."""
        if self.rows:
            raise ValueError(
                "a rule or a direction reads losses of its own, and estimator Private is there to read none "
                "without noise: expected "
                "zokern.Sgd(), zokern.Momentum(), zokern.Adam(), and a direction that is not measured"
            )

    def losses(
        self,
        points: Sequence[Point],
        scope: Collection[str] | Plan | None = None,
        closure: Callable[[], Any] | None = None,
    ) -> Tensor:
        """Returns the losses at the points, float64 [len(points)].

        scope    names of the parameters that are moved, or a plan of theirs; None: all
        closure  computes another loss than the step's; None: the step's

        Raises ValueError where the estimator asks for the losses of examples."""
        self.check_public()
        plan = scope if isinstance(scope, Plan) else self.plan.only(scope)
        closure = closure or self.closure
        found = self._read(plan, points, closure)
        self.asked = Asked(list(points), found, plan, self.bases, closure)
        self.answers.append(found)
        return found

    def examples(self, points: Sequence[Point], scope: Collection[str] | Plan | None = None) -> Tensor:
        """Returns the loss of each example at the points, float64 [len(points), examples].

        For estimators with `rows`: the closure returns a vector of them."""
        plan = scope if isinstance(scope, Plan) else self.plan.only(scope)
        plan = replace(plan, rows=True)
        found = self._read(plan, points, self.closure)
        self.asked = Asked(list(points), found.mean(1), plan, self.bases, self.closure)
        return found

    def moved(self) -> bool:
        """Returns whether weights moved by the last estimate. The host waits for the device.

        An estimator that asks it has `follows`, since in Blockwise's Jacobi order nothing has moved yet."""
        return self.finite is not None and bool(self.finite == 1.0)

    def again(self) -> tuple[float, float]:
        """Returns the loss of the last question's first point, read again, and theta's, at the same base."""
        points, _, plan, bases, closure = self.asked
        with self._all(bases, plan):
            # in this order: where ranks divide the points, another rank than before reads the first one
            found = self._read(plan, [THETA, points[0]], closure)
        middle, first = (found.mean(1) if plan.rows else found).tolist()
        return first, middle

    @contextmanager
    def at(self, base: Base, plan: Plan | None = None) -> Iterator[None]:
        """Reads losses around other weights while inside, under any evaluation; then puts the weights back.

        Weights and low bits have their bits again, also after an exception. plan holds the parameters that
        are written; None: all that are trained. Memory: a copy of them while inside, beside what the
        evaluation takes. Raises RuntimeError while updates of a low-rank direction wait."""
        plan = self.plan if plan is None else plan
        if plan.deferred:
            raise RuntimeError(
                "losses are read at other weights while updates wait in the core: build the optimizer with "
                "defer=False"
            )
        held = [t for group in plan.groups for t in (*group.theta, *(group.residuals or ()))]
        kept = [t.clone() for t in held]
        self.bases = (*self.bases, base)
        try:
            for group in plan.groups:
                base.write(group, self.states, base.argument)
            yield
        finally:
            self.bases = self.bases[:-1]
            with torch.no_grad():
                for tensor, copy in zip(held, kept):
                    tensor.copy_(copy)

    @contextmanager
    def standing(self) -> Iterator[None]:
        """Holds in the parameters, while inside, the weights that the step's losses are read around."""
        base, _ = (None, THETA) if self.lens is None else self.lens(THETA)
        with nullcontext() if base is None else self.at(base):
            yield

    @contextmanager
    def _all(self, bases: Sequence[Base], plan: Plan) -> Iterator[None]:
        """Enters several bases, the outermost first."""
        if not bases:
            yield
            return
        with self.at(bases[0], plan), self._all(bases[1:], plan):
            yield

    def _read(self, plan: Plan, points: Sequence[Point], closure: Callable[[], Any]) -> Tensor:
        """Returns the losses at the points through the lens: a call of the evaluation for each base.

        Inside at() there is no lens: the base is read itself."""
        if self.lens is None or self.bases:
            return self._ask(plan, points, closure)
        seen = [self.lens(point) for point in points]
        read: dict[int, Tensor] = {}
        for base in dict.fromkeys(base for base, _ in seen):
            members = [i for i, (own, _) in enumerate(seen) if own == base]
            with nullcontext() if base is None else self.at(base, plan):
                read.update(zip(members, self._ask(plan, [seen[i][1] for i in members], closure).unbind(0)))
        return torch.stack([read[i] for i in range(len(points))])

    def _ask(self, plan: Plan, points: Sequence[Point], closure: Callable[[], Any]) -> Tensor:
        return self.evaluation.losses(plan, points, closure)

    def slopes(
        self, draws: Sequence[int], scope: Collection[str] | Plan | None = None
    ) -> tuple[Tensor, Tensor]:
        """Returns the loss of theta and its derivative <gradient, z_k> along each draw, float64 [len(draws)].

        scope: names of the parameters that z moves, or a plan of theirs; None: all.
        Raises ValueError for an evaluation that reads losses alone, and for a rule that reads elsewhere."""
        plan = scope if isinstance(scope, Plan) else self.plan.only(scope)
        if self.lens is not None and not self.bases:
            raise ValueError(
                "the rule reads losses around other weights than theta; derivatives, as "
                "zokern.ForwardGradient asks for, are those of theta: "
                "expected a rule such as zokern.Sgd()"
            )
        read = getattr(self.evaluation, "slopes", None)
        if read is None:
            raise ValueError(
                f"evaluation is {self.evaluation.name!r}, which reads losses alone; derivatives, as "
                "zokern.ForwardGradient asks "
                "for, need evaluation='jvp', or 'auto'"
            )
        losses, slopes = read(plan, draws, self.closure)
        self.asked = Asked([THETA] * len(losses), losses, plan, self.bases, self.closure)
        self.answers += [losses, slopes]
        return losses, slopes


class Estimator(Part):
    """Estimates the gradient: the base class of estimators, which ask for losses and yield estimates.

        for estimate in estimator(oracle, plan): rule.update(plan.only(estimate.scope), ..., estimate)

    An estimator of your own has `__call__`, and of the rest what it needs. Its attributes are options, which
    a state_dict compares. Spall 1992, for the form.

        queries         draws of a step
        state           what it learns: plain values and tensors that a resumed run continues with. Each
                        object has its own, which is empty before a run
        begin           sets `state` anew, in the copy that an optimizer takes. One that holds another
                        estimator takes a copy of that there, by its fresh()
        lr              of an optimizer that is given none
        gain            of c over the slope along z, in expectation; None: c is no estimate of a slope
        settles         steps after which what it learns hardly depends on its start. zokern.tune leaves out
                        as many probes
        follows         whether it asks, after an estimate, if the weights moved (Oracle.moved). Blockwise
                        refuses it in Jacobi order, where all blocks are read before one moves
        rows            True where it asks for the losses of examples alone (Oracle.examples)
        backpropagates  True where its estimates have a gradient. It then has forwards(oracle, plan), which
                        yields the estimates without it, for zokern.tune
        perturbs        whether it reads losses away from theta, at eps
        shards          whether it reads losses alone, and no whole tensor of a parameter
        captures        True: its questions are the same in every step, whatever the losses, so that
                        zokern.graph takes it. A subclass says it anew"""

    queries: int = 1
    lr = SLOPES
    gain: float | None = None
    settles: int = 0
    rows = backpropagates = captures = follows = False
    perturbs = shards = True

    def __call__(self, oracle: Oracle, plan: Plan) -> Iterator[Estimate]:
        """Yields one estimate or several; each moves the weights before the next question."""
        raise NotImplementedError(f"estimator {type(self).__name__} has no __call__()")

    def forwards(self, oracle: Oracle, plan: Plan) -> Iterator[Estimate]:
        """Yields the estimates without a back-propagated term."""
        return self(oracle, plan)

    def keeps(self, shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
        """Returns name -> shape of the float32 tensors that it keeps in the optimizer's state of a parameter
        (Oracle.states)."""
        return {}


__all__ = ["ONES", "SLOPES", "Base", "Estimate", "Estimator", "Gradient", "Oracle"]
