"""An estimator around another: what such estimators share."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..evaluation import Point
from ..plan import Plan
from .base import Estimate, Estimator, Oracle
from .spsa import Spsa


class Within:
    """An oracle that moves some parameters only.

    base  the loss of theta, once it was read, for oracles that share it; None: it is read whenever it is
          asked for"""

    def __init__(self, oracle: Any, scope: Collection[str], base: list[Tensor] | None = None) -> None:
        self.oracle, self.scope, self.base = oracle, scope, base

    def moved(self) -> bool:
        return self.oracle.moved()

    def losses(self, points: Sequence[Point], scope: Collection[str] | Plan | None = None) -> Tensor:
        scope = self.scope if scope is None else scope
        if self.base is None:
            return self.oracle.losses(points, scope)
        asked = [point for point in points if point.terms or not self.base]
        found = iter(self.oracle.losses(asked, scope).unbind(0) if asked else ())
        losses = [next(found) if point.terms or not self.base else self.base[0] for point in points]
        self.base += [loss for point, loss in zip(points, losses) if not point.terms and not self.base]
        return torch.stack(losses)

    def examples(self, points: Sequence[Point], scope: Collection[str] | Plan | None = None) -> Tensor:
        return self.oracle.examples(points, self.scope if scope is None else scope)

    def slopes(
        self, draws: Sequence[int], scope: Collection[str] | Plan | None = None
    ) -> tuple[Tensor, Tensor]:
        return self.oracle.slopes(draws, self.scope if scope is None else scope)


class Around(Estimator):
    """Holds the inner estimator, and has its queries, lr and state. None: Spsa(), the central difference."""

    def __init__(self, inner: Estimator | None) -> None:
        self.inner: Estimator = Spsa() if inner is None else inner
        self.queries = self.inner.queries

    @property
    def follows(self) -> bool:  # type: ignore[override]
        return self.inner.follows

    @property
    def state(self) -> dict[str, Any]:
        """What the inner estimator learns."""
        return self.inner.state

    @state.setter
    def state(self, kept: dict[str, Any]) -> None:
        self.inner.state = kept

    def begin(self) -> None:
        """Takes a copy of the inner estimator as it is before a run."""
        self.inner = self.inner.fresh()

    @property
    def rows(self) -> bool:  # type: ignore[override]
        """Whether the inner estimator asks for the losses of examples alone."""
        return self.inner.rows

    @property
    def lr(self) -> float:  # type: ignore[override]
        return self.inner.lr

    @property
    def settles(self) -> int:  # type: ignore[override]
        return self.inner.settles

    @property
    def shards(self) -> bool:  # type: ignore[override]
        return self.inner.shards

    def within(
        self, oracle: Oracle, plan: Plan, names: tuple[str, ...], base: list[Tensor] | None = None
    ) -> Iterator[Estimate]:
        """Yields the inner estimator's estimates of some parameters, or of parts of them."""
        for estimate in self.inner(Within(oracle, names, base), plan.only(names)):  # type: ignore[arg-type]
            yield replace(estimate, scope=names if estimate.scope is None else estimate.scope)


__all__ = ["Around", "Within"]
