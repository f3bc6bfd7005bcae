"""Evaluation ``paired``: all points of a step in one pass of the closure,
as a mapped dimension of torch.vmap.

Small parameters are copies of all sides, stacked and mapped.
At a large matrix the weights are read once for all sides:

    dense z      one kernel makes z once and multiplies both signs, or tiles of both signs are made from one z
    factored z   one product x W^T of all sides' rows, and thin products beside it: (x V) C^T U^T

Python runs once for all sides, and no side can see another. Dropout masks are equal. A closure that cannot be
mapped is refused by name: a branch on a value that depends on the weights, `.item()`, a write into shared
memory, a loss that is a Python number.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch._functorch import vmap

from ..plan import Plan
from .attention import folding
from .copies import Copies
from .loss import loss_tensor, one_number
from .scratch import Scratch
from .standin import standing_in
from .trust import Reads


class Paired(Scratch):
    """Reads all points of a step in one pass of the closure, which torch.vmap maps over the perturbed
    weights.

    budget  bytes of reused memory per device, as in zokern.Scratch; None: on a GPU copies of all sides,
            where a quarter of what is free holds them. Activations of all sides live at once too
    sides   most sides in one pass, at least 2; more points take several passes
    check   True: compare with 'master', as in zokern.Scratch

    The weights are never written: copies, or products made at their use, stand in their place. What
    torch.compile made stays compiled: its graphs read all sides (docs/internals.md).
    Raises ValueError for arguments out of range. A step raises zokern.Refused where torch.vmap cannot map
    the closure: a branch on a value, `.item()`, an in-place write, a loss that is a Python number. An
    exception that 'master' meets too is the closure's own, and is raised as it is."""

    name = "paired"
    refusal = "torch.vmap cannot map the closure"

    def __init__(self, budget: int | None = None, sides: int = 32, check: bool = True) -> None:
        if not isinstance(sides, int) or sides < 2:
            raise ValueError(f"Paired: sides is {sides!r}; expected an integer, at least 2")
        super().__init__(budget, check)
        self.sides = sides

    def _pass(self, copies: Copies, closure: Callable[[], object]) -> Tensor:
        """Returns the losses of all sides, from one call of the closure under torch.vmap."""
        vmap.lazy_load_decompositions()
        try:
            # what torch.vmap does for a body that returns a tensor and takes none
            with (
                vmap.vmap_increment_nesting(copies.sides, "same") as copies.level,
                standing_in(copies),
                folding(),
            ):
                loss = closure()
                if not isinstance(loss, Tensor):
                    raise one_number(loss)
                found = loss_tensor(loss, copies.plan.rows)
                return torch._C._functorch._remove_batch_dim(found, copies.level, copies.sides, 0)
        finally:
            copies.level = None

    def _safer(self, plan: Plan) -> Reads | None:
        return super()._safer(plan) or Scratch(self.arena.budget, check=False)


__all__ = ["Paired"]
