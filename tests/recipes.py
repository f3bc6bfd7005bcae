"""The methods with ranks and intervals small enough for small models, and each method's update written out in float64.

A formula takes numbers from `zokern.draw` alone, at the names of docs/stream.md, and factors from torch.linalg. Every value comes
with a size, the same expression with magnitudes in place of numbers, so that rounding is bounded by a multiple of 2^-24 size.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import zokern
from zokern.stream import BASIS, RADIUS, draw_word

METHODS: dict[str, Callable[..., Any]] = {
    "subzero": partial(zokern.SubZero, rank=3, interval=3, reshape="none", lr=3e-3),
    "subzero_unit": partial(zokern.SubZero, rank=3, interval=3, reshape="none", norm="unit", lr=0.1, eps=1e-2),
    "subzero_adapters": partial(zokern.SubZero, rank=3, interval=3, lr=3e-3),
    "subzero_all": partial(zokern.SubZero, rank=3, interval=3, reshape="all", lr=3e-3),
    "lozo": partial(zokern.LOZO, rank=2, interval=3, lr=3e-3),
    "lozo_m": partial(zokern.LOZO, rank=2, interval=3, momentum=0.6, lr=3e-3),
    "lozo_unit": partial(zokern.LOZO, rank=2, interval=3, norm="unit", lr=3e-3),
    "tezo": partial(zokern.TeZO, rank=3, lr=3e-3),
    "tezo_unit": partial(zokern.TeZO, rank=3, norm="unit", lr=3e-3),
    "tezo_m": partial(zokern.TeZO, rank=3, rule="momentum", betas=(0.6, 0.9), lr=1e-3),
    "tezo_adam": partial(zokern.TeZO, rank=3, rule="adam", betas=(0.6, 0.9), lr=3e-3),
    "tezo_adam_corrected": partial(zokern.TeZO, rank=3, rule="adam", betas=(0.6, 0.9), bias_correction=True, lr=3e-3),
    "pgap": partial(zokern.PGAP, rank=3, interval=3, probes=3, norm="unit", lr=0.1, eps=1e-2),
    "pgap_matched": partial(zokern.PGAP, rank=3, interval=3, probes=3, steps=8, lr=3e-3),
    "pgap_step": partial(zokern.PGAP, rank=3, interval=3, probes=3, sign="step", norm="unit", lr=0.1, eps=1e-2),
    "pgap_positive": partial(zokern.PGAP, rank=3, interval=3, probes=3, sign="positive", norm="unit", lr=0.1, eps=1e-2),
    "fzoo": partial(zokern.FZOO, queries=3, lr=3e-3, eps=1e-3),
}
ONE_EACH = ("subzero", "lozo", "lozo_m", "tezo", "tezo_m", "tezo_adam", "pgap", "fzoo")


class Sized(NamedTuple):
    """A number and the sum of the magnitudes that it was made of."""

    value: Tensor
    size: Tensor

    def __matmul__(self, other: Sized) -> Sized:  # type: ignore[override]
        return Sized(self.value @ other.value, self.size @ other.size)

    def __add__(self, other: Sized) -> Sized:  # type: ignore[override]
        return Sized(self.value + other.value, self.size + other.size)

    def __mul__(self, factor: float | Tensor) -> Sized:  # type: ignore[override]
        return Sized(self.value * factor, self.size * abs(factor))

    @property
    def mT(self) -> Sized:
        return Sized(self.value.mT, self.size.mT)


def sized(value: Tensor) -> Sized:
    return Sized(value.double(), value.double().abs())


class Factors(NamedTuple):
    """z = left core right^T."""

    left: Sized
    core: Sized
    right: Sized

    def product(self) -> Sized:
        return self.left @ self.core @ self.right.mT


@dataclass
class Formula:
    """A method on paper: float64 weights that follow it, given the coefficients of each step."""

    name: str
    optimizer: Any  # options only; P-GAP's basis too, whose own checks are in test_methods.py
    theta: dict[str, Tensor]
    size: dict[str, Tensor] = field(default_factory=dict)
    kept: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, name: str, optimizer: Any, model: nn.Module) -> Formula:
        theta = {n: p.detach().double() for n, p in model.named_parameters() if p.requires_grad}
        return cls(name, optimizer, theta, {n: t.abs() for n, t in theta.items()})

    # Directions

    def normals(self, shape: Sequence[int], name: str, step: int, word: int) -> Tensor:
        return zokern.draw("normal", tuple(shape), seed=self.optimizer.seed, who=name, step=step, draw=word).double()

    def shape(self, name: str) -> tuple[int, int] | None:
        """Rows and columns of the matrix that a parameter is factored as."""
        long = [side for side in self.theta[name].shape if side != 1]
        if self.name == "fzoo" or len(long) != 2:
            return None
        direction, count = self.optimizer.factored, self.theta[name].numel()
        near = min(
            ((a, count // a) for a in range(1, count + 1) if count % a == 0 and a * a <= count), key=lambda p: p[1] - p[0]
        )
        if self.name == "subzero_all" or (self.name == "subzero_adapters" and min(long) <= 4 * direction.rank):
            return near
        return long[0], long[1]

    def basis_step(self, step: int) -> int:
        return 0 if self.name.startswith("tezo") else step - step % self.optimizer.factored.interval

    def rank(self, name: str) -> int:
        return min(self.optimizer.factored.rank_of(name), *self.shape(name))  # type: ignore[misc]

    def factors(self, name: str, step: int, query: int) -> Factors:
        """U, C and V of one draw."""
        (m, n), r, born = self.shape(name), self.rank(name), self.basis_step(step)  # type: ignore[misc]
        v = self.normals((n, r), name, born, draw_word(1, BASIS))
        long = 1.0 if self.name.endswith("_unit") else 1.0 / math.sqrt(r)
        if self.name.startswith("lozo"):
            return Factors(sized(self.normals((m, r), name, step, query) * long), sized(torch.eye(r)), sized(v))
        u = self.normals((m, r), name, born, draw_word(0, BASIS))
        if self.name.startswith("tezo"):
            return Factors(sized(u), sized(torch.diag(self.normals((r,), name, step, query) * long)), sized(v))
        core = self.normals((r, r), name, step, query)
        if self.name.startswith("pgap"):
            matrix = next(x for x in self.optimizer.matrices.values() if x.name == name)
            core, u, v = self.aligned(core, matrix.extra["spectrum"].double(), name, step, query), matrix.left, matrix.right
        else:
            u, v = orthonormal(u), orthonormal(v)
        matched = self.name not in ("subzero_unit", "pgap", "pgap_step", "pgap_positive")
        return Factors(sized(u), sized(core * (math.sqrt(m * n) / r if matched else 1.0)), sized(v))

    def aligned(self, core: Tensor, s: Tensor, name: str, step: int, query: int) -> Tensor:
        """Z0 - alpha diag(S), alpha = (sum_i S_i Z0_ii - xi sqrt(delta) ||S||) / ||S||^2."""
        word, xi = draw_word(query, RADIUS), 1.0
        if self.name in ("pgap", "pgap_matched"):
            xi = 1.0 if float(self.normals((1,), name, step, word)) >= 0 else -1.0
        elif self.name == "pgap_step":
            first = min(n for n in self.theta if self.shape(n) is not None)
            xi = 1.0 if float(self.normals((1,), first, step, word)) >= 0 else -1.0
        delta = 2.0 * (1.0 - step / 8) if self.name == "pgap_matched" else 2.0
        alpha = ((s * core.diagonal()).sum() - xi * math.sqrt(delta) * s.norm()) / (s.norm() ** 2 + 1e-12)
        return core - alpha * torch.diag(s)

    def dense(self, name: str, step: int, query: int) -> Sized:
        kind = "rademacher" if self.name == "fzoo" else "normal"
        shape = tuple(self.theta[name].shape)
        return sized(zokern.draw(kind, shape, seed=self.optimizer.seed, who=name, step=step, draw=query))

    def z(self, name: str, step: int, query: int) -> Tensor:
        if self.shape(name) is None:
            return self.dense(name, step, query).value
        return self.factors(name, step, query).product().value.reshape(self.theta[name].shape)

    def moved(self, step: int, query: int, scale: float) -> dict[str, Tensor]:
        """theta + scale z."""
        return {n: t + scale * self.z(n, step, query) for n, t in self.theta.items()}

    # Coefficients and updates

    def coefficients(self, losses: Sequence[Sequence[float]], eps: float) -> list[float]:
        if self.name == "fzoo":
            ahead = torch.tensor([sides[0] for sides in losses], dtype=torch.float64)
            return [(sides[0] - sides[1]) / float(ahead.std(correction=0)) for sides in losses]
        offsets = self.optimizer.estimator.stencil.offsets
        return [(sides[0] - sides[1]) / ((offsets[0] - offsets[1]) * eps) for sides in losses]

    def update(self, coefficients: Sequence[float], step: int, lr: float, weight_decay: float = 0.0) -> None:
        """theta <- (1 - lr wd) theta - lr times the method's average of c_k z_k."""
        q = len(coefficients)
        for name, theta in self.theta.items():
            weights = [c / q for c in coefficients]
            if self.shape(name) is None:
                total = sum_of([self.dense(name, step, k) * w for k, w in enumerate(weights)])
                move = self.averaged(name, total) if self.kind != "sgd" else total
            else:
                move = self.matrix_move(name, [self.factors(name, step, k) for k in range(q)], weights)
            decay = 1.0 - lr * weight_decay
            self.theta[name] = decay * theta - lr * move.value.reshape(theta.shape)
            self.size[name] = decay * self.size[name] + lr * move.size.reshape(theta.shape)

    @property
    def kind(self) -> str:
        return {"lozo_m": "momentum", "tezo_m": "momentum", "tezo_adam": "adam", "tezo_adam_corrected": "adam"}.get(
            self.name, "sgd"
        )

    def averaged(self, name: str, gradient: Sized) -> Sized:
        """Momentum or Adam of a dense gradient, or the first moment in a small space."""
        if self.kind == "momentum":
            old = self.kept.get(name)
            self.kept[name] = gradient if old is None else old * 0.6 + gradient * 0.4
            return self.kept[name]
        first, second = self.moments(name, gradient)
        return first * (1.0 / (second.value + 1e-8).sqrt())

    def moments(self, name: str, gradient: Sized) -> tuple[Sized, Sized]:
        zero = gradient * 0.0
        first, second, count = self.kept.get(name, (zero, zero, 0))
        squared = Sized(gradient.value**2, gradient.value**2)
        first, second, count = first * 0.6 + gradient * 0.4, second * 0.9 + squared * 0.1, count + 1
        self.kept[name] = first, second, count
        if self.name == "tezo_adam_corrected":
            return first * (1.0 / (1.0 - 0.6**count)), second * (1.0 / (1.0 - 0.9**count))
        return first, second

    def matrix_move(self, name: str, draws: Sequence[Factors], weights: Sequence[float]) -> Sized:
        left, _, right = draws[0]
        if self.kind == "sgd":
            return sum_of([f.product() * w for f, w in zip(draws, weights)])
        if self.name == "lozo_m":
            old = self.kept.get(name + " V")
            if old is not None and not torch.equal(old.value, right.value):
                self.kept[name] = self.kept[name] @ (old.mT @ right) * (1.0 / len(right.value))
            self.kept[name + " V"] = right
            return self.averaged(name, sum_of([f.left * w for f, w in zip(draws, weights)])) @ right.mT
        tau = sum_of([Sized(f.core.value.diagonal(), f.core.size.diagonal()) * w for f, w in zip(draws, weights)])
        if self.kind == "momentum":
            average = self.averaged(name, tau)
            return left @ Sized(torch.diag(average.value), torch.diag(average.size)) @ right.mT
        first, second = self.moments(name, tau)
        spread = left.value**2 @ torch.diag(second.value) @ (right.value**2).mT
        return (left @ Sized(torch.diag(first.value), torch.diag(first.size)) @ right.mT) * (1.0 / (spread + 1e-8).sqrt())


def sum_of(terms: Sequence[Sized]) -> Sized:
    total = terms[0]
    for term in terms[1:]:
        total = total + term
    return total


def orthonormal(x: Tensor) -> Tensor:
    """Q of the QR decomposition with a positive diagonal of R, float64."""
    q, r = torch.linalg.qr(x.double())
    return q * r.diagonal().sign()
