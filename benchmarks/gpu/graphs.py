"""CUDA graphs: verbs captured once; each replay, after the clock was advanced, must have its own step's z."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from guarded import equal
from torch import Tensor

from zokern import gemm
from zokern.backends import Backend, Batch, Noise, Outer, Sides, Span, Terms, Weight
from zokern.directions import resolve
from zokern.evaluation.arena import Arena

from .checks import DTYPES
from .run import Run, judge
from .verbs import SEED, STEP

REPLAYS = 4


class Captured:
    """A call as a CUDA graph, after one call that uploads its tables. On a CPU, where there is no graph, the
    call itself."""

    def __init__(self, call: Callable[[], object], device: str) -> None:
        self.replay = call
        call()
        if device == "cuda":
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                call()
            self.replay = graph.replay


def check_axpy(backend: Backend, device: str, dtype: torch.dtype, count: int) -> None:
    """K = 2 and a decay, coefficients changed in device memory between replays."""
    generator = torch.Generator().manual_seed(3)
    mine = [(0.02 * torch.randn(n, generator=generator)).to(dtype) for n in (count, 1001)]
    right, spans, draws = [t.clone() for t in mine], [Span(1), Span(2, 5)], [(STEP, 0), (2**32 - 2, 1)]
    mine = [t.to(device) for t in mine]
    clock, coeffs = torch.zeros(1, dtype=torch.int64, device=device), torch.tensor([1e-3, 0.5], device=device)

    def call() -> None:
        backend.axpy_(
            Batch(mine, spans, "stochastic"),
            Noise(resolve("normal"), SEED, draws, clock),
            Terms(coeffs, 0.999),
        )

    graph = Captured(call, device)
    for time in range(REPLAYS + 1):  # the first was the call before the capture
        if time:
            clock.add_(1)
            coeffs.mul_(0.5)
            graph.replay()
        late = [((step + time) % 2**32, draw) for step, draw in draws]
        a = torch.tensor([1e-3, 0.5]) * 0.5**time
        judge().axpy_(
            Batch(right, spans, "stochastic"), Noise(resolve("normal"), SEED, late), Terms(a, 0.999)
        )
        for got, expected in zip(mine, right):
            equal(got, expected, f"axpy_ after {time} replays")


def check_perturb(backend: Backend, device: str, dtype: torch.dtype, count: int) -> None:
    theta = (0.02 * torch.randn(count, generator=torch.Generator().manual_seed(4))).to(dtype)
    there, spans = theta.to(device), [Span(1, 3)]
    sides = [torch.empty_like(there) for _ in "+-"]
    clock = torch.zeros(1, dtype=torch.int64, device=device)

    def call() -> None:
        outs = [[side] for side in sides]
        backend.perturb(
            Batch([there], spans), Noise(resolve("normal"), SEED, [(STEP, 1)], clock), [1e-3, -1e-3], outs
        )

    graph, seen = Captured(call, device), []
    for time in range(1, REPLAYS + 1):
        clock.add_(1)
        graph.replay()
        expected = [[torch.empty_like(theta)] for _ in "+-"]
        judge().perturb(
            Batch([theta], spans), Noise(resolve("normal"), SEED, [(STEP + time, 1)]), [1e-3, -1e-3], expected
        )
        for got, (right,) in zip(sides, expected):
            equal(got, right, f"perturb, replay {time}")
        seen.append(sides[0].cpu().clone())
    assert not any(torch.equal(a, b) for a, b in zip(seen, seen[1:])), "perturb: two replays had the same z"


def check_linear(backend: Backend, device: str, dtype: torch.dtype, count: int) -> None:
    """Several tiles. One-hot rows x: the product is the perturbed W."""
    weight = (0.02 * torch.randn(count // 8, 8, generator=torch.Generator().manual_seed(5))).to(dtype)
    there, x, span, arena = (
        weight.to(device),
        torch.eye(8, dtype=dtype, device=device),
        Span(1, 3),
        Arena(8 << 20),
    )
    clock = torch.zeros(1, dtype=torch.int64, device=device)
    results: list[Tensor] = []

    def tiles() -> Iterator[tuple[int, int, dict[int, Tensor]]]:
        rows = -(-len(weight) // 5)
        for start in range(0, len(weight), rows):
            view, here = there[start : start + rows], Span(span.who, span.first + start * 8)
            pair = [arena.take(tuple(view.shape), dtype, there.device) for _ in "+-"]
            outs = [[tile] for tile in pair if tile is not None]
            backend.perturb(
                Batch([view], [here]), Noise(resolve("normal"), SEED, [(STEP, 1)], clock), [1e-3, -1e-3], outs
            )
            yield start, start + len(view), {side: tile for side, (tile,) in enumerate(outs)}
            arena.release()

    def call() -> None:
        results[:] = gemm.tiled_linear([x, x], there, [None, None], tiles()).split(len(x))

    graph = Captured(call, device)
    for time in range(1, REPLAYS + 1):
        clock.add_(1)
        graph.replay()
        expected = [[torch.empty_like(weight)] for _ in "+-"]
        judge().perturb(
            Batch([weight], [span]),
            Noise(resolve("normal"), SEED, [(STEP + time, 1)]),
            [1e-3, -1e-3],
            expected,
        )
        for got, (right,) in zip(results, expected):
            equal(got.t() + 0.0, right + 0.0, f"linear, replay {time}")  # a sum of products makes +0 of -0


def check_lowrank(backend: Backend, device: str, dtype: torch.dtype, count: int) -> None:
    """Two captured calls on factors that change in device memory; small whole numbers have exact sums."""
    m, n = 64, max(8, count // 4096) * 8
    left, right = (torch.arange(size * 16).view(size, 16) % 5 - 2.0 for size in (m, n))
    theta, there = torch.zeros(m, n), torch.zeros(m, n, dtype=dtype, device=device)
    sides, spans = [[side.to(device, copy=True)] for side in (left, right)], [Span(1)]

    def call() -> None:
        backend.lowrank_(Batch([there], spans), Outer(*sides, [0.5]))
        backend.lowrank_(Batch([there.view(-1)], spans), Outer(*sides, [-0.25]))

    graph = Captured(call, device)
    for time in range(REPLAYS + 1):
        if time:
            sides[0][0].mul_(-1), left.mul_(-1)
            graph.replay()
        theta += 0.25 * left @ right.t()
        equal(there, theta.to(dtype), f"lowrank_ after {time} replays")


def check_fused(backend: Backend, device: str, dtype: torch.dtype, count: int) -> None:
    """The same product by one kernel that makes z beside it."""
    weight = (0.02 * torch.randn(count // 8, 8, generator=torch.Generator().manual_seed(5))).to(dtype)
    there, x, span = weight.to(device), torch.eye(8, dtype=dtype, device=device), Span(1, 8)
    clock, results = torch.zeros(1, dtype=torch.int64, device=device), [torch.empty(0)] * 2
    kernel = gemm.own(backend, there.device)

    def call() -> None:
        noise = Noise(resolve("normal"), SEED, [(STEP, 1)] * 2, clock)
        results[:] = kernel.linear(Weight(there, span), Sides([x, x], [None, None], [1e-3, -1e-3]), noise)

    graph = Captured(call, device)
    for time in range(1, REPLAYS + 1):
        clock.add_(1)
        graph.replay()
        expected = [[torch.empty_like(weight)] for _ in "+-"]
        noise = Noise(resolve("normal"), SEED, [(STEP + time, 1)])
        judge().perturb(Batch([weight], [span]), noise, [1e-3, -1e-3], expected)
        for got, (right,) in zip(results, expected):
            equal(got.cpu().t() + 0.0, right + 0.0, f"linear, fused, replay {time}")


VERBS = {
    "axpy_": check_axpy, "perturb": check_perturb, "linear": check_linear, "linear, fused": check_fused,
    "lowrank_": check_lowrank,
}  # fmt: skip


def graphs(run: Run, backend: str) -> None:
    """All of them in every dtype."""
    if (found := run.backend(backend)) is None:
        return
    count = 4099 if run.quick else (1 << 20) + 3
    for dtype in DTYPES.values():
        for verb, check in VERBS.items():
            run.check(
                f"{backend}: {verb} in a CUDA graph, {dtype}",
                lambda c=check, d=dtype: c(found, run.device, d, count),
            )
