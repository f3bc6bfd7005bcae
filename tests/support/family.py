"""Small losses for tests of estimators:
of parameters in layers, and of a model with a loss for each example."""

from __future__ import annotations

import torch
from torch import Tensor, nn

NAMES = (
    "embed.weight",
    "layers.0.up",
    "layers.0.down",
    "layers.1.up",
    "layers.1.down",
    "layers.2.up",
    "layers.3.up",
    "head.weight",
)
EVALUATIONS = ("master", "paired", "scratch", "inplace")


def weights() -> dict[str, nn.Parameter]:
    generator = torch.Generator().manual_seed(3)
    return {
        name: nn.Parameter(0.5 * torch.randn(3, 4 + i, generator=generator)) for i, name in enumerate(NAMES)
    }


def loss(theta: dict[str, Tensor]) -> Tensor:
    parts = torch.stack(
        [
            (t.double() * (1 + i)).sin().mean() + t.double().square().mean()
            for i, t in enumerate(theta.values())
        ]
    )
    return parts.sum() + 0.3 * parts.prod() + 2.0


class Rows(nn.Module):
    """A model with a loss for each example."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(5)
        self.layers = nn.ModuleList([nn.Linear(6, 6), nn.Linear(6, 1)])
        for p in self.parameters():
            p.data = 0.5 * torch.randn(p.shape, generator=generator)
        self.x = torch.randn(10, 6, generator=generator)

    def forward(self) -> Tensor:
        return (self.layers[1](torch.tanh(self.layers[0](self.x)))[:, 0] - self.x.sum(1)).square()
