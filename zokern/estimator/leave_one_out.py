"""Estimator ``leave_one_out``: losses along draws, each against the mean of the others (RLOO).

    c_k = (L(theta + eps z_k) - mean_{j != k} L(theta + eps z_j)) / eps          g = (1 / q) sum_k c_k z_k

Kool et al. 2019 (the baseline); arXiv 2511.07971, 2025 (LOREN) takes it for fine-tuning.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from ..checks import whole_number
from ..directions.orthonormal import tree_sum
from ..evaluation import Point
from ..plan import Plan
from .base import Estimate, Oracle
from .spsa import Spsa


class LeaveOneOut(Spsa):
    """Compares the loss of each draw with the mean loss of all draws of the step, without reading the
    loss of theta.

        g = (1/q) sum_k c_k z_k,   c_k = (q / (q - 1)) (L(theta + eps z_k) - mean L) / eps

    queries  q, at least 2: one loss has no others to be compared with. A step reads q losses
    clip     bound on |c_k|, in units of loss per weight; None: no bound

    Raises ValueError for arguments out of range. Kool et al. 2019 (RLOO)."""

    captures = True

    def __init__(self, queries: int = 4, clip: float | None = None) -> None:
        super().__init__(whole_number("queries", queries, 2, 2**24 - 1), "central", clip)

    def __call__(self, oracle: Oracle, plan: Plan) -> Iterator[Estimate]:
        losses = oracle.losses([Point(((plan.draw(k), 1.0),)) for k in range(self.queries)])
        away = losses - tree_sum(losses.unsqueeze(1))[0] / self.queries
        found = self.estimate(plan, losses.unsqueeze(0), away * (self.queries / (self.queries - 1)))
        # slopes less their mean: the coefficients sum to 0, so a constant does not change the predicted fall
        yield replace(found, slopes=away / plan.groups[0].eps)


__all__ = ["LeaveOneOut"]
