"""First look: what a first step finds out about a closure, beside its losses."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch.overrides import TorchFunctionMode

from .plan import Plan
from .warning import warn


class Watch(TorchFunctionMode):
    """Notes which trained parameters are arguments of torch functions."""

    def __init__(self, plan: Plan) -> None:
        super().__init__()
        groups = plan.groups
        self.names = {id(t): name for g in groups for name, each in zip(g.names, g.objects) for t in each}
        self.seen: set[str] = set()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        for value in (*args, *kwargs.values()):
            for one in value if type(value) in (list, tuple) else (value,):
                if id(one) in self.names:
                    self.seen.add(self.names[id(one)])
        return func(*args, **kwargs)

    def unseen(self, plan: Plan, losses: Sequence[float]) -> tuple[str, ...]:
        """Returns the parameters that were not read. Raises if none was and no loss moved: the closure runs another model."""
        if self.seen:
            return tuple(name for name in plan.names if name not in self.seen)
        if len(set(losses)) == 1:
            raise RuntimeError(
                "the loss never used a trained parameter: the closure runs another model, or a loss that was computed before the step; "
                "give the optimizer the model that the closure runs, and call the model inside the closure"
            )
        return ()  # read by code that torch functions do not show: compiled or scripted


def repeats(plan: Plan, first: float, again: float) -> bool:
    """Whether two readings of the same point agree, to the rounding of sums in another order."""
    if not (math.isfinite(first) and math.isfinite(again)):
        return True
    coarse = any(t.dtype != torch.float32 for group in plan.groups for t in group.theta)
    on_device = any(t.device.type != "cpu" for group in plan.groups for t in group.theta)
    return abs(first - again) <= (4e-3 if coarse else 1e-4 if on_device else 1e-5) * max(abs(first), abs(again))


def distance(plan: Plan, losses: Sequence[float], base: float) -> None:
    """Warns where the losses are far above that of theta: eps reaches beyond the slope that it should measure."""
    middle = sum(losses) / len(losses)
    spread = max(losses) - min(losses)
    if all(map(math.isfinite, [*losses, base])) and abs(middle - base) > max(0.25 * abs(base), spread):
        warn(
            f"the perturbed losses are {middle:.4g} on average where that of the weights is {base:.4g}: eps = {plan.groups[0].eps} may be too "
            "large, so that the difference measures curvature and not slope; lower eps"
        )


__all__ = ["Watch", "distance", "repeats"]
