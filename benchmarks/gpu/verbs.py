"""The verbs as data: what is checked on a device. A new verb, or a new form of one, is a function and a line
of VERBS."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from zokern import gemm
from zokern.backends import (
    STATES,
    Backend,
    Batch,
    Noise,
    Outer,
    Projection,
    Sides,
    Span,
    Terms,
    Thin,
    Update,
    Weight,
)
from zokern.directions import resolve

SEED, STEP = 0x9E3779B97F4A7C15, 11


@dataclass
class Setting:
    """What a verb is given: a backend, the tensors of one launch on its device, their Spans and low bits, and
    a place for results.

    Whatever a verb writes beside thetas and lows it puts into `results`; all three are compared.
    """

    backend: Backend
    device: str
    thetas: list[Tensor]
    spans: list[Span]
    lows: list[Tensor]
    results: list[Tensor] = field(default_factory=list)

    def tensor(self, values: Sequence[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float32, device=self.device)

    def outs(self, dtype: torch.dtype | None = None) -> list[Tensor]:
        """A place for results, poisoned: an element that is not written is seen."""
        made = [
            torch.full_like(t, -77.0, dtype=dtype, memory_format=torch.contiguous_format) for t in self.thetas
        ]
        self.results += made
        return made


def draw(direction: str) -> Callable[[Setting], None]:
    return lambda at: at.backend.draw(
        Batch(at.outs(), at.spans), Noise(resolve(direction), SEED, [(STEP, 1)])
    )


def axpy(
    direction: str = "normal", terms: int = 1, decay: float = 1.0, rounding: str = "nearest", each: int = 0
) -> Callable[[Setting], None]:
    def verb(at: Setting) -> None:
        draws, coeffs = (
            [(STEP + k // 2, k % 2) for k in range(terms)],
            at.tensor([1e-3 * (-0.7) ** k for k in range(terms)]),
        )
        low = at.lows if rounding == "residual" else None
        chosen = resolve(direction)
        at.results.append(
            at.backend.axpy_(
                Batch(at.thetas, at.spans, rounding, low),
                Noise(chosen, SEED, draws),
                Terms(coeffs, decay, each),
            )
        )

    return verb


def project(
    *losses: Sequence[float], clip: float = float("inf"), decay: float = 0.0, direct: bool = False
) -> Callable[[Setting], None]:
    """Losses of micro-batches, as three points; their stencil has two draws, or they are coefficients."""

    def verb(at: Setting) -> None:
        def doubles(values: Sequence) -> Tensor:
            return torch.tensor(values, dtype=torch.float64, device=at.device)

        weights = None if direct else doubles([[0.5, -0.5, 0.0], [1.0, 0.0, -1.0]])
        scalars = doubles([1e-3, 2e-3, decay, clip, -1.0, 3.0])
        at.results += at.backend.project(Projection(doubles(losses), weights, scalars))

    return verb


# Scalars of a rule, in the order of SCALARS in zokern/backends/base.py.
NUMBERS = {"momentum": (0.999, 1e-3, 0.9, 0.1), "adam": (0.999, 2e-3, 0.9, 0.1, 0.99, 0.01, 0.0, 1.25, 1e-6)}


def update(rule: str, terms: int = 1, rounding: str = "nearest") -> Callable[[Setting], None]:
    def verb(at: Setting) -> None:
        draws, coeffs = (
            [(STEP + k, k % 2) for k in range(terms)],
            at.tensor([(-0.7) ** k for k in range(terms)]),
        )
        states = [[torch.full(t.shape, 1e-3, device=at.device) for t in at.thetas] for _ in STATES[rule]]
        low, scalars = at.lows if rounding == "residual" else None, at.tensor(NUMBERS[rule])
        at.results += [tensor for kept in states for tensor in kept]
        count = at.backend.update_(
            Batch(at.thetas, at.spans, rounding, low),
            Noise(resolve("normal"), SEED, draws),
            Update(coeffs, rule, scalars, states),
        )
        at.results.append(count)

    return verb


def perturb(
    direction: str = "normal", sides: int = 2, dtype: torch.dtype | None = None, residual: bool = False
) -> Callable[[Setting], None]:
    def verb(at: Setting) -> None:
        outs, low = [at.outs(dtype) for _ in range(sides)], at.lows if residual else None
        at.backend.perturb(
            Batch(at.thetas, at.spans, residuals=low),
            Noise(resolve(direction), SEED, [(STEP, 0)]),
            [1e-3, -1e-3][:sides],
            outs,
        )

    return verb


def rows(at: Setting) -> None:
    """Looked-up rows of the matrices of a list, some of them twice."""
    found = [i for i, t in enumerate(at.thetas) if t.dim() == 2]
    thetas = [at.thetas[i] for i in found]
    picked = [torch.arange(3 * len(t), device=at.device) * 7 % len(t) for t in thetas]
    outs = [
        [
            torch.full((len(p), t.shape[1]), -77.0, dtype=t.dtype, device=at.device)
            for t, p in zip(thetas, picked)
        ]
        for _ in "+-"
    ]
    at.results += [out for side in outs for out in side]
    spans = [at.spans[i]._replace(rows=p) for i, p in zip(found, picked)]
    at.backend.perturb(Batch(thetas, spans), Noise(resolve("normal"), SEED, [(STEP, 0)]), [1e-3, -1e-3], outs)


def whole(value: int, *shape: int) -> Tensor:
    """Small integers: their products and sums are exact in every order and in bfloat16, so matrix units give
    the CPU's bits too."""
    count = torch.Size(shape).numel()
    return ((torch.arange(count) * 7919 + value) % 17 - 8).float().view(shape)


def lowrank(rank: int, rounding: str = "nearest", decay: float = 1.0) -> Callable[[Setting], None]:
    def verb(at: Setting) -> None:
        columns = [t.shape[-1] for t in at.thetas]
        lefts = [
            whole(1, -(-(s.first + t.numel()) // n), rank).to(at.device)
            for t, s, n in zip(at.thetas, at.spans, columns)
        ]
        rights = [whole(5, n, rank).to(at.device) for n in columns]
        spans, low = at.spans, at.lows if rounding == "residual" else None
        scales = [0.125] * len(columns)
        at.results.append(
            at.backend.lowrank_(
                Batch(at.thetas, spans, rounding, low),
                Outer(lefts, rights, scales, decay),
                Noise(None, SEED, [(STEP, 0)]),
            )
        )

    return verb


def linear(at: Setting) -> None:
    """y = x (W +- a z)^T with one-hot rows x: the product picks columns of the perturbed tiles, and is
    exact."""
    i = next(i for i, t in enumerate(at.thetas) if t.dim() == 2 and t.is_contiguous())
    weight, span = at.thetas[i][:200], at.spans[i]
    x = torch.eye(weight.shape[1], dtype=weight.dtype, device=at.device)

    def tiles() -> Iterator[tuple[int, int, dict[int, Tensor]]]:
        for start in range(0, len(weight), 37):
            view, here = weight[start : start + 37], Span(span.who, span.first + start * weight.shape[1])
            pair = [torch.empty_like(view) for _ in "+-"]
            outs = [[tile] for tile in pair]
            at.backend.perturb(
                Batch([view], [here]), Noise(resolve("normal"), SEED, [(STEP, 0)]), [1e-3, -1e-3], outs
            )
            yield start, start + len(view), dict(enumerate(pair))

    at.results.append(gemm.tiled_linear([x, x], weight, [None, None], tiles()))


def linear_fused(at: Setting) -> None:
    """The same by one kernel that makes z beside the product, both signs and W itself."""
    i = next(i for i, t in enumerate(at.thetas) if t.dim() == 2 and t.is_contiguous())
    weight = at.thetas[i][:200]
    x = torch.eye(weight.shape[1], dtype=weight.dtype, device=at.device)
    for direction in ("normal", "rademacher"):
        noise = Noise(resolve(direction), SEED, [(STEP, 0)] * 3)
        sides = Sides([x] * 3, [None] * 3, [1e-3, -1e-3, 0.0])
        at.results += gemm.own(at.backend, weight.device).linear(Weight(weight, at.spans[i]), sides, noise)


def linear_factored(at: Setting) -> None:
    """y = x W^T +- (x V) C U^T beside it, of small integers."""
    m, n, rank = 72, 40, 8
    weight, x = (whole(k, rows, n).to(at.thetas[0].dtype).to(at.device) for k, rows in ((3, m), (4, 5)))
    left, right = (whole(k, count, rank).to(at.device) / 4 for k, count in ((1, m), (2, n)))
    middles = torch.stack([torch.eye(rank), -torch.eye(rank)]).to(at.device)
    sides = Sides([x, x], [None, None], thins=[Thin([0, 1], right.t().contiguous(), middles, left)])
    at.results.append(gemm.factored_linear(at.backend, Weight(weight, Span(0)), sides))


def sketch(at: Setting) -> None:
    """(sum_k c_k z_k) Omega with one-hot columns Omega."""
    omega, draws = torch.eye(96, device=at.device)[:, ::5].contiguous(), [(STEP, 0), (STEP, 1)]
    for transposed, shape in ((False, (50, 96)), (True, (96, 50))):
        noise = Noise(resolve("normal"), SEED, draws)
        y = gemm.sketch_of(at.backend, noise, [0.5, -2.0], Span(5, 3), shape, omega, transposed, 777)
        at.results.append(y)


# Name, and what is done; a new verb, or a new form of one, is one line. Names that start with lowrank_ get
# the matrices of a launch only.
VERBS: dict[str, Callable[[Setting], None]] = {
    "draw normal": draw("normal"),
    "draw rademacher": draw("rademacher"),
    "axpy_ normal K=1": axpy(),
    "axpy_ normal K=1, decay": axpy(decay=0.999),
    "axpy_ normal K=5": axpy(terms=5),
    "axpy_ normal K=1, stochastic": axpy(rounding="stochastic"),
    "axpy_ normal K=3, stochastic": axpy(terms=3, rounding="stochastic"),
    "axpy_ normal K=1, residual": axpy(rounding="residual"),
    "axpy_ normal K=2, residual, decay": axpy(terms=2, rounding="residual", decay=0.999),
    "axpy_ rademacher K=1": axpy("rademacher"),
    "axpy_ rademacher K=3, stochastic": axpy("rademacher", terms=3, rounding="stochastic"),
    "axpy_ normal K=4, each=1": axpy(terms=4, each=1),
    "axpy_ normal K=4, each=2, stochastic": axpy(terms=4, rounding="stochastic", each=2),
    "axpy_ normal K=4, each=2, residual": axpy(terms=4, rounding="residual", each=2),
    "update_ momentum": update("momentum"),
    "update_ momentum, residual": update("momentum", 1, "residual"),
    "update_ adam K=2, stochastic": update("adam", 2, "stochastic"),
    "update_ adam": update("adam"),
    "project": project([2.25, 2.125, 2.1875]),
    "project, micro-batches, clip, decay": project([2.3, 2.1, 2.2], [1.9, 1.7, 2.0], clip=30.0, decay=0.1),
    "project, not finite": project([2.3, float("inf"), 2.2], decay=0.1),
    "project, coefficients": project([0.7, -3.1, 1e-30], direct=True),
    "perturb one side": perturb(sides=1),
    "perturb both sides": perturb(),
    "perturb both sides, rademacher": perturb("rademacher"),
    "perturb both sides to float32": perturb(dtype=torch.float32),
    "perturb both sides, residual": perturb(residual=True),
    "perturb rows": rows,
    "linear": linear,
    "linear, factored": linear_factored,
    "sketch": sketch,
    "lowrank_ rank 5": lowrank(5),
    "lowrank_ rank 16, stochastic": lowrank(16, "stochastic"),
    "lowrank_ rank 32, residual, decay": lowrank(32, "residual", 0.5),
    "lowrank_ rank 128": lowrank(128),
    "linear, fused": linear_fused,
}
