"""One step, in a straight line: read the losses, weigh them, move the weights once."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch

from . import underflow
from .checks import fits
from .estimator import Estimate, Estimator, Oracle
from .evaluation import Evaluation, NotRepeatable
from .evaluation.base import Record
from .first_order import Descent, Move, descend
from .first_step import distance, name_statistics, repeats, unseen
from .guards import Guards
from .plan import Group, Plan
from .rule import Rule, Sgd


@dataclass(frozen=True)
class StepResult:
    """What one step measured and did.

    loss          mean of the losses that were read, a float: of theta + eps z and theta - eps z, and so above
                  the loss of theta where the loss is convex
    losses        per query, what the estimator read: (L(theta + eps z), L(theta - eps z)) for the central
                  difference
    coefficients  per query, the coefficient c_k of z_k in units of loss per weight, float32 (with the first
                  group's eps)
    seed, step    the run's seed and this step's number
    draws         (step, draw word) of each coefficient's z_k: the seed and these name it
    skipped       True when a loss, a coefficient, or lr times one, was NaN or infinite in float32: the
                  weights are as they were
    evaluation    the way in which the losses were read;  why: evaluation 'auto': the reason for the choice
    backend       what ran the kernels
    scratch_bytes most extra memory that the evaluation held at once
    unseen        first step: trained parameters that the loss did not read (they are updated all the same)
    whole         parameters that were copied in one piece because their use cannot be tiled
    swallowed     evaluation 'master': share of sampled 16-bit weights that the perturbation left as they
                  were; None: not measured
    predicted_fall  first-order fall of the loss of this batch by this step, (lr / n) sum_k c_k s_k in the
                    loss's unit, s_k the slope that
                  was read along z_k (c_k itself for Spsa); summed over the parts of a step. It assumes rule
                  SGD, and leaves weight decay, curvature and rounding out. One number was read for all
                  groups, so it needs lr c_k / eps to be equal in them. The slope is the batch's: on other
                  data the fall is less, as E[c^2] is |gradient|^2 plus the variance over batches and the
                  noise of the losses. Its mean over draws with E[z z^T] = I is lr |gradient|^2. Bayesian
                  takes its posterior mean for s_k. Negative with maximize. None: another rule, groups that
                  differ, a skipped step, an estimator that tells no slopes
    first_order_loss  estimators with a back-propagated term: the loss of theta that was back-propagated
    dead_updates  share of 16-bit weights in a sample that rounding to nearest left where they were; None: not
                  measured
    """

    loss: float
    losses: tuple[tuple[float, ...], ...]
    coefficients: tuple[float, ...]
    seed: int
    step: int
    skipped: bool
    evaluation: str
    backend: str
    scratch_bytes: int = 0
    unseen: tuple[str, ...] = ()
    whole: tuple[str, ...] = ()
    dead_updates: float | None = None
    why: str = ""
    swallowed: float | None = None
    predicted_fall: float | None = None
    draws: tuple[tuple[int, int], ...] = ()
    first_order_loss: float | None = None


class Steps(Protocol):
    """What a step needs of an optimizer: its parts, the checked plan, and counters that can refuse.

    drawn  whether the step has used its number"""

    estimator: Estimator
    evaluation: Evaluation
    rule: Rule
    guards: Guards
    state: Any
    result: StepResult | None
    drawn: bool

    def plan(self) -> Plan: ...
    def prepare(self, plan: Plan, oracle: Oracle) -> None: ...
    def learn(self, plan: Plan, estimate: Estimate) -> None: ...
    def count(self, finite: bool, result: StepResult) -> None: ...
    def defers(self) -> bool: ...


def step(
    optimizer: Any, closure: Callable[[], Any], first_order: Callable[[], Any] | None = None
) -> StepResult:
    """One zeroth-order step: theta <- (1 - lr wd) theta - lr (1/q) sum_k c_k z_k.

    optimizer  a zokern optimizer (zokern.MeZO, ...), also in a wrapper with `.optimizer` (accelerate's
               prepare(), Lightning)
    closure    computes the loss of one batch: returns a 0-d or [1] tensor or a Python number. It reads the
               same batch at every call. Evaluations 'master', 'scratch' and 'inplace' call it once per point,
               under no_grad; 'paired' calls it once
    first_order  of methods that back-propagate too (zokern.Addax, zokern.Hybrid): computes the loss that is
                 back-propagated, as of
               another batch; it is called once, with a graph. None: closure
    Returns a StepResult. Writes the trained parameters, once, and nothing else: RNG streams, train/eval
    flags, buffers, attributes of modules and the module tree are as they were. If the closure raises, the
    weights are as they were (evaluation 'inplace': up to rounding). The first step reads its first loss
    twice, and the loss of theta. Raises TypeError, before anything is read, for another optimizer, for what
    is no closure, and for a first_order that nothing uses; RuntimeError when the closure is not repeatable,
    changed the weights or never used them, after too many skipped or dead steps in a row, and when the update
    made weights inf or NaN. Malladi et al. 2023, Algorithm 1."""
    optimizer = _unwrapped(optimizer)
    if not callable(closure):
        raise TypeError(
            f"closure is {type(closure).__name__} {closure!r:.80}; expected a function without arguments "
            "that computes the loss, which "
            "is read at more than one point: zokern.step(optimizer, lambda: model(**batch).loss)"
        )
    if first_order is None:
        optimizer.step(closure)
        return optimizer.result
    estimator = type(optimizer.estimator).__name__
    if not callable(first_order) or not getattr(optimizer.estimator, "backpropagates", False):
        raise TypeError(
            f"first_order is {first_order!r:.80} and estimator {estimator}; expected a function that "
            "computes a loss, and an estimator that "
            "back-propagates one: zokern.Addax, zokern.Hybrid"
        )
    optimizer.step(closure, first_order)
    return optimizer.result


def _unwrapped(optimizer: Any) -> Any:
    """Returns the zokern optimizer itself, also from a wrapper that is an optimizer; TypeError for everything
    else."""
    # a wrapper may be a subclass of what it wraps (Lightning's), so its inside is looked at first
    for found in (getattr(optimizer, "optimizer", None), optimizer):
        if (
            isinstance(optimizer, torch.optim.Optimizer)
            and hasattr(found, "plan")
            and hasattr(found, "prepare")
        ):
            return found
    name = type(optimizer).__name__
    raise TypeError(
        f"optimizer is {name}; expected a zokern optimizer: zokern.step(zokern.MeZO(model), closure); "
        "nothing was read or moved"
    )


def run(
    optimizer: Steps, closure: Callable[[], Any], first_order: Callable[[], Any] | None = None
) -> StepResult:
    """Runs the step outside of a torch.inference_mode() around it: its tensors are used by later steps, in
    other modes.

    The closure is called in the mode in which the user wrote it."""
    inside = torch.is_inference_mode_enabled()
    with torch.inference_mode(False), torch.no_grad():
        return _run(
            optimizer,
            torch.inference_mode()(closure) if inside else closure,
            closure if first_order is None else first_order,
        )


def _run(optimizer: Steps, closure: Callable[[], Any], first_order: Callable[[], Any]) -> StepResult:
    """The step: ask for losses, estimate the gradient, write the weights once for each estimate."""
    plan: Plan = optimizer.plan()
    lens, rows = getattr(optimizer.rule, "base", None), getattr(optimizer.estimator, "rows", False)
    oracle = Oracle(optimizer.evaluation, plan, closure, optimizer.state, lens, rows)
    optimizer.prepare(plan, oracle)
    result: StepResult | None = None
    for estimate in optimizer.estimator(oracle, plan):
        part, record = plan.only(estimate.scope).along(estimate.draws), optimizer.evaluation.record
        part = part.each() if estimate.each else part
        checked = _check(optimizer, oracle) if result is None else result.unseen
        moves = [
            _move(optimizer, group, estimate, row.tolist())
            for group, row in zip(part.groups, estimate.coefficients)
        ]
        finite = all(fits([*weights, lr, decay, *(lr * w for w in weights)]) for weights, lr, decay in moves)
        fall = predicted_fall(part, estimate, moves) if finite and isinstance(optimizer.rule, Sgd) else None
        descent = (
            _descend(optimizer, plan, part, estimate, moves, first_order)
            if finite and estimate.gradient is not None
            else None
        )
        finite = finite and (descent is None or math.isfinite(descent.loss))
        result = _recorded(record, part, estimate, finite, checked, result, fall)
        whole = estimate.scope is None
        if descent is not None:
            result = replace(result, first_order_loss=descent.loss)
        if whole or not finite:
            optimizer.count(finite, result)
        if not finite:
            return result
        optimizer.learn(part, estimate)
        result = _update(optimizer, part, moves, result, whole, descent)
    if result is None:
        raise RuntimeError(
            f"estimator {type(optimizer.estimator).__name__} yielded no estimate; expected one or more a step"
        )
    if not whole:  # a part of the parameters may not reach the loss
        optimizer.count(True, result)
    return result


def _recorded(
    record: Record, plan: Plan, estimate: Estimate, finite: bool, unseen: tuple[str, ...],
    before: StepResult | None, fall: float | None
) -> StepResult:  # fmt: skip
    """Returns the record of an estimate, joined to that of the step's estimates before it."""
    losses = tuple(map(tuple, estimate.losses.tolist()))
    coefficients, draws = tuple(estimate.coefficients[0].tolist()), tuple(plan.draws())
    if before is not None:
        draws = before.draws + draws
        losses, coefficients = before.losses + losses, before.coefficients + coefficients
        fall = None if fall is None or before.predicted_fall is None else fall + before.predicted_fall
    return StepResult(
        loss=mean([loss for sides in losses for loss in sides]),
        losses=losses,
        coefficients=coefficients,
        seed=plan.seed,
        step=plan.step,
        skipped=not finite,
        evaluation=record.evaluation,
        backend=plan.groups[0].backend.name,
        scratch_bytes=max(record.scratch_bytes, before.scratch_bytes if before else 0),
        unseen=unseen,
        whole=record.whole,
        why=record.why,
        swallowed=record.swallowed,
        predicted_fall=fall,
        draws=draws,
        first_order_loss=None if before is None else before.first_order_loss,
    )


def mean(values: Sequence[float]) -> float:
    """Returns the mean, its sum rounded once; NaN where a value is not finite. The mean of finite values is
    finite."""
    if not all(map(math.isfinite, values)):
        return math.nan
    try:
        return math.fsum(values) / len(values)
    except OverflowError:  # in units of 2**64
        return math.fsum([value * 2.0**-64 for value in values]) / len(values) * 2.0**64


def _check(optimizer: Steps, oracle: Oracle) -> tuple[str, ...]:
    """First step, and every `paired_check` steps: reads a loss again. Returns the parameters that the first
    step did not read."""
    plan = oracle.asked.plan
    # a resumed run whose weights move would round more often than the run that it continues
    first = optimizer.result is None and (plan.step == 0 or optimizer.evaluation.exact)
    if not optimizer.guards.is_due(plan.step, first):
        return ()
    found = oracle.asked.losses.tolist()
    again, base = oracle.again()
    if not repeats(plan, found, again, optimizer.evaluation.exact):
        raise NotRepeatable(found[0], again)
    if not first:
        return ()
    distance(plan, found, base)
    name_statistics(oracle.plan)
    return unseen(oracle.plan, found, oracle.asked.closure)


def _move(optimizer: Steps, group: Group, estimate: Estimate, coefficients: list[float]) -> Move:
    """Returns what a group's rule is told: the weight of each draw, lr and decay."""
    lr = float(group.options["lr"])
    decay = 1.0 - lr * group.options["weight_decay"]
    sign = 1.0 if optimizer.guards.maximize else -1.0
    return [sign * c / estimate.count for c in coefficients], lr, decay


def _descend(
    optimizer: Steps, plan: Plan, part: Plan, estimate: Estimate, moves: Sequence[Move],
    closure: Callable[[], Any]
) -> Descent:  # fmt: skip
    """Back-propagates an estimate's gradient. What it moves, it moves along its draws as well."""
    assert estimate.gradient is not None
    each = {name: _move(optimizer, group, estimate, []) for group in plan.groups for name in group.names}
    each |= {name: move for group, move in zip(part.groups, moves) for name in group.names}
    found, sign = Descent(), -1.0 if optimizer.guards.maximize else 1.0
    try:
        descend(found, plan.along(estimate.draws), estimate.gradient, each, optimizer.rule, closure, sign)
    finally:
        optimizer.drawn = optimizer.drawn or bool(found.written)
    return found


def predicted_fall(plan: Plan, estimate: Estimate, moves: Sequence[Move]) -> float | None:
    """Returns the first-order fall of the loss by an estimate under rule SGD; None where it cannot be told
    (StepResult).

    What was read is the sum over groups of eps_g <gradient_g, z_k>. The fall sums lr_g c_gk <gradient_g,
    z_k>, and so it is known where lr_g c_gk / eps_g has one value for all groups."""
    if estimate.slopes is None:
        return None
    rates = [[lr * w / group.eps for w in weights] for group, (weights, lr, _) in zip(plan.groups, moves)]
    if not all(math.isclose(a, b, rel_tol=1e-6) for others in rates[1:] for a, b in zip(rates[0], others)):
        return None
    return -plan.groups[0].eps * sum(rate * slope for rate, slope in zip(rates[0], estimate.slopes.tolist()))


def _update(
    optimizer: Steps, plan: Plan, moves: list[Move], result: StepResult, whole: bool, descent: Descent | None
) -> StepResult:  # fmt: skip
    """Writes the weights: decay and direction, one rounding. Returns the record with the share of weights
    that did not move.

    whole    whether all trained parameters move, so that updates of low-rank directions may be deferred
             together
    descent  has moved some parameters, along their draws too"""
    optimizer.drawn = True  # from here on the step has its number, whatever is raised
    counts = [] if descent is None else descent.counts
    if descent is not None:
        by_name = {name: move for group, move in zip(plan.groups, moves) for name in group.names}
        left = [name for name in plan.names if name not in descent.written]
        plan = plan.only(left) if left else replace(plan, groups=[])
        moves = [by_name[group.names[0]] for group in plan.groups]
    still = underflow.watch_update(plan)
    for group, (weights, lr, decay) in zip(plan.groups, moves):
        defer = whole and descent is None and optimizer.defers()
        counts.append(optimizer.rule.update(plan, group, weights, lr, decay, optimizer.state, defer))
        group.forget_draws()  # the optimizer keeps the groups until the next step
    if still is not None:
        result = replace(result, dead_updates=still())
    if optimizer.guards.nonfinite != "ignore" and (nonfinite := sum(int(count) for count in counts)):
        raise RuntimeError(
            f"step {plan.step}: {nonfinite} weights are inf or NaN after the update (coefficients "
            f"{result.coefficients}); "
            "lower lr, or raise eps; nonfinite='ignore' keeps going"
        )
    return result
