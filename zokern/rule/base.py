"""What a step asks of a rule."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from torch import Tensor

from ..directions import Matrix
from ..evaluation import Group, Plan


class Rule(Protocol):
    """theta <- rule(theta, sum_k amounts[k] z_k), amounts[k] = -lr c_k / q (+lr where the loss is maximized).

    linear  whether the new weights are decay theta + sum_k amounts[k] z_k, so that what an evaluation in place left to restore is
            undone by the same write
    """

    name: str
    linear: bool

    def update(self, plan: Plan, group: Group, amounts: Sequence[float], decay: float, states: Any, defer: bool) -> Tensor | int:
        """Write the group's parameters; how many results are inf or NaN. states[tensor] is the optimizer's state of a parameter.

        defer: the updates of factored parameters may wait in their matrices' `pending` instead."""

    def rebase(self, group: Group, matrix: Matrix, old: Tensor, state: Any) -> None:
        """The basis of a matrix changes from `old` (its right side) to matrix.right: carry the state over."""
