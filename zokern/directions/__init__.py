"""Directions: what z is. One file each; a direction is a name, a block size and the map from words to values."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from .aligned import Aligned
from .diagonal import Diagonal
from .lazy import Lazy
from .lowrank import Factored, Matrix, Source
from .normal import Normal
from .rademacher import Rademacher
from .subspace import Subspace


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
            raise ValueError(f"unknown direction {direction!r}; expected one of {sorted(DIRECTIONS)} or a Direction")
        return DIRECTIONS[direction]()
    if not all(hasattr(direction, attribute) for attribute in ("name", "per_block", "values")):
        raise TypeError(
            f"direction is {direction!r}; expected one of {sorted(DIRECTIONS)} or a Direction (name, per_block, values)"
        )
    return direction


__all__ = [
    "DIRECTIONS",
    "Aligned",
    "Diagonal",
    "Direction",
    "Factored",
    "Lazy",
    "Matrix",
    "Normal",
    "Rademacher",
    "Source",
    "Subspace",
    "resolve",
]
