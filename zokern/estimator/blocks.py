"""Estimator ``blocks``: one block of parameters after another, each moved before the next is read (Gauss-Seidel).

Zhang et al. 2024 (ZO-Bench, module-wise perturbation with coordinate=True).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from ..evaluation import Point
from ..plan import Plan
from .base import SLOPES, Estimate, Estimator, Oracle
from .spsa import Spsa


def block_of(name: str) -> str:
    """Returns the transformer block of a parameter: its name up to the first number, or its module's name where there is none."""
    parts = name.split(".")
    number = next((i for i, part in enumerate(parts) if part.isdigit()), None)
    return ".".join(parts[:-1] if number is None else parts[: number + 1])


class _Within:
    """An oracle that moves some parameters only."""

    def __init__(self, oracle: Oracle, scope: Collection[str]) -> None:
        self.oracle, self.scope = oracle, scope

    def losses(self, points: Sequence[Point], scope: Collection[str] | Plan | None = None) -> Tensor:
        return self.oracle.losses(points, self.scope if scope is None else scope)


class Blockwise:
    """An estimator for each block of parameters in turn; a block has moved before the next one is read.

    inner  the estimator of a block; None: Spsa(), the central difference. All blocks of a step have the same draws
    block  a function from a parameter's name to its block's; by default the transformer block (block_of)

    A step reads as many losses as `inner` for each block. A block with a loss that is inf or NaN ends the step."""

    def __init__(self, inner: Estimator | None = None, block: Callable[[str], str] = block_of) -> None:
        self.inner: Estimator = Spsa() if inner is None else inner
        self.block, self.queries = block, self.inner.queries

    @property
    def state(self) -> dict[str, Any]:
        """What the inner estimator learns."""
        return self.inner.state

    @state.setter
    def state(self, kept: dict[str, Any]) -> None:
        self.inner.state = kept

    @property
    def lr(self) -> float:
        return getattr(self.inner, "lr", SLOPES)

    def __call__(self, oracle: Oracle, plan: Plan) -> Iterator[Estimate]:
        blocks: dict[str, list[str]] = {}
        for name in plan.names:
            blocks.setdefault(self.block(name), []).append(name)
        for names in map(tuple, blocks.values()):
            for estimate in self.inner(_Within(oracle, names), plan.only(names)):  # type: ignore[arg-type]
                yield replace(estimate, scope=names)


__all__ = ["Blockwise", "block_of"]
