"""One step, in a straight line: read the losses, weigh them, move the weights once."""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from . import estimator, underflow
from .arguments import fits
from .evaluation import Group, Plan, Reading
from .evaluation.objective import under_inference
from .rule import Sgd


@dataclass(frozen=True)
class StepResult:
    """What one step measured and did.

    loss          mean of the losses that were read (a float)
    losses        per query, the losses at the stencil's offsets: (L(theta + eps z), L(theta - eps z)) for the central one
    coefficients  per query, the projected gradient c_k in units of loss per weight, float32 (with the first group's eps)
    seed, step    the run's seed and this step's number: with the draw k they name z_k
    skipped       True when a loss, a coefficient, or lr times one, was NaN or infinite in float32: the weights are as they were
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


def run(optimizer: Any, closure: Callable[[], Any]) -> StepResult:
    """The line, outside of a torch.inference_mode() around it: what it keeps is used by later steps, whatever they are in. The closure
    is called inside, where the user wrote it."""
    inside = torch.is_inference_mode_enabled()
    with torch.inference_mode(False), torch.no_grad():
        return _run(optimizer, under_inference(closure) if inside else closure)


def _run(optimizer: Any, closure: Callable[[], Any]) -> StepResult:
    """The line itself; `optimizer` gives the plan, keeps the counters and holds the lock."""
    plan: Plan = optimizer.plan()
    optimizer.refresh(plan, closure)
    check = optimizer.paired_check and plan.step % optimizer.paired_check == 0
    reading: Reading = optimizer.evaluation.read(plan, closure, repeat_first=bool(check))
    try:  # whatever can raise comes before the update
        coefficients = [
            estimator.coefficients(reading.losses, plan.stencil, group.eps, optimizer.clip, optimizer.normalize)
            for group in plan.groups
        ]
        moves = [_move(optimizer, plan, group, found) for group, found in zip(plan.groups, coefficients)]
        finite = all(
            fits([*found, lr, decay, *(lr * w for w in weights)]) for found, (weights, lr, decay) in zip(coefficients, moves)
        )
        result = StepResult(
            loss=estimator.mean([loss for sides in reading.losses for loss in sides]),
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
        )
        optimizer.count(finite, reading)
        still = underflow.watch_update(plan) if finite else None
    except BaseException:
        _update(optimizer, plan, reading, None)  # an evaluation in place still stands beside the weights
        raise
    nonfinite = _update(optimizer, plan, reading, moves if finite else None)
    try:
        if still is not None:
            result = replace(result, dead_updates=still())
        if nonfinite:
            raise RuntimeError(
                f"step {plan.step}: {nonfinite} weights are inf or NaN after the update (coefficients {result.coefficients}); "
                "lower lr, or raise eps; nonfinite='ignore' keeps going"
            )
    except BaseException:
        optimizer.steps += 1  # the weights have moved, and a warning may be an error
        raise
    return result


Move = tuple[list[float], float, float]


def _move(optimizer: Any, plan: Plan, group: Group, coefficients: list[float]) -> Move:
    """What a group's rule is told: the weight of each draw, lr and decay."""
    lr = float(group.options["lr"])
    sign = 1.0 if optimizer.maximize else -1.0
    return [sign * c / plan.queries for c in coefficients], lr, 1.0 - lr * group.options["weight_decay"]


def _update(optimizer: Any, plan: Plan, reading: Reading, moves: list[Move] | None) -> int:
    """The only write: decay, direction and whatever the evaluation left to restore, one rounding. Returns non-finite results."""
    counts = []
    for g, group in enumerate(plan.groups):
        restore = [distance * group.eps for distance in reading.restore]
        if any(restore) and (moves is None or not optimizer.rule.linear):
            Sgd().update(plan, group, [0.0] * plan.queries, 0.0, 1.0, restore, optimizer.state, defer=False)
            restore = [0.0] * plan.queries
        if moves is None:
            continue
        weights, lr, decay = moves[g]
        counts.append(optimizer.rule.update(plan, group, weights, lr, decay, restore, optimizer.state, optimizer.defers(plan)))
    for group in plan.groups:
        group.drawn.clear()  # the optimizer keeps the groups until the next step, and z need not be kept
    if optimizer.nonfinite == "ignore" or moves is None:
        return 0
    return sum(int(count) for count in counts)


def finite_number(name: str, value: Any, *, minimum: float | None = None, above: float | None = None) -> float:
    """A finite Python float within bounds, or a ValueError that says so."""
    one = not isinstance(value, torch.Tensor) or value.numel() == 1
    accepted = one and isinstance(value, (numbers.Real, torch.Tensor)) and type(value) is not bool
    number = float(value) if accepted else math.nan
    low = number if minimum is None else minimum
    if not math.isfinite(number) or number < low or (above is not None and number <= above):
        bound = f" > {above}" if above is not None else f" >= {minimum}" if minimum is not None else ""
        raise ValueError(f"{name} is {value!r}; expected a finite number{bound}")
    return number


def whole_number(name: str, value: Any, least: int, most: int | None = None, none: str = "") -> int:
    """An integer within bounds, or a ValueError that says so."""
    number = least - 1 if isinstance(value, bool) or not isinstance(value, numbers.Integral) else int(value)
    if number < least or (most is not None and number > most):
        bound = f"at least {least}" if most is None else f"{least} <= {name} <= {most}"
        raise ValueError(f"{name} is {value!r}; expected an integer, {bound}" + (f", or None for {none}" if none else ""))
    return number
