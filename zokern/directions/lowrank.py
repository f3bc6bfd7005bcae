"""Factored directions: z = U C V^T for matrices, so that z is r (m + n) numbers, generated, and never m n.

Two shapes of them cover the published methods. Where U and V are a basis that is kept for an interval, a draw is the r x r core C
(`subspace`: SubZero; `aligned`: P-GAP; `diagonal`: TeZO). Where only V is kept, a draw is the m x r left factor U itself and
the core is the identity (`lazy`: LOZO). Parameters that are not matrices take a dense direction.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from ..stream import BASIS, draw_word


@dataclass
class Matrix:
    """One factored parameter: its basis, and the updates that wait for the next write.

    rows, columns  of the matrix that is factored: the parameter's own, or the near-square view of a flattened adapter
    left, right    the basis, float32 (rows, rank) and (columns, rank), contiguous; left is None where a draw is U itself
    born           step at which the basis was drawn, -1 before the first
    pending        sum of updates since the weights were written: theta = shrink W + left pending right^T (or pending right^T)
    shrink         product of the weight decays since then
    extra          what a direction or a rule keeps beside the basis (a spectrum, factor momentum)
    """

    name: str
    who: int
    rows: int
    columns: int
    rank: int
    device: torch.device
    left: Tensor | None = None
    right: Tensor | None = None
    born: int = -1
    pending: Tensor | None = None
    shrink: float = 1.0
    version: int = -1  # of the weights when updates began to wait
    extra: dict[str, Any] = field(default_factory=dict)

    def thin(self, side: str) -> Tensor:
        """The transpose of the basis' left or right side, contiguous: what x is multiplied with."""
        factor = getattr(self, side)
        kept = self.extra.get(side)
        if kept is None or kept[0] is not factor:
            self.extra[side] = kept = (factor, factor.t().contiguous())
        return kept[1]

    @property
    def shape(self) -> tuple[int, int]:
        return self.rows, self.columns


class Source(Protocol):
    """Standard normals of (seed, each matrix's name, step, draw word), float32, one launch; the optimizer provides it."""

    def __call__(self, matrices: Sequence[Matrix], shapes: Sequence[tuple[int, ...]], step: int, draw: int) -> list[Tensor]: ...


class Factored(Protocol):
    """A direction for matrices. `dense` names the direction of everything else; draws are named as in the stream."""

    name: str
    dense: Any

    def rank_of(self, name: str) -> int:
        """The rank asked for a parameter."""

    def shape(self, tensor: Tensor) -> tuple[int, int] | None:
        """Rows and columns of the matrix that a parameter is for this direction; None: it takes a dense z."""

    def basis_step(self, step: int) -> int:
        """The step at which the basis in use at `step` was drawn."""

    def refresh(self, matrices: Sequence[Matrix], source: Source, step: int) -> None:
        """Draw the basis of a basis step, a function of (seed, names, step) alone."""

    def spread(self, matrix: Matrix) -> float:
        """The root mean square of an element of z, which says whether rounding swallows it."""

    def draws(self, matrices: Sequence[Matrix], source: Source, step: int, draw: int) -> list[Tensor]:
        """For each matrix the core (rank, rank), or the left factor (rows, rank) where the basis has none; float32."""


def matrix_shape(tensor: Tensor) -> tuple[int, int] | None:
    """(m, n) of a parameter that is a matrix once dimensions of size 1 are dropped; None for vectors and stacks."""
    shape = [size for size in tensor.shape if size != 1]
    return (shape[0], shape[1]) if len(shape) == 2 else None


def near_square(count: int) -> tuple[int, int]:
    """The factors (a, b) of a number of elements, a <= b, with the least b - a."""
    a = int(count**0.5)
    while count % a:
        a -= 1
    return a, count // a


LEFT, RIGHT = draw_word(0, BASIS), draw_word(1, BASIS)

__all__ = ["LEFT", "RIGHT", "Factored", "Matrix", "Source", "matrix_shape", "near_square"]
