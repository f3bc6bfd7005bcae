"""A run of an optimizer by hand: a smooth loss of a few parameters, and float64 weights that are moved along
the stream's draws."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import zokern
from zokern.stream import RADIUS, draw_word, parameter_id

EPS, SEED = 0.05, 11
NAMES = ("embed.weight", "layers.0.up", "layers.0.down", "layers.1.up", "layers.1.down", "head.weight")


def weights() -> dict[str, nn.Parameter]:
    generator = torch.Generator().manual_seed(3)
    return {
        name: nn.Parameter(0.5 * torch.randn(3, 4 + i, generator=generator)) for i, name in enumerate(NAMES)
    }


def loss(theta: dict[str, Tensor]) -> Tensor:
    """Smooth, with all derivatives, and with blocks that depend on one another."""
    parts = [
        (t.double() * (1 + i)).sin().mean() + t.double().square().mean() for i, t in enumerate(theta.values())
    ]
    return torch.stack(parts).sum() + 0.3 * torch.stack(parts).prod() + 2.0


class Hand:
    """The weights of a run in float64, moved by hand.

    scale  what the loss is multiplied by
    wide   name -> eps of a parameter over EPS: losses are read so much further along its z, and an estimate
           moves it so much less; 1 where none is given"""

    def __init__(
        self, params: dict[str, nn.Parameter], scale: float = 1.0, wide: dict[str, float] | None = None
    ) -> None:
        self.theta = {name: p.detach().double() for name, p in params.items()}
        self.scale, self.wide = scale, wide or {}

    def z(self, name: str, step: int, query: int) -> Tensor:
        return zokern.draw(
            "normal", tuple(self.theta[name].shape), seed=SEED, who=name, step=step, draw=query
        ).double()

    def at(self, step: int, terms: list[tuple[int, float]], scope: tuple[str, ...] = NAMES) -> float:
        """The loss at theta + sum_k a_k z_k of some parameters."""
        moved = {
            n: t + sum(a * self.z(n, step, k) for k, a in terms) * self.wide.get(n, 1.0) if n in scope else t
            for n, t in self.theta.items()
        }
        return self.scale * float(loss(moved))

    def move(self, step: int, terms: list[tuple[int, float]], scope: tuple[str, ...] = NAMES) -> None:
        self.theta = {
            n: t + sum(a * self.z(n, step, k) for k, a in terms) / self.wide.get(n, 1.0) if n in scope else t
            for n, t in self.theta.items()
        }

    def difference(self, step: int, query: int, radius: float = 1.0, scope: tuple[str, ...] = NAMES) -> float:
        a, b = (self.at(step, [(query, sign * radius * EPS)], scope) for sign in (1, -1))
        return (a - b) / (2 * EPS)


def radius_of(name: str, step: int, query: int) -> float:
    """KerZOO's r of a query for one parameter, in (-1, 1)."""
    counter = torch.tensor([[0, parameter_id(name), step, draw_word((1 << 23) + query, RADIUS)]])
    return (float(zokern.philox4x32(counter, (SEED, 0))[0, 0]) + 0.5) / 2**31 - 1.0
