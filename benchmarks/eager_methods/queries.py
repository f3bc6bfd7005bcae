"""Eager loops whose coefficients are made of several losses, or of one difference in another way. z is dense.

MeZO            the published loop, with its term of weight decay: eager.step
ZOSignSGD       sign(c) z, as ZO-Bench has it
ZOConservative  theta, theta - lr c z and theta + lr c z are visited and read, and the best of them is kept
DPZO            differences of each example clipped, summed, and noise added
RLOO            K seeds, one-sided; the baseline of a loss is the mean of the others
FZOO            z = 2 bits - 1; K seeds, one-sided, and theta; steps scaled by the losses' std
KerZOO          K seeds, differences over a random radius, weighted by a kernel; the estimate is kept dense
BSZO            two seeds, and losses along combinations of them, which a Kalman filter chooses
MeZOGV          two seeds are ranked, and a difference is read along z_best - z_worst, which is kept dense
BlockMeZO       MeZO's step for one block after another, all of one seed
LeZO            MeZO's step for some layers
"""

from __future__ import annotations

import random

import torch
from torch import Tensor

from zokern.estimator.blocks import block_of, layer_of

from .. import eager
from .loop import Closure, Loop, Queries, signs


class MeZO(Loop):
    @torch.no_grad()
    def step(self, closure: Closure, seed: int) -> None:
        eager.step(self.parameters, closure, seed, self.lr, self.eps)


class ZOSignSGD(Loop):
    @torch.no_grad()
    def step(self, closure: Closure, seed: int) -> None:
        c = self.difference(seed, closure)
        self.update(seed, float(c > 0) - float(c < 0))


class ZOConservative(Loop):
    @torch.no_grad()
    def step(self, closure: Closure, seed: int) -> None:
        base = closure().item()
        c = self.difference(seed, closure)
        self.update(seed, c)
        onward = closure().item()
        self.update(seed, -2 * c)
        backward = closure().item()
        best = min(base, onward, backward)
        if best != backward:
            self.update(seed, c if best == base else 2 * c)


class DPZO(Loop):
    clip, noise = 0.1, 1.0

    @torch.no_grad()
    def step(self, closure: Closure, seed: int) -> None:
        plus, minus = self.sides(seed, closure)
        apart = (plus - minus).clamp(-self.clip, self.clip)
        noise = self.clip * self.noise * torch.randn(()).item()
        self.update(seed, (apart.sum().item() + noise) / (2 * self.eps * len(apart)))


class RLOO(Queries):
    queries = 4

    @torch.no_grad()
    def step(self, closure: Closure, seed: int) -> None:
        seeds = self.seeds(seed)
        losses = [self.ahead(each, closure) for each in seeds]
        mean = sum(losses) / self.queries
        for each, loss in zip(seeds, losses):
            self.update(each, (loss - mean) / (self.eps * (self.queries - 1)))


class FZOO(Queries):
    queries = 8

    def z(self, i: int, p: Tensor) -> Tensor:
        return signs(p)

    @torch.no_grad()
    def step(self, closure: Closure, seed: int) -> None:
        seeds = self.seeds(seed)
        losses = [self.ahead(each, closure) for each in seeds]
        base = closure().item()
        spread = torch.tensor(losses, dtype=torch.float64).std(correction=0).item()
        for each, loss in zip(seeds, losses):
            self.update(each, (loss - base) / (self.queries * spread) if spread else 0.0)


class KerZOO(Queries):
    """One radius for a query, as the paper has it, and neither the published code's clip nor its average."""

    queries = 3

    def radius(self, seed: int) -> float:
        return random.Random(seed).uniform(-1.0, 1.0)

    @torch.no_grad()
    def step(self, closure: Closure, seed: int) -> None:
        total: dict[int, Tensor] = {}
        for each in self.seeds(seed):
            r = self.radius(each)
            self.move(each, r)
            plus = closure()
            self.move(each, -2 * r)
            minus = closure()
            self.move(each, r)
            weight = ((plus - minus) / (2 * self.eps)).item() * 15 / 4 * r * (5 - 7 * r * r)
            torch.manual_seed(each)
            for i, p in enumerate(self.parameters):
                g = weight * self.z(i, p.data)
                total[i] = total[i] + g if i in total else g
        for i, p in enumerate(self.parameters):
            p.data = p.data - self.lr * (total[i] / self.queries)


class BSZO(Queries):
    """Version 4 of the published trainer. The filter's numbers are on the host, in float64."""

    queries, observations = 2, 3
    average: float | None = None  # of squared residuals

    @torch.no_grad()
    def step(self, closure: Closure, seed: int) -> None:
        seeds, prior = self.seeds(seed), sum(p.numel() for p in self.parameters) / 1e6
        mean = torch.zeros(self.queries, dtype=torch.float64)
        covariance = prior * torch.eye(self.queries, dtype=torch.float64)
        average = prior if self.average is None else self.average
        base = closure().item()
        for j in range(self.observations):
            chosen = j >= self.queries
            along = torch.linalg.eigh(covariance)[1][:, -1] if chosen else torch.eye(self.queries).double()[j]
            along = along * along[along.abs().argmax()].sign()
            terms = [(each, amount) for each, amount in zip(seeds, along.tolist()) if amount]
            for each, amount in terms:
                self.move(each, amount)
            loss = closure().item()
            for each, amount in terms:
                self.move(each, -amount)
            residual = (loss - base) / self.eps - along @ mean
            average = 0.9 * average + 0.1 * residual.item() ** 2
            gain = covariance @ along / (along @ covariance @ along + max(average, 0.01 * prior))
            mean, covariance = mean + gain * residual, covariance - torch.outer(gain, along @ covariance)
        self.average = average
        for each, slope in zip(seeds, mean.tolist()):
            self.update(each, slope)


class MeZOGV(Loop):
    best: int | None = None  # seed of the draw that is kept

    def drawn(self, seed: int) -> list[Tensor]:
        torch.manual_seed(seed)
        return [self.z(i, p.data) for i, p in enumerate(self.parameters)]

    def along(self, guide: list[Tensor], amount: float) -> None:
        for p, g in zip(self.parameters, guide):
            p.data = p.data + amount * g

    @torch.no_grad()
    def step(self, closure: Closure, seed: int) -> None:
        pair = [2 * seed + 1 if self.best is None else self.best, 2 * seed]
        losses = [self.ahead(each, closure) for each in pair]
        better = losses.index(min(losses))
        self.best = pair[better]
        guide = [a - b for a, b in zip(self.drawn(pair[better]), self.drawn(pair[1 - better]))]
        self.along(guide, self.eps)
        plus = closure()
        self.along(guide, -2 * self.eps)
        minus = closure()
        self.along(guide, self.eps)
        self.along(guide, -self.lr * ((plus - minus) / (2 * self.eps)).item())


class BlockMeZO(Loop):
    def blocks(self) -> list[list[int]]:
        found: dict[str, list[int]] = {}
        for i, name in enumerate(self.names):
            found.setdefault(block_of(name), []).append(i)
        return list(found.values())

    @torch.no_grad()
    def step(self, closure: Closure, seed: int) -> None:
        for only in self.blocks():
            self.update(seed, self.difference(seed, closure, only), only)


class LeZO(Loop):
    sparsity = 0.75

    def chosen(self, seed: int) -> set[int]:
        """Returns the numbers of the parameters that move: those of some layers, and those of none."""
        of = [layer_of(name) for name in self.names]
        layers = sorted({layer for layer in of if layer is not None})
        count = max(1, round((1 - self.sparsity) * len(layers)))
        kept = {None, *random.Random(seed).sample(layers, min(count, len(layers)))}
        return {i for i, layer in enumerate(of) if layer in kept}

    @torch.no_grad()
    def step(self, closure: Closure, seed: int) -> None:
        only = self.chosen(seed)
        self.update(seed, self.difference(seed, closure, only), only)
