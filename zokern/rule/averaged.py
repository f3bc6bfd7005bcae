"""Rule ``averaged``: KerZOO's acceleration. Losses are read, and weights kept, at an average of fast weights.

    w_t = 1 / beta_t,   beta_t = 1 + t / span,   t the updates of a parameter before this one
    y = (1 - w_t) theta + w_t fast                     where the step's losses are read
    fast <- decay fast + lr g                          g = sum_k weights[k] z_k
    theta <- (1 - w_t) theta + w_t fast

So theta is the average of all fast weights with weights that grow as t^(span - 1): the steps before the last
few times t / span are forgotten. KerZOO's published trainer (arXiv 2505.18886, 2025) has span = 6, and forms
theta from y by a division by 1 - w_t, which magnifies rounding by (6 + t) / t. Here y is written for the
readings and theta put back bit for bit, and nothing is undone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..checks import finite_number
from ..estimator import Base
from ..evaluation import Point
from ..group import Group
from ..plan import Plan
from .base import Rule
from .dense import advance
from .state import Keeps

GRID = 1 << 24  # w_t is a multiple of 1 / GRID, so that w_t and 1 - w_t are float32 numbers with the sum 1


def is_still(lr: float) -> bool:
    """Returns whether the fast weights do not move along the estimate, which the host knows."""
    return lr == 0.0


class Averaged(Rule):
    """Averages the weights along the run, and takes steps from a fast copy of them (KerZOO).

        fast <- decay fast + lr g,   theta <- (1 - w) theta + w fast,   w = 1 / (1 + t / span) after t updates

    span  a number above 0, in updates; KerZOO's published trainer: 6

    The losses of a step are read at (1 - w) theta + w fast. Keeps `fast`, float32 and shaped like the
    parameter (4 bytes a weight), which starts as the parameter, and the count `updates`. Readings take a
    copy of what is trained beside it. In 16 bits the average stalls where w (fast - theta) is below half
    an ulp; rounding='residual' or 'stochastic' avoids that. Weights that are edited by hand are averaged
    away: `del optimizer.state[parameter]` starts anew.
    Raises ValueError for a span out of range; an optimizer refuses it with low-rank directions. arXiv
    2505.18886, 2025."""

    name, verb, dense, gated = "averaged", "momentum", True, True
    shards = True

    def __init__(self, span: float = 6.0) -> None:
        self.span = finite_number("span", span, above=0.0)

    @property
    def gain(self) -> float:  # type: ignore[override]
        """span / (1 + span): of fast weights that move evenly the average is this share of the way."""
        return self.span / (1.0 + self.span)

    def weight(self, updates: int) -> float:
        """Returns w_t after t = `updates` updates."""
        return max(1, round(GRID / (1.0 + updates / self.span))) / GRID

    def base(self, point: Point) -> tuple[Base | None, Point]:
        """Returns the point around y."""
        return Base(self.blend), point

    def blend(self, group: Group, states: Any, _: Any) -> None:
        """theta <- y."""
        for i, tensor in enumerate(group.tensors):
            if "fast" in (state := states[tensor]):
                theta = group.read(i)
                group.put(i, theta + (state["fast"] - theta) * self.weight(state["updates"]))

    def update(
        self, plan: Plan, group: Group, weights: Sequence[float], lr: float, decay: float, states: Any,
        defer: bool
    ) -> Tensor | int:  # fmt: skip
        for i, tensor in enumerate(group.tensors):
            if "fast" not in states[tensor]:
                states[tensor].update(
                    fast=group.read(i).clone(memory_format=torch.contiguous_format), updates=0
                )
        if is_still(lr):  # a launch would turn -0.0 into 0.0
            every = range(len(group.tensors))
            if all(torch.equal(states[group.tensors[i]]["fast"], group.read(i)) for i in every):
                for tensor in group.tensors:
                    states[tensor]["updates"] += 1
                return 0

        def scalars(lr: float, decay: float, updates: int) -> tuple[float, ...]:
            w = self.weight(updates - 1)
            return 1.0 - w, w, decay, lr

        return advance(self, plan, group, weights, scalars, states, lr, decay)

    def keeps(self, shape: tuple[int, ...], draw: tuple[int, int] | None) -> Keeps:
        """Returns the fast weights."""
        return Keeps({"fast": shape}, True)


__all__ = ["Averaged"]
