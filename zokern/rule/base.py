"""What a step asks of a rule."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from torch import Tensor

from ..directions import Factored, Matrix
from ..plan import Group, Plan


class Rule(Protocol):
    """theta <- rule(theta, g), g = sum_k weights[k] z_k the descent direction: weights[k] = -c_k / q (+c_k / q to maximize).

    defers  whether updates of factored matrices stay in their small space, and may wait there
    """

    name: str
    defers: bool

    def update(
        self, plan: Plan, group: Group, weights: Sequence[float], lr: float, decay: float, states: Any, defer: bool
    ) -> Tensor | int:  # fmt: skip
        """Write the group's parameters; how many results are inf or NaN. states[tensor] is the optimizer's state of a parameter.

        defer: the updates of factored matrices are kept in `pending` instead."""

    def rebase(self, group: Group, matrix: Matrix, left: Tensor | None, right: Tensor, state: Any) -> None:
        """The basis of a matrix has changed from (left, right) to its present one: carry the state over."""


def check_basis(rule: Rule, direction: Factored | None) -> None:
    """Refuse a rule whose state belongs to one basis with a direction that changes its basis."""
    lasting = getattr(rule, "bases", None)
    if direction is not None and lasting is not None and direction.name not in lasting:
        raise ValueError(
            f"rule is {rule.name!r} with direction {direction.name!r}, whose basis changes or is no diagonal; its moments belong to "
            f"one basis of {list(lasting)}: expected zokern.Sgd() or zokern.Momentum(), or take zokern.TeZO, or zokern.MeZO (dense z)"
        )


__all__ = ["Rule", "check_basis"]
