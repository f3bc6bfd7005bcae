"""Bases: the factors of a low-rank direction that are kept, for each matrix that an optimizer trains."""

from __future__ import annotations

from typing import Any

from ..directions import LowRank, Matrix, Measured
from ..estimator import Oracle
from ..parameters import Trained, plain
from ..plan import Plan
from ..rule import Rule, basis_of, renew


class Bases:
    """The matrices of a low-rank direction. Without such a direction there are none.

    matrices  by id of the parameter"""

    def __init__(self, direction: LowRank | None, rule: Rule, states: Any) -> None:
        self.direction, self.rule, self.states = direction, rule, states
        self.matrices: dict[int, Matrix] = {}

    def of(self, entry: Trained) -> Matrix | None:
        """Returns what is kept of a parameter; None where its z is dense."""
        if self.direction is None or (shape := self._shape(entry)) is None:
            return None
        if id(entry.tensor) not in self.matrices:
            rank = min(self.direction.rank_of(plain(entry.name)), *shape)
            self.matrices[id(entry.tensor)] = Matrix(entry.name, entry.who, *shape, rank, entry.tensor.device)
        return self.matrices[id(entry.tensor)]

    def _shape(self, entry: Trained) -> tuple[int, int] | None:
        return (
            self.direction.shape(entry.tensor)
            if self.direction is not None and entry.tensor.numel()
            else None
        )

    def draw_shape(self, entry: Trained) -> tuple[int, int] | None:
        """Returns the shape of a draw of a parameter; None where its z is dense."""
        matrix = self.of(entry)
        return None if matrix is None or self.direction is None else self.direction.draw_shape(matrix)

    def forget_changed(self, entry: Trained) -> None:
        """Forgets the basis of a parameter that has another shape or device now."""
        matrix = self.matrices.get(id(entry.tensor))
        if matrix is not None and (matrix.shape, matrix.device) != (self._shape(entry), entry.tensor.device):
            del self.matrices[id(entry.tensor)]

    def lasts(self, step: int) -> bool:
        """Returns whether the basis of a step is that of the next one too."""
        return self.direction is not None and self.direction.basis_step(step) == self.direction.basis_step(
            step + 1
        )

    def renew(self, plan: Plan, oracle: Oracle) -> None:
        """Gives every matrix the basis of this step, and carries over what the rule keeps. A measured
        direction asks for losses."""
        if self.direction is None:
            return
        if isinstance(self.direction, Measured):
            self.direction.measure(oracle, plan)
        for group in plan.groups:
            if group.matrices is not None:
                renew(self.rule, self.direction, group, self.states, plan.seed, plan.step)
        if isinstance(self.direction, Measured):
            self.direction.forget({basis_of(self.rule, self.states, tensor) for tensor in [*self.states]})


__all__ = ["Bases"]
