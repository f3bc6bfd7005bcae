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
    """c_k = sum_j weights[j] u_kj, u_kj the centred rank of L(theta + offsets[j] eps z_k) among n perturbed
    losses.

    u = (rank - (n - 1) / 2) / sqrt((n^2 - 1) / 12), which has mean 0 and variance 1 over the n perturbed
    losses of the step. The least loss has rank 0. The loss of theta itself has u = 0. Equal losses keep the
    order in which they were asked for, so a step whose losses are all equal moves the weights. The published
    weights are rank / (n - 1) - 1/2, which are about sqrt(12) times smaller.

    Options as for Spsa; queries is 16 by default, and a step reads two perturbed losses or more.
    Raises ValueError for arguments out of range. Salimans et al. 2017; Sarkar et al. 2025."""

    lr, captures = ONES, True

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
        found = torch.where(torch.isfinite(losses).all(), self.differences(centred), torch.nan)
        return found.expand(len(plan.groups), -1)


__all__ = ["Ranked"]
