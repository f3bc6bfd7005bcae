"""Rule ``sgd``: theta <- decay theta + sum_k amounts[k] z_k, one rounding. Malladi et al. 2023, Algorithm 1."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..directions import Matrix
from ..evaluation import Group, Plan


class Sgd:
    name, linear = "sgd", True

    def update(self, plan: Plan, group: Group, amounts: Sequence[float], decay: float, states: Any, defer: bool) -> Tensor | int:
        if group.matrices is None:
            return group.axpy_(plan.direction, plan.seed, plan.draws(), amounts, decay, plan.rounding)
        deposit(group, total(plan, group, amounts), decay)
        return unwritten(group) if defer else group.write(plan.seed, plan.step, plan.rounding)

    def rebase(self, group: Group, matrix: Matrix, old: Tensor, state: Any) -> None:
        """Nothing is kept."""


def total(plan: Plan, group: Group, amounts: Sequence[float]) -> list[Tensor]:
    """sum_k amounts[k] draw_k of each matrix, in the small space, float32, in the order of the queries."""
    sums: list[Tensor] = []
    for query, amount in enumerate(amounts):
        terms = torch._foreach_mul(group.draws(plan, query), float(torch.tensor(amount, dtype=torch.float32)))
        sums = list(terms) if not sums else list(torch._foreach_add(sums, terms))
    return sums


def deposit(group: Group, updates: Sequence[Tensor], decay: float) -> None:
    """pending <- decay pending + update, and the weights' own decay beside it."""
    assert group.matrices is not None
    for matrix, tensor, update in zip(group.matrices, group.tensors, updates):
        if matrix.pending is None:
            matrix.pending, matrix.version = update, tensor._version
        else:
            matrix.pending = (matrix.pending if decay == 1.0 else matrix.pending * decay) + update
        matrix.shrink *= decay


def unwritten(group: Group) -> int:
    """How many waiting numbers are inf or NaN."""
    return sum(int((~torch.isfinite(m.pending)).sum()) for m in group.matrices or () if m.pending is not None)
