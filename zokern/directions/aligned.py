"""Direction ``aligned``: z = scale U Z V^T with U, S, V of an estimated gradient, Z on a hyperplane of the
core space (P-GAP).

    Z = Z0 - (sum_i S_i Z0_ii - xi sqrt(delta) ||S||) / (||S||^2 + 1e-12) diag(S),   Z0 normal, r x r

so that <diag(S), Z> = xi sqrt(delta) ||S||: the part of Z along the estimate is fixed, the rest stays normal.
Zhang et al. 2025, "Projected Gradient-Aligned Perturbation" (arXiv 2510.18228).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..checks import whole_number, within
from ..stream import RADIUS, draw_word
from .lowrank import Matrix, Source, Subspace
from .orthonormal import tree_sum

SIGNS = ("matrix", "step", "positive")


class Aligned(Subspace):
    """The draws of P-GAP. Its basis comes from measured losses, so the method (zokern.PGAP) sets left, right
    and the spectrum.

    delta   share of the estimate in a draw; steps: over how many steps it falls linearly to 0 (None: it
            stays)
    norm    'matched': scale = sqrt(m n) / r, so that E||z||_F^2 is m n (r^2 + delta - 1) / r^2; 'unit': scale
            = 1, the paper's formula
    sign    xi: 'matrix' an independent sign for every matrix and draw, 'step' one for all matrices,
            'positive' always +1
    """

    name = "aligned"

    def __init__(
        self, rank: int = 128, interval: int = 100, delta: float = 2.0, steps: int | None = None,
        sign: str = "matrix", norm: str = "matched", reshape: str = "none", dense: Any = None,
    ) -> None:  # fmt: skip
        super().__init__(rank, interval, norm, reshape, dense)
        delta = within("delta", delta, 0.0, math.inf, "a finite number, at least 0")
        steps = (
            None if steps is None else whole_number("steps", steps, expected="None or an integer, at least 1")
        )
        if sign not in SIGNS:
            raise ValueError(f"sign is {sign!r}; expected one of {list(SIGNS)}")
        self.delta, self.steps, self.sign = delta, steps, sign

    def delta_at(self, step: int) -> float:
        return self.delta if self.steps is None else self.delta * max(0.0, 1.0 - step / self.steps)

    def draws(self, matrices: Sequence[Matrix], source: Source, step: int, draw: int) -> list[Tensor]:
        cores = source(matrices, [(m.rank, m.rank) for m in matrices], step, draw)
        word, reach = draw_word(draw % 2**24, RADIUS), math.sqrt(self.delta_at(step))
        reaches = torch.full((len(matrices),), reach, dtype=torch.float64, device=cores[0].device)
        if self.sign != "positive":
            # independent of the parameters' order
            own = matrices if self.sign == "matrix" else [min(matrices, key=lambda m: m.name)]
            found = torch.cat(list(source(own, [(1,)] * len(own), step, word)))
            reaches = torch.where(found >= 0.0, reaches, -reaches)
        here = [i for i, m in enumerate(matrices) if "spectrum" in m.extra]
        spectra = [matrices[i].extra["spectrum"] for i in here]
        align_([cores[i] for i in here], spectra, [reaches[i] for i in here])
        return list(torch._foreach_mul(cores, [self.scale(m) for m in matrices]))


def align_(cores: Sequence[Tensor], spectra: Sequence[Tensor], reaches: Sequence[Tensor]) -> None:
    """Z of Z0 in place, with <diag(S), Z> = reach ||S||, reach float64 []. Matrices of one rank are worked on
    together: a few operations in all."""
    by_size: dict[tuple[int, torch.device], list[int]] = {}
    for i, s in enumerate(spectra):
        by_size.setdefault((len(s), s.device), []).append(i)
    for members in by_size.values():
        s = torch.stack([spectra[i] for i in members], 1).double()  # a column for each matrix
        diagonals = [torch.diagonal(cores[i]) for i in members]
        square, along = tree_sum(s * s), tree_sum(s * torch.stack(diagonals, 1).double())
        reach = torch.stack([reaches[i] for i in members])
        root = square.sqrt()
        # Newton's step: elementwise IEEE, as in orthonormal.py
        root = torch.where(root > 0.0, 0.5 * (root + square / root), root)
        alpha = (along - reach * root) / (square + 1e-12)
        torch._foreach_sub_(diagonals, list((s * alpha).float().unbind(1)))


__all__ = ["Aligned", "align_"]
