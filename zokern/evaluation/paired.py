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

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch._functorch import vmap

from ..plan import Plan
from . import standin
from .attention import folding
from .base import WAY_OUT, Point, Record, Refused, distinct
from .copies import Copies
from .isolation import Isolation
from .loss import loss_tensor
from .scratch import Scratch
from .standin import standing_in


class Paired(Scratch):
    """Reads all points of a step in one pass of the closure, which torch.vmap maps over the perturbed
    weights.

    budget  bytes of reused memory per device, as in zokern.Scratch; None: on a GPU copies of all sides,
            where a quarter of what is free holds them. Activations of all sides live at once too
    sides   most sides in one pass, at least 2; more points take several passes
    check   True: compare with 'master', as in zokern.Scratch

    The weights are never written: copies, or products made at their use, stand in their place. What
    torch.compile made runs as the Python that it was made from.
    Raises ValueError for arguments out of range. A step raises zokern.Refused where torch.vmap cannot map
    the closure: a branch on a value, `.item()`, an in-place write, a loss that is a Python number."""

    name = "paired"

    def __init__(self, budget: int | None = None, sides: int = 32, check: bool = True) -> None:
        if not isinstance(sides, int) or sides < 2:
            raise ValueError(f"Paired: sides is {sides!r}; expected an integer, at least 2")
        super().__init__(budget, check)
        self.sides = sides

    def read(
        self, plan: Plan, points: Sequence[Point], closure: Callable[[], object], isolation: Isolation
    ) -> Tensor:
        """Returns the losses without a comparison."""
        each = distinct(points)
        found: list[Tensor] = []
        whole: set[str] = set()
        largest = 0
        with isolation.session(eager=True), _quiet():
            for part in range(0, len(each), self.sides):
                here = each[part : part + self.sides]
                copies = Copies(plan, here, self.arena)
                found.append(isolation.run(partial(_pass, copies, closure)))
                whole |= copies.whole
                largest = max(largest, self.arena.peak, copies.largest)
        self.record = Record(self.name, scratch_bytes=largest, whole=tuple(sorted(whole)))
        losses = found[0] if len(found) == 1 else torch.cat(found)
        if each == list(points):
            return losses
        read = dict(zip(each, losses.unbind(0)))
        return torch.stack([read[point] for point in points])


def _pass(copies: Copies, closure: Callable[[], object]) -> Tensor:
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
                raise Refused(
                    f"the closure returned {type(loss).__name__} {loss!r:.40}, one number for all sides of a "
                    "step: return a tensor, or use evaluation='master'"
                )
            found = loss_tensor(loss, copies.plan.rows)
            return torch._C._functorch._remove_batch_dim(found, copies.level, copies.sides, 0)
    except Refused:
        raise
    except Exception as problem:
        if not _is_inside(problem, (torch, standin)):
            raise
        raise Refused(
            f"torch.vmap cannot map the closure ({type(problem).__name__}: {problem}): {WAY_OUT}"
        ) from problem
    finally:
        copies.level = None


def _is_inside(problem: BaseException, packages: Sequence[ModuleType]) -> bool:
    """Whether an exception was raised by Python code of some packages, and not by the closure's."""
    at = problem.__traceback__
    while at is not None and at.tb_next is not None:
        at = at.tb_next
    file = at.tb_frame.f_code.co_filename if at is not None else ""
    return file.startswith(tuple(str(Path(str(package.__file__)).parent) for package in packages))


@contextmanager
def _quiet() -> Iterator[None]:
    """Keeps torch from warning about operations that it maps in a loop."""
    functorch: Any = torch._C._functorch
    functorch._set_vmap_fallback_warning_enabled(False)
    try:
        yield
    finally:
        functorch._set_vmap_fallback_warning_enabled(True)


__all__ = ["Paired"]
