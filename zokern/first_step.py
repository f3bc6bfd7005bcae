"""First look: what a first step finds out about a closure, beside its losses."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from .evaluation import Isolation
from .parallel import parts_of
from .plan import Plan
from .warning import warn


class Watch(TorchFunctionMode):
    """Notes which trained parameters are arguments of torch functions."""

    def __init__(self, plan: Plan) -> None:
        super().__init__()
        self.names = {
            id(t): name for g in plan.groups for name, each in zip(g.names, g.objects) for t in each
        }
        self.seen: set[str] = set()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        for value in tree_leaves((args, kwargs)):
            if id(value) in self.names:
                self.seen.add(self.names[id(value)])
        return func(*args, **kwargs)


def unseen(plan: Plan, losses: Sequence[float], closure: Callable[[], Any]) -> tuple[str, ...]:
    """Reads the loss of the weights once more, and returns the trained parameters that no part of it reads.

    Raises RuntimeError if it reads none, and the losses of the step are equal:
    the closure runs another model."""
    watch, isolation, before = Watch(plan), Isolation(plan), _sums(plan)
    with isolation.session(eager=True):
        for part in parts_of(closure):
            isolation.read(part, watch)
    if changed := [name for name, a, b in zip(plan.names, before, _sums(plan)) if a != b]:
        _put_back(plan)
        raise RuntimeError(
            f"the closure changed the weights of {changed[0]!r} where no version counter tells, as through "
            ".data: the loss of a step must only read them"
        )
    if watch.seen:
        return tuple(name for name in plan.names if name not in watch.seen)
    if len(set(losses)) == 1:
        raise RuntimeError(
            "the loss never used a trained parameter: the closure runs another model, or the loss was "
            "computed before the step; give the optimizer the model that the closure runs, and call the "
            "model inside the closure"
        )
    return ()  # read by code that torch functions do not show: compiled or scripted


def _sums(plan: Plan) -> list[int]:
    """Returns the sum of the bits of each trained tensor, modulo 2^16 or 2^32:
    torch copies what it sums in a wider type."""
    kinds = {2: torch.int16, 4: torch.int32}
    bits = [t.view(kinds[t.element_size()]) for group in plan.groups for t in group.theta]
    return torch.stack([b.sum(dtype=b.dtype).long().cpu() for b in bits]).tolist()


def _put_back(plan: Plan) -> None:
    """Writes the copies that evaluation 'master' took in this step, where there are any."""
    for group in plan.groups:
        for tensor, copy in zip(group.theta, group.memo.get("masters", ())):
            tensor.copy_(copy)


def name_statistics(plan: Plan) -> None:
    """Warns once of what gradient training would do and a step does not:
    running statistics never move, padding rows do."""
    modules, trained = plan.tree.modules, {id(t) for t in plan.tensors}
    norms = [m for m in modules if getattr(m, "running_mean", None) is not None and m.training]
    norms += [m for m in modules if type(m).__name__ == "_SpectralNorm" and m.training]
    if norms:
        warn(
            f"{len(norms)} modules such as {type(norms[0]).__name__} keep running statistics, which never "
            "move: a step puts buffers back. Before the model is used in eval mode, renew them: "
            "torch.optim.swa_utils.update_bn(loader, model)"
        )
    padded = [
        m
        for m in modules
        if getattr(m, "padding_idx", None) is not None and id(getattr(m, "weight", None)) in trained
    ]
    if padded:
        warn(
            f"the padding row of {len(padded)} modules such as {type(padded[0]).__name__} moves along z, "
            "unlike under gradients, which are 0 there. It matters where a loss reads it; to keep it, write "
            "it back after each step"
        )


def repeats(plan: Plan, losses: Sequence[float], again: float, exact: bool = True) -> bool:
    """Whether the first loss and another reading of its point agree,
    to the rounding of sums in another order.

    In 16 bits also to a quarter of the spread of the losses:
    evaluation 'inplace' rounds the weights in every move."""
    first, spread = losses[0], max(losses) - min(losses)
    if not (math.isfinite(first) and math.isfinite(again)):
        return True
    on_device = any(t.device.type != "cpu" for group in plan.groups for t in group.theta)
    coarse = plan.is_coarse
    allowed = (1e-2 if coarse and not exact else 4e-3 if coarse else 1e-4 if on_device else 1e-5) * max(
        abs(first), abs(again)
    )
    return abs(first - again) <= allowed + (0.25 * spread if coarse and math.isfinite(spread) else 0.0)


def distance(plan: Plan, losses: Sequence[float], base: float) -> None:
    """Warns where the losses are far above that of theta:
    eps reaches beyond the slope that it should measure."""
    middle = sum(losses) / len(losses)
    spread = max(losses) - min(losses)
    if all(map(math.isfinite, [*losses, base])) and abs(middle - base) > max(0.25 * abs(base), spread):
        warn(
            f"the perturbed losses are {middle:.4g} on average where that of the weights is {base:.4g}: eps "
            f"= {plan.groups[0].eps} may be too large, so that the difference measures curvature and not "
            "slope; lower eps"
        )


__all__ = ["distance", "name_statistics", "repeats", "unseen"]
