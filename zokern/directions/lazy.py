"""Direction ``lazy``: z = U V^T, U drawn anew for every draw, V kept for an interval.

E||z||_F^2 = m n r: the reference's code. With scale = 1/sqrt(r) it is m n. Chen et al. 2025, "Enhancing Zeroth-Order Fine-Tuning for
Language Models with Low-Rank Structures" (LOZO).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from ..checks import whole_number
from .lowrank import RIGHT, Matrix, Source, matrix_shape
from .normal import Normal


class Lazy:
    """U V^T with normal factors. Both are addressed by name, so the step that draws a new V moves along the z that it measured.

    rank      r, at most min(m, n) of each matrix
    interval  steps between two V (the paper's nu)
    """

    name = "lazy"

    def __init__(self, rank: int = 2, interval: int = 50, dense: Any = None) -> None:
        rank, interval = whole_number("rank", rank), whole_number("interval", interval)
        self.rank, self.interval = rank, interval
        self.dense = Normal() if dense is None else dense

    def shape(self, tensor: Tensor) -> tuple[int, int] | None:
        return matrix_shape(tensor)

    def rank_of(self, name: str) -> int:
        return self.rank

    def basis_step(self, step: int) -> int:
        return step - step % self.interval

    def refresh(self, matrices: Sequence[Matrix], source: Source, step: int) -> None:
        for matrix, right in zip(matrices, source(matrices, [(m.columns, m.rank) for m in matrices], step, RIGHT)):
            matrix.right, matrix.born = right, step

    def spread(self, matrix: Matrix) -> float:
        """Returns the root mean square of an element of z."""
        return math.sqrt(matrix.rank)

    def draws(self, matrices: Sequence[Matrix], source: Source, step: int, draw: int) -> list[Tensor]:
        return source(matrices, [(m.rows, m.rank) for m in matrices], step, draw)
