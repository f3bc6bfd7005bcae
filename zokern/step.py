"""One step, in a straight line: read the losses, weigh them, move the weights once."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import Tensor

from . import shards, underflow
from .backends import Projection
from .device_numbers import Weights
from .estimator import Estimate, Estimator, Oracle
from .evaluation import Evaluation, NotRepeatable
from .evaluation.base import Record
from .first_order import Descent, Move, descend, waits
from .first_step import distance, name_statistics, repeats, unseen
from .group import Group
from .guards import Guards
from .parallel import MicroBatches, Ranks, Together, micro_batches, parts_of
from .plan import Plan
from .result import Numbers, Part, StepResult
from .rule import Rule, Sgd

Movement = tuple[Weights, float, float]  # of a group: the weight of each draw, lr and decay
Closures = Callable[[], Any] | Sequence[Callable[[], Any]]


class Steps(Protocol):
    """What a step needs of an optimizer: its parts, the checked plan, and counters that can refuse.

    drawn  whether the step has used its number"""

    estimator: Estimator
    evaluation: Evaluation
    rule: Rule
    guards: Guards
    ranks: Ranks
    state: Any
    result: StepResult | None
    drawn: bool

    @property
    def steps(self) -> int: ...
    def plan(self) -> Plan: ...
    def prepare(self, plan: Plan, oracle: Oracle) -> None: ...
    def learn(self, plan: Plan, estimate: Estimate, finite: Tensor) -> None: ...
    def count(self, result: StepResult) -> None: ...
    def defers(self) -> bool: ...
    def gated(self) -> bool: ...


def step(optimizer: Any, closure: Closures, first_order: Callable[[], Any] | None = None) -> StepResult:
    """Runs one zeroth-order step: reads the losses that the optimizer's estimator asks for, and moves the
    weights once.

        theta <- (1 - lr wd) theta - (lr / q) sum_k c_k z_k

    optimizer    a zokern optimizer (zokern.MeZO, ...), also in a wrapper with `.optimizer` (accelerate's
                 prepare(), Lightning)
    closure      computes the loss of one batch, and returns a 0-d or [1] tensor or a Python number. It
                 reads the same batch at every call. Evaluations 'master', 'scratch' and 'inplace' call it
                 once per point, under no_grad; 'paired' calls it once. A list of closures are the
                 micro-batches of one step: losses are their mean, in float64 and in the order of the list
    first_order  for methods that back-propagate too (zokern.Addax, zokern.Hybrid): computes the loss that
                 is back-propagated, as of another batch. It is called once, with a graph. None: the
                 closure

    Returns a zokern.StepResult. Writes the trained parameters, once, and nothing else: RNG streams,
    train/eval flags, buffers, attributes of modules and the module tree are as they were. If the closure
    raises, the weights are as they were (evaluation 'inplace': up to rounding), with two exceptions.
    zokern.BlockMeZO in Gauss-Seidel order has written the blocks before the one that was read. An error
    within the back-propagation of zokern.Addax leaves those parameters moved that it had reached. The step
    has then used its number.
    The first step reads its first loss twice, and the loss of theta.
    Raises TypeError, before anything is read, for another optimizer, for what is no closure, and for a
    first_order that nothing uses. Raises RuntimeError when the closure is not repeatable, changed the
    weights or never used them. Raises RuntimeError after too many skipped or dead steps in a row, and when
    the update made weights inf or NaN. Raises zokern.RankFailed, on every rank, where the processes of a
    group cannot go on together (zokern.Parallel). Ranks of sharded weights that read other losses are a
    RuntimeError on all ranks.
    Malladi et al. 2023, Algorithm 1."""
    optimizer = unwrapped(optimizer)
    closure = micro_batches(closure)
    if first_order is None:
        optimizer.step(closure, reads=False)
        return optimizer.result
    estimator = type(optimizer.estimator).__name__
    if not callable(first_order) or not optimizer.estimator.backpropagates:
        raise TypeError(
            f"first_order is {first_order!r:.80} and estimator {estimator}; expected a function that "
            "computes a loss, and an estimator that "
            "back-propagates one: zokern.Addax, zokern.Hybrid"
        )
    optimizer.step(closure, first_order, reads=False)
    return optimizer.result


def unwrapped(optimizer: Any) -> Any:
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


def run(optimizer: Steps, closure: Closures, first_order: Callable[[], Any] | None = None) -> StepResult:
    """Runs the step outside of a torch.inference_mode() around it: its tensors are used by later steps, in
    other modes.

    The closure is called in the mode in which the user wrote it."""
    inside, closure = torch.is_inference_mode_enabled(), micro_batches(closure)
    outside = torch.inference_mode(False) if inside else nullcontext()
    with optimizer.ranks.telling(optimizer.steps), outside, torch.no_grad():
        parts = [torch.inference_mode()(part) if inside else part for part in parts_of(closure)]
        return _run(
            optimizer,
            MicroBatches(parts) if len(parts) > 1 else parts[0],
            closure if first_order is None else first_order,
        )


def _run(optimizer: Steps, closure: Callable[[], Any], first_order: Callable[[], Any]) -> StepResult:
    """The step: ask for losses, estimate the gradient, write the weights once for each estimate.

    Numbers stay where the losses are. The host reads them only where a part of the step needs one."""
    plan: Plan = optimizer.plan()
    lens, rows = optimizer.rule.base, optimizer.estimator.rows
    reading = Together(optimizer.evaluation, optimizer.ranks)
    oracle = Oracle(reading, plan, closure, optimizer.state, lens, rows)
    optimizer.prepare(plan, oracle)
    result: StepResult | None = None
    oracle.answers.clear()  # what a rule or a direction read is theirs to judge
    for estimate in optimizer.estimator(oracle, plan):
        part, record = plan.only(estimate.scope).along(estimate.draws), optimizer.evaluation.record
        part = part.each() if estimate.each else part
        if result is None:
            checked = _check(optimizer, oracle)
            optimizer.ranks.agree(plan)
        moves = _moves(optimizer, part, estimate, oracle)
        oracle.answers.clear()
        result = _recorded(record, part, estimate, checked, result, moves, isinstance(optimizer.rule, Sgd))
        # 0: it is not finite, and the later parts of the step do not move either
        oracle.finite = finite = moves[0][0].projected.control[2]
        descent = None
        gradient = estimate.gradient
        if not optimizer.gated() or (gradient is not None and waits(plan, gradient)):
            if not all(weights.is_finite for weights, _, _ in moves):
                break
        if gradient is not None:
            descent = _descend(optimizer, plan, part, estimate, moves, first_order)
            result.numbers.first_order = descent.loss
            if isinstance(descent.loss, Tensor):
                fine = torch.isfinite(descent.loss)
                moves = [(w.only(fine.to(w.projected.control.device)), lr, decay) for w, lr, decay in moves]
                oracle.finite = finite = moves[0][0].projected.control[2]
            elif not math.isfinite(descent.loss):
                break
        with optimizer.ranks.writing():
            optimizer.learn(part, estimate, finite)
            _update(optimizer, part, moves, result.numbers, estimate.scope is None, descent)
    if result is None:
        raise RuntimeError(
            f"estimator {type(optimizer.estimator).__name__} yielded no estimate; expected one or more a step"
        )
    if plan.tape is None:  # in a capture there are no numbers yet
        optimizer.count(result)
    return result


def _recorded(
    record: Record, plan: Plan, estimate: Estimate, unseen: tuple[str, ...], before: StepResult | None,
    moves: Sequence[Movement], falls: bool
) -> StepResult:  # fmt: skip
    """Returns the record of an estimate, joined to that of the step's estimates before it.

    falls  whether the rule moves the weights along the estimate itself"""
    numbers = Numbers() if before is None else before.numbers
    found = [weights.projected for weights, _, _ in moves]
    fall = _fall(plan, [lr for _, lr, _ in moves]) if falls else None
    flags, weights = [one.control[2] for one in found], [one.weights for one in found]
    numbers.parts.append(Part(estimate.losses, found[0].coefficients, weights, flags, fall, estimate.slopes))
    if record.swallowed is not None:
        numbers.shares["swallowed"] = record.swallowed
    draws = tuple(plan.draws())
    return StepResult(
        seed=plan.seed,
        step=plan.step,
        evaluation=record.evaluation,
        backend=plan.groups[0].backend.name,
        numbers=numbers,
        scratch_bytes=max(record.scratch_bytes, before.scratch_bytes if before else 0),
        unseen=unseen,
        whole=record.whole,
        why=record.why,
        draws=draws if before is None else before.draws + draws,
    )


def _check(optimizer: Steps, oracle: Oracle) -> tuple[str, ...]:
    """First step, and every `paired_check` steps: reads a loss again. Returns the parameters that the first
    step did not read."""
    plan = oracle.asked.plan
    # a resumed run whose weights move would round more often than the run that it continues
    first = optimizer.result is None and (plan.step == 0 or optimizer.evaluation.exact)
    if plan.tape is not None or not optimizer.guards.is_due(plan.step, first):
        return ()
    found = oracle.asked.losses.tolist()
    if plan.sharded:
        shards.agree(plan.tensors, plan.seed, plan.step, found)
    again, base = oracle.again()
    if not repeats(plan, found, again, optimizer.evaluation.exact):
        also = "; with split='points' every rank reads the same batch" * (optimizer.ranks.split == "points")
        raise NotRepeatable(found[0], again, also)
    if not first:
        return ()
    distance(plan, found, base)
    name_statistics(oracle.plan)
    return unseen(replace(oracle.plan, rows=plan.rows), found, oracle.asked.closure)


def _moves(optimizer: Steps, plan: Plan, estimate: Estimate, oracle: Oracle) -> list[Movement]:
    """Returns the movement of every group: none moves unless the numbers of all are finite.

    Those are the answers that the estimate is made of, its coefficients and what comes of them. Where an
    earlier estimate of the step is not finite, none of its later ones is."""
    known: dict[Hashable, Movement] = {}
    rows = estimate.coefficients
    for answer in oracle.answers:  # less 0.0, which keeps every bit, or less NaN
        rows = rows - (answer - answer).sum().to(rows.device)

    def moves(finite: Tensor | None) -> list[Movement]:
        known.clear()
        for key, group, row in zip(keys, plan.groups, rows):
            if key not in known:
                known[key] = _move(optimizer, plan, group, estimate, row, finite)
        return [known[key] for key in keys]

    # groups of one parameter group move alike; estimate.each has a row for every parameter
    keys = [
        (id(g.options), g.eps, g.theta[0].device, i if estimate.each else 0)
        for i, g in enumerate(plan.groups)
    ]
    found = moves(oracle.finite)
    if len(known) == 1:
        return found
    device = found[0][0].projected.control.device
    return moves(
        torch.stack([weights.projected.control[2].to(device) for weights, _, _ in known.values()]).amin()
    )


def _move(
    optimizer: Steps, plan: Plan, group: Group, estimate: Estimate, row: Tensor, finite: Tensor | None
) -> Movement:  # fmt: skip
    """Returns the movement of a group: the weight of each draw, lr and decay.

    row  float64 [draws], the coefficients of this group"""
    options, device = group.options, group.theta[0].device
    lr, weight_decay = float(options["lr"]), float(options["weight_decay"])
    sign = 1.0 if optimizer.guards.maximize else -1.0
    if finite is not None:
        row = torch.where(finite.to(row.device) == 0.0, math.nan, row)
    scalars = plan.numbers(
        lambda: (
            group.eps,
            float(options["lr"]),
            float(options["weight_decay"]),
            math.inf,
            sign,
            estimate.count,
        ),
        torch.float64,
        device,
    )
    projected = group.backend.project(Projection(row.to(device).reshape(1, -1), None, scalars))
    decay = 1.0 - lr * weight_decay
    return Weights(projected, lr, decay), lr, decay


def _descend(
    optimizer: Steps, plan: Plan, part: Plan, estimate: Estimate, moves: Sequence[Movement],
    closure: Callable[[], Any]
) -> Descent:  # fmt: skip
    """Back-propagates an estimate's gradient. What it moves, it moves along its draws as well."""
    assert estimate.gradient is not None
    each: dict[str, Move] = {}
    finite = moves[0][0].projected.control[2] == 1.0
    for group in plan.groups:  # those without draws stay as well where the draws' numbers are not finite
        lr, device = float(group.options["lr"]), group.theta[0].device
        decay = 1.0 - lr * float(group.options["weight_decay"])
        none = Weights.of((), lr, decay, device).only(finite.to(device))
        each |= dict.fromkeys(group.names, (none, lr, decay))
    each |= {name: move for group, move in zip(part.groups, moves) for name in group.names}
    found, sign = Descent(), -1.0 if optimizer.guards.maximize else 1.0
    try:
        descend(found, plan.along(estimate.draws), estimate.gradient, each, optimizer.rule, closure, sign)
    finally:
        optimizer.drawn = optimizer.drawn or bool(found.written)
    return found


def _fall(plan: Plan, lrs: Sequence[float]) -> Callable[..., float | None]:
    """Returns a function that tells the first-order fall of the loss by an estimate under rule SGD, or None
    (StepResult), from its slopes and the weights of each group.

    What was read is the sum over groups of eps_g <gradient_g, z_k>. The fall sums lr_g c_gk <gradient_g,
    z_k>, and so it is known where lr_g c_gk / eps_g has one value for all groups."""
    eps = [group.eps for group in plan.groups]

    def tell(slopes: Sequence[float], weights: Sequence[Sequence[float]]) -> float | None:
        rates = [[lr * w / e for w in own] for lr, e, own in zip(lrs, eps, weights)]
        if not all(
            math.isclose(a, b, rel_tol=1e-6) for others in rates[1:] for a, b in zip(rates[0], others)
        ):
            return None
        return -eps[0] * sum(rate * slope for rate, slope in zip(rates[0], slopes))

    return tell


def _update(
    optimizer: Steps, plan: Plan, moves: list[Movement], numbers: Numbers, whole: bool,
    descent: Descent | None,
) -> None:  # fmt: skip
    """Writes the weights: decay and direction, one rounding. Keeps the share of weights that did not move,
    and counts what is inf or NaN.

    whole    whether all trained parameters move, so that updates of low-rank directions may be deferred
             together
    descent  has moved some parameters, along their draws too"""
    optimizer.drawn = True  # from here on the step has its number, whatever is raised
    if descent is not None:
        numbers.nonfinite += descent.counts
        by_name = {name: move for group, move in zip(plan.groups, moves) for name in group.names}
        left = [name for name in plan.names if name not in descent.written]
        plan = plan.only(left) if left else replace(plan, groups=[])
        moves = [by_name[group.names[0]] for group in plan.groups]
    still = underflow.watch_update(plan)
    for group, (weights, lr, decay) in zip(plan.groups, moves):
        defer = whole and descent is None and optimizer.defers()
        numbers.nonfinite.append(
            optimizer.rule.update(plan, group, weights, lr, decay, optimizer.state, defer)
        )
        group.forget_draws()  # the optimizer keeps the groups until the next step
    if still is not None:
        numbers.shares["dead"] = still()
