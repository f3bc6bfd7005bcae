"""Rule ``sgd``: theta <- decay theta + lr sum_k weights[k] z_k, one rounding. Malladi et al. 2023, Algorithm 1."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from ..directions import Matrix
from ..plan import Group, Plan
from .state import Keeps
from .waiting import deposit, is_nothing, total


class Sgd:
    """theta <- decay theta + lr g, g = sum_k weights[k] z_k, the rule of every method by default. One rounding to the weights' dtype.

    It has no arguments and keeps no state. The updates of a factored matrix may wait in its core (r x r, or m x r): there they are summed in
    float32, and W is written once. Malladi et al. 2023, Algorithm 1."""

    name, defers, linear = "sgd", True, True

    def update(
        self, plan: Plan, group: Group, weights: Sequence[float], lr: float, decay: float, states: Any, defer: bool
    ) -> Tensor | int:  # fmt: skip
        amounts = [lr * w for w in weights]
        if is_nothing(amounts, decay):
            return group.write(plan.seed, plan.step, plan.rounding) if group.matrices is not None and not defer else 0
        if group.matrices is None:
            return group.axpy_(plan.direction, plan.seed, plan.draws(), amounts, decay, plan.rounding)
        return deposit(plan, group, total(plan, group, amounts), decay, defer)

    def keeps(self, shape: tuple[int, ...], draw: tuple[int, int] | None) -> Keeps:
        """Returns nothing."""
        return Keeps({}, False)

    def basis(self, state: Any) -> int | None:
        """None: nothing is kept."""
        return None

    def rebase(self, group: Group, matrix: Matrix, left: Tensor | None, right: Tensor | None, state: Any) -> None:
        """Nothing is kept."""
