"""linear and sketch: products with z that is never held, beside torch's products with matrices that are."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

import zokern

from ..measure import Case, Group
from .dense import EPS, weights
from .run import Run
from .timing import IdleToIdle, figure, in_time, measure, timer_of

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


def tiles(run: Run, tokens: tuple[int, ...] = (512, 4096)) -> None:
    """Both signs of a matrix by tiles of so many rows, from an idle device to an idle one, as in a step; and
    torch's products of such tiles alone. 501 rows are what a CPU's tile has; 2048 are 2^23 elements."""
    m, n = (96, 64) if run.quick else (11008, 4096)
    w = weights(run, m * n, torch.bfloat16).view(m, n)
    counts = (32, 33, m) if run.quick else (501, 512, 2048, m)
    for rows in tokens[:1] if run.quick else tokens:
        x, bound = weights(run, rows * n, torch.bfloat16).view(rows, n), "two F.linear"
        out = torch.empty(rows, m, dtype=torch.bfloat16, device=run.device)

        def bare(x=x) -> None:
            F.linear(x, w)
            F.linear(x, w)

        def alone(count: int, x=x, out=out) -> Any:
            def call() -> None:
                for start in range(0, m, count):
                    torch.mm(x, w[start : start + count].t(), out=out[:, start : start + count])

            return call

        def ours(count: int, name: str, x=x) -> Any:
            tile = count * n
            return lambda: zokern.linear(x, w, scales=(EPS, -EPS), seed=7, who=1, tile=tile, backend=name)

        whole, label = f"mm of {m} rows", f"{m}x{n} bf16, {rows} tokens"
        cases = [Case(f"mm of {count} rows", alone(count), m * n, 2) for count in reversed(counts)]
        group = measure(run, Group(f"products of tiles, {label}", cases, timer_of(run)), 20, 2)
        for case in cases[1:]:
            figure(run, group, f"{case.name}, {rows} tokens / whole", case.name, whole)
        cases = [Case(bound, bare, m * n, 2)]
        for name in run.backends():
            cases += [
                Case(f"+- by {count} rows {name}", ours(count, name), m * n, 2, eager=bound)
                for count in counts
            ]
        group = measure(
            run, Group(f"linear by tiles, idle to idle, {label}", cases, IdleToIdle(run.device)), 20, 3
        )
        for case in cases[1:]:
            figure(run, group, f"{case.name}, {rows} tokens / two F.linear", case.name, bound)


def products(run: Run) -> None:
    in_time(
        run, {"tiles": lambda: tiles(run), "linear": lambda: linears(run), "sketch": lambda: sketches(run)}
    )
