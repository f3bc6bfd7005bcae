"""Rule ``projected``: SGD whose distance from the start is rescaled every `interval` steps.

    W <- W0 + f (W - W0)       f a number for each projected parameter, found by a search from f = 1:

    t = ||W - W0||                                              before the search
    z ~ N(0, 1), cut at +-reach t / width                       one for each parameter and iteration
    g = (L(f + width z / t) - L(f - width z / t)) / (2 width)   losses of the step's batch
    f <- f - rate g z, cut at 1 +- reach                        `iterations` times, two losses each

Then the step's losses are read around the new W, which is written with the update: an exception changes
nothing. DiZO (arXiv 2502.03304, 2025) writes this for gamma = t f. There z and width are in units of weights,
and gamma <- gamma - rate t g z. Its public code reads a batch of its own in every iteration.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..backends import Batch, Noise, Span
from ..checks import finite_number, whole_number, within
from ..directions import Normal
from ..directions.orthonormal import tree_sum
from ..estimator import Base, Oracle
from ..evaluation import THETA, Point
from ..group import Group
from ..plan import Plan
from ..stream import RADIUS, draw_word
from .sgd import Sgd
from .state import Keeps

# names as published, the first that there are: factors of LoRA; keys and values of attention, in models of
# transformers
PUBLISHED = ("lora_",), ("k_proj.weight", "v_proj.weight")
SEARCH = 1 << 22  # first query of the purpose RADIUS for the search's z


class Projected(Sgd):
    """Moves as SGD, and now and then rescales the distance from the start by a search on the step's batch
    (DiZO).

        W <- W0 + f (W - W0) every `interval` steps, and then theta <- decay theta + lr g
        the search, from f = 1:   f <- f - rate z (L(f + width z / t) - L(f - width z / t)) / (2 width)
        z normal, cut at +-reach t / width;   t = ||W - W0||_2

    names       parts of the names of the parameters that are projected. None: 'lora_' where a name has it,
                else 'k_proj.weight' and 'v_proj.weight', else all
    interval    steps between two projections: 50. Step 0 has none
    iterations  of a search: 10, of two losses each
    rate        of a search, in weights per unit of loss: 2.0, as published
    width       half-width of the differences in gamma = t f, in weights: 0.1, as published
    reach       f stays within 1 - reach and 1 + reach, per search: 0.2, as published. f - width z / t and
                f + width z / t stay within `reach` of f

    Losses of a search are those of the step's batch; the public code reads another batch in every
    iteration.

    Keeps `start`, which is W0 in float32 (4 bytes for each projected weight), from a parameter's first
    step on. A projection takes a copy of the projected weights. W0 + f (W - W0) is rounded to nearest,
    but exact with rounding='residual'. `factors` holds f of the last projection, by name.
    Raises ValueError for arguments out of range, and in the first step where no trained parameter has
    such a name. arXiv 2502.03304, 2025."""

    name, defers = "projected", False

    @property
    def gated(self) -> bool:  # type: ignore[override]
        """Whether a step that is not finite is left to the device: not where weights are projected."""
        return not self._due

    def __init__(
        self,
        names: Sequence[str] | None = None,
        interval: int = 50,
        iterations: int = 10,
        rate: float = 2.0,
        width: float = 0.1,
        reach: float = 0.2,
    ) -> None:
        if names is not None and (isinstance(names, str) or not all(isinstance(name, str) for name in names)):
            raise ValueError(
                f"names is {names!r:.80}; expected parts of parameter names, such as ('k_proj', 'v_proj'), "
                "or None"
            )
        self.names = None if names is None else tuple(names)
        self.interval, self.iterations = (
            whole_number("interval", interval),
            whole_number("iterations", iterations),
        )
        self.rate, self.width = (
            finite_number("rate", rate, above=0.0),
            finite_number("width", width, above=0.0),
        )
        self.reach = within("reach", reach, 0.0, 1.0, "0 < reach < 1", least=False)
        self._factors: dict[str, float] = {}
        self._due: set[int] = set()  # ids of tensors that this step projects, and has not yet written

    @property
    def factors(self) -> dict[str, float]:
        """f of the last projection of this process, by name."""
        return dict(self._factors)

    def chosen(self, names: Sequence[str]) -> tuple[str, ...]:
        """Returns those that are projected of the trained parameters' names."""
        for parts in PUBLISHED if self.names is None else (self.names,):
            if found := tuple(name for name in names if any(part in name for part in parts)):
                return found
        if self.names is not None:
            raise ValueError(
                f"names is {self.names!r}, which no trained parameter has in its name (they are "
                f"{list(names[:3])}, ...)"
            )
        return tuple(names)

    def prepare(self, plan: Plan, oracle: Oracle, states: Any) -> None:
        """Keeps W0 of parameters that are new, and searches f where a projection is due."""
        oracle.check_public()
        self._due = set()
        part = plan.only(self.chosen(plan.names))
        where = [
            (group, i, states[tensor]) for group in part.groups for i, tensor in enumerate(group.tensors)
        ]
        for group, i, state in where:
            if "start" not in state:
                state["start"] = group.read(i).clone(memory_format=torch.contiguous_format)
        if plan.step and plan.step % self.interval == 0:
            lengths = {group.names[i]: _length(group.read(i) - state["start"]) for group, i, state in where}
            away = {name: length for name, length in lengths.items() if length}
            if away:
                self._search(plan.only(tuple(away)), away, oracle)
                self._due = {id(group.tensors[i]) for group, i, _ in where if group.names[i] in away}

    def _search(self, part: Plan, lengths: Mapping[str, float], oracle: Oracle) -> None:
        """Sets `factors`: a difference of two losses moves all of them.

        lengths  ||W - W0|| by name, in weights"""
        factors, most = dict.fromkeys(part.names, 1.0), self.reach / self.width
        for iteration in range(self.iterations):
            drawn = zip(part.names, _normals(part, draw_word(SEARCH + iteration, RADIUS)))
            z = [min(max(one, -most * lengths[name]), most * lengths[name]) for name, one in drawn]
            sides = []
            for sign in (1.0, -1.0):
                moved = tuple(
                    (name, factors[name] + sign * self.width * one / lengths[name])
                    for name, one in zip(part.names, z)
                )
                with oracle.at(Base(_project, moved), part):
                    sides.append(float(oracle.losses([THETA], part)[0]))
            slope = (sides[0] - sides[1]) / (2.0 * self.width)
            if math.isfinite(slope):
                for name, one in zip(part.names, z):
                    factors[name] = min(
                        max(factors[name] - self.rate * slope * one, 1.0 - self.reach), 1.0 + self.reach
                    )
        self._factors = factors

    def base(self, point: Point) -> tuple[Base | None, Point]:
        """Returns the point around the projected weights, in a step that projects."""
        return (Base(_project, tuple(self._factors.items())) if self._due else None), point

    def update(
        self, plan: Plan, group: Group, weights: Sequence[float], lr: float, decay: float, states: Any,
        defer: bool
    ) -> Tensor | int:  # fmt: skip
        due = [name for name, tensor in zip(group.names, group.tensors) if id(tensor) in self._due]
        _project(group, states, tuple((name, self._factors[name]) for name in due))
        self._due -= {id(tensor) for tensor in group.tensors}
        return super().update(plan, group, weights, lr, decay, states, defer)

    def keeps(self, shape: tuple[int, ...], draw: tuple[int, int] | None) -> Keeps:
        """Returns W0."""
        return Keeps({"start": shape}, False)


def _normals(plan: Plan, word: int) -> list[float]:
    """Returns the first normal of every parameter, for a step and draw word."""
    found: list[float] = []
    for group in plan.groups:
        outs = [torch.empty(1, dtype=torch.float32, device=group.theta[0].device) for _ in group.spans]
        spans = [Span(span.who) for span in group.spans]
        group.backend.draw(Batch(outs, spans), Noise(Normal(), plan.seed, [(plan.step, word)]))
        found += torch.cat(outs).tolist()
    return found


def _length(x: Tensor) -> float:
    """Returns ||x||_2, added in a fixed order: the same bits on every device and number of threads."""
    return math.sqrt(float(tree_sum(x.reshape(-1, 1).double().square_())[0]))


def _project(group: Group, states: Any, factors: Sequence[tuple[str, float]]) -> None:
    """W <- W0 + f (W - W0)."""
    known = dict(factors)
    for i, (name, tensor) in enumerate(zip(group.names, group.tensors)):
        if name in known:
            start = states[tensor]["start"]
            group.put(i, start + (group.read(i) - start) * known[name])


__all__ = ["Projected"]
