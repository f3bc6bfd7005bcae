"""Estimators of parts: ``blocks`` estimates every block of parameters by itself, ``layers`` a random share of
the layers together.

Zhang et al. 2024 (ZO-Bench, module-wise perturbation); Wang et al. 2024 (LeZO, arXiv 2410.09823).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ..checks import says, within
from ..plan import Plan
from ..stream import LAYERS
from .around import Around
from .base import Estimate, Estimator, Oracle

ORDERS = ("gauss-seidel", "jacobi")


def module_of(name: str) -> str:
    """Returns the module of a parameter: its name up to the last dot."""
    return name.rpartition(".")[0]


def layer_of(name: str) -> str | None:
    """Returns the layer of a parameter: its name up to the first number; None where the name holds no
    number."""
    return _head(name, 0)


def block_of(name: str) -> str:
    """Returns the transformer block of a parameter: its name up to the first number, or its module's name
    where there is none."""
    return _head(name, 0) or module_of(name)


def sublayer_of(name: str) -> str:
    """Returns the part of a layer that a parameter is in, such as its attention: the name up to one word
    after the first number."""
    return _head(name, 1) or module_of(name)


def _head(name: str, more: int) -> str | None:
    """Returns a name up to its first number and some words after it; None without a number."""
    parts = name.split(".")
    number = next((i for i, part in enumerate(parts) if part.isdigit()), None)
    return None if number is None else ".".join(parts[: number + 1 + more])


BLOCKS = {"layer": block_of, "sublayer": sublayer_of, "module": module_of}


class Blockwise(Around):
    """Estimates block by block: a step reads losses, and moves weights, for each block of parameters by
    itself.

    inner  the estimator of a block; None: zokern.Spsa(), the central difference
    block  'layer' (a transformer block), 'sublayer' (its attention, its MLP), 'module' (a linear layer),
           or a function from a parameter's name to the name of its block
    order  'gauss-seidel': a block has moved before the next is read. 'jacobi': all blocks are read at
           theta before one moves, and theta itself is read once

    Blocks have draws of their own, because z is named by the parameter. A step reads as many losses as
    `inner` for each block. After a loss that is inf or NaN, or a closure that raises, no further block
    moves. In Gauss-Seidel order the blocks before it have moved already, and the step has used its number. In
    Jacobi order none has moved.
    Raises ValueError for another name of blocks or order, and for zokern.Guided in Jacobi order. Zhang et al.
    2024 (ZO-Bench, arXiv 2402.11592)."""

    def __init__(
        self, inner: Estimator | None = None, block: str | Callable[[str], str] = "layer",
        order: str = ORDERS[0]
    ) -> None:  # fmt: skip
        super().__init__(inner)
        if not callable(block) and block not in BLOCKS:
            raise ValueError(
                f"block is {block!r}; expected one of {list(BLOCKS)}, or a function from a parameter's name "
                "to its block's"
            )
        if order not in ORDERS:
            raise ValueError(f"order is {order!r}; expected one of {list(ORDERS)}")
        if order == "jacobi" and self.follows:
            raise ValueError(
                f"order is 'jacobi' with {type(self.inner).__name__}, which asks whether its last estimate "
                "moved the weights: no block has moved when the next is read. Use order='gauss-seidel'"
            )
        self.block, self.order = block if callable(block) else BLOCKS[block], order

    @property
    def captures(self) -> bool:  # type: ignore[override]
        """Whether the inner estimator asks the same of every step."""
        return says(self.inner, "captures")

    def __call__(self, oracle: Oracle, plan: Plan) -> Iterator[Estimate]:
        blocks: dict[str, list[str]] = {}
        for name in plan.names:
            blocks.setdefault(self.block(name), []).append(name)
        base: list[Tensor] | None = [] if self.order == "jacobi" else None
        estimates = (
            estimate
            for names in blocks.values()
            for estimate in self.within(oracle, plan, tuple(names), base)
        )
        yield from estimates if base is None else _together(list(estimates))


def _together(estimates: Sequence[Estimate]) -> list[Estimate]:
    """Returns the estimates, NaN where a coefficient of one of them is inf or NaN: all blocks move, or
    none."""
    flaw = torch.stack([0.0 * estimate.coefficients.sum() for estimate in estimates]).sum()
    return [replace(estimate, coefficients=estimate.coefficients + flaw) for estimate in estimates]


class Layers(Around):
    """Estimates along a random share of the layers; the others are neither perturbed nor moved in this
    step.

    inner     the estimator; None: zokern.Spsa(), the central difference
    sparsity  share of the layers that stay, 0 <= sparsity < 1; at least one layer moves
    layer     a function from a parameter's name to its layer's, or to None for one that moves in every
              step. The default takes the name up to its first number, so that embeddings, the last norm
              and the head always move

    The layers of a step are a function of (seed, name of the layer, step).
    Raises ValueError for a sparsity out of range. Wang et al. 2024 (LeZO, arXiv 2410.09823)."""

    def __init__(
        self, inner: Estimator | None = None, sparsity: float = 0.75,
        layer: Callable[[str], str | None] = layer_of
    ) -> None:  # fmt: skip
        super().__init__(inner)
        self.sparsity, self.layer = within("sparsity", sparsity, 0.0, 1.0, "0 <= sparsity < 1"), layer

    def chosen(self, plan: Plan) -> tuple[str, ...]:
        """Returns the names of the parameters that move in this step."""
        of = {name: self.layer(name) for name in plan.names}
        layers = sorted({layer for layer in of.values() if layer is not None})
        order = sorted(layers, key=lambda layer: int(plan.bits(LAYERS, who=layer)[0, 0]))
        still = order[max(1, round((1.0 - self.sparsity) * len(order))) :]
        return tuple(name for name in plan.names if of[name] not in still)

    def __call__(self, oracle: Oracle, plan: Plan) -> Iterator[Estimate]:
        yield from self.within(oracle, plan, self.chosen(plan))


__all__ = ["Blockwise", "Layers", "block_of", "layer_of", "module_of", "sublayer_of"]
