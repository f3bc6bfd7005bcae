"""Estimator ``spread``: differences in standard deviations of the step's losses. Dang et al. 2026 (FZOO)."""

from __future__ import annotations

import torch
from torch import Tensor

from ..directions.orthonormal import tree_sum
from ..plan import Plan
from .base import ONES
from .spsa import Spsa, Stencil


class Spread(Spsa):
    """c_k = (sum_j weights[j] L_kj) / sigma, sigma the population standard deviation of the perturbed losses
    of all queries.

    A step whose losses are all equal moves nothing. Options as for Spsa; a step reads two perturbed losses or
    more."""

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
