"""Eager loops with a z of low rank for matrices. Other parameters take a dense normal z.

    SubZero      z = sqrt(m n) / r U Z V^T  U, V the Q factors of normals, kept for an interval; Z r x r
    SubZeroPlus  z = U Z V^T                the same; one-sided, K seeds; a step is U Adam(sum) V^T
    LOZO         z = U V^T                  V normal, kept for an interval; U normal, m x r, in every step
    PGAP         z = U (Z - a diag S) V^T   U, S, V of a dense estimate of the gradient, kept for an interval
    TeZO         z = U diag(tau) V^T        U, V normal, kept for the run; tau normal, r numbers
    ZOMuon       z = P Psi                  P the Q factor of normals; Psi normal, r x n; step P msign(sum)
    ZOMOPI       the same                   steps along P U V^T of a power iteration
    EGGROLL      z = a b^T                  a, b normal; both signs of K seeds, weighted by the losses' ranks

Factors have the parameters' dtype, as there.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..eager import normal_like
from .loop import Closure, Loop, Queries, is_matrix, normal


def orthonormal(rows: int, rank: int, like: Tensor) -> Tensor:
    return torch.linalg.qr(torch.randn(rows, rank, device=like.device))[0].to(like.dtype)


class SubZero(Loop):
    rank = 8

    @torch.no_grad()
    def refresh(self) -> None:
        self.basis: dict[int, tuple[Tensor, Tensor]] = {}
        for i, p in enumerate(self.parameters):
            if is_matrix(p):
                rank = min(self.rank, *p.squeeze().shape)
                left, right = (orthonormal(side, rank, p) for side in p.squeeze().shape)
                self.basis[i] = left, right.t()

    def core(self, i: int, p: Tensor) -> Tensor:
        rank = self.basis[i][1].shape[0] if i in self.basis else 0
        return normal(p, rank, rank) if rank else normal_like(p)

    def lifted(self, i: int, p: Tensor, core: Tensor) -> Tensor:
        """Returns U core V^T of a matrix."""
        left, right = self.basis[i]
        return (left @ core @ right).view(p.shape)

    def z(self, i: int, p: Tensor) -> Tensor:
        core = self.core(i, p)
        if i not in self.basis:
            return core
        return self.lifted(i, p, core) * math.sqrt(p.numel() / core.numel())


class Cores(Queries):
    """K differences from the loss of theta, in the cores of matrices."""

    def core(self, i: int, p: Tensor) -> Tensor:
        raise NotImplementedError

    def summed(self, closure: Closure, seed: int) -> dict[int, Tensor]:
        """Returns the mean of K slopes times cores, for each parameter."""
        base, total = closure().item(), dict[int, Tensor]()
        for each in self.seeds(seed):
            slope = (self.ahead(each, closure) - base) / self.eps / self.queries
            torch.manual_seed(each)
            for i, p in enumerate(self.parameters):
                core = slope * self.core(i, p.data)
                total[i] = total[i] + core if i in total else core
        return total


class SubZeroPlus(SubZero, Cores):
    """K differences from the loss of theta, and torch's Adam of their average, in the core of a matrix."""

    rank, queries, betas, adam_eps = 16, 99, (0.9, 0.95), 1e-8

    def refresh(self) -> None:
        super().refresh()
        self.moments: dict[int, list[Tensor]] = {}
        self.count = 0

    def z(self, i: int, p: Tensor) -> Tensor:
        core = self.core(i, p)
        return self.lifted(i, p, core) if i in self.basis else core

    def quotient(self, i: int, g: Tensor) -> Tensor:
        """Returns Adam's step of an estimate, in float32."""
        (one, two), g = self.betas, g.float() if g.dtype != torch.float64 else g
        m, v = self.moments.setdefault(i, [torch.zeros_like(g), torch.zeros_like(g)])
        m.mul_(one).add_(g, alpha=1 - one)
        v.mul_(two).addcmul_(g, g, value=1 - two)
        root = (v / (1 - two**self.count)).sqrt() + self.adam_eps
        return m / (1 - one**self.count) / root

    @torch.no_grad()
    def step(self, closure: Closure, seed: int) -> None:
        total = self.summed(closure, seed)
        self.count += 1
        for i, p in enumerate(self.parameters):
            move = self.quotient(i, total[i]).to(p.dtype)
            p.data = p.data - self.lr * (self.lifted(i, p.data, move) if i in self.basis else move)


class LOZO(Loop):
    rank = 2

    @torch.no_grad()
    def refresh(self) -> None:
        self.right = {
            i: normal(p, p.shape[-1], self.rank) for i, p in enumerate(self.parameters) if is_matrix(p)
        }

    def z(self, i: int, p: Tensor) -> Tensor:
        return normal(p, p.shape[0], self.rank) @ self.right[i].t() if i in self.right else normal_like(p)


class TeZO(Loop):
    rank = 32

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

    rank, probes, delta = 128, 10, 2.0

    @torch.no_grad()
    def refresh(self) -> None:
        self.basis: dict[int, tuple[Tensor, Tensor, Tensor]] = {}
        for i, p in enumerate(self.parameters):
            if is_matrix(p):
                rank = min(self.rank, *p.shape)
                left, right = (orthonormal(side, rank, p) for side in p.shape)
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


class ZOMuon(Cores):
    rank, queries = 64, 4

    @torch.no_grad()
    def refresh(self) -> None:
        self.left = {
            i: orthonormal(p.shape[0], min(self.rank, *p.shape), p)
            for i, p in enumerate(self.parameters)
            if is_matrix(p)
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
        total = self.summed(closure, seed)
        for i, p in enumerate(self.parameters):
            move = total[i]
            if i in self.left:
                whole = move if move.dtype == torch.float64 else move.float()
                move = self.left[i] @ self.orthogonal(i, whole).to(p.dtype)
            p.data = p.data - self.lr * move


class ZOMOPI(ZOMuon):
    queries, leading = 8, 32

    def refresh(self) -> None:
        super().refresh()
        self.right = {
            i: torch.randn(self.parameters[i].shape[1], min(self.leading, left.shape[1]), device=left.device)
            for i, left in self.left.items()
        }

    def orthogonal(self, i: int, x: Tensor) -> Tensor:
        v = self.right[i].to(x.dtype)
        self.right[i] = v = torch.linalg.qr(x.t() @ (x @ v))[0]
        return torch.nn.functional.normalize(x @ v, dim=0) @ v.t()


class EGGROLL(Queries):
    queries = 16

    def z(self, i: int, p: Tensor) -> Tensor:
        return normal(p, p.shape[0], 1) @ normal(p, 1, p.shape[1]) if is_matrix(p) else normal_like(p)

    @torch.no_grad()
    def step(self, closure: Closure, seed: int) -> None:
        seeds, losses = self.seeds(seed), []
        for each in seeds:
            losses += [side.item() for side in self.sides(each, closure)]
        # float64: equal losses have equal ranks by their order alone
        ranks = torch.tensor(losses, dtype=torch.float64).argsort().argsort().view(-1, 2) / (len(losses) - 1)
        for each, (plus, minus) in zip(seeds, ranks.tolist()):
            self.update(each, (plus - minus) / 2 / self.queries)
