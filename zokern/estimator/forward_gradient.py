"""Estimator ``forward_gradient``: exact derivatives along random directions. Baydin et al. 2022.

c_k = <gradient, z_k>          g = (1 / q) sum_k c_k z_k          E[g] is the gradient, as E[z z^T] = I
"""

from __future__ import annotations

from collections.abc import Iterator

from ..checks import finite_number, whole_number
from ..plan import Plan
from .base import Estimate, Estimator, Oracle


class ForwardGradient(Estimator):
    """Estimates the gradient from exact derivatives along random draws, read in forward mode: eps plays
    no part.

        g = (1/q) sum_k <gradient, z_k> z_k

    queries  q: draws a step, averaged; each is one forward pass with tangents
    clip     bound on |<gradient, z_k>|, in units of loss per weight; None: no bound

    It needs evaluation='jvp', or 'auto'. Raises ValueError for arguments out of range.
    Baydin et al. 2022 (arXiv 2202.08587); Zhang et al. 2024 (ZO-Bench's Forward-Grad)."""

    perturbs = False

    def __init__(self, queries: int = 1, clip: float | None = None) -> None:
        self.queries = whole_number("queries", queries, 1, 2**24 - 1)
        self.clip = None if clip is None else finite_number("clip", clip, above=0.0)

    def __call__(self, oracle: Oracle, plan: Plan) -> Iterator[Estimate]:
        draws = tuple(plan.draw(k) for k in range(self.queries))
        losses, slopes = oracle.slopes(draws)
        found = slopes.float().double()
        if self.clip is not None:
            found = found.clamp(-self.clip, self.clip)
        # a fall is told from slopes with one eps
        told = slopes if len({group.eps for group in plan.groups}) == 1 else None
        yield Estimate(
            draws, found.expand(len(plan.groups), -1), losses.unsqueeze(1), self.queries, slopes=told
        )


__all__ = ["ForwardGradient"]
