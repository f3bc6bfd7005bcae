"""Rules with state for parameters with a dense z: one launch for a group. The states are float32, in the optimizer's state."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..evaluation import Group, Plan


def advance(
    plan: Plan, group: Group, weights: Sequence[float], rule: str, keys: Sequence[str], scalars: Callable[[int], Sequence[float]], states: Any
) -> Tensor | int:  # fmt: skip
    """The verb update_ over the group. keys name the states; scalars(t) are the rule's numbers in a tensor's t-th update.

    Tensors that were frozen for a while, or added later, have fewer updates behind them: each number of updates is a launch."""
    launches: dict[int, list[int]] = {}
    for i, tensor in enumerate(group.tensors):
        state = states[tensor]
        if keys[0] not in state:
            state["updates"] = 0
            for key in keys:
                state[key] = torch.zeros(tensor.shape, dtype=torch.float32, device=tensor.device)
        state["updates"] += 1
        launches.setdefault(state["updates"], []).append(i)
    count: Tensor | int = 0
    for updates, members in launches.items():
        kept = [[states[group.tensors[i]][key] for i in members] for key in keys]
        count = count + group.update_(plan, members, weights, rule, scalars(updates), kept)
    return count


__all__ = ["advance"]
