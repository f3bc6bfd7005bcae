"""linear and sketch: products with z that is never held, beside torch's products with matrices that are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

import zokern
from zokern import overlap

from ..measure import Case, Group
from .dense import EPS, weights
from .run import Run
from .timing import figure, measure, timer_of

SHAPE = (14336, 4096)  # of W: rows are what a token becomes
TOKENS = (16, 128, 512, 2048)  # of one side
RANK, PROBES = 8, 32
TILE = 1 << 21  # elements of W in scratch memory for one sign, in one tile or in two of half the size


def on_one_stream(call: Callable[[], Any]) -> Callable[[], Any]:
    """The call with nothing made ahead."""

    def alone() -> Any:
        kept, overlap.SLOTS = overlap.SLOTS, 1
        try:
            return call()
        finally:
            overlap.SLOTS = kept

    return alone


def linears(run: Run, tokens: tuple[int, ...] = TOKENS) -> None:
    """Both signs, dense z with tiles made ahead and in turn, and z of rank 8, against two products with W as it is."""
    m, n = (96, 64) if run.quick else SHAPE
    w = weights(run, m * n, torch.bfloat16).view(m, n)
    left, right = (torch.randn(side, RANK, device=run.device) for side in (m, n))
    timer = timer_of(run)
    for rows in tokens[:1] if run.quick else tokens:
        x, bound = weights(run, rows * n, torch.bfloat16).view(rows, n), f"two F.linear, {rows} tokens"

        def bare(x=x) -> None:
            F.linear(x, w)
            F.linear(x, w)

        def ours(direction: Any, name: str, x=x, tile: int = TILE) -> Any:
            return lambda: zokern.linear(x, w, direction, scales=(EPS, -EPS), seed=7, who=1, tile=tile, backend=name)

        cases, compared = [Case(bound, bare, m * n, 2)], []
        for name in run.backends():
            ahead = f"linear +- dense {name}, {rows} tokens"
            same, whole = f"{ahead}, one stream", f"{ahead}, one stream, tiles twice as large"
            alone = on_one_stream(ours("normal", name, tile=TILE // overlap.SLOTS)), on_one_stream(ours("normal", name))
            for label, call in zip((ahead, same, whole), (ours("normal", name), *alone)):
                cases.append(Case(label, call, m * n, 2, eager=bound))
            compared += [(same, ahead), (whole, ahead)]
            cases.append(Case(f"linear +- rank {RANK} {name}, {rows} tokens", ours((left, right), name), m * n, 2, eager=bound))
        group = measure(run, Group(f"linear, {m}x{n} bf16, {rows} tokens a side (eager: two F.linear)", cases, timer), 20, 2)
        for case in cases[1:]:
            figure(run, group, f"{case.name} / two F.linear", case.name, bound)
        for slow, ahead in compared:
            figure(run, group, f"{slow} / made ahead", slow, ahead)


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
