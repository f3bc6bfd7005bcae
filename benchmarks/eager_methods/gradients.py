"""Eager loops that take a derivative.

FGD     one forward with z as tangents; z is kept for the update
Addax   MeZO's difference, and a back-propagation of all parameters
Hybrid  MeZO's difference, and a back-propagation of the last parameters, which z does not move
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel

from .loop import Closure, Loop


class FGD(Loop):
    """z of all parameters at once: as tangents, in one forward, and in the update."""

    def step(self, closure: Closure, seed: int) -> None:
        torch.manual_seed(seed)
        tangents = [self.z(i, p.data) for i, p in enumerate(self.parameters)]
        with torch.no_grad(), forward_ad.dual_level(), sdpa_kernel(SDPBackend.MATH):
            for p, z in zip(self.parameters, tangents):
                p.copy_(forward_ad.make_dual(p.detach(), z))
            slope = forward_ad.unpack_dual(closure()).tangent.item()
        with torch.no_grad():
            for p, z in zip(self.parameters, tangents):
                p.data = p.data - self.lr * (slope * z)


class Addax(Loop):
    """MeZO's difference, then all gradients at once, of the same closure."""

    alpha = 0.02

    def step(self, closure: Closure, seed: int) -> None:
        with torch.no_grad():
            coefficient = self.difference(seed, closure)
        gradients = torch.autograd.grad(closure(), self.parameters)
        with torch.no_grad():
            self.update(seed, self.alpha * coefficient)
            for p, gradient in zip(self.parameters, gradients):
                p.data = p.data - self.lr * (1 - self.alpha) * gradient


class Hybrid(Loop):
    """The last tenth of the parameters by back-propagation and AdamW, the others by MeZO's loop."""

    def __init__(
        self, parameters: Sequence[Tensor], lr: float, eps: float, names: Sequence[str] = (), **options: Any
    ) -> None:
        cut = len(parameters) - max(1, len(parameters) // 10)
        self.last = torch.optim.AdamW(list(parameters[cut:]), lr=1e-4, weight_decay=0.0)
        super().__init__(parameters[:cut], lr, eps, names[:cut], **options)

    def step(self, closure: Closure, seed: int) -> None:
        for p in self.parameters:
            p.requires_grad_(False)
        closure().backward()
        with torch.no_grad():
            self.update(seed, self.difference(seed, closure))
        self.last.step()
        self.last.zero_grad()
