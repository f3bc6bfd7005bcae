"""The products of a step against torch's own F.linear: what zokern/matmul.py chooses on this processor, and what it does not.

A case runs a product over matrices of about 40 million elements together, so that W comes from memory as it does in a model.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from zokern import matmul

from .bench_elementwise import DTYPES
from .measure import Case, Group

SHAPES = [(768, 768), (3072, 768), (50272, 768)]


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def bench_matmul(benchmark, report, dtype: str) -> None:
    cases, figures = [], []
    for m, k in SHAPES[:2] if report.quick else SHAPES:
        weights = [
            torch.randn(m, k).to(DTYPES[dtype]) for _ in range(max(1, 40_000_000 // (m * k) // (8 if report.quick else 1)))
        ]
        for rows in (8, 64) if report.quick or dtype == "bf16" else (8, 64, 256):
            x = torch.randn(rows, k).to(DTYPES[dtype])
            size = f"{dtype} {rows} rows, {m}x{k}"
            own = f"F.linear {size}"
            name = f"matmul.linear {size}, {'another product' if matmul.chooses(x, weights[0]) else 'the same'}"
            cases.append(Case(own, lambda x=x, ws=weights: [F.linear(x, w) for w in ws]))
            cases.append(Case(name, lambda x=x, ws=weights: [matmul.linear(x, w) for w in ws], eager=own))
            figures.append((f"matmul {size} / F.linear", own, name))
    group = Group(f"products, {dtype}", cases).run(benchmark, 2 if report.quick else 5)
    report.add(group, **{figure: group.ratio(own, name) for figure, own, name in figures})
