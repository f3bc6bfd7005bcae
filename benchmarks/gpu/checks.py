"""Correctness of every verb: the conformance suite on the device, then tensors of realistic sizes against the
CPU backend.

The conformance suite (tests/support) judges by the reference, at every tail, offset, stride and rounding,
with tensors that the reference can take. Here the CPU backend judges lists of millions of elements, and every
call is made again: a second launch on equal inputs that gives other bits is a race. Both compare whole
guarded buffers, so a write beside the tensor is found too.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import cache

import conformance
import conformance_kept
import conformance_project
import conformance_update
import lowrank_bound
import torch
from guarded import Guarded, equal, guarded
from torch import Tensor

from zokern.backends import Backend, Batch, Noise, Span
from zokern.directions import resolve

from .run import Run, judge
from .verbs import VERBS, Setting

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
REPEATS = 3
SUITE: dict[str, Callable] = {
    **conformance.EVERY,
    **conformance_update.CHECKS,
    **conformance_project.CHECKS,
    **conformance_kept.CHECKS,
}  # a further module of checks is one more name here


@cache
def tensors(dtype: torch.dtype, quick: bool) -> tuple[list[Guarded], list[Span], list[Guarded]]:
    """One launch: long and tiny, aligned and not, transposed, in the middle of a parameter, beyond 32 bits;
    weights and low bits."""
    generator = torch.Generator().manual_seed(len(str(dtype)))
    n = 4099 if quick else (1 << 20) + 3
    side = 40 if quick else 1032
    forms = [
        ((n,), 0, None, 0), ((n,), 3, None, 5), ((n - 8,), 0, None, 2**32 - 16),
        ((n // 2,), 1, None, 2**33 + 7),
        ((1,), 0, None, 9), ((7,), 2, None, 0),
        ((side, side + 24), 0, None, 0), ((side, 33), 0, lambda x: x.t(), 0),
        ((side, 64), 0, lambda x: x[:, 8:31], 0),
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


def result(
    verb: Callable[[Setting], None], backend: Backend, device: str, given, matrices: bool
) -> list[Tensor]:
    """Everything that a verb could have written, from fresh copies of the same tensors, on the CPU."""
    copies = [[t.copy_to(device) for t in group] for group in (given[0], given[2])]
    chosen = [i for i, t in enumerate(given[0]) if not matrices or len(t.shape) == 2]
    views, lows = ([group[i].view for i in chosen] for group in copies)
    at = Setting(backend, device, views, [given[1][i] for i in chosen], lows)
    verb(at)
    return [t.detach().cpu() for t in [*(t.buffer for group in copies for t in group), *at.results]]


def check_verb(
    name: str, backend: Backend, device: str, dtype: torch.dtype, quick: bool, repeats: int = REPEATS
) -> None:
    """Raises AssertionError with the first element that differs, from the judge's or from the first
    launch's."""
    given, matrices = tensors(dtype, quick), name.startswith("lowrank_")
    right = result(VERBS[name], judge(), "cpu", given, matrices)
    for time in range(repeats):
        mine = result(VERBS[name], backend, device, given, matrices)
        assert len(mine) == len(right), f"{len(mine)} results, expected {len(right)}"
        for i, (got, expected) in enumerate(zip(mine, right)):
            if name.startswith("linear"):  # a product with zeros beside the one has no sign of zero to keep
                got, expected = got + 0.0, expected + 0.0
            equal(
                got, expected, f"{name}, {str(dtype).removeprefix('torch.')}, result {i}, launch {time + 1}"
            )


def verbs(run: Run, backend: str, dtype: str, names: Sequence[str] = tuple(VERBS)) -> None:
    """Every verb of VERBS, or those named, in one dtype."""
    if (found := run.backend(backend)) is None:
        return
    for name in names:
        run.check(
            f"{backend}: {name}, {dtype}",
            lambda n=name: check_verb(n, found, run.device, DTYPES[dtype], run.quick),
        )


def suite(run: Run, backend: str, share: int = 0, of: int = 1) -> None:
    """Every `of`-th check of the conformance suite; low-rank products with factors whose sums are exact on
    matrix units too."""
    if (found := run.backend(backend)) is None:
        return
    scale = "quick" if run.quick else "full"
    for name in list(SUITE)[share::of]:
        exact = conformance.small_integers() if name in conformance.LOWRANK else nullcontext()
        with exact:
            run.check(f"{backend}: {name}", lambda n=name: SUITE[n](found, run.device, scale))


def bounds(run: Run, backend: str) -> None:
    """lowrank_ with random factors: no element further from exact arithmetic than
    tests/support/lowrank_bound.py allows."""
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
        found.draw(
            Batch([out], [Span(long["who"], long["first"])]),
            Noise(resolve(direction), long["seed"], [(long["step"], long["draw"])]),
        )
        digests = [hashlib.sha256(part.numpy()).hexdigest() for part in out.cpu().split(long["piece"])]
        wrong = [i for i, (got, right) in enumerate(zip(digests, long["sha256"])) if got != right]
        assert not wrong and len(digests) == len(long["sha256"]), (
            f"pieces {wrong} of {len(digests)} have other digests"
        )

    for direction in conformance.DIRECTIONS:
        run.check(f"{backend}: 2^26 values, {direction}", lambda d=direction: held(d))
