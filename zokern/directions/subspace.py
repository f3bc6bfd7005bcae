"""Direction ``subspace``: z = scale U Z V^T with orthonormal U, V kept for an interval and an r x r core Z of normals.

scale = sqrt(m n) / r makes E||z||_F^2 = m n, as for a dense z, so that eps and lr carry over (norm="matched"; the reference's code);
scale = 1 is the formula of the paper (norm="unit"). Yu et al. 2025, "Zeroth-Order Fine-Tuning of LLMs in Random Subspaces".
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..checks import whole_number
from .lowrank import LEFT, RIGHT, Matrix, Source, matrix_shape, near_square
from .normal import Normal
from .orthonormal import orthonormal


class Subspace:
    """U Z V^T. U and V are Q of the QR decomposition of normals of (seed, name, step of the refresh): a run can be replayed.

    rank      r, at most min(m, n) of each matrix
    interval  steps between two bases
    norm      'matched': scale sqrt(m n) / r; 'unit': 1
    reshape   'adapters': a matrix with a side of at most 4 r (a LoRA factor) is factored as the near-square view (a, b), a b = m n,
              of its flattened elements; 'all'; 'none'
    """

    name = "subspace"

    def __init__(
        self, rank: int = 8, interval: int = 2000, norm: str = "matched", reshape: str = "adapters", dense: Any = None
    ) -> None:
        for what, value, choices in (("norm", norm, ("matched", "unit")), ("reshape", reshape, ("adapters", "all", "none"))):
            if value not in choices:
                raise ValueError(f"{what} is {value!r}; expected one of {list(choices)}")
        rank, interval = whole_number("rank", rank), whole_number("interval", interval)
        self.rank, self.interval, self.norm, self.reshape = rank, interval, norm, reshape
        self.dense = Normal() if dense is None else dense

    def shape(self, tensor: Tensor) -> tuple[int, int] | None:
        shape = matrix_shape(tensor)
        if shape is not None and (self.reshape == "all" or (self.reshape == "adapters" and min(shape) <= 4 * self.rank)):
            return near_square(tensor.numel())
        return shape

    def rank_of(self, name: str) -> int:
        return self.rank

    def basis_step(self, step: int) -> int:
        return step - step % self.interval

    def refresh(self, matrices: Sequence[Matrix], source: Source, step: int) -> None:
        for side, word in (("left", LEFT), ("right", RIGHT)):
            shapes = [(m.rows if side == "left" else m.columns, m.rank) for m in matrices]
            for matrix, q in zip(matrices, orthonormal(source(matrices, shapes, step, word))):
                setattr(matrix, side, q)
                matrix.born = step

    def scale(self, matrix: Matrix) -> float:
        return math.sqrt(matrix.rows * matrix.columns) / matrix.rank if self.norm == "matched" else 1.0

    def spread(self, matrix: Matrix) -> float:
        """Returns the root mean square of an element of z."""
        return self.scale(matrix) * matrix.rank / math.sqrt(matrix.rows * matrix.columns)

    def draws(self, matrices: Sequence[Matrix], source: Source, step: int, draw: int) -> list[Tensor]:
        cores = source(matrices, [(m.rank, m.rank) for m in matrices], step, draw)
        return list(torch._foreach_mul(cores, [self.scale(matrix) for matrix in matrices]))
