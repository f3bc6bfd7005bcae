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

from .. import devices
from ..backends import Batch, Noise, Terms
from ..checks import finite_number, within
from ..device_numbers import Amount, Weights, stacked
from ..estimator import Base, Oracle
from ..evaluation import Point
from ..group import Group
from ..plan import Plan
from ..stream import BASIS, draw_word
from .base import Rule
from .state import Keeps
from .waiting import is_nothing

START = draw_word(1 << 23, BASIS)  # of the first m, at step 0


def warming(step: int) -> float:
    """Returns beta of the published trainer: 0.1 to step 200, then up to 0.9888 at step 2000, then 0.99.

    beta = 0.99 - 0.89 / (1 + 8 p)^3,   p = ((step - 200) / 1800)^1.8,   for 200 <= step <= 2000"""
    if step > 2000:
        return 0.99
    progress = max((step - 200) / 1800, 0.0) ** 1.8
    return 0.99 - 0.89 / (1.0 + 8.0 * progress) ** 3


class Cone(Rule):
    """Perturbs and moves the weights along draws in a cone about the momentum of the estimates (ConMeZO).

        z = cos(angle) m / l + sin(angle) u,   u the draw,   l the root mean square that m is expected to have
        theta <- decay theta - lr c z,   m <- beta m + (1 - beta) c z

    angle  between z and m, in radians, 0 < angle < pi/2: 1.35 as published
    beta   a number, 0 <= beta < 1, or a function of the step number that returns one; as published:
           zokern.rule.cone.warming

    It takes one draw a step, and any stencil. Each loss of a difference is read around other weights, so
    each is a call of the evaluation. Keeps `momentum`, which is m in float32 (4 bytes a weight),
    `length`, which is l and lies where the losses do, and `updates`. Readings take a copy of what is
    trained beside it.
    Raises ValueError for arguments out of range, and in the first step for several queries; an optimizer
    refuses it with low-rank directions. arXiv 2511.02757, 2025."""

    name, dense, plain, gated = "cone", True, True, True
    captures = shards = True

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
                torch.empty(group.theta[i].shape, dtype=torch.float32, device=group.theta[i].device)
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

    def tilt(self, group: Group, states: Any, terms: Sequence[tuple[int, Any]]) -> None:
        """theta <- theta + eps sum_k amount_k cos(angle) m / l."""
        far = sum(amount * group.reach(word) for word, amount in terms)
        far = far.value if isinstance(far, Amount) else far
        for i, tensor in enumerate(group.tensors):
            _add(group, i, states[tensor]["momentum"], far * self._along(states[tensor]))

    def _along(self, state: Any) -> Any:
        """Returns cos(angle) / l, a number of the host or float64 []."""
        length = state["length"]
        if not isinstance(length, Tensor):
            length = finite_number("length", length, above=0.0)
        return math.cos(self.angle) / length

    def _beta(self, step: int) -> float:
        if not callable(self.beta):
            return self.beta
        return within("beta", self.beta(step), 0.0, 1.0, "0 <= beta < 1")

    def update(
        self, plan: Plan, group: Group, weights: Sequence[float], lr: float, decay: float, states: Any,
        defer: bool
    ) -> Tensor | int:  # fmt: skip
        if len(weights) != 1:
            raise ValueError(
                f"an estimate has {len(weights)} draws with rule 'cone'; expected queries of 1: momentum and "
                "draw make one z"
            )
        weights = Weights.of(weights, lr, decay, group.theta[0].device)
        (w,) = plan.at_hand(weights.projected.weights)
        beta: Any = self._beta(plan.now)
        if isinstance(w, Tensor):
            beta = plan.numbers(lambda: [self._beta(plan.now)], torch.float64, w.device)[0]
        elif not weights.is_finite:
            return 0
        else:  # a captured step left l in device memory, here the host's
            for tensor in group.tensors:
                states[tensor]["length"] = float(states[tensor]["length"])
        # parameters that were frozen for a while have an l of their own
        launches: dict[Any, list[int]] = {}
        for i, tensor in enumerate(group.tensors):
            length = states[tensor]["length"]
            launches.setdefault(("", id(length)) if isinstance(length, Tensor) else length, []).append(i)
        count: Tensor | int = 0
        for members in launches.values():
            count = count + self._move(plan, group, members, weights, w, beta, states)
        return count

    def _move(
        self, plan: Plan, group: Group, members: Sequence[int], weights: Weights, w: Any, beta: Any,
        states: Any
    ) -> Tensor | int:  # fmt: skip
        """Updates some tensors that have one l: by numbers of the host, or by those in device memory."""
        kept = [states[group.tensors[i]] for i in members]
        moments, length = [state["momentum"] for state in kept], kept[0]["length"]
        cos, sin, new = self._along(kept[0]), math.sin(self.angle), -w * (1.0 - beta)
        # m = z where the weights move. Else m alone does: a launch would turn weights of -0.0 into 0.0
        moves, rests = (-beta * sin / cos, beta / cos + new), (new * sin, beta + new * cos)
        ahead, aside = beta * length + new * math.cos(self.angle), new * sin
        count: Tensor | int = 0
        control: Tensor | None = None
        longer: Tensor | float
        if isinstance(w, Tensor):
            amounts, (shrink, go, finite) = weights.projected.amounts, weights.projected.control.unbind(0)
            scalars = stacked((shrink, amounts[0], cos, 1.0), amounts)
            gate = torch.stack((shrink, go, go))
            count = group.update_(plan, members, [sin], "momentum", scalars, [moments], gate)
            both = torch.where(go == 1.0, stacked(moves, w), stacked(rests, w)).float()
            coefficient, rest, control = both[:1], 1.0, torch.stack((both[1], finite, finite))
            longer = torch.where(finite == 1.0, torch.hypot(ahead, aside), length)
        else:
            first, rest = moves
            longer = math.hypot(ahead, aside)
            if is_nothing([weights.lr * w], weights.decay):
                first, rest = rests
            else:
                numbers = weights.decay, weights.lr * w, cos, 1.0
                count = group.update_(plan, members, [sin], "momentum", lambda: numbers, [moments])
            coefficient = torch.tensor([first], dtype=torch.float32, device=moments[0].device)
        batch = Batch(moments, [group.spans[i] for i in members])
        group.backend.axpy_(batch, plan.noise(plan.draws()), Terms(coefficient, rest, control=control))

        def counted() -> None:
            for state in kept:
                state["updates"] += 1

        plan.act(counted)
        for state in kept:
            state["length"] = longer
        return count

    def keeps(self, shape: tuple[int, ...], draw: tuple[int, int] | None) -> Keeps:
        """Returns m."""
        return Keeps({"momentum": shape}, True)


def _add(group: Group, i: int, values: Tensor, amount: Any) -> None:
    """Adds amount times values to tensor i: a product and a sum in float32, and the rounding of Group.put.

    values  float32, in the shape of the tensor;  amount  a number, or one in device memory, []
    Works on some rows at a time, whose temporaries stay in a CPU's caches."""
    if group.residual(i) is not None or values.numel() < 2:
        group.put(i, group.read(i) + values * amount)
        return
    rows = max(1, devices.of(values.device).sketched // values[0].numel())
    for theta, part in zip(group.theta[i].split(rows), values.split(rows)):
        theta.copy_((part * amount).add_(theta))


__all__ = ["Cone", "warming"]
