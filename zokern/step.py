"""One step, in a straight line: read the losses, weigh them, move the weights once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from . import estimator, underflow
from .checks import fits
from .evaluation import THETA, NotRepeatable, Point
from .first_step import distance, name_statistics, repeats, unseen
from .plan import Group, Plan


@dataclass(frozen=True)
class StepResult:
    """What one step measured and did.

    loss          mean of the losses that were read, a float: of theta + eps z and theta - eps z, and so above the loss of theta
                  where the loss is convex
    losses        per query, the losses at the stencil's offsets: (L(theta + eps z), L(theta - eps z)) for the central one
    coefficients  per query, the projected gradient c_k in units of loss per weight, float32 (with the first group's eps)
    seed, step    the run's seed and this step's number: with the draw k they name z_k
    skipped       True when a loss, a coefficient, or lr times one, was NaN or infinite in float32: the weights are as they were
    evaluation    the way in which the losses were read;  why: evaluation 'auto': the reason for the choice
    backend       what ran the kernels
    scratch_bytes most extra memory that the evaluation held at once
    unseen        first step: trained parameters that the loss did not read (they are updated all the same)
    whole         parameters that were copied in one piece because their use cannot be tiled
    swallowed     evaluation 'master': share of sampled 16-bit weights that the perturbation left as they were; None: not measured
    dead_updates  share of 16-bit weights in a sample that rounding to nearest left where they were; None: not measured
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


def step(optimizer: Any, closure: Callable[[], Any]) -> StepResult:
    """One zeroth-order step: theta <- (1 - lr wd) theta - lr (1/q) sum_k c_k z_k.

    optimizer  a zokern optimizer (zokern.MeZO, ...), also in a wrapper with `.optimizer` (accelerate's prepare(), Lightning)
    closure    computes the loss of one batch: returns a 0-d or [1] tensor or a Python number. It reads the same batch at every
               call. Evaluations 'master', 'scratch' and 'inplace' call it once per point, under no_grad; 'paired' calls it once
    Returns a StepResult. Writes the trained parameters, once, and nothing else: RNG streams, train/eval flags, buffers, attributes
    of modules and the module tree are as they were. If the closure raises, the weights are as they were (evaluation 'inplace': up
    to rounding). The first step reads its first loss twice, and the loss of theta.
    Raises TypeError, before anything is read, for another optimizer and for what is no closure; RuntimeError when the closure is
    not repeatable, changed the weights or never used them, after too many skipped or dead steps in a row, and when the update made
    weights inf or NaN. Malladi et al. 2023, Algorithm 1."""
    optimizer = _unwrapped(optimizer)
    if not callable(closure):
        raise TypeError(
            f"closure is {type(closure).__name__} {closure!r:.80}; expected a function without arguments that computes the loss, which "
            "is read at more than one point: zokern.step(optimizer, lambda: model(**batch).loss)"
        )
    optimizer.step(closure)
    return optimizer.result


def _unwrapped(optimizer: Any) -> Any:
    """Returns the zokern optimizer itself, also from a wrapper that is an optimizer; TypeError for everything else."""
    # a wrapper may be a subclass of what it wraps (Lightning's), so its inside is looked at first
    for found in (getattr(optimizer, "optimizer", None), optimizer):
        if isinstance(optimizer, torch.optim.Optimizer) and hasattr(found, "plan") and hasattr(found, "evaluation"):
            return found
    name = type(optimizer).__name__
    raise TypeError(
        f"optimizer is {name}; expected a zokern optimizer: zokern.step(zokern.MeZO(model), closure); nothing was read or moved"
    )


def run(optimizer: Any, closure: Callable[[], Any]) -> StepResult:
    """Runs the step outside of a torch.inference_mode() around it: its tensors are used by later steps, in other modes.

    The closure is called in the mode in which the user wrote it."""
    inside = torch.is_inference_mode_enabled()
    with torch.inference_mode(False), torch.no_grad():
        return _run(optimizer, torch.inference_mode()(closure) if inside else closure)


def _run(optimizer: Any, closure: Callable[[], Any]) -> StepResult:
    """The step; `optimizer` gives the plan, keeps the counters and holds the lock."""
    plan: Plan = optimizer.plan()
    optimizer.drop_low_bits()
    optimizer.refresh(plan, closure)
    sides = [[Point(((plan.draw(k), o),)) if o else THETA for o in plan.stencil.offsets] for k in range(plan.queries)]
    points = [point for each in sides for point in each]
    read = optimizer.evaluation.losses(plan, points, closure)
    unseen = _check(optimizer, plan, points, read, closure)
    found = read.tolist()
    many = len(plan.stencil.offsets)
    losses = tuple(tuple(found[k * many : (k + 1) * many]) for k in range(plan.queries))
    # whatever can raise comes before the update
    coefficients = [
        estimator.coefficients(losses, plan.stencil, group.eps, optimizer.clip, optimizer.normalize) for group in plan.groups
    ]
    moves = [_move(optimizer, plan, group, c) for group, c in zip(plan.groups, coefficients)]
    finite = all(fits([*c, lr, decay, *(lr * w for w in weights)]) for c, (weights, lr, decay) in zip(coefficients, moves))
    record = optimizer.evaluation.record
    result = StepResult(
        loss=estimator.mean(found),
        losses=losses,
        coefficients=tuple(coefficients[0]),
        seed=plan.seed,
        step=plan.step,
        skipped=not finite,
        evaluation=record.evaluation,
        backend=plan.groups[0].backend.name,
        scratch_bytes=record.scratch_bytes,
        unseen=unseen,
        whole=record.whole,
        why=record.why,
        swallowed=record.swallowed,
    )
    optimizer.count(finite, result)
    if not finite:
        return result
    still = underflow.watch_update(plan)
    optimizer.drawn = True  # from here on the step has its number, whatever is raised
    nonfinite = _update(optimizer, plan, moves)
    if still is not None:
        result = replace(result, dead_updates=still())
    if nonfinite:
        raise RuntimeError(
            f"step {plan.step}: {nonfinite} weights are inf or NaN after the update (coefficients {result.coefficients}); "
            "lower lr, or raise eps; nonfinite='ignore' keeps going"
        )
    return result


def _check(optimizer: Any, plan: Plan, points: list[Point], read: Tensor, closure: Callable[[], Any]) -> tuple[str, ...]:
    """First step, and every `paired_check` steps: reads the first loss again. Returns the parameters that the first step did not read."""
    every, first = optimizer.paired_check, optimizer.result is None
    if plan.step and optimizer.evaluation.name == "inplace":
        first = False  # a resumed run would move, and round, more often than the run that it continues
    if not every or not (first or (every != "first" and plan.step % every == 0)):
        return ()
    found = read.tolist()
    again, base = optimizer.evaluation.losses(plan, [points[0], THETA], closure).tolist()
    if not repeats(plan, found, again):
        raise NotRepeatable(found[0], again)
    if not first:
        return ()
    distance(plan, found, base)
    name_statistics(plan)
    return unseen(plan, found, closure)


Move = tuple[list[float], float, float]


def _move(optimizer: Any, plan: Plan, group: Group, coefficients: list[float]) -> Move:
    """Returns what a group's rule is told: the weight of each draw, lr and decay."""
    lr = float(group.options["lr"])
    decay = 1.0 - lr * group.options["weight_decay"]
    sign = 1.0 if optimizer.maximize else -1.0
    return [sign * c / plan.queries for c in coefficients], lr, decay


def _update(optimizer: Any, plan: Plan, moves: list[Move]) -> int:
    """Writes the weights, the only time: decay and direction, one rounding. Returns how many results are not finite."""
    counts = []
    for group, (weights, lr, decay) in zip(plan.groups, moves):
        counts.append(optimizer.rule.update(plan, group, weights, lr, decay, optimizer.state, optimizer.defers(plan)))
        group.drawn.clear()  # the optimizer keeps the groups until the next step, and z need not be kept
    if optimizer.nonfinite == "ignore":
        return 0
    return sum(int(count) for count in counts)
