"""Rule ``cone``: ConMeZO's direction, a draw tilted towards the momentum of the estimates, and its step.

    z = cos(angle) m / l + sin(angle) u             u the draw; losses are read along z
    theta <- decay theta + lr w z                   w = -c, c the coefficient along z
    m <- beta m + (1 - beta) c z                    in a parameter's first step m is drawn as u is
    l <- sqrt((beta l + (1 - beta) c cos(angle))^2 + ((1 - beta) c sin(angle))^2),   1 at first

l is what the root mean square of m is expected to be, for u independent of m: no norm is measured. A step is
two launches of a group: the verb update_ turns m into z and moves theta along it, and axpy_ turns z into the
new m. ConMeZO (arXiv 2511.02757, 2025).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..backends import Batch, Noise, Terms
from ..checks import finite_number, within
from ..directions import Matrix
from ..estimator import Base, Oracle
from ..evaluation import Point
from ..group import Group
from ..plan import Plan
from ..stream import BASIS, draw_word
from .state import Keeps
from .waiting import is_nothing

START = draw_word(1 << 23, BASIS)  # of the first m, at step 0


def warming(step: int) -> float:
    """Returns beta of the published trainer: 0.1 for 200 steps, then up to 0.9888 from step 2000 on.

    beta = 0.99 - 0.89 / (1 + 8 p)^3,   p = ((step - 200) / 1800)^1.8"""
    progress = min(max((step - 200) / 1800, 0.0), 1.0) ** 1.8
    return 0.99 - 0.89 / (1.0 + 8.0 * progress) ** 3


class Cone:
    """Perturbs and moves the weights along draws in a cone about the momentum of the estimates (ConMeZO).

        z = cos(angle) m / l + sin(angle) u,   u the draw,   l the root mean square that m is expected to have
        theta <- decay theta - lr c z,   m <- beta m + (1 - beta) c z

    angle  between z and m, in radians, 0 < angle < pi/2: 1.35 as published
    beta   a number, 0 <= beta < 1, or a function of the step number that returns one; as published:
           zokern.rule.cone.warming

    It takes one draw a step, and any stencil. Each loss of a difference is read around other weights, so
    each is a call of the evaluation. Keeps `momentum`, which is m in float32 (4 bytes a weight),
    `length`, which is l, and `updates`. Readings take a copy of what is trained beside it.
    Raises ValueError for arguments out of range, and in the first step for several queries; an optimizer
    refuses it with low-rank directions. arXiv 2511.02757, 2025."""

    name, defers, dense, plain = "cone", False, True, True

    def __init__(self, angle: float = 1.35, beta: float | Callable[[int], float] = warming) -> None:
        self.angle = within("angle", angle, 0.0, math.pi / 2, "0 < angle < pi/2", least=False)
        self.beta = (
            beta
            if callable(beta)
            else within("beta", beta, 0.0, 1.0, "0 <= beta < 1, or a function of the step")
        )

    def prepare(self, plan: Plan, oracle: Oracle, states: Any) -> None:
        """Draws m of parameters that have none."""
        for group in plan.groups:
            new = [i for i, tensor in enumerate(group.tensors) if "momentum" not in states[tensor]]
            made = [
                torch.empty(group.tensors[i].shape, dtype=torch.float32, device=group.theta[i].device)
                for i in new
            ]
            if new:
                batch = Batch(made, [group.spans[i] for i in new])
                group.backend.draw(batch, Noise(plan.direction, plan.seed, [(0, START)]))
            for i, momentum in zip(new, made):
                states[group.tensors[i]].update(momentum=momentum, length=1.0, updates=0)

    def base(self, point: Point) -> tuple[Base | None, Point]:
        """Returns the point along u alone, around weights that have moved along m."""
        return (
            (Base(self.tilt, point.terms), point.scaled(math.sin(self.angle)))
            if point.terms
            else (None, point)
        )

    def tilt(self, group: Group, states: Any, terms: Sequence[tuple[int, float]]) -> None:
        """theta <- theta + eps sum_k amount_k cos(angle) m / l."""
        far = sum(amount * group.reach(word) for word, amount in terms)
        for i, tensor in enumerate(group.tensors):
            group.put(i, group.read(i) + states[tensor]["momentum"] * (far * self._along(states[tensor])))

    def _along(self, state: Any) -> float:
        """Returns cos(angle) / l."""
        return math.cos(self.angle) / finite_number("length", state["length"], above=0.0)

    def update(
        self, plan: Plan, group: Group, weights: Sequence[float], lr: float, decay: float, states: Any,
        defer: bool
    ) -> Tensor | int:  # fmt: skip
        if len(weights) != 1:
            raise ValueError(
                f"an estimate has {len(weights)} draws with rule 'cone'; expected queries of 1: momentum and "
                "draw make one z"
            )
        beta = (
            self.beta
            if not callable(self.beta)
            else within("beta", self.beta(plan.step), 0.0, 1.0, "0 <= beta < 1")
        )
        # parameters that were frozen for a while have an l of their own
        launches: dict[float, list[int]] = {}
        for i, tensor in enumerate(group.tensors):
            launches.setdefault(states[tensor]["length"], []).append(i)
        count: Tensor | int = 0
        for members in launches.values():
            count = count + self._move(plan, group, members, weights[0], lr, decay, beta, states)
        return count

    def _move(
        self,
        plan: Plan,
        group: Group,
        members: Sequence[int],
        w: float,
        lr: float,
        decay: float,
        beta: float,
        states: Any,
    ) -> Tensor | int:
        """Updates some tensors that have one l."""
        kept = [states[group.tensors[i]] for i in members]
        moments, length = [state["momentum"] for state in kept], kept[0]["length"]
        cos, sin, new = self._along(kept[0]), math.sin(self.angle), -w * (1.0 - beta)
        count: Tensor | int = 0
        if is_nothing([lr * w], decay):  # m alone: a launch would turn weights of -0.0 into 0.0
            coefficient, rest = new * sin, beta + new * cos
        else:
            # m = z
            told = decay, lr * w, cos, 1.0
            count = group.update_(plan, members, [sin], "momentum", lambda: told, [moments])
            coefficient, rest = -beta * sin / cos, beta / cos + new
        terms = Terms(torch.tensor([coefficient], dtype=torch.float32, device=moments[0].device), rest)
        batch = Batch(moments, [group.spans[i] for i in members])
        group.backend.axpy_(batch, plan.noise(plan.draws()), terms)
        unit = math.cos(self.angle)
        for state in kept:
            state["length"] = math.hypot(beta * length + new * unit, new * sin)
            state["updates"] += 1
        return count

    def keeps(self, shape: tuple[int, ...], draw: tuple[int, int] | None) -> Keeps:
        """Returns m."""
        return Keeps({"momentum": shape}, True)

    def basis(self, state: Any) -> int | None:
        """None: the state belongs to no basis."""
        return None

    def rebase(
        self, group: Group, matrix: Matrix, left: Tensor | None, right: Tensor | None, state: Any
    ) -> None:
        """Nothing depends on a basis."""


__all__ = ["Cone", "warming"]
