"""Eager loops that keep something of every weight. z is dense, and what is kept has the weights' dtype.

ZOMomentum  torch.optim.SGD with momentum on c z, parameter by parameter, as ZO-Bench has it
ZOAdam      torch.optim.Adam on c z, the same
AdaMeZO     Adam's moments made again from the seeds of the last ten steps, which are what is kept
ConMeZO     z in a cone about a momentum; during a step the momentum's buffer holds z
HiZOO       z / sqrt(h), h learned from the losses' curvature; three losses
SparseMeZO  z of the weights that were small at the start, by a mask
MeZOSVRG    differences at theta and at an anchor; anchor and full estimate are kept dense
DiZO        MeZO's step; every 50 steps the distance of some matrices from the start is searched
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..eager import normal_like
from .loop import Closure, Loop


class ZOMomentum(Loop):
    momentum = 0.9

    def refresh(self) -> None:
        self.optimizer = self.made()

    def made(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters, lr=self.lr, momentum=self.momentum)

    def update(self, seed: int, coefficient: float, only: object = None) -> None:
        torch.manual_seed(seed)
        for i, p in enumerate(self.parameters):
            p.grad = coefficient * self.z(i, p.data)
            self.optimizer.step()
            p.grad = None


class ZOAdam(ZOMomentum):
    def made(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters, lr=self.lr)


class AdaMeZO(Loop):
    window, betas, adam_eps, scale = 10, (0.7, 0.9), 1e-5, 100.0

    def refresh(self) -> None:
        self.past: list[tuple[int, float]] = []  # seed and coefficient, the newest first

    def ready(self) -> None:
        self.past = [(-1 - j, 1.0) for j in range(self.window)]

    @torch.no_grad()
    def step(self, closure: Closure, seed: int) -> None:
        c = self.difference(seed, closure)
        self.past = [(seed, c), *self.past][: self.window]
        if len(self.past) < self.window:
            return self.update(seed, c)
        device, (one, two) = self.parameters[0].device, self.betas
        streams = [torch.Generator(device).manual_seed(each % 2**63) for each, _ in self.past]
        for p in self.parameters:
            m, v = torch.zeros_like(p.data), torch.zeros_like(p.data)
            for j, (stream, (_, c)) in enumerate(zip(streams, self.past)):
                g = c * torch.normal(0.0, 1.0, p.shape, generator=stream, dtype=p.dtype, device=p.device)
                m += one**j * g
                v += two**j * g * g
            p.data = p.data - self.lr * self.scale * m / (v.sqrt() + self.adam_eps)


class ConMeZO(Loop):
    angle = 1.35

    def refresh(self) -> None:
        self.momentum = [normal_like(p.data) for p in self.parameters]
        self.length, self.steps = 1.0, 0  # the expected root mean square of the momentum

    def beta(self) -> float:
        if self.steps > 2000:
            return 0.99
        progress = max((self.steps - 200) / 1800, 0.0) ** 1.8
        return 0.99 - 0.89 / (1 + 8 * progress) ** 3

    def along(self, amount: float) -> None:
        for p, m in zip(self.parameters, self.momentum):
            p.data = p.data + amount * m

    @torch.no_grad()
    def step(self, closure: Closure, seed: int) -> None:
        """The buffer becomes m + u tan(angle) l, so that z = cos(angle) / l buffer, and then the new m."""
        share, tilt = math.cos(self.angle) / self.length, math.tan(self.angle) * self.length
        torch.manual_seed(seed)
        for i, m in enumerate(self.momentum):
            m.add_(self.z(i, m), alpha=tilt)
        self.along(self.eps * share)
        plus = closure()
        self.along(-2 * self.eps * share)
        minus = closure()
        self.along(self.eps * share)
        c, beta = ((plus - minus) / (2 * self.eps)).item(), self.beta()
        self.along(-self.lr * c * share)
        torch.manual_seed(seed)
        for i, m in enumerate(self.momentum):
            m.mul_(beta + (1 - beta) * c * share).sub_(self.z(i, m), alpha=beta * tilt)
        along = beta * self.length + (1 - beta) * c * math.cos(self.angle)
        self.length = math.hypot(along, (1 - beta) * c * math.sin(self.angle))
        self.steps += 1


class HiZOO(Loop):
    """The published loop reads theta once more, for its log."""

    smooth = 1e-8

    def refresh(self) -> None:
        self.h = [torch.ones_like(p.data) for p in self.parameters]

    def z(self, i: int, p: Tensor) -> Tensor:
        return normal_like(p) / self.h[i].sqrt()

    @torch.no_grad()
    def step(self, closure: Closure, seed: int) -> None:
        base = closure()
        plus, minus = self.sides(seed, closure)
        c = ((plus - minus) / (2 * self.eps)).item()
        curvature = ((plus + minus - 2 * base).abs() / (2 * self.eps**2)).item()
        torch.manual_seed(seed)
        for i, p in enumerate(self.parameters):
            z, h = normal_like(p.data), self.h[i]
            self.h[i] = h = (1 - self.smooth) * h + self.smooth * curvature * h * z * z
            p.data = p.data - self.lr * (c * z / h.sqrt())


class SparseMeZO(Loop):
    """The paper finds the mask again in every pass, from perturbed weights, which may flip it."""

    sparsity = 0.75

    @torch.no_grad()
    def refresh(self) -> None:
        self.mask = []
        for p in self.parameters:
            size = p.data.abs().flatten()
            kept = max(1, round((1 - self.sparsity) * size.numel()))
            self.mask.append(p.data.abs() <= size.kthvalue(kept).values)

    def z(self, i: int, p: Tensor) -> Tensor:
        return normal_like(p) * self.mask[i]


class MeZOSVRG(Loop):
    """One seed for both differences, as Algorithm 1 has it; the published code takes two."""

    interval, steps = 2, 0

    @torch.no_grad()
    def step(self, closure: Closure, seed: int) -> None:
        c = self.difference(seed, closure)
        if self.steps % self.interval == 0:
            torch.manual_seed(seed)
            self.full = [c * self.z(i, p.data) for i, p in enumerate(self.parameters)]
            self.anchor = [p.data.clone() for p in self.parameters]
            for p, full in zip(self.parameters, self.full):
                p.data = p.data - self.lr * full
        else:
            here = [p.data for p in self.parameters]
            for p, anchor in zip(self.parameters, self.anchor):
                p.data = anchor
            c -= self.difference(seed, closure)
            torch.manual_seed(seed)
            for i, (p, theta, full) in enumerate(zip(self.parameters, here, self.full)):
                p.data = theta - self.lr * (c * self.z(i, theta) + full)
        self.steps += 1


class DiZO(Loop):
    projected, interval, iterations, rate = ("k_proj.weight", "v_proj.weight"), 50, 10, 2.0
    width, reach = 0.1, 0.2

    @torch.no_grad()
    def refresh(self) -> None:
        chosen = [i for i, name in enumerate(self.names) if any(part in name for part in self.projected)]
        self.start = {i: self.parameters[i].data.clone() for i in chosen or range(len(self.parameters))}
        self.steps = 0

    def project(self, closure: Closure, seed: int) -> None:
        """W <- W0 + f (W - W0), with f from a search of one number for each matrix."""
        torch.manual_seed(seed)
        away = {i: self.parameters[i].data - start for i, start in self.start.items()}
        lengths = torch.tensor([d.double().norm().item() for d in away.values()], dtype=torch.float64)
        gamma, most = lengths, self.reach / self.width * lengths

        def put(gamma: Tensor) -> None:
            for g, length, (i, start) in zip(gamma.tolist(), lengths.tolist(), self.start.items()):
                self.parameters[i].data = start + g / length * away[i]

        for _ in range(self.iterations):
            z = torch.randn(len(away), dtype=torch.float64).clamp(min=-most, max=most)
            sides = []
            for sign in (1, -1):
                put(gamma + sign * self.width * z)
                sides.append(closure().item())
            slope = (sides[0] - sides[1]) / (2 * self.width)
            moved = gamma - self.rate * lengths * slope * z
            gamma = moved.clamp(min=(1 - self.reach) * lengths, max=(1 + self.reach) * lengths)
        put(gamma)

    @torch.no_grad()
    def step(self, closure: Closure, seed: int) -> None:
        if self.steps and self.steps % self.interval == 0:
            self.project(closure, seed)
        self.steps += 1
        self.update(seed, self.difference(seed, closure))
