"""Estimator ``private``: differences of each example clipped, summed, and noise added to the sum (DP-ZO).

    c_k = (sum_i clip(L_i(theta + eps z_k) - L_i(theta - eps z_k), -C, C) + C sigma n_k) / (2 eps B)

n_k is standard normal or Laplace. Tang et al. 2024 (DP-ZO, arXiv 2401.04343).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from ..checks import finite_number, whole_number
from ..directions import Normal
from ..directions.orthonormal import tree_sum
from ..evaluation import Point
from ..plan import Plan
from ..stream import PRIVACY
from .base import Estimate, Oracle
from .spsa import Spsa

NOISES = ("gaussian", "laplace")


class Private(Spsa):
    """Estimates from differences that are clipped for each example and noised in their sum (DP-ZO).

        g = (1/q) sum_k c_k z_k
        c_k = (sum_i cut(L_i(theta + eps z_k) - L_i(theta - eps z_k)) + C sigma n_k) / (2 eps B)
        L_i the loss of example i,   cut(x) = min(max(x, -C), C)

    clip     C, bound on the difference of an example's two losses, in units of loss
    noise    sigma, in units of C: standard deviation ('gaussian') or scale ('laplace') of what is added
             to a sum
    kind     'gaussian' or 'laplace'
    batch    B, what the sum is divided by; None: the number of examples, which is then public. With
             batches sampled example by example give their expected size
    queries  q: draws a step. Each is a release of its own, with noise n_k of its own

    The closure returns a vector, the loss of each example: shape [examples]. A step calls for 2 q such
    vectors.

    **What is private, and what is not.** Of a step only the coefficients, and so the weights, are
    functions of clipped and noised sums. There is no accountant, and no (epsilon, delta) is claimed:
    sampling of batches, composition over steps and the choice of options are yours. The noise is a
    function of the run's seed, like z. A reader of the seed, from a state_dict, a log or a default, can
    take the noise off, so draw the seed with secrets.randbits(64). Philox is no cryptographic generator,
    and its normals end at 5.4 standard deviations, so proofs for exact noise do not cover it.
    StepResult.loss and .losses are means without noise. A step is skipped where no example has finite
    losses.

    Raises ValueError for arguments out of range, and for a closure that returns no vector. Tang et al.
    2024 (arXiv 2401.04343)."""

    rows = True

    def __init__(
        self, clip: float = 0.1, noise: float = 1.0, kind: str = "gaussian", batch: int | None = None,
        queries: int = 1
    ) -> None:  # fmt: skip
        super().__init__(queries, "central")
        self.bound = finite_number("clip", clip, above=0.0)
        self.noise = finite_number("noise", noise, minimum=0.0)
        if kind not in NOISES:
            raise ValueError(f"kind is {kind!r}; expected one of {list(NOISES)}")
        self.kind, self.batch = kind, None if batch is None else whole_number("batch", batch)

    def __call__(self, oracle: Oracle, plan: Plan) -> Iterator[Estimate]:
        points = [Point(((plan.draw(k), sign),)) for k in range(self.queries) for sign in (1.0, -1.0)]
        losses = oracle.examples(points).view(self.queries, 2, -1)
        apart = losses[:, 0] - losses[:, 1]
        known = torch.where(torch.isfinite(apart).any(1), 0.0, torch.nan)
        total = tree_sum(apart.nan_to_num(0.0).clamp(-self.bound, self.bound).mT) + known
        total = total + self.bound * self.noise * self.draws(plan).to(total.device)
        differences = total / (2 * (self.batch or losses.shape[2]))
        yield replace(self.estimate(plan, losses.mean(2), differences), slopes=None)

    def draws(self, plan: Plan) -> Tensor:
        """Returns the noise n_k of every query, float64 [queries], from normals at (the empty name, step,
        query), purpose `privacy`."""
        found = torch.cat([Normal().values(plan.bits(PRIVACY, k)) for k in range(self.queries)]).double()
        if self.kind == "gaussian":
            return found[:, 0]
        square = found[:, :4] ** 2  # two normals make an exponential number, and two of these a Laplace one
        return (square[:, 0] + square[:, 1] - square[:, 2] - square[:, 3]) / 2.0


__all__ = ["Private"]
