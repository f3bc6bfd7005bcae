"""Direction ``diagonal``: z = U diag(tau) V^T, U and V drawn once, r normals tau a draw.

E||z||_F^2 = m n r. Sun et al. 2025, "TeZO: Empowering the Low-Rankness on the Temporal Dimension".
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..checks import whole_number
from .lowrank import LEFT, RIGHT, Matrix, Source, matrix_shape
from .normal import Normal


class Diagonal:
    """U diag(tau) V^T with normal U, V of (seed, name, step 0) that last the whole run.

    rank  r of every matrix, at most min(m, n); ranks: per parameter name, where they differ (the paper takes them from the
          weights' spectra: zokern.methods.tezo.spectral_ranks)
    """

    name = "diagonal"

    def __init__(self, rank: int = 32, ranks: Mapping[str, int] | None = None, dense: Any = None) -> None:
        self.rank = whole_number("rank", rank)
        self.ranks = {name: whole_number(f"ranks[{name!r}]", r) for name, r in (ranks or {}).items()}
        self.dense = Normal() if dense is None else dense

    def shape(self, tensor: Tensor) -> tuple[int, int] | None:
        return matrix_shape(tensor)

    def rank_of(self, name: str) -> int:
        return self.ranks.get(name, self.rank)

    def basis_step(self, step: int) -> int:
        return 0

    def refresh(self, matrices: Sequence[Matrix], source: Source, step: int) -> None:
        for side, word in (("left", LEFT), ("right", RIGHT)):
            shapes = [(m.rows if side == "left" else m.columns, m.rank) for m in matrices]
            for matrix, factor in zip(matrices, source(matrices, shapes, step, word)):
                setattr(matrix, side, factor)
                matrix.born = step

    def spread(self, matrix: Matrix) -> float:
        """Returns the root mean square of an element of z."""
        return math.sqrt(matrix.rank)

    def draws(self, matrices: Sequence[Matrix], source: Source, step: int, draw: int) -> list[Tensor]:
        return [torch.diag(tau) for tau in source(matrices, [(m.rank,) for m in matrices], step, draw)]
