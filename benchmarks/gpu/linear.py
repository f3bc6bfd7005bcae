"""linear and sketch: products with z that is never held, beside torch's products with matrices that are."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

import zokern

from ..measure import Case, Group
from .dense import EPS, weights
from .run import Run
from .timing import figure, measure, timer_of

SHAPE = (14336, 4096)  # of W: rows are what a token becomes
TOKENS = (16, 128, 512, 2048)  # of one side
RANK, PROBES = 8, 32


def linears(run: Run, tokens: tuple[int, ...] = TOKENS) -> None:
    """Both signs, dense z by tiles, and z of rank 8, against two products with W as it is."""
    m, n = (96, 64) if run.quick else SHAPE
    w = weights(run, m * n, torch.bfloat16).view(m, n)
    left, right = (torch.randn(side, RANK, device=run.device) for side in (m, n))
    timer = timer_of(run)
    for rows in tokens[:1] if run.quick else tokens:
        x, bound = weights(run, rows * n, torch.bfloat16).view(rows, n), f"two F.linear, {rows} tokens"

        def bare(x=x) -> None:
            F.linear(x, w)
            F.linear(x, w)

        def ours(direction: Any, name: str, x=x) -> Any:
            return lambda: zokern.linear(x, w, direction, scales=(EPS, -EPS), seed=7, who=1, backend=name)

        cases = [Case(bound, bare, m * n, 2)]
        for name in run.backends():
            cases.append(
                Case(f"linear +- dense {name}, {rows} tokens", ours("normal", name), m * n, 2, eager=bound)
            )
            cases.append(
                Case(
                    f"linear +- rank {RANK} {name}, {rows} tokens",
                    ours((left, right), name),
                    m * n,
                    2,
                    eager=bound,
                )
            )
        group = measure(
            run,
            Group(f"linear, {m}x{n} bf16, {rows} tokens a side (eager: two F.linear)", cases, timer),
            20,
            2,
        )
        for case in cases[1:]:
            figure(run, group, f"{case.name} / two F.linear", case.name, bound)


def sketches(run: Run) -> None:
    """Y = z Omega, z drawn tile by tile, against a normal matrix and its product."""
    m, n = (96, 64) if run.quick else SHAPE
    omega = torch.randn(n, PROBES, device=run.device)
    loop = f"torch.randn({m}, {n}) @ omega"
    cases = [Case(loop, lambda: torch.randn(m, n, device=run.device) @ omega, m * n, 4)]
    for name in run.backends():

        def ours(name=name) -> None:
            zokern.sketch("normal", (m, n), omega, seed=7, who=1, draws=[(0, 0)], coeffs=[1.0], backend=name)

        cases.append(Case(f"sketch {name}", ours, m * n, 4, eager=loop))
    measure(run, Group(f"sketch, {m}x{n} float32, {PROBES} probes", cases, timer_of(run)), 20, 3)


def products(run: Run) -> None:
    linears(run)
    sketches(run)
