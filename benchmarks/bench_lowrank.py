"""lowrank_: W += s U V^T in place, against addmm_ and the eager sum, over ranks and shapes; and the product
of a linear layer."""

from __future__ import annotations

import pytest
import torch

import zokern
from zokern import backends
from zokern.backends import Batch, Outer, Span

from .bench_elementwise import DTYPES, EPS, weights
from .measure import Case, Group

SHAPES = [(768, 768), (3072, 768), (4096, 4096)]
RANKS = (1, 8, 16, 32, 64, 128)


def factors(m: int, n: int, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(rank)
    left, right = (torch.randn(rows, rank, generator=generator) * 1e-3 for rows in (m, n))
    return left, right


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: f"{shape[0]}x{shape[1]}")
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def bench_lowrank(benchmark, report, dtype: str, shape: tuple[int, int]) -> None:
    """torch's addmm_ takes factors of W's type,
    and is left out where it is far slower than the eager sum (bf16 on a CPU)."""
    m, n = shape
    count = m * n
    w, other = weights(count, dtype).view(m, n), torch.empty(m, n, dtype=DTYPES[dtype])
    traffic, size = 2 * w.element_size(), f"{dtype} {m}x{n}"
    yardstick = f"w += c {size}"
    cases = [
        Case(f"copy out.copy_(w) {size}", lambda: other.copy_(w), count, traffic),
        Case(yardstick, lambda: w.add_(EPS), count, traffic),
    ]
    figures = {}
    for rank in (8, 64) if report.quick else RANKS:
        left, right = factors(m, n, rank)
        eager = f"eager W + s * (U @ V.T) r={rank} {size}"
        ours = f"lowrank_ r={rank} {size}"
        cases.append(
            Case(
                ours,
                lambda u=left, v=right: zokern.lowrank_(w, u, v, scale=EPS),
                count,
                traffic,
                yardstick,
                eager,
            )
        )
        if dtype == "fp32":
            addmm = f"addmm_ r={rank} {size}"
            cases.append(
                Case(
                    addmm,
                    lambda u=left, v=right: w.addmm_(u, v.t(), alpha=EPS),
                    count,
                    traffic,
                    yardstick,
                    eager,
                )
            )
            figures[f"lowrank_ r={rank} {size} / addmm_"] = (ours, addmm)
        cases.append(
            Case(
                eager,
                lambda u=left, v=right: other.copy_(w + EPS * (u @ v.t())),
                count,
                traffic,
                yardstick,
                every=2,
            )
        )
        figures[f"lowrank_ r={rank} {size} / w += c"] = (ours, yardstick)
    group = Group(f"lowrank_, {size}", cases).run(benchmark, 4 if report.quick else 12)
    report.add(group, **{name: group.ratio(over, under) for name, (over, under) in figures.items()})


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def bench_lowrank_forward(benchmark, report, dtype: str) -> None:
    """y <- y + t U^T: what a low-rank direction adds to a linear layer's output, 768 to 3072 features, rank
    16."""
    out_features, rank = 3072, 16
    backend = backends.resolve(None, torch.device("cpu"))
    cases = []
    for tokens in (4, 128) if report.quick else (4, 16, 128, 512, 2048):
        y = weights(tokens * out_features, dtype).view(tokens, out_features)
        t, u = factors(tokens, out_features, rank)
        short, narrow = t.to(y.dtype), u.to(y.dtype)
        count, traffic, size = y.numel(), 2 * y.element_size(), f"{dtype} tokens={tokens}"

        def ours(y=y, t=t, u=u) -> None:
            backend.lowrank_(Batch([y], [Span(0)]), Outer([t], [u], [EPS]))

        eager = f"torch y + s * (t @ U.T) {size}"
        cases.append(Case(f"y += c {size}", lambda y=y: y.add_(EPS), count, traffic))
        cases.append(Case(f"lowrank_ {size}", ours, count, traffic, f"y += c {size}", eager))
        cases.append(
            Case(
                eager,
                lambda y=y, t=short, u=narrow: y.add_(t @ u.t(), alpha=EPS),
                count,
                traffic,
                f"y += c {size}",
            )
        )
    group = Group(f"lowrank_ in a linear layer, {dtype}", cases).run(benchmark, 10 if report.quick else 40)
    report.add(group)
