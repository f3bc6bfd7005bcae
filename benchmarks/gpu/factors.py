"""lowrank_ over the matrices of a model in one launch, against addmm_ over them, baddbmm_ of all, and the
eager sum."""

from __future__ import annotations

from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from torch import Tensor

from zokern.backends import Backend, Batch, Outer, Span

from ..measure import Case, Group
from .dense import EPS, weights
from .run import Run
from .timing import figure, measure, timer_of

SHAPES = ((4096, 4096), (4096, 14336))
RANKS = (8, 16, 32, 64, 128)
MATRICES = 16  # of one launch: far more than the caches hold


def ours(backend: Backend, ws: list[Tensor], us: list[Tensor], vs: list[Tensor]) -> Callable[[], Any]:
    spans, scales = [Span(i) for i in range(len(ws))], [EPS] * len(ws)
    return lambda: backend.lowrank_(Batch(ws, spans), Outer(us, vs, scales))


def factored(run: Run, shapes: tuple = SHAPES, ranks: tuple = RANKS, matrices: int = MATRICES) -> None:
    if run.quick:
        shapes, ranks, matrices = ((64, 96),), (8, 16), 2
    shares: dict[str, list[float]] = {}
    for m, n in shapes:
        count, size = matrices * m * n, f"{matrices} x {m}x{n}"
        flat = weights(run, count, torch.bfloat16)
        other, stacked = torch.empty_like(flat), flat.view(matrices, m, n)
        ws, copy = list(stacked.unbind()), f"copy {size}"
        for rank in ranks:
            if run.left < 4:
                return run.skip(f"lowrank_ from rank {rank}, {size}", "the part's time was up")
            group = one(
                run, ws, stacked, rank, size, Case(copy, lambda o=other, f=flat: o.copy_(f), count, 4)
            )
            for name in run.backends():
                line = f"lowrank_ r={rank} {name} {size}"
                for other_line, what, scale in (
                    (copy, "copy", 100),
                    (f"addmm_ r={rank} {size}", "addmm_", 1),
                ):
                    if (found := figure(run, group, f"{line} / {what}", other_line, line, scale)) is not None:
                        shares.setdefault(f"{name} {what}", []).append(found)
                figures(run, name, shares)
    return None


def figures(run: Run, name: str, shares: dict[str, list[float]]) -> None:
    """Over the shapes and ranks so far; each is said anew, so that a part that is cut off has said what it
    had."""
    if found := shares.get(f"{name} copy"):
        run.figure(f"lowrank_ {name}, least / copy", min(found))
    if found := shares.get(f"{name} addmm_"):
        run.figure(f"lowrank_ {name}, least / addmm_", min(found))
        run.figure(f"lowrank_ {name}, median / addmm_", median(found))


def one(run: Run, ws: list[Tensor], stacked: Tensor, rank: int, size: str, copy: Case) -> Group:
    generator = torch.Generator(run.device).manual_seed(rank)
    left, right = (
        1e-3 * torch.randn(len(ws), side, rank, device=run.device, generator=generator)
        for side in stacked.shape[1:]
    )
    us, vs = list(left.unbind()), list(right.unbind())
    short, narrow = left.bfloat16(), right.bfloat16().transpose(1, 2)

    def addmm() -> None:
        for w, u, v in zip(ws, short, narrow):
            w.addmm_(u, v, alpha=EPS)

    def eagerly() -> None:
        for w, u, v in zip(ws, short, narrow):
            w.copy_(w + EPS * (u @ v))

    loop = f"eager W + s * (U @ V.T) r={rank} {size}"
    count = stacked.numel()
    cases = [
        copy,
        Case(f"addmm_ r={rank} {size}", addmm, count, 4, copy.name, loop),
        Case(
            f"baddbmm_ r={rank} {size}",
            lambda: stacked.baddbmm_(short, narrow, alpha=EPS),
            count,
            4,
            copy.name,
            loop,
        ),
        Case(loop, eagerly, count, 4, copy.name, loop, every=2),
    ]
    for name, backend in run.backends().items():
        cases.append(
            Case(f"lowrank_ r={rank} {name} {size}", ours(backend, ws, us, vs), count, 4, copy.name, loop)
        )
        cases.append(
            Case(
                f"lowrank_ r={rank} {name} one of {size}",
                ours(backend, ws[:1], us[:1], vs[:1]),
                count // len(ws),
                4,
                copy.name,
            )
        )
    return measure(run, Group(f"lowrank_, rank {rank}, bf16 {size}", cases, timer_of(run)), 15, 2.5)
