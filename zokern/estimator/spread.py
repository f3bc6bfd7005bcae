"""Estimator ``spread``: differences in standard deviations of the step's losses. Dang et al. 2026 (FZOO)."""

from __future__ import annotations

import torch
from torch import Tensor

from ..directions.orthonormal import tree_sum
from ..plan import Plan
from .base import ONES
from .spsa import Spsa, Stencil


class Spread(Spsa):
    """Divides the differences by the spread of the losses, so that flat and steep losses give steps of
    one length.

        g = (1/q) sum_k c_k z_k,   c_k = (sum_j weights[j] L_kj) / sigma

    queries, stencil, clip  as for zokern.Spsa, with 8 queries and 'forward' by default; clip is a bound
                     on |c_k|, in units of sigma and not of loss per weight

    L_kj is the loss at theta + offsets[j] eps z_k. sigma is the population standard deviation of the
    perturbed losses of all queries. A step whose losses are all equal moves nothing.
    Raises ValueError for arguments out of range, and for a step that reads fewer than two perturbed
    losses. Dang et al. 2026 (FZOO)."""

    lr, gain, captures = ONES, None, True

    def __init__(
        self, queries: int = 8, stencil: str | Stencil = "forward", clip: float | None = None
    ) -> None:
        super().__init__(queries, stencil, clip)
        check_several(self)

    def slopes(self, differences: Tensor, losses: Tensor, plan: Plan) -> Tensor:
        perturbed = losses[:, [j for j, offset in enumerate(self.stencil.offsets) if offset]].reshape(-1)
        away = perturbed - _mean(perturbed)
        sigma = _mean(away * away).sqrt()
        found = torch.where(sigma == 0.0, 0.0 * differences, differences / sigma)
        return torch.where(torch.isfinite(sigma), found, torch.nan).expand(len(plan.groups), -1)


def check_several(estimator: Spsa) -> None:
    """Raises ValueError for an estimator that compares perturbed losses and reads one a step."""
    queries, stencil = estimator.queries, estimator.stencil
    if (perturbed := queries * sum(offset != 0.0 for offset in stencil.offsets)) < 2:
        raise ValueError(
            f"queries is {queries} with stencil {stencil.name!r}, which read {perturbed} perturbed loss a "
            "step, and one loss has no "
            "spread; expected queries of at least 2, or stencil='central'"
        )


def _mean(values: Tensor) -> Tensor:
    return tree_sum(values.unsqueeze(1))[0] / len(values)


__all__ = ["Spread", "check_several"]
