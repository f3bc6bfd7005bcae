"""Evaluation ``scratch``: the loss at theta + offset eps z, with weights that nobody touches.

While the closure runs, a TorchFunctionMode looks at every call into torch. Where a trained parameter is an argument, a perturbed
copy takes its place for that one call: nothing in the model is replaced, so there is nothing to put back, whatever the closure
raises, and a parameter is found wherever it is used, through a module, a tie, or by hand.

    small tensors (norms, biases)   perturbed once per draw, both signs in one launch, and kept for the reading
    linear, addmm (Conv1D)          tile by tile through one reused piece of memory, so the budget holds for any size; linear on a CPU
                                    whose own kernel is the faster one: z made beside the product, no tile at all
    embedding, indexing             only the rows that are looked up
    everything else                 the whole tensor, for that call; the record names it in `whole`

16-bit norm weights and biases are perturbed in float32: at 1.0 a step of eps = 1e-3 is below half an ulp of bfloat16.
"""

from __future__ import annotations

from collections.abc import Callable

from .arena import Arena
from .copies import Copies
from .plan import Plan, Point, Reading, unrepeatable
from .substitution import Substitution
from .surroundings import Surroundings

MIB = 1 << 20


class Scratch:
    """Evaluation through perturbed copies, never through the weights.

    budget  bytes of reused memory per device (default 64 MB). A use that cannot be tiled takes its own parameter's size if that
            is more; the step's record lists such parameters in ``whole``.
    """

    name = "scratch"

    def __init__(self, budget: int = 64 * MIB) -> None:
        if not isinstance(budget, int) or budget < MIB:
            raise ValueError(f"Scratch: budget is {budget!r} bytes; expected an integer, at least {MIB} (1 MB)")
        self.arena = Arena(budget)

    def read(self, plan: Plan, closure: Callable[[], object], repeat_first: bool = False) -> Reading:
        surroundings = Surroundings(plan)
        copies = Copies(plan, self.arena)
        substitution = Substitution(copies)
        base: float | None = None
        losses = []
        for query in range(plan.queries):
            self.arena.reset()
            copies.prepare([Point(query, offset) for offset in plan.stencil.offsets])
            sides: list[float] = []
            for side, offset in enumerate(plan.stencil.offsets):
                if offset == 0.0 and base is not None:
                    sides.append(base)
                    continue
                copies.side = side
                # without deferred updates the loss at offset 0 is the closure's own
                loss = surroundings.read(closure, substitution if offset or plan.deferred else None)
                sides.append(loss)
                if offset == 0.0:
                    base = loss
                    continue
                copies.check_used()
                if (
                    repeat_first
                    and query == 0
                    and len(sides) == 1
                    and (again := surroundings.read(closure, substitution)) != loss
                ):
                    raise unrepeatable(loss, again)
            losses.append(tuple(sides))
        whole, unseen = copies.report()
        scratch_bytes = max(self.arena.peak, copies.largest)
        return Reading(losses, [0.0] * plan.queries, scratch_bytes, unseen, whole, rows=copies.rows, coarse=copies.coarse)
