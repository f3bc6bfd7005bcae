"""One step, in a straight line: read the losses, weigh them, move the weights once."""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from . import estimator
from .evaluation import Plan, Reading
from .rule import Sgd


@dataclass(frozen=True)
class StepResult:
    """What one step measured and did.

    loss          mean of the losses that were read (a float)
    losses        per query, the losses at the stencil's offsets: (L(theta + eps z), L(theta - eps z)) for the central one
    coefficients  per query, the projected gradient c_k in units of loss per weight, float32 (with the first group's eps)
    seed, step    the run's seed and this step's number: with the draw k they name z_k
    skipped       True when a loss or coefficient was inf or NaN: the weights are as they were
    evaluation, backend   what ran
    scratch_bytes most extra memory that the evaluation held at once
    unseen        trained parameters that the loss never read (they were updated all the same)
    whole         parameters that were perturbed in one piece because their use cannot be tiled
    unpaired      evaluation 'paired': parameters that were read for some side alone
    dead_updates  share of 16-bit weights in a sample that rounding to nearest left where they were; None when not measured
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
    unpaired: tuple[str, ...] = ()
    dead_updates: float | None = None


def step(optimizer: Any, closure: Callable[[], Any]) -> StepResult:
    """One zeroth-order step: theta <- (1 - lr wd) theta - lr (1/q) sum_k c_k z_k.

    optimizer  a zokern optimizer (zokern.MeZO, ...), also as accelerate's prepare() returns it: in a wrapper with `.optimizer`
    closure    computes the loss of one batch: returns a 0-d or [1] tensor or a Python number. It is called once per query and
               offset, under no_grad, on the same batch each time.
    Returns a StepResult. Writes the trained parameters, once, and nothing else: RNG streams, train/eval flags, buffers and the
    module tree are as they were. If the closure raises, the weights are as they were (evaluation 'walk': up to rounding).
    Raises TypeError, before anything is read, for another optimizer and for what is no closure; RuntimeError when the closure
    changed the weights, when the loss never used them, after too many skipped or dead steps in a row, and when the update made
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
    """The zokern optimizer itself, also from a wrapper that is an optimizer; TypeError for everything else."""
    for found in (optimizer, getattr(optimizer, "optimizer", None)):
        if isinstance(optimizer, torch.optim.Optimizer) and hasattr(found, "plan") and hasattr(found, "result"):
            return found
    name = type(optimizer).__name__
    raise TypeError(
        f"optimizer is {name}; expected a zokern optimizer: zokern.step(zokern.MeZO(model), closure); nothing was read or moved"
    )


@torch.no_grad()
def run(optimizer: Any, closure: Callable[[], Any]) -> StepResult:
    """The line itself; `optimizer` gives the plan, keeps the counters and holds the lock."""
    plan: Plan = optimizer.plan()
    optimizer.refresh(plan, closure)
    check = optimizer.paired_check and plan.step % optimizer.paired_check == 0
    reading: Reading = optimizer.evaluation.read(plan, closure, repeat_first=bool(check))
    try:
        coefficients = [
            estimator.coefficients(reading.losses, plan.stencil, group.eps, optimizer.clip, optimizer.normalize)
            for group in plan.groups
        ]
        finite = all(math.isfinite(c) for group in coefficients for c in group)
        optimizer.count(finite, reading)
        sample = optimizer.sample(plan) if finite else None
    except BaseException:
        _update(optimizer, plan, reading, None)  # an evaluation in place still stands beside the weights
        raise
    nonfinite = _update(optimizer, plan, reading, coefficients if finite else None)
    flat = [loss for sides in reading.losses for loss in sides]
    result = StepResult(
        loss=math.fsum(flat) / len(flat) if all(map(math.isfinite, flat)) else math.nan,
        losses=tuple(reading.losses),
        coefficients=tuple(coefficients[0]),
        seed=plan.seed,
        step=plan.step,
        skipped=not finite,
        evaluation=reading.evaluation or optimizer.evaluation.name,
        backend=plan.groups[0].backend.name,
        scratch_bytes=reading.scratch_bytes,
        unseen=reading.unseen,
        whole=reading.whole,
        unpaired=reading.unpaired,
        dead_updates=sample() if sample is not None else None,
    )
    if nonfinite:
        optimizer.steps += 1
        raise RuntimeError(
            f"step {plan.step}: {nonfinite} weights are inf or NaN after the update (coefficients {result.coefficients}); "
            "lower lr, or raise eps; nonfinite='ignore' keeps going"
        )
    return result


def _update(optimizer: Any, plan: Plan, reading: Reading, coefficients: list[list[float]] | None) -> int:
    """The only write: decay, direction and whatever the evaluation left to restore, one rounding. Returns non-finite results."""
    counts = []
    sign = 1.0 if optimizer.maximize else -1.0
    for g, group in enumerate(plan.groups):
        restore = [distance * group.eps for distance in reading.restore]
        if any(restore) and (coefficients is None or not optimizer.rule.linear):
            Sgd().update(plan, group, [0.0] * plan.queries, 0.0, 1.0, restore, optimizer.state, defer=False)
            restore = [0.0] * plan.queries
        if coefficients is None:
            continue
        lr = float(group.options["lr"])
        decay = 1.0 - lr * group.options["weight_decay"]
        weights = [sign * c / plan.queries for c in coefficients[g]]
        counts.append(optimizer.rule.update(plan, group, weights, lr, decay, restore, optimizer.state, optimizer.defers(plan)))
    for group in plan.groups:
        group.drawn.clear()  # the optimizer keeps the groups until the next step, and z need not be kept
    if optimizer.nonfinite == "ignore" or coefficients is None:
        return 0
    return sum(int(count) for count in counts)


def finite_number(name: str, value: Any, *, minimum: float | None = None, above: float | None = None) -> float:
    """A finite Python float within bounds, or a ValueError that says so."""
    accepted = isinstance(value, (numbers.Real, torch.Tensor)) and type(value) is not bool
    number = float(value) if accepted else math.nan
    low = number if minimum is None else minimum
    if not math.isfinite(number) or number < low or (above is not None and number <= above):
        bound = f" > {above}" if above is not None else f" >= {minimum}" if minimum is not None else ""
        raise ValueError(f"{name} is {value!r}; expected a finite number{bound}")
    return number
