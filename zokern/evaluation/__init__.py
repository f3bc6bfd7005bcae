"""Evaluations: how the losses at theta + eps sum_k a_k z_k are read. One file each."""

from __future__ import annotations

from ..part import Part
from .auto import Auto
from .base import THETA, Evaluation, NotRepeatable, Point, Record, Refused, point_of
from .inplace import InPlace
from .isolation import Isolation
from .jvp import Jvp
from .loss import loss_tensor
from .master import Master
from .paired import Paired
from .scratch import Scratch

EVALUATIONS: dict[str, type] = {
    "auto": Auto, "inplace": InPlace, "jvp": Jvp, "master": Master, "paired": Paired, "scratch": Scratch,
}  # fmt: skip
ALIASES = {"walk": "inplace"}  # for one release


def resolve(evaluation: str | Evaluation) -> Evaluation:
    """Returns an evaluation from its name; of an evaluation a copy, as it is before a run.

    One of another class than zokern's is returned itself."""
    if isinstance(evaluation, str):
        name = ALIASES.get(evaluation, evaluation)
        if name not in EVALUATIONS:
            raise ValueError(
                f"unknown evaluation {evaluation!r}; expected one of {sorted(EVALUATIONS)} or an Evaluation"
            )
        return EVALUATIONS[name]()
    lacks = [name for name in ("losses", *Evaluation.__annotations__) if not hasattr(evaluation, name)]
    if isinstance(evaluation, type) or lacks:
        raise TypeError(
            f"evaluation is {evaluation!r}; expected one of {sorted(EVALUATIONS)} or an Evaluation object, "
            f"which has {lacks} as well"
        )
    return evaluation.fresh() if isinstance(evaluation, Part) else evaluation


__all__ = [
    "EVALUATIONS", "THETA", "Auto", "Evaluation", "InPlace", "Isolation", "Jvp", "Master", "NotRepeatable",
    "Paired", "Point", "Record", "Refused", "Scratch", "loss_tensor", "point_of", "resolve",
]  # fmt: skip
