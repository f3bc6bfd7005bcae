"""The reference with some functions replaced while its verbs run."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from unittest.mock import patch

from zokern.backends import Batch, reference
from zokern.directions import normal


class Patched(reference.Reference):
    """One mistake.

    replaced     functions by name: of zokern/backends/reference.py, or of zokern/directions/normal.py as
                 "normal.<name>"
    verbs        the verbs that see the replacements
    rejected_by  the checks of tests/support/conformance.py that must fail
    """

    replaced: dict[str, Callable] = {}
    verbs: tuple[str, ...] = ("draw", "axpy_", "perturb", "lowrank_")
    rejected_by: tuple[str, ...] = ()

    def _run(self, verb: str, *arguments, **named):
        with ExitStack() as stack:
            for name, function in self.replaced.items() if verb in self.verbs else ():
                module = normal if name.startswith("normal.") else reference
                stack.enter_context(patch.object(module, name.removeprefix("normal."), function))
            return getattr(reference.Reference, verb)(self, *arguments, **named)

    def draw(self, *arguments, **named):
        return self._run("draw", *arguments, **named)

    def axpy_(self, *arguments, **named):
        return self._run("axpy_", *arguments, **named)

    def perturb(self, *arguments, **named):
        return self._run("perturb", *arguments, **named)

    def lowrank_(self, *arguments, **named):
        return self._run("lowrank_", *arguments, **named)


def only(batch: Batch, i: int) -> Batch:
    """One tensor of a batch."""
    low = batch.residuals and batch.residuals[i : i + 1]
    return Batch(batch.tensors[i : i + 1], batch.spans[i : i + 1], batch.rounding, low)
