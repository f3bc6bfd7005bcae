"""Estimator ``kernel``: KerZOO's differences over random radii, whose weights cancel the bias of low orders.

    c_k = K(r_k) (L(theta + eps r_k z_k) - L(theta - eps r_k z_k)) / (2 eps),   r_k uniform in (-d, d)
    K(r) = (C / d) P(r / d):   E[r K(r)] = C,  E[r^j K(r)] = 0 for j = 3, 5, .. up to `order`

    order  P(x)                                                            E[(r K)^2] / C^2   bias
    1      3 x                                                             9/5                eps^2
    3      15/4 x (5 - 7 x^2)                                              25/4               eps^4
    5      105/64 x (35 - 126 x^2 + 99 x^4)                                11025/832          eps^6
    7      315/256 x (105 - 693 x^2 + 1287 x^4 - 715 x^6)                  99225/4352         eps^8

E[(r K)^2] is the factor by which the variance of c exceeds MeZO's, for a linear loss and C = 1. KerZOO (arXiv
2505.18886, 2025) prints order 5 with the factor 195/64, for which E[r K] is 13/7. Bach and Perchet 2016 have
the kernels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ..backends import Batch, Terms
from ..checks import finite_number, flag
from ..directions.orthonormal import tree_sum
from ..evaluation import Point
from ..plan import Plan
from ..stream import RADIUS, draw_word, parameter_id, philox4x32
from .base import Estimate, Oracle
from .spsa import Spsa

# order -> factor, and the coefficients of 1, x^2, x^4, ..: P(x) = factor x (sum_i coefficients[i] x^(2 i))
KERNELS: dict[int, tuple[float, tuple[float, ...]]] = {
    1: (3.0, (1.0,)),
    3: (3.75, (5.0, -7.0)),
    5: (105 / 64, (35.0, -126.0, 99.0)),
    7: (315 / 256, (105.0, -693.0, 1287.0, -715.0)),
}
SCOPES = ("query", "tensor")
OF_TENSORS = 1 << 23  # first query of the purpose RADIUS for the radii of single parameters
PIECE = 1 << 20  # elements of g that exist at a time


class Kernel(Spsa):
    """Estimates from differences over random radii, weighted by a kernel that cancels the bias of the
    difference (KerZOO).

        g = (1/q) sum_k c_k z_k,   c_k = K(r_k) (L(theta + eps r_k z_k) - L(theta - eps r_k z_k)) / (2 eps)

    queries    q: draws a step, averaged (the published trainer: 3)
    scale      C, the mean of r K(r), without a unit: 1 gives g the length of MeZO's per step; the
               published trainer has 4
    width      d, the largest |r|: a number, or a function of the step number that returns one (published:
               max(1 - t/4000, 1e-4))
    clip       bound on |c_k|, in units of loss per weight; None: no bound
    order      1, 3, 5 or 7: the last odd power of r whose moment K cancels; 1 cancels none
    rescale    whether K follows the width. False, as published: K(r) = C P(r) at any d, which keeps the
               moments at d = 1 alone
    scope      'query': one r_k for all parameters, as the theorem needs. 'tensor', as published: one for
               each, which cancels the bias within a parameter alone. It takes a launch for each
               parameter, in place of one for a group
    clip_norm  bound on the Euclidean norm of each parameter's g, in units of loss per weight (published:
               4e5); None: no bound. z is made once more, for the norms

    r_k is a function of (seed, step, query), and with scope='tensor' of the parameter's name too. It
    keeps nothing.
    Raises ValueError for arguments out of range, and in the first step for clip_norm with a low-rank
    direction. arXiv 2505.18886, 2025."""

    def __init__(
        self,
        queries: int = 3,
        scale: float = 1.0,
        width: float | Callable[[int], float] = 1.0,
        clip: float | None = None,
        order: int = 3,
        rescale: bool = True,
        scope: str = "query",
        clip_norm: float | None = None,
    ) -> None:
        super().__init__(queries, "central", clip)
        self.scale = finite_number("scale", scale, above=0.0)
        self.width = width if callable(width) else finite_number("width", width, above=0.0)
        if isinstance(order, bool) or order not in KERNELS:
            raise ValueError(f"order is {order!r}; expected one of {list(KERNELS)}")
        if scope not in SCOPES:
            raise ValueError(
                f"scope is {scope!r}; expected 'query', one radius for all parameters, or 'tensor', one for "
                "each"
            )
        self.order, self.rescale, self.scope = int(order), flag("rescale", rescale), scope
        self.clip_norm = None if clip_norm is None else finite_number("clip_norm", clip_norm, above=0.0)

    @property
    def shards(self) -> bool:  # type: ignore[override]
        """Whether no norm of a whole parameter is taken."""
        return self.clip_norm is None

    @property
    def gain(self) -> float:  # type: ignore[override]
        """E[r K(r)]: C, and where K does not follow the width, that of the first step's d."""
        if self.rescale:
            return self.scale
        factor, coefficients = KERNELS[self.order]
        width = float(self.width(0) if callable(self.width) else self.width)
        return (
            self.scale
            * factor
            * sum(c * width ** (2 * i + 2) / (2 * i + 3) for i, c in enumerate(coefficients))
        )

    def radii(self, plan: Plan) -> list[tuple[float, float]]:
        """Returns (r_k, K(r_k)) of every query."""
        (units,) = _units(plan, [parameter_id("")], [draw_word(k, RADIUS) for k in range(self.queries)])
        return self.weighted(plan, units)

    def radii_of_tensors(self, plan: Plan) -> list[list[tuple[float, float]]]:
        """Returns (r_k, K(r_k)) of every query, for every parameter of the plan."""
        whos = [span.who for group in plan.groups for span in group.spans]
        rows = _units(plan, whos, [draw_word(OF_TENSORS + k, RADIUS) for k in range(self.queries)])
        return [self.weighted(plan, units) for units in rows]

    def weighted(self, plan: Plan, units: Sequence[float]) -> list[tuple[float, float]]:
        """Returns (r, K(r)) for numbers r / d in (-1, 1)."""
        width = (
            finite_number("width", self.width(plan.step), above=0.0) if callable(self.width) else self.width
        )
        factor, coefficients = KERNELS[self.order]
        found = []
        for unit in units:
            x = unit if self.rescale else width * unit
            total = coefficients[-1]
            for coefficient in coefficients[-2::-1]:
                total = coefficient + total * x * x
            size = self.scale / width if self.rescale else self.scale
            found.append((width * unit, size * factor * x * total))
        return found

    def __call__(self, oracle: Oracle, plan: Plan) -> Iterator[Estimate]:
        draws = [plan.draw(k) for k in range(self.queries)]
        if self.scope == "tensor":
            radii = self.radii_of_tensors(plan)
            split = plan.each([{draw: r for draw, (r, _) in zip(draws, pairs)} for pairs in radii])
            losses = oracle.losses([Point(((draw, sign),)) for draw in draws for sign in (1.0, -1.0)], split)
            losses = losses.view(self.queries, 2)
            flat = [k for pairs in radii for _, k in pairs]
            weights = plan.numbers(lambda: flat, torch.float64, losses.device).view(len(radii), -1)
            estimate = replace(
                self.estimate(split, losses, self.differences(losses) * weights), slopes=None, each=True
            )
        else:
            pairs = self.radii(plan)
            losses = oracle.losses(
                [Point(((draw, sign * r),)) for draw, (r, _) in zip(draws, pairs) for sign in (1.0, -1.0)]
            )
            losses = losses.view(self.queries, 2)
            flat = [number for pair in pairs for number in pair]
            where, weights = plan.numbers(lambda: flat, torch.float64, losses.device).view(-1, 2).T
            estimate = self.estimate(plan, losses, self.differences(losses) * weights)
            assert estimate.slopes is not None
            estimate = replace(estimate, slopes=estimate.slopes / (weights * where))
        yield estimate if self.clip_norm is None else self.clipped(plan, estimate)

    def clipped(self, plan: Plan, estimate: Estimate) -> Estimate:
        """Returns the estimate with g of each parameter scaled to a norm of clip_norm at most."""
        assert self.clip_norm is not None
        if plan.factored is not None:
            raise ValueError(
                f"clip_norm is {self.clip_norm!r} with a low-rank direction; expected None, or a dense z"
            )
        rows, split = estimate.coefficients, plan.each()
        if not estimate.each:
            rows = torch.cat([row.expand(len(group.names), -1) for row, group in zip(rows, plan.groups)])
        norms = _norms(split.along(estimate.draws), rows / estimate.count)
        factors = (self.clip_norm / (norms + 1e-8)).clamp(max=1.0)
        return replace(estimate, coefficients=(rows * factors.unsqueeze(1)).float().double(), each=True)


def _units(plan: Plan, whos: Sequence[int], words: Sequence[int]) -> list[list[float]]:
    """Returns a number in (-1, 1) for every id and draw word: the first Philox word of block 0, centred."""
    counters = torch.tensor(
        [[0, who, plan.step, word] for who in whos for word in words], dtype=torch.int64, device="cpu"
    )
    found = philox4x32(counters, (plan.seed & 0xFFFFFFFF, plan.seed >> 32))[:, 0].view(len(whos), len(words))
    return ((found.double() + 0.5) * 2.0**-31 - 1.0).tolist()


def _norms(plan: Plan, rows: Tensor) -> Tensor:
    """Returns the norm of sum_k rows[i, k] z_k for every parameter i, float64, on the rows' device.

    plan  has a group for each parameter"""
    found = []
    for group, row in zip(plan.groups, rows):
        (theta,), (span,), squares = group.theta, group.spans, []
        terms = Terms(row.to(device=theta.device, dtype=torch.float32))
        for start in range(0, theta.numel(), PIECE):
            piece = torch.zeros(min(PIECE, theta.numel() - start), dtype=torch.float32, device=theta.device)
            scale = group.scale(0)
            factors = None if scale is None else [scale.view(-1)[start : start + PIECE]]
            batch = Batch([piece], [span._replace(first=span.first + start)], scales=factors)
            group.backend.axpy_(batch, plan.noise(plan.draws()), terms)
            squares.append(tree_sum(piece.double().square().unsqueeze(1))[0].to(rows.device))
        total = torch.zeros((), dtype=torch.float64, device=rows.device)
        for square in squares:
            total = total + square
        found.append(total.sqrt())
    return torch.stack(found)


__all__ = ["KERNELS", "Kernel"]
