"""Rule ``sgd``: theta <- decay theta + lr sum_k weights[k] z_k, one rounding. Malladi et al. 2023, Algorithm
1."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..backends import Batch, Outer, Terms
from ..device_numbers import Weights, cached_upload
from ..group import Group, ends_of
from ..plan import Plan
from .base import Rule
from .waiting import add_, deposit, is_nothing, summed, total


class Sgd(Rule):
    """Moves the weights along the estimate, as plain SGD does; the rule of every method by default.

        theta <- decay theta + lr g,   g = sum_k weights[k] z_k,   weights[k] = -c_k / q,   decay = 1 - lr wd

    It has no arguments and keeps no state. A weight is rounded once to its dtype. Updates of low-rank
    directions may be summed in the small factor, in float32, and written once (docs/factored.md).
    Malladi et al. 2023, Algorithm 1."""

    name, defers, linear, gated = "sgd", True, True, True
    shards = True

    def update(
        self, plan: Plan, group: Group, weights: Sequence[float], lr: float, decay: float, states: Any,
        defer: bool
    ) -> Tensor | int:  # fmt: skip
        weights = Weights.of(weights, lr, decay, group.theta[0].device)
        noise, projected = plan.noise([(plan.step, 0)], None), weights.projected
        if weights.moves_nothing:
            return group.write(noise, plan.rounding) if group.matrices is not None and not defer else 0
        if group.matrices is None:
            return group.axpy_(
                plan.noise(plan.draws()), projected.amounts, decay, plan.rounding, projected.control
            )
        return deposit(plan, group, summed(plan, group, projected.amounts), weights.kept(decay), defer)

    def descend(
        self, plan: Plan, group: Group, weights: Sequence[float], gradient: Tensor, weight: float, lr: float,
        decay: float
    ) -> Tensor | int:  # fmt: skip
        """theta <- decay theta + lr (sum_k weights[k] z_k - weight gradient) for the one tensor of a group,
        one rounding.

        The sum is made in the gradient's own memory where that is float32, else in 4 bytes a weight of this
        tensor. Returns how many results are inf or NaN."""
        amounts: Any
        if isinstance(weights, Weights) and not plan.knows(weights.projected.weights):
            if weights.moves_nothing:
                return 0
            amounts, control = (
                weights.projected.amounts,
                weights.moves if lr * weight else weights.projected.control,
            )
            table = amounts
        else:
            amounts, control = [lr * w for w in weights], None
            if is_nothing([*amounts, lr * weight], decay):
                return 0
            table = cached_upload(tuple(amounts), torch.float32, gradient.device)
        move = gradient.detach().float().contiguous().mul_(-lr * weight)
        if group.matrices is None and weights:
            batch = Batch([move], group.spans, scales=group.scales)
            group.backend.axpy_(batch, plan.noise(plan.draws()), Terms(table))
        elif group.matrices is not None and weights:
            lefts, rights = zip(*ends_of(group.matrices, total(plan, group, amounts), group.backend))
            group.backend.lowrank_(Batch([move], group.spans), Outer(lefts, rights, [1.0]))
        return add_(plan, group, 0, move, 1.0, decay, control=control)
