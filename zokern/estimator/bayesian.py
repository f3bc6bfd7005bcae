"""Estimator ``bayesian``: BSZO, a Kalman filter over the slopes along a few draws, read along combinations of
them.

    y_j = (L(theta + eps sum_k d_jk z_k) - L(theta)) / eps,   d_j the top eigenvector of the posterior
    covariance g = sum_k mu_k z_k, mu the posterior mean

The prior of the slopes is N(0, s^2 I), s = sqrt(weights / 1e6). The variance of the noise starts at s^2 and
follows the squared residuals (average with 0.1, at least a tenth of its start). BSZO, version 4 of the
published trainer.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from ..checks import whole_number
from ..evaluation import THETA, point_of
from ..plan import Plan
from .base import Estimate, Estimator, Oracle

KEEP, FLOOR = 0.9, 0.1  # of the noise's running variance


class Bayesian(Estimator):
    """Estimates the slopes along a few draws by a Kalman filter over losses that are read along
    combinations of them (BSZO).

        y_j = (L(theta + eps sum_k d_jk z_k) - L(theta)) / eps,   d_j the widest direction of the posterior
        g = sum_k mu_k z_k,   mu the posterior mean of the slopes, in units of loss per weight

    queries       draws whose span is searched (published: 2)
    observations  losses beside that of theta (published: 3)

    A step reads 1 + observations losses, one after another, because each depends on those before. The
    filter runs where the losses are. Its eigenvectors are torch.linalg.eigh's, which waits for a GPU. `state`
    keeps the variance of the noise, one number.
    Raises ValueError for arguments out of range. arXiv 2601.01452, 2026."""

    gain = 1.0

    def __init__(self, queries: int = 2, observations: int = 3) -> None:
        self.queries, self.observations = (
            whole_number("queries", queries, 1),
            whole_number("observations", observations, 1),
        )

    def __call__(self, oracle: Oracle, plan: Plan) -> Iterator[Estimate]:
        prior, eps = sum(t.numel() for t in plan.tensors) / 1e6, plan.groups[0].eps
        draws = tuple(plan.draw(k) for k in range(self.queries))
        (base,) = oracle.losses([THETA])
        kind, device = torch.float64, base.device
        noise = before = torch.as_tensor(self.state.get("noise", prior), dtype=kind, device=device)
        mean = torch.zeros(self.queries, dtype=kind, device=device)
        covariance = torch.eye(self.queries, dtype=kind, device=device) * prior
        rank = torch.arange(self.queries, 0, -1, dtype=kind, device=device)
        ties = torch.diag(rank * (1e-9 * prior))  # of equal variances the first wins
        losses = [base]
        for _ in range(self.observations):
            along = torch.linalg.eigh(covariance + ties)[1][:, -1]
            along = along * along.gather(0, along.abs().argmax().view(1)).sign()
            losses += oracle.losses([point_of(plan, draws, along)]).to(base.device).unbind(0)
            residual = (losses[-1] - base) / eps - along @ mean
            gain = covariance @ along / (along @ covariance @ along + noise)
            mean, covariance = mean + gain * residual, covariance - torch.outer(gain, along @ covariance)
            new = torch.clamp(KEEP * noise + (1.0 - KEEP) * residual * residual, min=FLOOR * prior)
            # of a step that is skipped: the eigenvectors are those of finite numbers
            noise = torch.where(torch.isfinite(new), new, noise)
        read = torch.stack(losses)
        (self.state["noise"],) = plan.at_hand(torch.where(torch.isfinite(read).all(), noise, before).view(1))
        yield Estimate(
            draws, mean.float().double().expand(len(plan.groups), -1), read.unsqueeze(0), slopes=mean
        )


__all__ = ["Bayesian"]
