"""The products of a step against torch's own F.linear: what zokern/gemm/library.py chooses on this processor,
and what it does not.

A case runs a product over matrices of about 40 million elements together (4 million from 64 rows on), so that
W comes from memory as it does in a model. bench_perturbed has the reading of a dense z: both signs of it
beside two plain products, as tiles that torch multiplies and in one kernel (csrc/linear.cpp); and what that
kernel's product is worth without z, at which zokern/gemm/library.py's yields() goes.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import zokern
from zokern.backends import Sides, Span, Weight, cpu
from zokern.gemm import library

from .bench_elementwise import DTYPES, EPS
from .measure import Case, Group

SHAPES = [(768, 768), (3072, 768), (50272, 768)]


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def bench_matmul(benchmark, report, dtype: str) -> None:
    cases, figures = [], []
    for m, k in SHAPES[:2] if report.quick else SHAPES:
        weights = [
            torch.randn(m, k).to(DTYPES[dtype])
            for _ in range(max(1, 40_000_000 // (m * k) // (8 if report.quick else 1)))
        ]
        for rows in (8, 64) if report.quick or dtype == "bf16" else (8, 64, 256):
            x = torch.randn(rows, k).to(DTYPES[dtype])
            size = f"{dtype} {rows} rows, {m}x{k}"
            own = f"F.linear {size}"
            name = (
                f"matmul.linear {size}, {'another product' if library.chooses(x, weights[0]) else 'the same'}"
            )
            cases.append(Case(own, lambda x=x, ws=weights: [F.linear(x, w) for w in ws]))
            cases.append(Case(name, lambda x=x, ws=weights: [library.linear(x, w) for w in ws], eager=own))
            figures.append((f"matmul {size} / F.linear", own, name))
    group = Group(f"products, {dtype}", cases).run(benchmark, 2 if report.quick else 5)
    report.add(group, **{figure: group.ratio(own, name) for figure, own, name in figures})


@pytest.mark.parametrize(
    "dtype, rows", [("fp32", 4), ("fp32", 32), ("fp32", 128), ("fp32", 512), ("bf16", 4), ("bf16", 128)]
)
def bench_perturbed(benchmark, report, dtype: str, rows: int, monkeypatch) -> None:
    if cpu.why_off() is not None:
        pytest.skip(f"no compiled kernels: {cpu.why_off()}")

    on = cpu.Cpu()

    def both(fused: bool, x, ws) -> None:
        monkeypatch.setattr(library, "yields", lambda dtype: fused)
        for w in ws:
            zokern.linear(x, w, scales=(EPS, -EPS), who=1, step=2, backend="cpu")

    def plain(x, ws) -> None:
        for w in ws:
            on.linear(Weight(w, Span(0)), Sides([x, x], [None, None]))

    def bound(x, ws) -> None:
        for w in ws:
            F.linear(x, w)
            F.linear(x, w)

    chosen = "in one kernel" if library.yields(DTYPES[dtype]) else "as tiles"
    shapes = [(768, 768)] if report.quick else [(768, 768), (3072, 768), (768, 3072)]
    cases, figures = [], []
    for m, k in shapes:
        elements = 4_000_000 if rows > 32 or report.quick else 40_000_000
        ws = [torch.randn(m, k).to(DTYPES[dtype]) for _ in range(max(1, elements // (m * k)))]
        x, size = torch.randn(rows, k).to(DTYPES[dtype]), f"{dtype} {rows} rows, {m}x{k}"
        named = {
            f"two F.linear {size}": lambda x=x, ws=ws: bound(x, ws),
            f"both signs of z as tiles {size}": lambda x=x, ws=ws: both(False, x, ws),
            f"both signs of z in one kernel {size}": lambda x=x, ws=ws: both(True, x, ws),
            f"W itself, twice, in one kernel {size}": lambda x=x, ws=ws: plain(x, ws),
        }
        cases += [Case(name, call, eager=f"two F.linear {size}") for name, call in named.items()]
        figures += [(f"{name} / two F.linear", name, f"two F.linear {size}") for name in list(named)[1:]]
    group = Group(f"perturbed products, {dtype} {rows} rows (chosen here: {chosen})", cases)
    group.run(benchmark, 3 if report.quick else 9)
    report.add(group, **{figure: group.ratio(over, under) for figure, over, under in figures})
