"""Estimator ``conservative``: ZO-SGD-Cons keeps the best of three weights. Zhang et al. 2024 (ZO-Bench)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch

from ..device_numbers import constant
from ..evaluation import THETA, point_of
from ..plan import Plan
from .base import Estimate, Oracle
from .spsa import Spsa


class Conservative(Spsa):
    """Chooses the best of a step, no step and a step back, by reading the loss at each.

        g as in zokern.Spsa
        the estimate is g, 0 or -g, by the least loss of theta - lr g, theta and theta + lr g

    queries, stencil, clip  as for zokern.Spsa; clip in units of loss per weight

    A step reads three losses more than zokern.Spsa. It goes with rule SGD and without weight decay, which
    the three losses do not contain.
    Raises ValueError for arguments out of range. Raises it in a step, before a loss is read, for parameter
    groups that differ in lr or eps and for a weight_decay above 0. Zhang et al. 2024 (ZO-Bench, arXiv
    2402.11592)."""

    captures = True

    def __call__(self, oracle: Oracle, plan: Plan) -> Iterator[Estimate]:
        decays = [float(group.options["weight_decay"]) for group in plan.groups]
        if any(decays):
            raise ValueError(
                f"weight_decay is {max(decays)!r}; Conservative reads losses of weights that have not "
                "decayed: expected weight_decay=0 in all parameter groups, or another estimator, as of "
                "zokern.MeZO"
            )
        pairs = {(float(group.options["lr"]), group.eps) for group in plan.groups}
        if len(pairs) > 1:
            raise ValueError(
                f"parameter groups have (lr, eps) = {sorted(pairs)}; Conservative needs one pair for all of "
                "them"
            )
        (first,) = super().__call__(oracle, plan)
        group, sign = plan.groups[0], 1.0 if plan.maximize else -1.0  # of the move along g
        far = plan.numbers(
            lambda: [float(group.options["lr"]) / first.count / group.eps],
            torch.float64,
            first.coefficients.device,
        )
        amounts = sign * (first.coefficients[0] * far)
        # a step without finite losses is skipped, and moves no weight on its way
        ahead = point_of(plan, first.draws, torch.where(torch.isfinite(amounts), amounts, 0.0))
        losses = oracle.losses([THETA, ahead, ahead.scaled(-1.0)])
        best = (-sign * losses).argmin().view(1)
        factor = constant((0.0, 1.0, -1.0), torch.float64, losses.device).gather(0, best)
        yield replace(first, coefficients=first.coefficients * factor)


__all__ = ["Conservative"]
