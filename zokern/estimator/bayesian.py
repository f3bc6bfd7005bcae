"""Estimator ``bayesian``: BSZO, a Kalman filter over the slopes along a few draws, read along combinations of
them.

    y_j = (L(theta + eps sum_k d_jk z_k) - L(theta)) / eps,   d_j the axis k = j, for j < q
    g = sum_k mu_k z_k, mu the posterior mean                 d_j the top eigenvector of S, for j >= q

    r_j = y_j - d_j mu                                        mu, S = 0, s^2 I at the start of a step
    e  <- 0.9 e + 0.1 r_j^2                                   e = s^2 at the start of a run
    v   = max(e, s^2 / 100)                                   s^2 = weights / 1e6
    mu <- mu + S d_j r_j / (d_j S d_j + v),   S <- S - S d_j d_j S / (d_j S d_j + v)

This is version 4 of the published trainer, without the 1e-10 that it adds to the diagonal of S. An
observation's own residual is in the noise v of its gain, so one outlier shrinks itself.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from ..checks import whole_number
from ..evaluation import THETA, Point, point_of
from ..plan import Plan
from .base import Estimate, Estimator, Oracle

KEEP, FLOOR = 0.9, 0.01  # of the average of squared residuals; the least noise, in variances of the prior


class Bayesian(Estimator):
    """Estimates the slopes along a few draws by a Kalman filter over losses that are read along
    combinations of them (BSZO).

        y_j = (L(theta + eps sum_k d_jk z_k) - L(theta)) / eps
        g = sum_k mu_k z_k,   mu the posterior mean of the slopes, in units of loss per weight

    queries       draws whose span is searched (published: 2)
    observations  losses beside that of theta (published: 3)

    The first observations are along the draws themselves, and further ones along the widest direction of
    the posterior. mu is no estimate of a slope but less: the prior draws it to 0, and the noise of an
    observation contains its own residual. The slopes that a step tells are y_j along the draws. A group with
    another eps than the first one moves along mu eps_1 / eps.

    A step reads 1 + observations losses. Those along draws are one question, and each further one depends
    on those before. The filter runs where the losses are. Its eigenvectors are torch.linalg.eigh's, which
    waits for a GPU. `state` keeps the running average of squared residuals, one number. Prior, noise and
    directions are those of the published trainer, version 4.
    Raises ValueError for arguments out of range. arXiv 2601.01452, 2026."""

    def __init__(self, queries: int = 2, observations: int = 3) -> None:
        self.queries, self.observations = (
            whole_number("queries", queries, 1),
            whole_number("observations", observations, 1),
        )

    @property
    def settles(self) -> int:  # type: ignore[override]
        """Steps until a tenth is left of the noise's start."""
        return math.ceil(math.log(0.1, KEEP) / self.observations)

    def __call__(self, oracle: Oracle, plan: Plan) -> Iterator[Estimate]:
        prior, eps = sum(t.numel() for t in plan.tensors) / 1e6, plan.groups[0].eps
        draws = tuple(plan.draw(k) for k in range(self.queries))
        alone = [Point(((draw, 1.0),)) for draw in draws[: self.observations]]
        *ahead, base = oracle.losses([*alone, THETA]).unbind(0)
        kind, device = torch.float64, base.device
        average = before = torch.as_tensor(self.state.get("noise", prior), dtype=kind, device=device)
        mean = torch.zeros(self.queries, dtype=kind, device=device)
        axes = torch.eye(self.queries, dtype=kind, device=device)
        covariance = axes * prior
        for j in range(self.observations):
            if j < self.queries:
                along = axes[j]
            else:
                along = _widest(covariance, prior)
                ahead += oracle.losses([point_of(plan, draws, along)]).to(device).unbind(0)
            residual = (ahead[j] - base) / eps - along @ mean
            new = KEEP * average + (1.0 - KEEP) * residual * residual
            # of a step that is skipped: the eigenvectors are those of finite numbers
            average = torch.where(torch.isfinite(new), new, average)
            spread = covariance @ along
            gain = spread / (along @ spread + average.clamp(min=FLOOR * prior))
            mean, covariance = mean + gain * residual, covariance - torch.outer(gain, spread)
        read, slopes = torch.stack([base, *ahead]), torch.zeros_like(mean)
        slopes[: len(alone)] = (read[1 : 1 + len(alone)] - base) / eps  # a draw that was not read has mu = 0
        finite = torch.isfinite(read).all()
        (self.state["noise"],) = plan.at_hand(torch.where(finite, average, before).view(1))
        # mu is in units of the first group's eps: where another's is wider, the same loss is a lesser slope
        units = plan.numbers(lambda: [plan.groups[0].eps / group.eps for group in plan.groups], kind, device)
        found = (units.unsqueeze(1) * mean).float().double()
        yield Estimate(draws, found, read.unsqueeze(0), slopes=slopes)


def _widest(covariance: Tensor, prior: float) -> Tensor:
    """Returns the top eigenvector, its largest element positive; of equal variances the first draw's."""
    rank = torch.arange(len(covariance), 0, -1, dtype=covariance.dtype, device=covariance.device)
    along = torch.linalg.eigh(covariance + torch.diag(rank * (1e-9 * prior)))[1][:, -1]
    return along * along.gather(0, along.abs().argmax().view(1)).sign()


__all__ = ["Bayesian"]
