"""Holds what the eager loops share: MeZO's published loop, with a z that a method replaces."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import Tensor

from ..eager import normal_like

Closure = Callable[[], Tensor]


def is_matrix(p: Tensor) -> bool:
    return p.squeeze().dim() == 2


def normal(p: Tensor, *shape: int) -> Tensor:
    return torch.randn(*shape, dtype=p.dtype, device=p.device)


def signs(p: Tensor) -> Tensor:
    return (2 * torch.randint(0, 2, p.shape, device=p.device) - 1).to(p.dtype)


class Loop:
    """Takes MeZO's step: theta + eps z, theta - eps z, theta again, theta - lr c z: four passes, and z four
    times.

    names    of the parameters, for loops that choose some of them. Without names each is a layer by itself
    options  in place of what the class has, such as queries=4"""

    def __init__(
        self, parameters: Sequence[Tensor], lr: float, eps: float, names: Sequence[str] = (), **options: Any
    ) -> None:
        self.parameters, self.lr, self.eps = list(parameters), lr, eps
        self.names = list(names) or [str(i) for i in range(len(self.parameters))]
        if unknown := [name for name in options if not hasattr(type(self), name)]:
            raise TypeError(f"the eager loop of {type(self).__name__} has no option {unknown}")
        vars(self).update(options)
        self.refresh()

    def refresh(self) -> None:
        """Draws what is kept for an interval."""

    def ready(self) -> None:
        """Puts the loop where a long run is, where its first steps are others."""

    def z(self, i: int, p: Tensor) -> Tensor:
        return normal_like(p)

    def move(self, seed: int, scaling: float, only: Collection[int] | None = None) -> None:
        """theta <- theta + scaling eps z, of all parameters or of those with the numbers `only`."""
        torch.manual_seed(seed)
        for i, p in enumerate(self.parameters):
            if only is None or i in only:
                p.data = p.data + scaling * self.z(i, p.data) * self.eps

    def update(self, seed: int, coefficient: float, only: Collection[int] | None = None) -> None:
        """theta <- theta - lr coefficient z."""
        torch.manual_seed(seed)
        for i, p in enumerate(self.parameters):
            if only is None or i in only:
                p.data = p.data - self.lr * (coefficient * self.z(i, p.data))

    def sides(
        self, seed: int, closure: Closure, only: Collection[int] | None = None
    ) -> tuple[Tensor, Tensor]:
        """Returns the losses at theta + eps z and at theta - eps z."""
        self.move(seed, +1, only)
        plus = closure()
        self.move(seed, -2, only)
        minus = closure()
        self.move(seed, +1, only)
        return plus, minus

    def difference(self, seed: int, closure: Closure, only: Collection[int] | None = None) -> float:
        plus, minus = self.sides(seed, closure, only)
        return ((plus - minus) / (2 * self.eps)).item()

    def ahead(self, seed: int, closure: Closure) -> float:
        """Returns the loss at theta + eps z."""
        self.move(seed, +1)
        loss = closure().item()
        self.move(seed, -1)
        return loss

    @torch.no_grad()
    def step(self, closure: Closure, seed: int) -> None:
        self.update(seed, self.difference(seed, closure))


class Queries(Loop):
    """Has several draws in a step, with seeds that no other step has."""

    queries = 1

    def seeds(self, seed: int) -> range:
        return range(seed * self.queries, (seed + 1) * self.queries)


class Differences(Queries):
    """Takes the mean of c z over several draws.

        c = (1 / eps) sum_j weights[j] L(theta + offsets[j] eps z)

    rademacher  z is of signs, and not normal"""

    offsets: Sequence[float] = (1.0, -1.0)
    weights: Sequence[float] = (0.5, -0.5)
    rademacher = False

    def z(self, i: int, p: Tensor) -> Tensor:
        return signs(p) if self.rademacher else normal_like(p)

    @torch.no_grad()
    def step(self, closure: Closure, seed: int) -> None:
        seeds = self.seeds(seed)
        base = closure().item() if 0.0 in self.offsets else 0.0
        slopes = []
        for each in seeds:
            at, slope = 0.0, 0.0
            for offset, weight in zip(self.offsets, self.weights):
                if offset:
                    self.move(each, offset - at)
                    at = offset
                slope += weight * (closure().item() if offset else base)
            self.move(each, -at)
            slopes.append(slope / self.eps)
        for each, slope in zip(seeds, slopes):
            self.update(each, slope / len(seeds))
