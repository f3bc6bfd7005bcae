"""Estimator ``sign``: ZO-SGD-Sign. Liu et al. 2019 (signSGD via zeroth-order oracle); Zhang et al. 2024
(ZO-Bench)."""

from __future__ import annotations

from torch import Tensor

from ..plan import Plan
from .base import ONES
from .spsa import Spsa


class Sign(Spsa):
    """g = (1/q) sum_k sign(c_k) z_k, c_k as in Spsa: steps of one length, whatever the losses.

    ZO-Bench's form, where the sign is taken of the projected gradient and z stays normal. Options as for
    Spsa."""

    lr, gain, captures = ONES, None, True

    def slopes(self, differences: Tensor, losses: Tensor, plan: Plan) -> Tensor:
        return super().slopes(differences, losses, plan).sign()


__all__ = ["Sign"]
