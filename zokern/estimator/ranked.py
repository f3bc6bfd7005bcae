"""Estimator ``ranked``: centred ranks in place of losses, as evolution strategies take them. Salimans et al.
2017 (arXiv 1703.03864); Sarkar et al. 2025 (EGGROLL, arXiv 2511.16652)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..plan import Plan
from .base import ONES
from .spread import check_several
from .spsa import Spsa, Stencil


class Ranked(Spsa):
    """Weighs each draw by the ranks of its losses among all perturbed losses of the step, as evolution
    strategies do.

        g = (1/q) sum_k c_k z_k,   c_k = sum_j weights[j] u_kj
        u = (rank - (n - 1) / 2) / sqrt((n^2 - 1) / 12)

    queries, stencil, clip  as for zokern.Spsa, with 16 queries by default; clip is a bound on |c_k|,
                     which has no unit and not that of loss per weight

    u_kj is the centred rank of L(theta + offsets[j] eps z_k) among the n perturbed losses of a step. The
    least loss has rank 0, and u has mean 0 and variance 1. The loss of theta itself has u = 0. Equal
    losses keep the order in which they were asked for, so a step whose losses are all equal moves the
    weights. The published weights are rank / (n - 1) - 1/2, which are about sqrt(12) times smaller.
    Raises ValueError for arguments out of range, and for a step that reads fewer than two perturbed
    losses. Salimans et al. 2017; Sarkar et al. 2025."""

    lr, gain, captures = ONES, None, True

    def __init__(
        self, queries: int = 16, stencil: str | Stencil = "central", clip: float | None = None
    ) -> None:
        super().__init__(queries, stencil, clip)
        check_several(self)

    def slopes(self, differences: Tensor, losses: Tensor, plan: Plan) -> Tensor:
        sides = [j for j, offset in enumerate(self.stencil.offsets) if offset]
        perturbed = losses[:, sides].reshape(-1)
        count = len(perturbed)
        ranks = perturbed.argsort(stable=True).argsort().to(losses.dtype)
        centred = torch.zeros_like(losses)
        centred[:, sides] = ((ranks - (count - 1) / 2) / math.sqrt((count**2 - 1) / 12)).view(len(losses), -1)
        return self.differences(centred).expand(len(plan.groups), -1)


__all__ = ["Ranked"]
