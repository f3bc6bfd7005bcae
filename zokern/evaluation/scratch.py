"""Evaluation ``scratch``: the loss at theta + offset eps z, with weights that nobody touches.

While the closure runs, a TorchFunctionMode looks at every call into torch. Where a trained parameter is an argument, a perturbed
copy takes its place for that one call: nothing in the model is replaced, so there is nothing to put back, whatever the closure
raises, and a parameter is found wherever it is used, through a module, a tie, or by hand.

    small tensors (norms, biases)   perturbed once per draw, both signs in one launch, and kept for the reading
    linear, addmm (Conv1D)          tile by tile through one reused piece of memory, so the budget holds for any size
    embedding, indexing             only the rows that are looked up
    everything else                 the whole tensor, for that call; the record names it in `whole`

16-bit norm weights and biases are perturbed in float32: at 1.0 a step of eps = 1e-3 is below half an ulp of bfloat16.
"""

from __future__ import annotations

from collections.abc import Callable

from .arena import Arena
from .copies import Copies
from .plan import Plan, Reading, unrepeatable
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
            offsets = [offset for offset in plan.stencil.offsets if offset != 0.0]
            copies.prepare(query, offsets)
            sides: list[float] = []
            for offset in plan.stencil.offsets:
                if offset == 0.0:
                    if base is None:
                        base = surroundings.read(closure)
                    sides.append(base)
                    continue

                def loss(side: int = offsets.index(offset)) -> float:
                    copies.side = side
                    return surroundings.read(closure, substitution)

                sides.append(loss())
                copies.check_used()
                if repeat_first and query == 0 and len(sides) == 1 and (again := loss()) != sides[0]:
                    raise unrepeatable(sides[0], again)
            losses.append(tuple(sides))
        whole, unseen = copies.report()
        return Reading(losses, [0.0] * plan.queries, max(self.arena.peak, copies.largest), unseen, whole)
