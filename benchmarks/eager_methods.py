"""Holds the eager loops of the methods, as their public code does them. A loop has the name of its method.

All of them make the whole z of a parameter, again from the step's seed in each of four passes (three where
one side is read), and add it to the weights. Only the shape of z differs:

    SubZero  z = sqrt(m n) / r  U Z V^T  U, V the Q factors of normals, kept for an interval; Z normal, r x r
    LOZO     z = U V^T                   V normal, kept for an interval; U normal, m x r, in every step
    PGAP     z = U (Z - a diag S) V^T    U, S, V of a dense estimate of the gradient, kept for an interval
    TeZO     z = U diag(tau) V^T         U, V normal, kept for the run; tau normal, r numbers
    ZOMuon   z = P Psi                   P the Q factor of normals; Psi normal, r x n; a step is P msign(sum)
    ZOMOPI   the same                    steps along P U V^T of a power iteration
    EGGROLL  z = a b^T                   a, b normal; both signs of K seeds, weighted by the losses' ranks
    FZOO     z = 2 bits - 1              one-sided, K seeds, and theta; steps scaled by the losses' std
    FGD      z normal                    one forward with z as tangents; z is kept for the update
    Addax    z normal                    also a back-propagation of all parameters
    Hybrid   z normal                    also a back-propagation of the last ones, which z does not move

Parameters that are no matrices take a dense normal z. Factors have the parameters' dtype, as there.
`zokern/methods/` names the papers.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel

from . import eager
from .eager import normal_like

Closure = Callable[[], Tensor]


def is_matrix(p: Tensor) -> bool:
    return p.squeeze().dim() == 2


def normal(p: Tensor, *shape: int) -> Tensor:
    return torch.randn(*shape, dtype=p.dtype, device=p.device)


class Loop:
    """theta + eps z, theta - eps z, theta again, theta - lr c z: four passes, and z four times."""

    def __init__(self, parameters: list[Tensor], lr: float, eps: float) -> None:
        self.parameters, self.lr, self.eps = parameters, lr, eps
        self.refresh()

    def refresh(self) -> None:
        """Draw what is kept for an interval."""

    def z(self, i: int, p: Tensor) -> Tensor:
        return normal_like(p)

    def move(self, seed: int, scaling: float) -> None:
        torch.manual_seed(seed)
        for i, p in enumerate(self.parameters):
            p.data = p.data + scaling * self.z(i, p.data) * self.eps

    def update(self, seed: int, coefficient: float) -> None:
        torch.manual_seed(seed)
        for i, p in enumerate(self.parameters):
            p.data = p.data - self.lr * (coefficient * self.z(i, p.data))

    def difference(self, seed: int, closure: Closure) -> float:
        self.move(seed, +1)
        plus = closure()
        self.move(seed, -2)
        minus = closure()
        self.move(seed, +1)
        return ((plus - minus) / (2 * self.eps)).item()

    @torch.no_grad()
    def step(self, closure: Closure, seed: int) -> None:
        self.update(seed, self.difference(seed, closure))


class MeZO(Loop):
    """The published loop, with its term of weight decay: eager.step."""

    @torch.no_grad()
    def step(self, closure: Closure, seed: int) -> None:
        eager.step(self.parameters, closure, seed, self.lr, self.eps)


class SubZero(Loop):
    def __init__(self, parameters: list[Tensor], lr: float, eps: float, rank: int = 8) -> None:
        self.rank = rank
        super().__init__(parameters, lr, eps)

    @torch.no_grad()
    def refresh(self) -> None:
        self.basis: dict[int, tuple[Tensor, Tensor]] = {}
        for i, p in enumerate(self.parameters):
            if is_matrix(p):
                left, right = (
                    torch.linalg.qr(torch.randn(side, self.rank))[0].to(p.dtype) for side in p.squeeze().shape
                )
                self.basis[i] = left, right.t()

    def z(self, i: int, p: Tensor) -> Tensor:
        if i not in self.basis:
            return normal_like(p)
        left, right = self.basis[i]
        core = normal(p, left.shape[1], right.shape[0])
        return (left @ core @ right).view(p.shape) * math.sqrt(p.numel() / self.rank**2)


class LOZO(Loop):
    def __init__(self, parameters: list[Tensor], lr: float, eps: float, rank: int = 2) -> None:
        self.rank = rank
        super().__init__(parameters, lr, eps)

    @torch.no_grad()
    def refresh(self) -> None:
        self.right = {
            i: normal(p, p.shape[-1], self.rank) for i, p in enumerate(self.parameters) if is_matrix(p)
        }

    def z(self, i: int, p: Tensor) -> Tensor:
        return normal(p, p.shape[0], self.rank) @ self.right[i].t() if i in self.right else normal_like(p)


class TeZO(Loop):
    def __init__(self, parameters: list[Tensor], lr: float, eps: float, rank: int = 32) -> None:
        self.rank = rank
        super().__init__(parameters, lr, eps)

    @torch.no_grad()
    def refresh(self) -> None:
        self.factors = {
            i: (normal(p, p.shape[0], self.rank), normal(p, p.shape[1], self.rank))
            for i, p in enumerate(self.parameters)
            if is_matrix(p)
        }

    def z(self, i: int, p: Tensor) -> Tensor:
        if i not in self.factors:
            return normal_like(p)
        left, right = self.factors[i]
        return (left * normal(p, self.rank)) @ right.t()


class PGAP(Loop):
    """The basis is random until estimate() is called: a step costs the same."""

    def __init__(
        self,
        parameters: list[Tensor],
        lr: float,
        eps: float,
        rank: int = 128,
        probes: int = 10,
        delta: float = 2.0,
    ) -> None:
        self.rank, self.probes, self.delta = rank, probes, delta
        super().__init__(parameters, lr, eps)

    @torch.no_grad()
    def refresh(self) -> None:
        self.basis: dict[int, tuple[Tensor, Tensor, Tensor]] = {}
        for i, p in enumerate(self.parameters):
            if is_matrix(p):
                rank = min(self.rank, *p.shape)
                left, right = (torch.linalg.qr(torch.randn(side, rank))[0].to(p.dtype) for side in p.shape)
                self.basis[i] = left, torch.linspace(1, 0.1, rank).to(p.dtype), right.t()

    @torch.no_grad()
    def estimate(self, closure: Closure, seed: int) -> None:
        """G = 1/h sum c_i z_i, dense and in float32,
        then a singular value decomposition of every matrix of it."""
        dense = Loop(self.parameters, self.lr, self.eps)
        total = {i: torch.zeros(p.shape) for i, p in enumerate(self.parameters) if i in self.basis}
        for probe in range(self.probes):
            coefficient = dense.difference(seed + probe, closure)
            torch.manual_seed(seed + probe)
            for i, p in enumerate(self.parameters):
                z = normal_like(p.data)
                if i in total:
                    total[i] += coefficient / self.probes * z
        for i, gradient in total.items():
            left, spectrum, right = torch.linalg.svd(gradient, full_matrices=False)
            rank, dtype = self.basis[i][1].numel(), self.parameters[i].dtype
            self.basis[i] = left[:, :rank].to(dtype), spectrum[:rank].to(dtype), right[:rank].to(dtype)

    def z(self, i: int, p: Tensor) -> Tensor:
        if i not in self.basis:
            return normal_like(p)
        left, spectrum, right = self.basis[i]
        core = normal(p, spectrum.numel(), spectrum.numel())
        sign = 1.0 if torch.rand(1).item() < 0.5 else -1.0
        along = (spectrum * torch.diagonal(core)).sum() - sign * math.sqrt(self.delta) * spectrum.norm()
        return left @ (core - along / (spectrum.norm() ** 2 + 1e-12) * torch.diag(spectrum)) @ right


class FZOO(Loop):
    def __init__(self, parameters: list[Tensor], lr: float, eps: float, queries: int = 8) -> None:
        self.queries = queries
        super().__init__(parameters, lr, eps)

    def z(self, i: int, p: Tensor) -> Tensor:
        return (2 * torch.randint(0, 2, p.shape, device=p.device) - 1).to(p.dtype)

    @torch.no_grad()
    def step(self, closure: Closure, seed: int) -> None:
        seeds = range(seed * self.queries, (seed + 1) * self.queries)
        losses = []
        for each in seeds:
            self.move(each, +1)
            losses.append(closure().item())
            self.move(each, -1)
        base = closure().item()
        spread = torch.tensor(losses, dtype=torch.float64).std(correction=0).item()
        for each, loss in zip(seeds, losses):
            self.update(each, (loss - base) / (self.queries * spread) if spread else 0.0)


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

    def __init__(self, parameters: list[Tensor], lr: float, eps: float) -> None:
        cut = len(parameters) - max(1, len(parameters) // 10)
        self.last = torch.optim.AdamW(parameters[cut:], lr=1e-4, weight_decay=0.0)
        super().__init__(parameters[:cut], lr, eps)

    def step(self, closure: Closure, seed: int) -> None:
        for p in self.parameters:
            p.requires_grad_(False)
        closure().backward()
        with torch.no_grad():
            self.update(seed, self.difference(seed, closure))
        self.last.step()
        self.last.zero_grad()


class ZOMuon(Loop):
    def __init__(
        self, parameters: list[Tensor], lr: float, eps: float, rank: int = 64, queries: int = 4
    ) -> None:
        self.rank, self.queries = rank, queries
        super().__init__(parameters, lr, eps)

    @torch.no_grad()
    def refresh(self) -> None:
        sides = {
            i: (p.shape[0], min(self.rank, *p.shape)) for i, p in enumerate(self.parameters) if is_matrix(p)
        }
        self.left = {
            i: torch.linalg.qr(torch.randn(m, r))[0].to(self.parameters[i].dtype)
            for i, (m, r) in sides.items()
        }

    def core(self, i: int, p: Tensor) -> Tensor:
        return normal(p, self.left[i].shape[1], p.shape[1]) if i in self.left else normal_like(p)

    def z(self, i: int, p: Tensor) -> Tensor:
        return self.left[i] @ self.core(i, p) if i in self.left else self.core(i, p)

    def orthogonal(self, i: int, x: Tensor) -> Tensor:
        x = x / (x.norm() + 1e-7)
        for _ in range(5):
            square = x @ x.t()
            x = 3.4445 * x + (-4.7750 * square + 2.0315 * square @ square) @ x
        return x

    @torch.no_grad()
    def step(self, closure: Closure, seed: int) -> None:
        seeds, base = range(seed * self.queries, (seed + 1) * self.queries), closure().item()
        total: dict[int, Tensor] = {}
        for each in seeds:
            self.move(each, +1)
            slope = (closure().item() - base) / self.eps / self.queries
            self.move(each, -1)
            torch.manual_seed(each)
            for i, p in enumerate(self.parameters):
                core = slope * self.core(i, p.data)
                total[i] = total[i] + core if i in total else core
        for i, p in enumerate(self.parameters):
            move = (
                self.left[i] @ self.orthogonal(i, total[i].float()).to(p.dtype)
                if i in self.left
                else total[i]
            )
            p.data = p.data - self.lr * move


class ZOMOPI(ZOMuon):
    def __init__(
        self, parameters: list[Tensor], lr: float, eps: float, rank: int = 64, queries: int = 8
    ) -> None:
        self.right: dict[int, Tensor] = {}
        super().__init__(parameters, lr, eps, rank, queries)

    def orthogonal(self, i: int, x: Tensor) -> Tensor:
        v = self.right.get(i, torch.randn(x.shape[1], min(32, x.shape[0])))
        self.right[i] = v = torch.linalg.qr(x.t() @ (x @ v))[0]
        return torch.nn.functional.normalize(x @ v, dim=0) @ v.t()


class EGGROLL(Loop):
    def __init__(self, parameters: list[Tensor], lr: float, eps: float, queries: int = 16) -> None:
        self.queries = queries
        super().__init__(parameters, lr, eps)

    def z(self, i: int, p: Tensor) -> Tensor:
        return normal(p, p.shape[0], 1) @ normal(p, 1, p.shape[1]) if is_matrix(p) else normal_like(p)

    @torch.no_grad()
    def step(self, closure: Closure, seed: int) -> None:
        seeds, losses = range(seed * self.queries, (seed + 1) * self.queries), []
        for each in seeds:
            for way in (+1, -2):
                self.move(each, way)
                losses.append(closure().item())
            self.move(each, +1)
        ranks = torch.tensor(losses).argsort().argsort().view(-1, 2) / (len(losses) - 1)
        for each, (plus, minus) in zip(seeds, ranks.tolist()):
            self.update(each, (plus - minus) / 2 / self.queries)


def _loops(loop: type[Loop]) -> list[type[Loop]]:
    return [one for below in loop.__subclasses__() for one in (below, *_loops(below))]


LOOPS: dict[str, type[Loop]] = {loop.__name__: loop for loop in _loops(Loop)}  # by the name of the method
