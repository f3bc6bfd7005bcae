"""Estimator ``sign``: ZO-SGD-Sign. Liu et al. 2019 (signSGD via zeroth-order oracle); Zhang et al. 2024
(ZO-Bench)."""

from __future__ import annotations

from torch import Tensor

from ..plan import Plan
from .base import ONES
from .spsa import Spsa


class Sign(Spsa):
    """Estimates a descent direction from the signs of the differences, so that a step has one length
    whatever the losses are.

        g = (1/q) sum_k sign(c_k) z_k,   c_k as in zokern.Spsa

    queries, stencil, clip  as for zokern.Spsa; clip, in units of loss per weight, changes no sign

    The sign is taken of the slope along each draw, and z stays as it is. zokern.SignSgd takes the sign of
    each element of g instead.
    Raises ValueError for arguments out of range. Zhang et al. 2024 (ZO-Bench, arXiv 2402.11592)."""

    lr, gain, captures = ONES, None, True

    def slopes(self, differences: Tensor, losses: Tensor, plan: Plan) -> Tensor:
        return super().slopes(differences, losses, plan).sign()


__all__ = ["Sign"]
