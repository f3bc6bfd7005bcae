"""First order: the term weight * grad L1 of an estimate, which back-propagation makes.

The loss of theta is read once more, with a graph. Of the trained parameters only those of the term require a
gradient meanwhile. So what lies below them records nothing and keeps no activations. There are two ways to
move them:

    as they arrive   theta <- decay theta + lr (sum_k weights[k] z_k - weight grad L1), one rounding for all
                     terms; each gradient is then freed
    by an optimizer  torch's, from .grad: the gradients of the term exist at once

Lv et al. 2023 (LOMO, arXiv 2306.09782) and Li et al. 2025 (Addax, arXiv 2410.06441) for the first way.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .device_numbers import Weights
from .estimator import Gradient
from .evaluation import Isolation, loss_tensor
from .plan import Plan

Move = tuple[Sequence[float], float, float]  # the weight of each draw, lr and decay


@dataclass
class Descent:
    """What a back-propagation did.

    loss     of theta; where it is not finite, nothing was written. A tensor where the host does not know it
    written  names of the parameters that have moved
    counts   of inf and NaN among their weights"""

    loss: float | Tensor = math.nan
    written: set[str] = field(default_factory=set)
    counts: list[Any] = field(default_factory=list)


def waits(plan: Plan, gradient: Gradient) -> bool:
    """Whether the host has to know, or knows, that a step is finite before a gradient moves weights.

    torch's optimizers move whenever they are called. The rule moves by what the device knows."""
    return gradient.optimizer is not None or all(plan.knows(group.theta[0]) for group in plan.groups)


def descend(
    found: Descent, plan: Plan, gradient: Gradient, moves: Mapping[str, Move], rule: Any,
    closure: Callable[[], Any], sign: float,
) -> None:  # fmt: skip
    """Back-propagates sign * loss at theta. Moves each parameter of the term once, along all its terms.

    found  takes what was done, also where an error ends it
    plan   the step, with the draws of the estimate
    moves  by name of a parameter: it has no weights where z does not move it

    Raises TypeError for a rule that takes draws alone, ValueError for a loss without a graph, and what the
    closure raises. Until back-propagation has begun nothing has moved. An error in it leaves those moved that
    it had reached; with an optimizer none."""
    names = plan.names if gradient.names is None else list(gradient.names)
    kept: dict[str, Tensor] = {}

    def write(name: str, arrived: Tensor) -> None:
        weights, lr, decay = moves[name]
        part = plan.only((name,)).along(plan.words)
        if isinstance(found.loss, Tensor):
            known = Weights.of(weights, lr, decay, arrived.device)
            weights = known.only(torch.isfinite(found.loss).to(arrived.device))
        found.counts.append(rule.descend(part, part.groups[0], weights, arrived, gradient.weight, lr, decay))
        found.written.add(name)

    _check_rule(rule, gradient)
    tape = _Tape(plan, names, write if gradient.optimizer is None else kept.__setitem__)
    isolation = Isolation(plan)

    def body() -> Tensor:
        with torch.enable_grad():
            loss = closure()
        value = _checked(loss, names)
        found.loss = float(value) if waits(plan, gradient) else value
        # written by the closure: the isolation says so
        if (isinstance(found.loss, Tensor) or math.isfinite(found.loss)) and not isolation.weights.changes():
            loss.backward(torch.full_like(loss, sign))
            tape.hand_over()
            isolation.weights.written()
        return value

    with isolation.session(eager=False), tape.recording():
        isolation.run(body)
    if gradient.optimizer is not None and kept:
        _step(gradient.optimizer, gradient.weight, plan, kept)
        found.written.update(kept)


def _check_rule(rule: Any, gradient: Gradient) -> None:
    """Raises TypeError for a rule that cannot take a gradient beside draws."""
    if gradient.optimizer is None and rule.descend is None:
        raise TypeError(
            f"rule is {type(rule).__name__}, which takes draws alone; a term with gradients goes with "
            "zokern.Sgd()"
        )
    if rule.base is not None:
        raise TypeError(
            f"rule is {type(rule).__name__}, which reads losses around other weights; a gradient is that of "
            "theta, and goes with zokern.Sgd()"
        )


def _step(optimizer: Any, weight: float, plan: Plan, kept: Mapping[str, Tensor]) -> None:
    """Moves parameters by torch's optimizer, from the gradients that were kept, by name."""
    tensors = dict(zip(plan.names, plan.tensors))
    for name, arrived in kept.items():
        tensors[name].grad = arrived if weight == 1.0 else arrived * weight
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def _checked(loss: Any, names: Sequence[str]) -> Tensor:
    """Returns the loss, 0-d float64, without its graph."""
    if not isinstance(loss, Tensor) or not loss.requires_grad:
        raise ValueError(
            f"the first-order loss has no graph; expected a tensor that depends on {names[0]!r} or others of "
            f"{len(names)} parameters, computed outside torch.no_grad() and inference_mode(), and not "
            "detached"
        )
    return loss_tensor(loss.detach())


class _Tape:
    """Hands every gradient over when it is complete: at the end where several objects stand for a tensor."""

    def __init__(self, plan: Plan, names: Sequence[str], take: Callable[[str, Tensor], None]) -> None:
        objects = {name: each for group in plan.groups for name, each in zip(group.names, group.objects)}
        self.take, chosen = take, set(names)
        self.taped = [
            (name, t, len(objects[name])) for name in names for t in objects[name] if t.requires_grad
        ]
        self.others = [
            t for name, each in objects.items() if name not in chosen for t in each if t.requires_grad
        ]
        self.sums: dict[str, Tensor] = {}

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Inside, only parameters of the tape require gradients; at the end flags and .grad are as before."""
        before = [t.grad for _, t, _ in self.taped]
        hooks = [
            t.register_post_accumulate_grad_hook(partial(self._arrive, name, count))
            for name, t, count in self.taped
        ]
        try:
            for t in self.others:
                t.requires_grad_(False)
            for _, t, _ in self.taped:
                t.grad = None
            yield
        finally:
            for t in self.others:
                t.requires_grad_(True)
            for hook in hooks:
                hook.remove()
            for (_, t, _), grad in zip(self.taped, before):
                t.grad = grad

    def _arrive(self, name: str, count: int, tensor: Tensor) -> None:
        arrived, tensor.grad = tensor.grad, None
        assert arrived is not None
        arrived = arrived.to_dense() if arrived.is_sparse else arrived
        if count == 1:
            self.take(name, arrived)
        else:
            self.sums[name] = self.sums[name] + arrived if name in self.sums else arrived

    def hand_over(self) -> None:
        """Hands over what waited for other objects of its memory."""
        while self.sums:
            self.take(*self.sums.popitem())


__all__ = ["Descent", "Move", "descend", "waits"]
