"""Estimator ``anchored``: MeZO-SVRG's control variate, a difference of two estimates along the same draws.

Every `interval` steps the anchor is set: anchor <- theta, and the loss of the full data is read there.

    G = (1/q) sum_k a_k z_k        a_k = (F(theta + eps z_k) - F(theta - eps z_k)) / (2 eps), F the full loss
    g = ratio G                    in that step
    g = G + (1/q) sum_k (c_k(theta) - c_k(anchor)) z_k        in the others, c_k of the step's batch

G is no tensor: its draws belong to the anchor's step and are made again from the stream. Gautam et al. 2024
(arXiv 2404.08080), Algorithm 1. Their public code takes different draws in the two estimates, which adds
their variances, and its anchor is a list that holds the current parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..checks import finite_number, whole_number
from ..device_numbers import stacked
from ..group import Group
from ..plan import Plan
from .base import Base, Estimate, Oracle
from .spsa import Spsa, Stencil


class Anchored(Spsa):
    """Reduces the variance of zokern.Spsa by an anchor: an estimate at earlier weights, of the full data
    (MeZO-SVRG).

        g = G + (1/q) sum_k (c_k(theta) - c_k(anchor)) z_k,   G = (1/q) sum_k a_k z'_k
        a_k, z'_k: slopes of the full data, and draws, of the step that set the anchor, where g = ratio G

    interval         steps between two anchors (the paper's q): 2, as in the published script
    full             a closure of the loss of the full data, F, as published; None: the step's own, so that G
                     keeps the noise of one batch
    ratio            lr of the steps that set the anchor over that of the others (the paper's eta_1 /
                     eta_2)
    queries, stencil, clip  as for zokern.Spsa; clip, in units of loss per weight, bounds each difference
                     of two estimates

    A step that sets the anchor reads the losses of zokern.Spsa, and another step twice as many. A step
    sets one too where a parameter has none, and on a CPU where the losses of the last anchor were not
    finite. On a GPU the host does not know of that, and steps are skipped up to the next anchor. It keeps
    the parameters' `anchor`, float32 (4 bytes a weight), and in `state` its step and the differences of F.
    Raises ValueError for arguments out of range, and in the first step for a low-rank direction. Gautam
    et al. 2024 (arXiv 2404.08080)."""

    def __init__(
        self,
        interval: int = 2,
        full: Callable[[], Any] | None = None,
        ratio: float = 1.0,
        queries: int = 1,
        stencil: str | Stencil = "central",
        clip: float | None = None,
    ) -> None:
        super().__init__(queries, stencil, clip)
        self.interval, self.ratio = (
            whole_number("interval", interval, 1),
            finite_number("ratio", ratio, above=0.0),
        )
        if full is not None and not callable(full):
            raise TypeError(
                f"full is {full!r:.80}; expected a function without arguments that computes the loss of the "
                "full data, or None"
            )
        self.full = full

    def keeps(self, shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
        """Returns the anchor."""
        return {"anchor": shape}

    def __call__(self, oracle: Oracle, plan: Plan) -> Iterator[Estimate]:
        if plan.factored is not None:
            raise ValueError(
                f"estimator Anchored with direction {plan.factored.name!r}, whose draws are those of one "
                "basis; expected a dense z"
            )
        known = "step" in self.state and all("anchor" in oracle.states[tensor] for tensor in plan.tensors)
        if not known or plan.step % self.interval == 0:
            yield self.anchor(oracle, plan)
            return
        points = self.points(plan)
        here = oracle.losses(points).view(self.queries, -1)
        with oracle.at(Base(_to_anchor)):
            there = oracle.losses(points).view(self.queries, -1)
        own = self.estimate(plan, here, self.differences(here) - self.differences(there))
        full = stacked(self.state["full"], here)
        anchored = self.estimate(plan, here, full)
        yield replace(
            own,
            draws=(*[(self.state["step"], plan.draw(k)) for k in range(self.queries)], *own.draws),
            coefficients=torch.cat([anchored.coefficients, own.coefficients], 1),
            losses=torch.cat([here, there], 1),
            slopes=None,
        )

    def anchor(self, oracle: Oracle, plan: Plan) -> Estimate:
        """Returns the estimate of the full loss; keeps it, and theta, where the losses are finite."""
        losses = oracle.losses(self.points(plan), closure=self.full).view(self.queries, -1)
        differences = self.differences(losses)
        fine = torch.isfinite(differences).all()
        (finite,) = plan.at_hand(fine.view(1))
        known = isinstance(finite, Tensor) or finite
        kept = torch.where(fine, differences, torch.nan)  # no bound makes a number of NaN
        self.state = {"step": plan.step, "full": plan.at_hand(kept)} if known else {}
        with oracle.standing():
            for group in plan.groups:
                for i, tensor in enumerate(group.tensors):
                    oracle.states[tensor]["anchor"] = group.read(i).clone(
                        memory_format=torch.contiguous_format
                    )
        estimate = self.estimate(plan, losses, differences)
        return replace(estimate, coefficients=(estimate.coefficients * self.ratio).float().double())


def _to_anchor(group: Group, states: Any, _: Any) -> None:
    """theta <- anchor."""
    for i, tensor in enumerate(group.tensors):
        group.put(i, states[tensor]["anchor"])


__all__ = ["Anchored"]
