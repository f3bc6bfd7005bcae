"""Rule ``sign``: theta <- decay theta + lr sign(g), the sign of the summed estimate. Bernstein et al. 2018;
Liu et al. 2019 (ZO-signSGD)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from ..estimator.base import ONES
from ..group import Group
from ..plan import Plan
from .base import Rule
from .waiting import is_nothing


class SignSgd(Rule):
    """Moves every weight by lr, up or down by the sign of the estimate.

        theta <- decay theta + lr sign(g),   g = sum_k weights[k] z_k;   a weight with g = 0 stays

    It has no arguments and keeps no state. zokern.Sign is something else: it takes the sign of each slope
    along z, and z stays as it is. With one query both differ by |z| alone; with several, this sign is one
    of their sum.
    An optimizer refuses it with a low-rank direction, because the sign of a product has no factors.
    Bernstein et al. 2018 (signSGD, arXiv 1802.04434); Liu et al. 2019 (signSGD via zeroth-order oracle)."""

    name, gated = "sign", True
    shards = True
    lr = ONES  # of an optimizer that is given none: steps have one length, whatever the slope
    dense = True  # of directions it goes with dense ones

    def scalars(self, lr: float, decay: float = 1.0, updates: int = 1) -> tuple[float, ...]:
        """The numbers of zokern.update_."""
        return decay, lr

    def update(
        self, plan: Plan, group: Group, weights: Sequence[float], lr: float, decay: float, states: Any,
        defer: bool
    ) -> Tensor | int:  # fmt: skip
        if is_nothing([lr], decay):
            return 0
        members = range(len(group.names))
        return group.update_(
            plan, members, weights, self.name, lambda: self.scalars(*plan.rates(group, lr, decay)), []
        )


__all__ = ["SignSgd"]
