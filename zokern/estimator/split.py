"""Estimator ``split``: back-propagation for some parameters, a zeroth-order estimate for the others.

Zhang et al. 2024 (ZO-Bench's hybrid); Sugiura and Matsutani 2025 (ElasticZO, arXiv 2501.04287).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import replace
from typing import Any

import torch

from ..plan import Plan
from .around import Around
from .base import Estimate, Estimator, Gradient, Oracle


class Split(Around):
    """Estimates the gradient of some parameters by `inner`, and back-propagates that of the others, all
    at the same weights.

    first      the names of the parameters that are back-propagated, or a function from a name to whether
               it is one of them
    inner      None: zokern.Spsa(), the central difference; it moves the other parameters alone
    optimizer  a torch optimizer of the back-propagated parameters; None: the rule moves them, with the lr
               of their parameter group, as gradients arrive

    A step reads what `inner` reads and one loss of theta more, whose graph begins at the first
    back-propagated parameter. `state` has the optimizer's state.
    Raises ValueError where `first` chooses no parameter, or all of them. Zhang et al. 2024 (ZO-Bench);
    Sugiura and Matsutani 2025 (ElasticZO, arXiv 2501.04287)."""

    backpropagates, shards = True, False

    def __init__(
        self,
        first: Collection[str] | Callable[[str], bool],
        inner: Estimator | None = None,
        optimizer: torch.optim.Optimizer | None = None,
    ) -> None:
        super().__init__(inner)
        self.first, self._optimizer = first if callable(first) else frozenset(first), optimizer

    @property
    def state(self) -> dict[str, Any]:
        """What the inner estimator learns, and the state_dict of the torch optimizer."""
        kept = {"inner": dict(self.inner.state)}
        return kept if self._optimizer is None else {**kept, "optimizer": self._optimizer.state_dict()}

    @state.setter
    def state(self, kept: dict[str, Any]) -> None:
        self.inner.state = dict(kept.get("inner", {}))
        if self._optimizer is not None and "optimizer" in kept:
            self._optimizer.load_state_dict(kept["optimizer"])

    def parts(self, names: Collection[str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Returns the names that are back-propagated, and the others. Raises ValueError where one is
        empty."""
        is_first = self.first if callable(self.first) else self.first.__contains__
        chosen = tuple(name for name in names if is_first(name))
        others = tuple(name for name in names if not is_first(name))
        if not chosen or not others:
            raise ValueError(
                f"first_order chooses {len(chosen)} of {len(names)} trained parameters, such as "
                f"{[*names][-1:]}; expected some, and not all"
            )
        return chosen, others

    def __call__(self, oracle: Oracle, plan: Plan) -> Iterator[Estimate]:
        chosen, _ = self.parts(plan.names)
        gradient: Gradient | None = Gradient(names=chosen, optimizer=self._optimizer)
        for estimate in self.forwards(oracle, plan):
            yield replace(estimate, slopes=None, gradient=gradient)
            gradient = None  # of further blocks

    def forwards(self, oracle: Oracle, plan: Plan) -> Iterator[Estimate]:
        """Yields the inner estimates of the other parameters, whose lr zokern.tune tells."""
        return self.within(oracle, plan, self.parts(plan.names)[1])


__all__ = ["Split"]
