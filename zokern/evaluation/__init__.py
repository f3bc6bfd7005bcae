"""Evaluations: how the loss at theta + offset eps z is read. One file each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from .auto import Auto
from .objective import Objective
from .paired import Paired
from .plan import Group, Plan, Reading
from .scratch import Scratch
from .walk import Walk


class Evaluation(Protocol):
    name: str

    def read(self, plan: Plan, closure: Callable[[], object], repeat_first: bool = False) -> Reading: ...


EVALUATIONS: dict[str, type] = {"auto": Auto, "paired": Paired, "scratch": Scratch, "walk": Walk}


def resolve(evaluation: str | Evaluation) -> Evaluation:
    """An evaluation from its name, or the evaluation itself."""
    if isinstance(evaluation, str):
        if evaluation not in EVALUATIONS:
            raise ValueError(f"unknown evaluation {evaluation!r}; expected one of {sorted(EVALUATIONS)} or an Evaluation")
        return EVALUATIONS[evaluation]()
    if not hasattr(evaluation, "read"):
        raise TypeError(f"evaluation is {evaluation!r}; expected one of {sorted(EVALUATIONS)} or an Evaluation")
    return evaluation


__all__ = ["EVALUATIONS", "Auto", "Evaluation", "Group", "Objective", "Paired", "Plan", "Reading", "Scratch", "Walk", "resolve"]
