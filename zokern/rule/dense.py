"""Rules with state for parameters with a dense z: one launch for a group. The states are float32, in the
optimizer's state."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..backends import Batch, Update
from ..device_numbers import on_device
from ..group import Group
from ..plan import Plan
from .base import Rule
from .waiting import is_nothing

PIECE = 1 << 20  # elements of the memory that stands for weights which do not move


def advance(
    rule: Rule,
    plan: Plan,
    group: Group,
    weights: Sequence[float],
    scalars: Callable[[float, float, int], Sequence[float]],
    states: Any,
    lr: float,
    decay: float,
) -> Tensor | int:
    """The verb update_ over the group, with rule `verb`, or `name`. scalars(lr, decay, t) are the numbers of
    update t.

    Tensors that were frozen for a while, or added later, have fewer updates behind them: each number of
    updates is a launch."""
    keys: Sequence[str] = ()
    verb = getattr(rule, "verb", rule.name)
    for tensor, theta in zip(group.tensors, group.theta):
        state, shapes = states[tensor], rule.keeps(tuple(theta.shape), None).tensors
        keys = [*shapes]
        if keys[0] not in state:
            state["updates"] = 0
            for key, shape in shapes.items():
                state[key] = torch.zeros(shape, dtype=torch.float32, device=tensor.device)
    own = [states[tensor] for tensor in group.tensors]

    def advanced() -> None:
        for state in own:
            state["updates"] += 1

    plan.act(advanced)
    launches: dict[int, list[int]] = {}
    for i, state in enumerate(own):
        launches.setdefault(state["updates"], []).append(i)
    count: Tensor | int = 0
    for members in launches.values():
        kept = [[own[i][key] for i in members] for key in keys]
        first = own[members[0]]

        def told(state: dict = first) -> Sequence[float]:
            return scalars(*plan.rates(group, lr, decay), state["updates"])

        shrink, reach, *_ = told()
        if is_nothing([reach], shrink):
            _keep_up(plan, group, members, weights, verb, told, kept)
        else:
            count = count + group.update_(plan, members, weights, verb, told, kept)
    return count


def _keep_up(
    plan: Plan, group: Group, members: Sequence[int], weights: Sequence[float], rule: str,
    scalars: Callable[[], Sequence[float]],
    kept: Sequence[Sequence[Tensor]],
) -> None:  # fmt: skip
    """The states alone, where lr is 0: theta + 0 would turn -0.0 into +0.0, so zeros take the place of the
    weights, a piece at a time."""
    device = group.tensors[members[0]].device
    coeffs, control = on_device(weights, device)
    numbers = plan.numbers(scalars, torch.float32, device)
    zeros = torch.zeros(
        min(PIECE, max(group.theta[i].numel() for i in members)), dtype=torch.float32, device=device
    )
    for i, *states in zip(members, *kept):
        span, size = group.spans[i], group.theta[i].numel()
        if span.pitch is not None:  # a slice of columns, whose pieces have no flat numbers
            update = Update(coeffs, rule, numbers, [[state] for state in states], control)
            still = torch.zeros(group.theta[i].shape, dtype=torch.float32, device=device)
            group.backend.update_(Batch([still], [span]), plan.noise(plan.draws()), update)
            continue
        for start in range(0, size, PIECE):
            stop = min(size, start + PIECE)
            parts = [[state.view(-1)[start:stop]] for state in states]
            scale = group.scale(i)
            factors = None if scale is None else [scale.view(-1)[start:stop]]
            batch = Batch([zeros[: stop - start]], [span._replace(first=span.first + start)], scales=factors)
            update = Update(coeffs, rule, numbers, parts, control)
            group.backend.update_(batch, plan.noise(plan.draws()), update)


__all__ = ["advance"]
