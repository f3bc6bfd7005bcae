"""Correctness of every verb: the conformance suite on the device, then tensors of realistic sizes against the CPU backend.

The conformance suite (tests/conformance.py) judges by the reference, at every tail, offset, stride and rounding, with tensors that the
reference can take. Here the CPU backend judges lists of millions of elements, and every call is made again: a second launch on equal
inputs that gives other bits is a race. Both compare whole guarded buffers, so a write beside the tensor is found too.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import cache

import conformance
import lowrank_bound
import torch
from guarded import Guarded, equal, guarded
from torch import Tensor

from zokern import products
from zokern.backends import Backend, Span
from zokern.directions import resolve

from .run import Run, judge

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
SEED, STEP = 0x9E3779B97F4A7C15, 11
REPEATS = 3


@dataclass
class Setting:
    """What a verb is given: a backend, the tensors of one launch on its device, their Spans and low bits, and a place for results.

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
        made = [torch.full_like(t, -77.0, dtype=dtype, memory_format=torch.contiguous_format) for t in self.thetas]
        self.results += made
        return made


def draw(direction: str) -> Callable[[Setting], None]:
    return lambda at: at.backend.draw(at.outs(), at.spans, resolve(direction), SEED, STEP, 1)


def axpy(direction: str = "normal", terms: int = 1, decay: float = 1.0, rounding: str = "nearest") -> Callable[[Setting], None]:
    def verb(at: Setting) -> None:
        draws, coeffs = [(STEP + k // 2, k % 2) for k in range(terms)], at.tensor([1e-3 * (-0.7) ** k for k in range(terms)])
        low = at.lows if rounding == "residual" else None
        at.results.append(at.backend.axpy_(at.thetas, at.spans, resolve(direction), SEED, draws, coeffs, decay, rounding, low))

    return verb


def perturb(
    direction: str = "normal", sides: int = 2, dtype: torch.dtype | None = None, residual: bool = False
) -> Callable[[Setting], None]:
    def verb(at: Setting) -> None:
        outs, low = [at.outs(dtype) for _ in range(sides)], at.lows if residual else None
        at.backend.perturb(at.thetas, at.spans, resolve(direction), SEED, STEP, 0, [1e-3, -1e-3][:sides], outs, low)

    return verb


def rows(at: Setting) -> None:
    """Looked-up rows of the matrices of a list, some of them twice."""
    found = [i for i, t in enumerate(at.thetas) if t.dim() == 2]
    thetas = [at.thetas[i] for i in found]
    picked = [torch.arange(3 * len(t), device=at.device) * 7 % len(t) for t in thetas]
    outs = [
        [torch.full((len(p), t.shape[1]), -77.0, dtype=t.dtype, device=at.device) for t, p in zip(thetas, picked)] for _ in "+-"
    ]
    at.results += [out for side in outs for out in side]
    spans = [at.spans[i]._replace(rows=p) for i, p in zip(found, picked)]
    at.backend.perturb(thetas, spans, resolve("normal"), SEED, STEP, 0, [1e-3, -1e-3], outs, None)


def whole(value: float, *shape: int) -> Tensor:
    """Small integers: their products and sums are exact in every order and in bfloat16, so matrix units give the CPU's bits too."""
    count = torch.Size(shape).numel()
    return ((torch.arange(count) * 7919 + int(value)) % 17 - 8).float().view(shape)


def lowrank(rank: int, rounding: str = "nearest", decay: float = 1.0) -> Callable[[Setting], None]:
    def verb(at: Setting) -> None:
        columns = [t.shape[-1] for t in at.thetas]
        lefts = [whole(1, -(-(s.first + t.numel()) // n), rank).to(at.device) for t, s, n in zip(at.thetas, at.spans, columns)]
        rights = [whole(5, n, rank).to(at.device) for n in columns]
        spans, low = at.spans, at.lows if rounding == "residual" else None
        scales = [0.125] * len(columns)
        at.results.append(at.backend.lowrank_(at.thetas, spans, lefts, rights, scales, decay, rounding, low, SEED, STEP))

    return verb


def linear(at: Setting) -> None:
    """y = x (W +- a z)^T with one-hot rows x: the product picks columns of the perturbed tiles, and is exact."""
    i = next(i for i, t in enumerate(at.thetas) if t.dim() == 2 and t.is_contiguous())
    weight, span = at.thetas[i][:200], at.spans[i]
    x = torch.eye(weight.shape[1], dtype=weight.dtype, device=at.device)

    def fill(view: Tensor, here: Span, sides: Sequence[int], tiles: Sequence[Tensor], low: Tensor | None) -> None:
        scales = [(1e-3, -1e-3)[j] for j in sides]
        at.backend.perturb([view], [here], resolve("normal"), SEED, STEP, 0, scales, [[tile] for tile in tiles], None)

    def take(shape: tuple[int, ...]) -> Tensor:
        return torch.empty(shape, dtype=weight.dtype, device=at.device)

    at.results += products.tiled_linear([x, x], weight, span, [None, None], None, [[0, 1]], fill, take, lambda: None, 37)


def linear_factored(at: Setting) -> None:
    """y = x W^T +- (x V) C U^T beside it, of small integers."""
    m, n, rank = 72, 40, 8
    weight, x = (whole(k, rows, n).to(at.thetas[0].dtype).to(at.device) for k, rows in ((3, m), (4, 5)))
    left, right = (whole(k, count, rank).to(at.device) / 4 for k, count in ((1, m), (2, n)))
    middles = torch.stack([torch.eye(rank), -torch.eye(rank)]).to(at.device)
    part = products.Part([0, 1], right.t().contiguous(), middles, left)
    at.results += products.factored_linear(at.backend, [x, x], weight, [part], 1.0, [None, None])


def sketch(at: Setting) -> None:
    """(sum_k c_k z_k) Omega with one-hot columns Omega."""
    omega, draws = torch.eye(96, device=at.device)[:, ::5].contiguous(), [(STEP, 0), (STEP, 1)]
    for transposed, shape in ((False, (50, 96)), (True, (96, 50))):
        y = products.sketch_of(
            at.backend, resolve("normal"), SEED, Span(5, 3), shape, draws, [0.5, -2.0], omega, transposed, 777
        )
        at.results.append(y)


# Name, and what is done; a new verb, or a new form of one, is one line. Names that start with lowrank_ get the matrices of a launch only.
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
}


@cache
def tensors(dtype: torch.dtype, quick: bool) -> tuple[list[Guarded], list[Span], list[Guarded]]:
    """One launch: long and tiny, aligned and not, transposed, in the middle of a parameter, beyond 32 bits; weights and low bits."""
    generator = torch.Generator().manual_seed(len(str(dtype)))
    n = 4099 if quick else (1 << 20) + 3
    side = 40 if quick else 1032
    forms = [
        ((n,), 0, None, 0), ((n,), 3, None, 5), ((n - 8,), 0, None, 2**32 - 16), ((n // 2,), 1, None, 2**33 + 7),
        ((1,), 0, None, 9), ((7,), 2, None, 0),
        ((side, side + 24), 0, None, 0), ((side, 33), 0, lambda x: x.t(), 0), ((side, 64), 0, lambda x: x[:, 8:31], 0),
    ]  # fmt: skip
    thetas, spans, lows = [], [], []
    for i, (shape, offset, see, first) in enumerate(forms):
        theta = guarded(shape, dtype, offset, see)
        theta.view.copy_(0.02 * torch.randn(theta.shape, generator=generator))
        low = guarded(theta.shape, torch.int16, offset)
        low.view.copy_(torch.randint(-(2**15), 2**15, theta.shape, generator=generator, dtype=torch.int32))
        thetas.append(theta)
        lows.append(low)
        spans.append(Span(1000 + i, first))
    return thetas, spans, lows


def result(verb: Callable[[Setting], None], backend: Backend, device: str, given, matrices: bool) -> list[Tensor]:
    """Everything that a verb could have written, from fresh copies of the same tensors, on the CPU."""
    copies = [[t.copy_to(device) for t in group] for group in (given[0], given[2])]
    chosen = [i for i, t in enumerate(given[0]) if not matrices or len(t.shape) == 2]
    views, lows = ([group[i].view for i in chosen] for group in copies)
    at = Setting(backend, device, views, [given[1][i] for i in chosen], lows)
    verb(at)
    return [t.detach().cpu() for t in [*(t.buffer for group in copies for t in group), *at.results]]


def check_verb(name: str, backend: Backend, device: str, dtype: torch.dtype, quick: bool, repeats: int = REPEATS) -> None:
    """Raises AssertionError with the first element that differs, from the judge's or from the first launch's."""
    given, matrices = tensors(dtype, quick), name.startswith("lowrank_")
    right = result(VERBS[name], judge(), "cpu", given, matrices)
    for time in range(repeats):
        mine = result(VERBS[name], backend, device, given, matrices)
        assert len(mine) == len(right), f"{len(mine)} results, expected {len(right)}"
        for i, (got, expected) in enumerate(zip(mine, right)):
            if name.startswith("linear"):  # a product with zeros beside the one has no sign of zero to keep
                got, expected = got + 0.0, expected + 0.0
            equal(got, expected, f"{name}, {str(dtype).removeprefix('torch.')}, result {i}, launch {time + 1}")


def verbs(run: Run, backend: str, dtype: str) -> None:
    """Every verb of VERBS in one dtype."""
    if (found := run.backend(backend)) is None:
        return
    for name in VERBS:
        run.check(f"{backend}: {name}, {dtype}", lambda n=name: check_verb(n, found, run.device, DTYPES[dtype], run.quick))


def suite(run: Run, backend: str, share: int = 0, of: int = 1) -> None:
    """Every `of`-th check of the conformance suite; low-rank products with factors whose sums are exact on matrix units too."""
    if (found := run.backend(backend)) is None:
        return
    scale = "quick" if run.quick else "full"
    for name in list(conformance.EVERY)[share::of]:
        exact = conformance.small_integers() if name in conformance.LOWRANK else nullcontext()
        with exact:
            run.check(f"{backend}: {name}", lambda n=name: conformance.EVERY[n](found, run.device, scale))


def bounds(run: Run, backend: str) -> None:
    """lowrank_ with random factors: no element further from exact arithmetic than tests/lowrank_bound.py allows."""
    if (found := run.backend(backend)) is None:
        return
    shape = (40, 72) if run.quick else (1024, 1040)

    def held(rank: int, dtype: torch.dtype) -> None:
        share = lowrank_bound.share(found, run.device, shape, rank, dtype)
        assert 0 < share <= 1, f"the largest error is {share:.3g} of its bound"

    for dtype in DTYPES.values():
        for rank in (1, 8, 16, 32, 64, 128):
            run.check(f"{backend}: lowrank_ bound, rank {rank}, {dtype}", lambda r=rank, d=dtype: held(r, d))


def vectors(run: Run, backend: str) -> None:
    """2^26 values from one launch have the digests that the reference left in tests/vectors."""
    if (found := run.backend(backend)) is None:
        return

    def held(direction: str) -> None:
        long = json.loads((conformance.VECTORS / f"{direction}-v1.json").read_text())["long"]
        out = torch.empty(long["count"], device=run.device)
        found.draw([out], [Span(long["who"], long["first"])], resolve(direction), long["seed"], long["step"], long["draw"])
        digests = [hashlib.sha256(part.numpy()).hexdigest() for part in out.cpu().split(long["piece"])]
        wrong = [i for i, (got, right) in enumerate(zip(digests, long["sha256"])) if got != right]
        assert not wrong and len(digests) == len(long["sha256"]), f"pieces {wrong} of {len(digests)} have other digests"

    for direction in conformance.DIRECTIONS:
        run.check(f"{backend}: 2^26 values, {direction}", lambda d=direction: held(d))
