"""Directions: what z is. One file each;
a direction is a name, a block size and the map from words to values."""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor

from .aligned import Aligned
from .lowrank import Diagonal, Drawn, Kept, Lazy, LowRank, Matrix, Measured, Source, Stack, Subspace
from .normal import Normal
from .rademacher import Rademacher
from .scaled import Curved, Masked, Scaled


class Direction(Protocol):
    """What a backend needs to know: ``name`` selects a compiled kernel, ``values`` is the definition."""

    name: str
    per_block: int

    def values(self, words: Tensor) -> Tensor: ...


DIRECTIONS: dict[str, type[Direction]] = {"normal": Normal, "rademacher": Rademacher}


def resolve(direction: str | Direction) -> Direction:
    """A direction from its name, or the direction itself."""
    if isinstance(direction, str):
        if direction not in DIRECTIONS:
            raise ValueError(
                f"unknown direction {direction!r}; expected one of {sorted(DIRECTIONS)} or a Direction"
            )
        return DIRECTIONS[direction]()
    if not all(hasattr(direction, attribute) for attribute in ("name", "per_block", "values")):
        raise TypeError(
            f"direction is {direction!r}; expected one of {sorted(DIRECTIONS)} or a Direction (name, "
            "per_block, values)"
        )
    return direction


def parts(direction: Any) -> tuple[LowRank | None, Scaled | None, Direction]:
    """Returns the low-rank and the scaled direction that a direction is,
    and the dense one that it is made of. The low-rank one is a copy, as it is before a run.

    Raises ValueError for a low-rank direction whose dense part has factors."""
    if isinstance(direction, LowRank):
        if isinstance(direction.dense, Scaled):
            raise ValueError(
                f"direction {direction.name!r} has dense={direction.dense.name!r}; expected a direction "
                "without factors: a scale of single elements goes with dense directions only"
            )
        return direction.fresh(), None, resolve(direction.dense)
    if isinstance(direction, Scaled):
        return None, direction, resolve(direction.base)
    return None, None, resolve(direction)


__all__ = [
    "DIRECTIONS",
    "Aligned",
    "Curved",
    "Diagonal",
    "Direction",
    "Drawn",
    "Kept",
    "Lazy",
    "LowRank",
    "Masked",
    "Matrix",
    "Measured",
    "Normal",
    "Rademacher",
    "Scaled",
    "Source",
    "Stack",
    "Subspace",
    "parts",
    "resolve",
]
