"""One suite for every backend:
each ``check_*(backend, device, scale)`` raises AssertionError where it is not the reference.

Verbs are compared bit for bit, whole guarded buffers at a time (guarded.py); CHECKS holds on every backend,
LOWRANK on those that sum low-rank products in the definition's order. Cases come from a generator
seeded with the check's name. ``scale`` is "full", or "quick" for a backend that is interpreted: the same
checks with fewer and smaller cases.

    for name, problem in conformance.run(backend).items(): ...      # problem is None where the check passed
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from guarded import Guarded, equal, filled, guarded
from torch import Tensor

from zokern.backends import ROUNDINGS, Batch, Noise, Outer, Span, Terms
from zokern.backends.reference import Reference
from zokern.directions import resolve
from zokern.stream import INDEX_LIMIT

VECTORS = Path(__file__).parents[1] / "vectors"
DIRECTIONS = ("normal", "rademacher")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SIZES = {
    "quick": (0, 1, 7, 9, 129, 300),
    "full": (0, 1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 33, 63, 65, 127, 128, 129, 255, 257, 511, 513, 1000, 4097),
}
OFFSETS = {"quick": (0, 3), "full": range(8)}
# first elements: inside a block, across the limits of int32 and uint32, and the last that the stream has
# (None: limit - n)
FIRSTS = {
    "quick": (7, 2**31 - 5, None),
    "full": (0, 1, 7, 8, 127, 128, 2**31 - 5, 2**31, 2**32 - 8, 2**32 + 3, 2**34 - 1, None),
}
SEED = 0x0123456789ABCDEF


class Versus:
    """Runs a verb on a backend and on the reference,
    from equal buffers, and compares everything they could have written.

    What the reference wrote is kept for the next backend:
    a check makes the same calls in the same order every time.
    """

    known: dict[tuple, list] = {}

    def __init__(self, check: Callable, backend, device: str, scale: str) -> None:
        self.backend, self.device = backend, device
        self.case = (check.__name__, scale, SMALL_INTEGERS[0])
        self.calls = 0

    def _both(self, groups: Sequence[Sequence[Guarded]], call: Callable) -> tuple[list, list]:
        """``call(backend, views of each group)`` on copies for the
        backend and on copies for the reference: both results."""

        def result(backend, device):
            copies = [[t.copy_to(device) for t in group] for group in groups]
            return [*copies, call(backend, [[t.view for t in group] for group in copies], device)]

        mine = result(self.backend, self.device)
        key = (*self.case, self.calls)
        self.calls += 1
        if key not in self.known:
            self.known[key] = result(Reference(), "cpu")
        return mine, self.known[key]

    def draw(self, outs: Sequence[Guarded], spans, direction: str, seed=SEED, step=3, draw=1) -> None:
        def call(backend, groups, device):
            backend.draw(
                Batch(groups[0], located(spans, device)), Noise(resolve(direction), seed, [(step, draw)])
            )

        mine, right = self._both([outs], call)
        same(mine[0], right[0], f"draw {direction}, tensor")

    def axpy(
        self, thetas, spans, direction: str, draws=((3, 1),), coeffs=(1e-3,), decay=1.0, rounding="nearest",
        residuals=(), each=0,
    ) -> None:  # fmt: skip
        def call(backend, groups, device):
            theta, low = groups[0], groups[1] if residuals else None
            where, z = located(spans, device), resolve(direction)
            a = torch.tensor(coeffs, dtype=torch.float32, device=device)
            return backend.axpy_(
                Batch(theta, where, rounding, low), Noise(z, SEED, list(draws)), Terms(a, decay, each)
            )

        mine, right = self._both([thetas, residuals], call)
        same(mine[0], right[0], f"axpy_ {direction} K={len(draws)} {rounding}, tensor")
        same(mine[1], right[1], f"axpy_ {direction} K={len(draws)} {rounding}, residual")
        equal(mine[2], right[2], f"axpy_ {direction} {rounding}, how many results are inf or NaN")

    def perturb(self, thetas, spans, direction: str, outs, scales=(1e-3, -1e-3), residuals=()) -> None:
        def call(backend, groups, device):
            theta, low, *sides = groups
            low = low if residuals else None
            batch = Batch(theta, located(spans, device), residuals=low)
            noise = Noise(resolve(direction), SEED, [(3, 1)])
            backend.perturb(batch, noise, list(scales), sides)

        mine, right = self._both([thetas, residuals, *outs], call)
        same(mine[0], right[0], f"perturb {direction}, theta (only read), tensor")
        same(mine[1], right[1], f"perturb {direction}, residual (only read), tensor")
        for j in range(len(outs)):
            same(mine[2 + j], right[2 + j], f"perturb {direction} side {j}, tensor")

    def lowrank(
        self,
        thetas,
        spans,
        factors,
        scales=(),
        decay=1.0,
        rounding="nearest",
        residuals=(),
        outs=(),
        step=4,
        what="",
    ) -> None:
        def call(backend, groups, device):
            theta, low, out = groups
            lefts, rights = ([pair[side].to(device) for pair in factors] for side in (0, 1))
            products = Outer(lefts, rights, list(scales or [0.37] * len(theta)), decay)
            batch = Batch(theta, located(spans, device), rounding, low or None)
            return backend.lowrank_(batch, products, Noise(None, SEED, [(step, 0)]), out or None)

        mine, right = self._both([thetas, residuals, outs], call)
        same(mine[0], right[0], f"lowrank_ {what} {rounding}, tensor")
        same(mine[1], right[1], f"lowrank_ {what} {rounding}, residual")
        same(mine[2], right[2], f"lowrank_ {what} {rounding}, out")
        equal(mine[3], right[3], f"lowrank_ {what} {rounding}, how many results are inf or NaN")


def located(spans: Sequence[Span], device: str) -> list[Span]:
    """The spans with their rows on the tensors' device."""
    return [s if s.rows is None else s._replace(rows=s.rows.to(device)) for s in spans]


def same(mine: Sequence[Guarded], right: Sequence[Guarded], what: str) -> None:
    for i, (got, expected) in enumerate(zip(mine, right)):
        equal(got.view, expected.view, f"{what} {i} {tuple(expected.shape)} {expected.buffer.dtype}")
        equal(
            got.buffer,
            expected.buffer,
            f"{what} {i} {tuple(expected.shape)} {expected.buffer.dtype}, memory around it",
        )


def source(check: Callable) -> torch.Generator:
    """The generator of a check's cases."""
    return torch.Generator().manual_seed(zlib.crc32(check.__name__.encode()))


def ids(generator: torch.Generator, count: int) -> list[int]:
    return torch.randint(0, 2**32, (count,), generator=generator).tolist()


def weights(shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Finite weights: mostly N(0, 0.02^2), one in eight of
    any exponent (so huge and subnormal ones), some zeros."""
    value = (torch.randn(shape, generator=generator) * 0.02).to(dtype)
    bits = torch.int32 if dtype == torch.float32 else torch.int16
    limit = torch.iinfo(bits)
    wild = (
        torch.randint(limit.min, limit.max, shape, generator=generator, dtype=torch.int64)
        .to(bits)
        .view(dtype)
    )
    kind = torch.randint(0, 32, shape, generator=generator)
    value = torch.where((kind < 4) & wild.isfinite(), wild, value)
    return torch.where(
        kind == 4, torch.zeros_like(value), torch.where(kind == 5, -torch.zeros_like(value), value)
    )


def theta_of(generator, shape, dtype, offset=0, see=None) -> Guarded:
    tensor = guarded(shape, dtype, offset, see)
    tensor.view.copy_(weights(tensor.shape, dtype, generator))
    return tensor


def low_of(generator, tensor: Guarded) -> Guarded:
    """Random low bits for a bfloat16 tensor, contiguous in logical order."""
    return filled(torch.randint(-(2**15), 2**15, tensor.shape, generator=generator).to(torch.int16), offset=3)


def out_like(
    tensor: Guarded, dtype: torch.dtype | None = None, rows: Tensor | None = None, offset: int = 0
) -> Guarded:
    shape = tensor.shape if rows is None else (rows.numel(), *tensor.shape[1:])
    return guarded(shape, dtype or tensor.buffer.dtype, offset)


# --- the block function -------------------------------------------------------------------------------------


def known_answers() -> list[tuple[int, list[int], list[int], list[int]]]:
    """Rows (rounds, counter, key, words) of vectors/philox4x32.txt."""
    lines = (VECTORS / "philox4x32.txt").read_text().splitlines()
    rows = [[part.split() for part in line.split("|")] for line in lines if line and line[0] != "#"]
    return [(int(r[0]), *([int(word, 16) for word in part] for part in rest)) for r, *rest in rows]


def check_philox_known_answers(backend, device="cpu", scale="full") -> None:
    for rounds, counter, key, words in known_answers():
        got = backend.philox4x32(torch.tensor([counter], device=device), (key[0], key[1]), rounds)
        equal(got, torch.tensor([words]), f"philox4x32-{rounds} of {counter} under {key}")


def check_philox_random_counters(backend, device="cpu", scale="full") -> None:
    generator = source(check_philox_random_counters)
    for rounds in (7, 10):
        for count in (1, 5, 300) if scale == "quick" else (1, 5, 16, 1000, 20001):
            counter = torch.randint(0, 2**32, (count, 4), generator=generator)
            key = tuple(ids(generator, 2))
            got = backend.philox4x32(counter.to(device), key, rounds)
            equal(got, Reference().philox4x32(counter, key, rounds), f"philox4x32-{rounds}, {count} counters")


# --- sizes, alignments, element numbers ---------------------------------------------------------------------


def spread(generator, scale: str, offset: int, dtypes=DTYPES):
    """Half of the sizes, every dtype, for one launch;
    each tensor with its own id and a small first element."""
    cases = [(size, dtype) for size in SIZES[scale][offset % 2 :: 2] for dtype in dtypes]
    thetas = [theta_of(generator, (size,), dtype, offset) for size, dtype in cases]
    firsts = torch.randint(0, 300, (len(cases),), generator=generator).tolist()
    return thetas, [Span(who, first) for who, first in zip(ids(generator, len(cases)), firsts)]


def far(generator, scale: str, dtypes=DTYPES):
    """Tensors of 37 and 300 elements at every first element of FIRSTS."""
    thetas, spans = [], []
    for first in FIRSTS[scale]:
        for size in (37,) if scale == "quick" else (37, 300):
            for dtype in dtypes:
                thetas.append(theta_of(generator, (size,), dtype))
                spans.append(Span(ids(generator, 1)[0], INDEX_LIMIT - size if first is None else first))
    return thetas, spans


def check_draw_sizes(backend, device="cpu", scale="full") -> None:
    generator, versus = source(check_draw_sizes), Versus(check_draw_sizes, backend, device, scale)
    for direction in DIRECTIONS:
        for offset in OFFSETS[scale]:
            thetas, spans = spread(generator, scale, offset)
            versus.draw([out_like(t, offset=offset) for t in thetas], spans, direction)


def check_draw_firsts(backend, device="cpu", scale="full") -> None:
    generator, versus = source(check_draw_firsts), Versus(check_draw_firsts, backend, device, scale)
    for direction in DIRECTIONS:
        thetas, spans = far(generator, scale)
        versus.draw([out_like(t) for t in thetas], spans, direction)


def check_draw_names(backend, device="cpu", scale="full") -> None:
    """Extreme seeds and counter words; z differs by who, step, draw and seed and by nothing else."""
    generator, versus = source(check_draw_names), Versus(check_draw_names, backend, device, scale)
    top = 2**32 - 1
    names = [(0, 0, 0), (top, 0, 0), (0, top, 0), (0, 0, top), (2**31, 2**31, 2**31), (1, 2, 3 << 24 | 5)]
    seeds = (0, 2**32 + 1, 2**64 - 1) if scale == "quick" else (0, 1, top, 2**32, 2**32 + 1, 2**63, 2**64 - 1)
    for direction in DIRECTIONS:
        for seed in seeds:
            for who, step, draw in names[1::2] if scale == "quick" else names:
                out = guarded((21,), torch.float32)
                versus.draw([out], [Span(who, ids(generator, 1)[0] % 100)], direction, seed, step, draw)


def check_axpy_sizes(backend, device="cpu", scale="full") -> None:
    generator, versus = source(check_axpy_sizes), Versus(check_axpy_sizes, backend, device, scale)
    for direction in DIRECTIONS:
        for offset in OFFSETS[scale]:
            versus.axpy(*spread(generator, scale, offset), direction)


def check_axpy_firsts(backend, device="cpu", scale="full") -> None:
    generator, versus = source(check_axpy_firsts), Versus(check_axpy_firsts, backend, device, scale)
    for direction in DIRECTIONS:
        versus.axpy(*far(generator, scale), direction)


def check_perturb_sizes(backend, device="cpu", scale="full") -> None:
    """One and two sides; outputs of theta's dtype and float32;
    every alignment of theta and of the outputs."""
    generator, versus = source(check_perturb_sizes), Versus(check_perturb_sizes, backend, device, scale)
    for direction in DIRECTIONS:
        for offset in OFFSETS[scale]:
            thetas, spans = spread(generator, scale, offset)
            dtype = torch.float32 if offset % 2 else None
            outs = [
                [out_like(t, dtype, offset=(offset * 5 + j) % 8) for t in thetas]
                for j in range(1 + (offset % 4 < 2))
            ]
            versus.perturb(thetas, spans, direction, outs, (1e-3, -1e-3)[: len(outs)])


def check_perturb_firsts(backend, device="cpu", scale="full") -> None:
    generator, versus = source(check_perturb_firsts), Versus(check_perturb_firsts, backend, device, scale)
    for direction in DIRECTIONS:
        thetas, spans = far(generator, scale)
        versus.perturb(
            thetas, spans, direction, [[out_like(t) for t in thetas] for _ in range(2)], (0.5, 0.25)
        )


# --- strides, slices of columns, looked-up rows -------------------------------------------------------------

VIEWS: list[tuple[tuple[int, ...], Callable[[Tensor], Tensor]]] = [
    ((13, 37), lambda x: x.t()),
    ((5, 300), lambda x: x[:, ::2]),
    ((300,), lambda x: x[::3]),
    ((4, 9, 10), lambda x: x.permute(2, 0, 1)),
    ((9, 16), lambda x: x[:, 3:12]),
    ((3, 4, 5, 8), lambda x: x.permute(0, 3, 1, 2)),
    ((3, 4, 5, 8), lambda x: x.permute(3, 1, 0, 2)[::2]),
    ((1, 50, 1), lambda x: x.transpose(0, 2)),
    ((2, 3, 1, 7), lambda x: x[:, :, 0, 1::2]),
    ((700, 3), lambda x: x.t()),
    ((1,), lambda x: x[0]),
    ((0, 4), lambda x: x.t()),
]


def strided(generator, scale: str):
    views = VIEWS[:4] if scale == "quick" else VIEWS
    thetas = [
        theta_of(generator, shape, dtype, offset=1, see=see) for shape, see in views for dtype in DTYPES
    ]
    firsts = torch.randint(0, 1000, (len(thetas),), generator=generator).tolist()
    return thetas, [Span(who, first) for who, first in zip(ids(generator, len(thetas)), firsts)]


def check_axpy_strides(backend, device="cpu", scale="full") -> None:
    """Any stride: transposed, every second column, permuted;
    the bytes between the elements keep their sentinels."""
    generator, versus = source(check_axpy_strides), Versus(check_axpy_strides, backend, device, scale)
    for direction in DIRECTIONS:
        for rounding in ("nearest", "stochastic"):
            versus.axpy(*strided(generator, scale), direction, rounding=rounding)


def check_axpy_strides_residual(backend, device="cpu", scale="full") -> None:
    generator = source(check_axpy_strides_residual)
    versus = Versus(check_axpy_strides_residual, backend, device, scale)
    for direction in DIRECTIONS:
        thetas, spans = strided(generator, scale)
        versus.axpy(
            thetas, spans, direction, rounding="residual", residuals=[low_of(generator, t) for t in thetas]
        )


def check_perturb_strides(backend, device="cpu", scale="full") -> None:
    generator, versus = source(check_perturb_strides), Versus(check_perturb_strides, backend, device, scale)
    for direction in DIRECTIONS:
        thetas, spans = strided(generator, scale)
        versus.perturb(thetas, spans, direction, [[out_like(t, offset=j) for t in thetas] for j in range(2)])
        lows = [low_of(generator, t) for t in thetas]
        versus.perturb(
            thetas, spans, direction, [[out_like(t, torch.float32) for t in thetas]], (0.01,), lows
        )


def column_slices(generator, scale: str):
    """Columns [a, b) of a (rows, width) parameter:
    a view of it and a compact copy, numbered as in the whole.

    Of the third case all rows begin on 16 bytes; in the fourth they do after five elements, with low bits.
    """
    thetas, spans = [], []
    cases = [
        (5, 40, 3, 12),
        (3, 300, 130, 300),
        (9, 80, 16, 72),
        (9, 80, 3, 75),
        (7, 129, 0, 1),
        (4, 64, 8, 24),
        (2, 1000, 1, 999),
        (6, 33, 5, 5),
    ]
    for rows, width, a, b in cases[:4] if scale == "quick" else cases:
        for dtype in DTYPES:
            who = ids(generator, 1)[0]
            thetas.append(theta_of(generator, (rows, width), dtype, see=lambda x, a=a, b=b: x[:, a:b]))
            thetas.append(theta_of(generator, (rows, b - a), dtype, offset=5))
            spans += [Span(who, first=a, pitch=width), Span(who, first=2 * width + a, pitch=width)]
    # rows that lie further apart than 32 bits can say
    thetas.append(theta_of(generator, (4, 30), torch.float32))
    spans.append(Span(ids(generator, 1)[0], first=2**33 - 33, pitch=2**33 - 1))
    return thetas, spans


def check_draw_pitch(backend, device="cpu", scale="full") -> None:
    generator, versus = source(check_draw_pitch), Versus(check_draw_pitch, backend, device, scale)
    for direction in DIRECTIONS:
        thetas, spans = column_slices(generator, scale)
        versus.draw([out_like(t) for t in thetas], spans, direction)


def check_axpy_pitch(backend, device="cpu", scale="full") -> None:
    generator, versus = source(check_axpy_pitch), Versus(check_axpy_pitch, backend, device, scale)
    for direction in DIRECTIONS:
        for rounding in ("nearest", "stochastic"):
            versus.axpy(*column_slices(generator, scale), direction, rounding=rounding)
        thetas, spans = column_slices(generator, scale)
        versus.axpy(
            thetas, spans, direction, rounding="residual", residuals=[low_of(generator, t) for t in thetas]
        )


def check_perturb_pitch(backend, device="cpu", scale="full") -> None:
    generator, versus = source(check_perturb_pitch), Versus(check_perturb_pitch, backend, device, scale)
    for direction in DIRECTIONS:
        thetas, spans = column_slices(generator, scale)
        versus.perturb(thetas, spans, direction, [[out_like(t) for t in thetas] for _ in range(2)])


def check_perturb_rows(backend, device="cpu", scale="full") -> None:
    """Looked-up rows keep their own numbers:
    repeats, any order, none, a first element, a slice of columns, low bits."""
    generator, versus = source(check_perturb_rows), Versus(check_perturb_rows, backend, device, scale)
    shapes = [(11, 9), (50, 64)] if scale == "quick" else [(11, 9), (50, 64), (1, 8), (1000, 3), (40, 200)]
    for direction in DIRECTIONS:
        thetas, spans, lows = [], [], []
        for count, columns in shapes:
            for dtype in DTYPES:
                for looked_up in (0, 1, 17):
                    rows = torch.randint(0, count, (looked_up,), generator=generator)
                    first, pitch = torch.randint(0, 500, (2,), generator=generator).tolist()
                    thetas.append(theta_of(generator, (count, columns), dtype, offset=looked_up % 3))
                    spans.append(
                        Span(ids(generator, 1)[0], first, None if pitch < 250 else columns + pitch, rows)
                    )
                    lows.append(low_of(generator, thetas[-1]))
        rows = torch.tensor([3, 0, 3, 2])
        thetas.append(theta_of(generator, (20, 9), torch.bfloat16, see=lambda x: x[::5, 1:8]))
        spans.append(Span(ids(generator, 1)[0], first=2**33 - 11, pitch=2**33 - 1, rows=rows))
        lows.append(low_of(generator, thetas[-1]))
        rows = torch.randint(0, 24, (9,), generator=generator)
        for dtype in DTYPES:  # rows of whole units, all on 16 bytes
            thetas.append(theta_of(generator, (24, 64), dtype))
            spans.append(Span(ids(generator, 1)[0], first=40, pitch=72, rows=rows))
            lows.append(filled(low_of(generator, thetas[-1]).view))
        for dtype, residuals in ((None, ()), (torch.float32, lows)):
            outs = [[out_like(t, dtype, s.rows) for t, s in zip(thetas, spans)] for _ in range(2)]
            versus.perturb(thetas, spans, direction, outs, residuals=residuals)


# --- arithmetic ---------------------------------------------------------------------------------------------


def check_axpy_many_draws(backend, device="cpu", scale="full") -> None:
    """K draws in order, decay first, one rounding; coefficients of all sizes, zero and subnormal ones too."""
    generator, versus = source(check_axpy_many_draws), Versus(check_axpy_many_draws, backend, device, scale)
    sizes = (150,) if scale == "quick" else (150, 5000)
    for direction in DIRECTIONS:
        for count in (1, 2, 3, 5):
            for decay in (1.0, 0.999):
                thetas = [theta_of(generator, (size,), dtype) for size in sizes for dtype in DTYPES]
                spans = [Span(who, 5) for who in ids(generator, len(thetas))]
                draws = [(7 + k // 2, k % 2 if k < 4 else 1 << 24 | 9) for k in range(count)]
                coeffs = (torch.randn(count, generator=generator) * 10.0 ** -torch.arange(count)).tolist()
                versus.axpy(thetas, spans, direction, draws, coeffs, decay)
    for count in (4, 8, 11, 32, 33, 70):
        # more than one turn of all threads of a block
        size = {11: 4500 if scale == "full" else 67, 33: 2100}.get(count, 67)
        thetas = [theta_of(generator, (size,), dtype, 0) for dtype in DTYPES]
        spans = [Span(who, 8) for who in ids(generator, 3)]
        coeffs = (torch.randn(count, generator=generator) / 100).tolist()
        versus.axpy(thetas, spans, "normal", [(3, k) for k in range(count)], coeffs, 0.999)
    for coeffs in ((0.0, -0.0), (1e-40, -3e-39), (1e38, -1e38), (1e-30, 1.0)):
        for decay in (1.0, 0.0, -1.5, 1e-40):
            thetas = [theta_of(generator, (137,), dtype) for dtype in DTYPES]
            versus.axpy(
                thetas, [Span(who) for who in ids(generator, 3)], "normal", [(1, 0), (0, 1)], coeffs, decay
            )


def replay(generator, count: int, each: int) -> tuple[list[tuple[int, int]], list[float], list[float]]:
    """Draws, coefficients and decays of a run of count / each steps; a step's coefficients are of one size
    and not of another's."""
    steps = ids(generator, count // each)
    draws = [(step, query) for step in steps for query in range(each)]
    sizes = 10.0 ** -torch.arange(count // each).remainder(5).repeat_interleave(each)
    coeffs = (torch.randn(count, generator=generator) * sizes).tolist()
    return draws, coeffs, (1 - torch.rand(count // each, generator=generator) / 8).tolist()


def check_axpy_each(backend, device="cpu", scale="full") -> None:
    """A rounding after every `each` terms, with the decay and the random bits of its own step;
    many terms, broken weights."""
    generator, versus = source(check_axpy_each), Versus(check_axpy_each, backend, device, scale)
    cases = [
        (size, dtype)
        for size in ((9, 300) if scale == "quick" else (1, 15, 64, 300, 1029))
        for dtype in DTYPES
    ]
    cases.append((4500, torch.bfloat16))  # more than one unit of eight for each thread of a block
    for direction in DIRECTIONS:
        for rounding in ROUNDINGS:
            for count, each in ((3, 1), (4, 2)):
                # off alignment for steps of two terms, but for the tensor of many units
                thetas = [
                    theta_of(generator, (size,), dtype, offset=each - 1 if size < 4500 else 0)
                    for size, dtype in cases
                ]
                spans = [Span(who, 8 * (i % 9) * (i % 3)) for i, who in enumerate(ids(generator, len(cases)))]
                lows = [low_of(generator, t) for t in thetas] if rounding == "residual" else []
                versus.axpy(thetas, spans, direction, *replay(generator, count, each), rounding, lows, each)
    for rounding in ROUNDINGS:
        if rounding == "stochastic" or scale == "full":
            thetas = [theta_of(generator, (43,), dtype) for dtype in DTYPES]
            lows = [low_of(generator, t) for t in thetas] if rounding == "residual" else []
            spans = [Span(who, 8) for who in ids(generator, 3)]
            for count, each in ((70, 1), (70, 2), (36, 12), (66, 33)):
                versus.axpy(thetas, spans, "normal", *replay(generator, count, each), rounding, lows, each)
        for dtype in DTYPES:  # overflow, inf and NaN in the middle of a run stay; subnormal results are kept
            size, tiny, most = 67, torch.finfo(dtype).smallest_normal, torch.finfo(dtype).max
            broken = weights((size,), dtype, generator)
            broken[::7], broken[1::11], broken[2::13] = float("inf"), float("-inf"), float("nan")
            subnormal = (torch.randn(size, generator=generator) * tiny).to(dtype)
            largest = torch.full((size,), most, dtype=dtype)
            for values, coeff in ((subnormal, tiny / 4), (largest, most / 100), (broken, 1e-3)):
                theta = filled(values, offset=2)
                lows = [low_of(generator, theta)] if rounding == "residual" else []
                draws = [(step, 0) for step in range(4)]
                coeffs = [coeff, -coeff, coeff / 2, coeff]
                versus.axpy(
                    [theta], [Span(9, 3)], "normal", draws, coeffs, [1.0, -0.5, 1.0, 0.75], rounding, lows, 1
                )


def check_axpy_each_is_calls(backend, device="cpu", scale="full") -> None:
    """One call with roundings in between writes what the calls write one after the other, under any clock;
    decays may be one number."""
    generator = source(check_axpy_each_is_calls)
    for direction in map(resolve, DIRECTIONS):
        for rounding, dtype in (("nearest", torch.float32), ("nearest", torch.bfloat16),
            ("nearest", torch.float16),
                                ("stochastic", torch.bfloat16), ("stochastic", torch.float16),
                                ("residual", torch.bfloat16)):  # fmt: skip
            for each in (1, 2):
                start = weights((333,), dtype, generator)
                start[5], start[17] = float("inf"), float("nan")
                span, first_low = Span(ids(generator, 1)[0], 3), torch.zeros(333, dtype=torch.int16)
                draws, coeffs, decays = replay(generator, 6, each)
                decay = decays if each == 1 else decays[0]
                clock = (
                    torch.full((1,), 2**32 - 3, dtype=torch.int64, device=device)
                    if rounding == "stochastic"
                    else None
                )
                a = torch.tensor(coeffs, device=device)
                results = []
                for step in (0, each):
                    theta, low = start.to(device, copy=True), [first_low.to(device, copy=True)]
                    for k in range(0, 6, step or 6):
                        here = slice(k, k + (step or 6))
                        factor = decay if not step or each == 2 else decays[k]
                        batch = Batch([theta], [span], rounding, low if rounding == "residual" else None)
                        noise = Noise(direction, SEED, draws[here], clock)
                        count = backend.axpy_(batch, noise, Terms(a[here], factor, 0 if step else each))
                    results.append((theta.cpu(), low[0].cpu(), count.cpu()))
                for got, expected, what in zip(*results, ("weights", "low bits", "count")):
                    equal(
                        got,
                        expected,
                        f"axpy_ {direction.name} {dtype} {rounding} each={each} against single calls, {what}",
                    )


def check_axpy_one_rounding(backend, device="cpu", scale="full") -> None:
    """a z + theta at a tie of float32 that float64 cannot see:
    a sum rounded to float64 first goes the wrong way.

    z = B 2^j and a = A 2^k with 24-bit integers A, B and A B = 2^47 + d, 0 < d < 2^18: a z is just above half
    a unit in the last place of theta = +-1, whose last bit is even, so the right result is the next float32
    and the twice rounded one is theta.
    """
    versus = Versus(check_axpy_one_rounding, backend, device, scale)
    count = 1 << 14
    z = torch.empty(count)
    Reference().draw(Batch([z], [Span(3)]), Noise(resolve("normal"), SEED, [(3, 1)]))
    mantissa = (torch.frexp(z.double()).mantissa.abs() * 2**24).long()
    partner = (2**47 + mantissa - 1) // mantissa
    excess = mantissa * partner - 2**47
    found = ((excess > 0) & (excess < 2**18)).nonzero()[:, 0].tolist()
    assert len(found) > 4, "the search found no case, so the check would check nothing"
    for i in found[: 3 if scale == "quick" else 40]:
        power = -24 - 47 + 24 - int(torch.frexp(z[i].double()).exponent)
        coeff = float(partner[i]) * 2.0**power
        for theta in (1.0, -1.0):
            sign = theta if z[i] > 0 else -theta
            versus.axpy([filled(torch.tensor([theta]))], [Span(3, i)], "normal", coeffs=[sign * coeff])


def check_axpy_stochastic(backend, device="cpu", scale="full") -> None:
    """The 16 bits of (who, step of the last draw, purpose rounding), one set an element;
    float32 is unchanged by it."""
    generator, versus = source(check_axpy_stochastic), Versus(check_axpy_stochastic, backend, device, scale)
    for direction in DIRECTIONS:
        for draws, coeffs in (([(3, 1)], [1e-5]), ([(9, 0), (4, 2)], [1e-3, 1e-4])):
            versus.axpy(*spread(generator, scale, 1), direction, draws, coeffs, 0.9999, "stochastic")
        versus.axpy(*far(generator, scale), direction, coeffs=[1e-6], rounding="stochastic")


def check_axpy_residual(backend, device="cpu", scale="full") -> None:
    """bfloat16 and 16 low bits are an exact float32, through ties and every low half;
    other types round to nearest."""
    generator, versus = source(check_axpy_residual), Versus(check_axpy_residual, backend, device, scale)
    for direction in DIRECTIONS:
        for offset in OFFSETS[scale]:
            thetas, spans = spread(generator, scale, offset)
            versus.axpy(
                thetas,
                spans,
                direction,
                rounding="residual",
                residuals=[low_of(generator, t) for t in thetas],
            )
        thetas, spans = far(generator, scale, (torch.bfloat16,))
        versus.axpy(
            thetas, spans, direction, rounding="residual", residuals=[low_of(generator, t) for t in thetas]
        )
    # coefficient 0 keeps the float32 value, so the ties of the split are met on purpose: low half 0x8000
    count = 64 if scale == "quick" else 2048
    high = weights((count,), torch.bfloat16, generator)
    low = torch.tensor([-32768, 32767, 0, -1]).to(torch.int16).repeat(count // 4)
    for decay in (1.0, -1.0, 0.5):
        theta, residual = filled(high), filled(low)
        versus.axpy(
            [theta], [Span(1)], "normal", coeffs=[0.0], decay=decay, rounding="residual", residuals=[residual]
        )


def check_axpy_special(backend, device="cpu", scale="full") -> None:
    """inf and NaN among the weights stay what they are,
    overflow becomes inf, subnormals are kept, and the count is exact."""
    generator, versus = source(check_axpy_special), Versus(check_axpy_special, backend, device, scale)
    size = 67 if scale == "quick" else 4099
    for rounding in ("nearest", "stochastic", "residual"):
        for dtype in DTYPES:
            tiny = torch.finfo(dtype).smallest_normal
            subnormal = (torch.randn(size, generator=generator) * tiny).to(dtype)
            largest = (torch.finfo(dtype).max * torch.randn(size, generator=generator).sign()).to(dtype)
            broken = weights((size,), dtype, generator)
            broken[::7], broken[1::11], broken[2::13] = float("inf"), float("-inf"), float("nan")
            for values, coeff in (
                (subnormal, tiny / 4),
                (largest, torch.finfo(dtype).max / 100),
                (broken, 1e-3),
            ):
                theta = filled(values, offset=2)
                low = low_of(generator, theta)
                versus.axpy(
                    [theta], [Span(9, 3)], "normal", coeffs=[coeff], rounding=rounding, residuals=[low]
                )
    theta = theta_of(generator, (size,), torch.float32)
    for coeff in (float("inf"), float("nan")):
        versus.axpy([theta], [Span(9, 3)], "normal", coeffs=[coeff])


def check_perturb_arithmetic(backend, device="cpu", scale="full") -> None:
    """Scales of all sizes, broken and subnormal weights, low bits joined in float32 before z is added."""
    generator = source(check_perturb_arithmetic)
    versus = Versus(check_perturb_arithmetic, backend, device, scale)
    size = 67 if scale == "quick" else 4099
    for direction in DIRECTIONS:
        for scales in ((1e-3, -1e-3), (0.0, -0.0), (1e-40, 1e38), (float("inf"), 1.0)):
            thetas = [theta_of(generator, (size,), dtype, offset=1) for dtype in DTYPES]
            for t in thetas:
                t.view[::17], t.view[3::19] = float("inf"), float("nan")
                t.view[5::23] = torch.finfo(t.buffer.dtype).tiny / 2
            spans = [Span(who, 11) for who in ids(generator, 3)]
            lows = [low_of(generator, t) for t in thetas]
            for dtype, residuals in ((None, ()), (None, lows), (torch.float32, lows)):
                outs = [[out_like(t, dtype) for t in thetas] for _ in scales]
                versus.perturb(thetas, spans, direction, outs, scales, residuals)


# --- facts that hold without a reference: who computes what does not matter ---------------------------------


def check_shards(backend, device="cpu", scale="full") -> None:
    """1, 2, 4 and 8 shards give the bits of the whole."""
    generator = source(check_shards)
    size = 203 if scale == "quick" else 10007
    for direction in DIRECTIONS:
        z = resolve(direction)
        for dtype, rounding in (
            (torch.float32, "nearest"),
            (torch.bfloat16, "stochastic"),
            (torch.float16, "stochastic"),
        ):
            start, first = weights((size,), dtype, generator), 2**31 - 100
            coeffs = torch.tensor([1e-3, 0.1], device=device)
            expected = None
            for shards in (1, 2, 4, 8):
                whole = start.to(device, copy=True)
                parts = list(torch.tensor_split(whole, shards))
                spans = [Span(77, first + p.storage_offset()) for p in parts]
                backend.axpy_(
                    Batch(parts, spans, rounding), Noise(z, SEED, [(3, 1), (2, 0)]), Terms(coeffs, 0.99)
                )
                expected = whole.cpu() if expected is None else expected
                equal(whole, expected, f"axpy_ {direction} {rounding}, {shards} shards")


def check_order(backend, device="cpu", scale="full") -> None:
    """Neither the order of the list nor the company in it changes a bit:
    a mixed launch equals one launch a tensor."""
    generator = source(check_order)
    count = 9 if scale == "quick" else 60
    sizes = torch.randint(0, 400, (count,), generator=generator).tolist()
    start = [weights((size,), DTYPES[i % 3], generator) for i, size in enumerate(sizes)]
    spans = [Span(who, i) for i, who in enumerate(ids(generator, count))]
    coeffs = torch.tensor([0.01], device=device)
    for direction in DIRECTIONS:
        z = resolve(direction)
        results = []
        for order in (list(range(count)), torch.randperm(count, generator=generator).tolist(), None):
            thetas = [t.to(device, copy=True) for t in start]
            for batch in [[i] for i in range(count)] if order is None else [order]:
                here = [thetas[i] for i in batch], [spans[i] for i in batch]
                backend.axpy_(Batch(*here, "stochastic"), Noise(z, SEED, [(3, 1)]), Terms(coeffs))
            results.append(thetas)
        for other, how in ((results[1], "another order"), (results[2], "one by one")):
            for i, (got, expected) in enumerate(zip(other, results[0])):
                equal(got, expected.cpu(), f"axpy_ {direction}, {how}, tensor {i}")


def check_dtypes_share_z(backend, device="cpu", scale="full") -> None:
    """z is one float32 number whatever the dtype: the bfloat16 and float16 draws are its roundings."""
    for direction in DIRECTIONS:
        z = resolve(direction)
        drawn = [torch.empty(300, dtype=dtype, device=device) for dtype in DTYPES]
        backend.draw(Batch(drawn, [Span(5, 12)] * 3), Noise(z, SEED, [(3, 1)]))
        for out in drawn[1:]:
            equal(out, drawn[0].cpu().to(out.dtype), f"draw {direction} {out.dtype}")


def check_empty_launch(backend, device="cpu", scale="full") -> None:
    """No tensor, and only empty tensors, are launches that do nothing and count nothing."""
    z, coeffs = resolve("normal"), torch.tensor([1.0], device=device)
    for tensors in ([], [torch.empty(0, device=device)], [torch.empty(3, 0, device=device)] * 2):
        spans = [Span(1)] * len(tensors)
        backend.draw(Batch(tensors, spans), Noise(z, SEED, [(0, 0)]))
        backend.perturb(Batch(tensors, spans), Noise(z, SEED, [(0, 0)]), [1.0], [tensors])
        count = backend.axpy_(Batch(tensors, spans), Noise(z, SEED, [(0, 0)]), Terms(coeffs))
        equal(count, torch.zeros(1, dtype=torch.int64), "axpy_ of nothing")


def check_large(backend, device="cpu", scale="full") -> None:
    """Tensors that take several chunks, threads or programs, at odd sizes and numbers, among small ones."""
    generator, versus = source(check_large), Versus(check_large, backend, device, scale)
    sizes = (5, 70_001) if scale == "quick" else (5, 0, 70_001, 3, 140_003)
    for direction in DIRECTIONS:
        for dtype in DTYPES[:1] if scale == "quick" else DTYPES:
            thetas = [theta_of(generator, (size,), dtype, offset=1) for size in sizes]
            spans = [Span(who, 3) for who in ids(generator, len(sizes))]
            versus.axpy(thetas, spans, direction, rounding="stochastic")
            if scale == "full":
                versus.draw([out_like(t) for t in thetas], spans, direction)
                versus.perturb(thetas, spans, direction, [[out_like(t) for t in thetas] for _ in range(2)])
    if scale == "full":
        wide = theta_of(generator, (257, 300), torch.bfloat16, see=lambda x: x.t())
        versus.axpy([wide], [Span(4, 3)], "normal")


def check_tiles(backend, device="cpu", scale="full") -> None:
    """Aligned tensors long enough for the tiles that share Philox blocks, with elements before and after
    whole tiles, and inf."""
    generator, versus = source(check_tiles), Versus(check_tiles, backend, device, scale)
    sizes = (
        ((8225, 24),)
        if scale == "quick"
        else ((8225, 24), (4096, 0), (36_000, 8 * 15), (12_289, 2**33 + 128 - 8))
    )
    for direction in DIRECTIONS:
        cases = [(size, first, dtype) for size, first in sizes for dtype in (*DTYPES, torch.bfloat16)]
        thetas = [theta_of(generator, (size,), dtype) for size, _, dtype in cases]
        for i, theta in enumerate(thetas):
            theta.view[torch.randint(0, len(theta.view), (5 + i,), generator=generator)] = float("inf")
        spans = [Span(who, first) for who, (_, first, _) in zip(ids(generator, len(cases)), cases)]
        versus.axpy(thetas, spans, direction)
        if scale == "full":
            versus.axpy(thetas, spans, direction, [(3, 1), (2**32 - 1, 0)], [1e-3, 0.5], 0.99, "stochastic")
        versus.draw([out_like(t) for t in thetas], spans, direction)
        versus.perturb(thetas, spans, direction, [[out_like(t) for t in thetas] for _ in range(2)])


def check_clock(backend, device="cpu", scale="full") -> None:
    """A clock is added to every step number, modulo 2^32, when the call runs;
    the same call later means another z."""
    generator, reference = source(check_clock), Reference()
    values, who = weights((300,), torch.bfloat16, generator), ids(generator, 1)[0]
    clock, spans = torch.zeros(1, dtype=torch.int64, device=device), [Span(who)]
    coeffs = torch.tensor([0.5, -0.25])
    for time in (0, 7, 2**32 - 2):
        clock.fill_(time)
        late = [(step + time) % 2**32 for step in (3, 5)]
        for direction in map(resolve, DIRECTIONS):
            got, right = torch.empty(300, device=device), torch.empty(300)
            backend.draw(Batch([got], spans), Noise(direction, SEED, [(3, 1)], clock))
            reference.draw(Batch([right], spans), Noise(direction, SEED, [(late[0], 1)]))
            equal(got, right, f"draw {direction.name} at clock {time}")
            for count, rounding in ((1, "nearest"), (2, "stochastic")):
                got, right = values.clone().to(device), values.clone()
                draws, a = [(3, 1), (5, 0)][:count], coeffs[:count]
                backend.axpy_(
                    Batch([got], spans, rounding), Noise(direction, SEED, draws, clock), Terms(a.to(device))
                )
                reference.axpy_(
                    Batch([right], spans, rounding),
                    Noise(direction, SEED, list(zip(late, (1, 0)))[:count]),
                    Terms(a),
                )
                equal(got, right, f"axpy_ {direction.name} K={count} {rounding} at clock {time}")
            sides = [torch.empty(300, dtype=torch.bfloat16, device=device) for _ in range(2)]
            expected = [torch.empty(300, dtype=torch.bfloat16) for _ in range(2)]
            theta = values.clone().to(device)
            backend.perturb(
                Batch([theta], spans),
                Noise(direction, SEED, [(3, 1)], clock),
                [0.5, -0.5],
                [[s] for s in sides],
            )
            reference.perturb(
                Batch([values], spans),
                Noise(direction, SEED, [(late[0], 1)]),
                [0.5, -0.5],
                [[e] for e in expected],
            )
            for j in range(2):
                equal(sides[j], expected[j], f"perturb {direction.name} side {j} at clock {time}")


# --- low-rank products --------------------------------------------------------------------------------------

RANKS = {"quick": (1, 3, 8, 33), "full": (1, 2, 3, 7, 8, 16, 31, 33, 64, 128)}


SMALL_INTEGERS = [False]


@contextmanager
def small_integers():
    """Factors whose sums are exact in any order and in bfloat16: with them the suite also holds on matrix
    units, bit for bit."""
    SMALL_INTEGERS[0] = True
    try:
        yield
    finally:
        SMALL_INTEGERS[0] = False


def factors_of(generator, m: int, n: int, rank: int) -> tuple[Tensor, Tensor]:
    if SMALL_INTEGERS[0]:
        left, right = (torch.randint(-8, 9, (rows, rank), generator=generator).float() for rows in (m, n))
        return left, right
    return torch.randn(m, rank, generator=generator), torch.randn(n, rank, generator=generator)


def around(generator, theta: Guarded, span: Span, n: int, rank: int) -> tuple[Tensor, Tensor]:
    """Factors of the smallest matrix of n columns that holds a tensor's numbers."""
    last = span.first + torch.Size(theta.shape).numel()
    if span.pitch is not None or span.rows is not None:
        rows = theta.shape[0] - 1 if span.rows is None else int(span.rows.max()) if span.rows.numel() else 0
        last = span.first + max(rows, 0) * (span.pitch or theta.shape[-1]) + theta.shape[-1]
    return factors_of(generator, last // n + 1, n, rank)


def check_lowrank_ranks(backend, device="cpu", scale="full") -> None:
    """Every rank, rows and columns that divide nothing, every alignment."""
    generator, versus = source(check_lowrank_ranks), Versus(check_lowrank_ranks, backend, device, scale)
    shapes = (
        [(13, 53), (5, 7)] if scale == "quick" else [(13, 53), (5, 7), (1, 100), (100, 1), (3, 200), (34, 49)]
    )
    for offset, rank in enumerate(RANKS[scale]):
        cases = [(shape, dtype) for shape in shapes for dtype in DTYPES]
        thetas = [theta_of(generator, shape, dtype, offset % 8) for shape, dtype in cases]
        factors = [factors_of(generator, *shape, rank) for shape, _ in cases]
        scales = (torch.randn(len(cases), generator=generator) * 0.01).tolist()
        versus.lowrank(
            thetas, [Span(who) for who in ids(generator, len(cases))], factors, scales, what=f"rank {rank}"
        )


def check_lowrank_offset(backend, device="cpu", scale="full") -> None:
    """Factors that begin between the boundaries of wider loads, in the ranks whose kernels load widely."""
    generator = source(check_lowrank_offset)
    for rank in (16, 64) if scale == "quick" else (16, 32, 64, 128):
        for offset in (1, 2, 3):
            left, right = factors_of(generator, 9, 40, rank)
            start = weights((9, 40), torch.float32, generator)
            results = []
            for one, where in ((backend, device), (Reference(), "cpu")):
                pair = []
                for factor in (left, right):
                    memory = torch.empty(factor.numel() + offset, device=where)
                    pair.append([memory[offset:].view(factor.shape).copy_(factor)])
                results.append(start.to(where, copy=True))
                one.lowrank_(Batch(results[-1:], [Span(3)]), Outer(*pair, [0.25]))
            equal(*results, f"lowrank_ rank {rank}, factors {offset} elements off")


def check_lowrank_firsts(backend, device="cpu", scale="full") -> None:
    """Shards that start and end inside a row, and numbers beyond 32 bits."""
    generator, versus = source(check_lowrank_firsts), Versus(check_lowrank_firsts, backend, device, scale)
    thetas, spans, factors = [], [], []
    for dtype in DTYPES:
        for first in (0, 1, 52, 53, 100, 265):
            thetas.append(theta_of(generator, (3, 71) if first % 2 else (200,), dtype, offset=first % 3))
            spans.append(Span(1, first))
            factors.append(factors_of(generator, 20, 53, 5))
    for first in (
        (2**31 - 5, 2**32 + 3) if scale == "quick" else (2**31 - 5, 2**31, 2**32 - 8, 2**32 + 3, 2**34 - 1)
    ):
        thetas.append(theta_of(generator, (150,), torch.float32))
        spans.append(Span(1, first))
        factors.append(around(generator, thetas[-1], spans[-1], (1 << 17) - 1, 2))
    versus.lowrank(thetas, spans, factors)


def check_lowrank_shapes(backend, device="cpu", scale="full") -> None:
    """Row and column come from the number and the factors:
    a flattened, reshaped or transposed-shape theta is the same matrix."""
    generator, versus = source(check_lowrank_shapes), Versus(check_lowrank_shapes, backend, device, scale)
    m, n = 24, 64
    shapes = [(m, n), (n, m), (m * n,), (m, 4, 16), (1, m * n), (m * n, 1), (2, 3, 4, 64)]
    cases = [(shape, dtype) for shape in shapes for dtype in DTYPES]
    thetas = [theta_of(generator, shape, dtype, offset=1) for shape, dtype in cases]
    pair = factors_of(generator, m, n, 9)
    versus.lowrank(thetas, [Span(1)] * len(cases), [pair] * len(cases))


def check_lowrank_strides(backend, device="cpu", scale="full") -> None:
    """Any stride, and matrices whose rows are longer or shorter than the tensor's;
    the bytes between keep their sentinels."""
    generator, versus = source(check_lowrank_strides), Versus(check_lowrank_strides, backend, device, scale)
    for rounding in ("nearest", "stochastic", "residual"):
        thetas, spans = strided(generator, scale)
        columns = torch.randint(1, 90, (len(thetas),), generator=generator).tolist()
        factors = [around(generator, t, s, n, 3) for t, s, n in zip(thetas, spans, columns)]
        lows = [low_of(generator, t) for t in thetas] if rounding == "residual" else []
        versus.lowrank(thetas, spans, factors, rounding=rounding, residuals=lows, decay=0.9)
        outs = [out_like(t, offset=1) for t in thetas]
        versus.lowrank(thetas, spans, factors, rounding=rounding, residuals=lows, outs=outs, what="to outs")


def check_lowrank_pitch(backend, device="cpu", scale="full") -> None:
    """Slices of columns: rows of the whole matrix,
    in a view of it and in a compact copy, and pitches that are not its n."""
    generator, versus = source(check_lowrank_pitch), Versus(check_lowrank_pitch, backend, device, scale)
    for rounding in ("nearest", "stochastic", "residual"):
        thetas, spans = column_slices(generator, scale)
        columns = [span.pitch if i % 4 < 3 else 11 for i, span in enumerate(spans[:-1])] + [1 << 20]
        factors = [around(generator, t, s, n, 2) for t, s, n in zip(thetas, spans, columns)]
        lows = [low_of(generator, t) for t in thetas] if rounding == "residual" else []
        versus.lowrank(thetas, spans, factors, rounding=rounding, residuals=lows)


def check_lowrank_rows(backend, device="cpu", scale="full") -> None:
    """Looked-up rows keep their own numbers; they are written to outs."""
    generator, versus = source(check_lowrank_rows), Versus(check_lowrank_rows, backend, device, scale)
    shapes = [(11, 9), (50, 64)] if scale == "quick" else [(11, 9), (50, 64), (1, 8), (1000, 3), (40, 200)]
    thetas, spans, factors, lows = [], [], [], []
    for count, columns in shapes:
        for dtype in DTYPES:
            for looked_up in (0, 1, 17):
                rows = torch.randint(0, count, (looked_up,), generator=generator)
                first, pitch = torch.randint(0, 500, (2,), generator=generator).tolist()
                thetas.append(theta_of(generator, (count, columns), dtype, offset=looked_up % 3))
                spans.append(
                    Span(
                        ids(generator, 1)[0],
                        first if looked_up == 17 else 0,
                        None if pitch < 250 else columns + pitch,
                        rows,
                    )
                )
                factors.append(around(generator, thetas[-1], spans[-1], spans[-1].pitch or columns, 4))
                lows.append(low_of(generator, thetas[-1]))
    for dtype, rounding in (
        (None, "nearest"),
        (None, "stochastic"),
        (torch.float32, "residual"),
        (None, "residual"),
    ):
        outs = [out_like(t, dtype, s.rows) for t, s in zip(thetas, spans)]
        versus.lowrank(thetas, spans, factors, outs=outs, rounding=rounding, residuals=lows)
    try:
        backend.lowrank_(Batch([thetas[1].view], spans[1:2]), Outer(*([f] for f in factors[1]), [1.0]))
    except ValueError:
        return
    raise AssertionError("lowrank_ wrote looked-up rows in place")


def check_lowrank_arithmetic(backend, device="cpu", scale="full") -> None:
    """Decay first, the scale last, one rounding;
    all roundings, factors and scales of all sizes; outs of either type."""
    generator = source(check_lowrank_arithmetic)
    versus = Versus(check_lowrank_arithmetic, backend, device, scale)
    # with and without aligned rows
    shapes = [(9, 40), (9, 31)] if scale == "quick" else [(19, 136), (19, 131)]
    for decay in (1.0, 0.999, 0.0, -1.5, 1e-40):
        for size in (1.0, 2.0**-60, 2.0**55) if SMALL_INTEGERS[0] else (1.0, 1e-38, 1e18):
            factors = [
                tuple(size * f for f in factors_of(generator, *shape, 6)) for _ in DTYPES for shape in shapes
            ]
            for rounding in ("nearest", "stochastic", "residual"):
                thetas = [
                    theta_of(generator, shape, dtype, offset=shape[1] % 8)
                    for dtype in DTYPES
                    for shape in shapes
                ]
                spans = [Span(who, 0) for who in ids(generator, len(thetas))]
                lows = [low_of(generator, t) for t in thetas] if rounding == "residual" else []
                scales = [1e-3, -1e-40, 0.5, 1e-5, -0.0, 3.0]
                versus.lowrank(
                    thetas, spans, factors, scales, decay, rounding, lows, step=ids(generator, 1)[0]
                )
                for dtype in (None, torch.float32):
                    outs = [out_like(t, dtype) for t in thetas]
                    versus.lowrank(thetas, spans, factors, scales, decay, rounding, lows, outs)


def check_lowrank_special(backend, device="cpu", scale="full") -> None:
    """inf and NaN in the weights and in the factors,
    overflow to inf, subnormal results, and the exact count."""
    generator, versus = source(check_lowrank_special), Versus(check_lowrank_special, backend, device, scale)
    m, n = (5, 64) if scale == "quick" else (23, 304)
    for dtype in DTYPES:
        for rounding in ("nearest", "stochastic", "residual"):
            broken = weights((m, n), dtype, generator)
            broken[::2, ::7], broken[1::2, 1::11] = float("inf"), float("-inf")
            broken[:, 2::13] = float("nan")
            largest = (torch.finfo(dtype).max * torch.randn(m, n, generator=generator).sign()).to(dtype)
            subnormal = (torch.randn(m, n, generator=generator) * torch.finfo(dtype).smallest_normal).to(
                dtype
            )
            for i, values in enumerate((broken, largest, subnormal)):
                theta = filled(values, offset=8 if rounding == "nearest" else 2)
                left, right = factors_of(generator, m, n, 3)
                size = (1e-3, torch.finfo(dtype).max / 100, torch.finfo(dtype).smallest_normal / 4)[i]
                lows = [low_of(generator, theta)] if rounding == "residual" else []
                versus.lowrank([theta], [Span(9)], [(left, right)], [size], rounding=rounding, residuals=lows)
    # its payload must not become a number
    nan = torch.tensor(0x7FFFFFFF, dtype=torch.int32).view(torch.float32)
    for dtype in DTYPES:
        for at, value in ((0, nan), (1, -nan), (2, float("inf")))[: 2 if SMALL_INTEGERS[0] else 3]:
            left, right = factors_of(generator, m, n, 3)
            left[at, 1], right[at + 1, 0] = value, value
            versus.lowrank([filled(weights((m, n), dtype, generator))], [Span(9)], [(left, right)])


def check_lowrank_large(backend, device="cpu", scale="full") -> None:
    """Several chunks, threads and panels, at odd sizes,
    among small tensors, and more panels than lie in memory at once."""
    generator, versus = source(check_lowrank_large), Versus(check_lowrank_large, backend, device, scale)
    shapes = [(2, 3), (151, 233), (0, 4), (1, 1)]
    for dtype in DTYPES[:1] if scale == "quick" else DTYPES:
        thetas = [theta_of(generator, shape, dtype, offset=1) for shape in shapes]
        factors = [factors_of(generator, *shape, 5) for shape in shapes]
        versus.lowrank(
            thetas, [Span(who) for who in ids(generator, len(shapes))], factors, rounding="stochastic"
        )
    tall = theta_of(generator, (40, 1100), torch.float32)
    versus.lowrank([tall], [Span(2)], [factors_of(generator, 40, 1100, 33)])
    if scale == "full":
        thetas = [theta_of(generator, (1, 20_001), torch.float32) for _ in range(5)]
        versus.lowrank(thetas, [Span(1)] * 5, [factors_of(generator, 1, 20_001, 17) for _ in thetas])
        turned = theta_of(generator, (257, 300), torch.bfloat16, see=lambda x: x.t())
        versus.lowrank([turned], [Span(4)], [factors_of(generator, 300, 257, 3)])


def check_lowrank_empty(backend, device="cpu", scale="full") -> None:
    """No tensor, and only empty tensors, are launches that do nothing and count nothing."""
    for shapes in ([], [(0,)], [(3, 0), (0, 3)]):
        tensors = [torch.empty(shape, device=device) for shape in shapes]
        factors = [torch.ones(3, 2, device=device) for _ in shapes]
        count = backend.lowrank_(
            Batch(tensors, [Span(1)] * len(shapes)), Outer(factors, factors, [1.0] * len(shapes))
        )
        equal(count, torch.zeros(1, dtype=torch.int64), "lowrank_ of nothing")


def check_lowrank_shards(backend, device="cpu", scale="full") -> None:
    """1, 2 and 4 shards give the bits of the whole, cut on row borders or inside rows, or by columns."""
    generator = source(check_lowrank_shards)
    m, n = (9, 23) if scale == "quick" else (37, 271)
    for dtype, rounding in (
        (torch.float32, "nearest"),
        (torch.bfloat16, "stochastic"),
        (torch.float16, "stochastic"),
    ):
        start = weights((m, n), dtype, generator)
        left, right = (f.to(device) for f in factors_of(generator, m, n, 11))
        expected = None
        for cut in (1, 2, 4, "columns"):
            whole = start.to(device, copy=True)
            if cut == "columns":
                parts = [whole[:, :7], whole[:, 7:]]
                spans = [Span(77, 0, n), Span(77, 7, n)]
            else:
                parts = list(torch.tensor_split(whole.view(-1), cut))
                spans = [Span(77, p.storage_offset()) for p in parts]
            many = len(parts)
            factors = Outer([left] * many, [right] * many, [0.3] * many, 0.99)
            backend.lowrank_(Batch(parts, spans, rounding), factors, Noise(None, SEED, [(3, 0)]))
            expected = whole.cpu() if expected is None else expected
            equal(whole, expected, f"lowrank_ {dtype} {rounding}, shards: {cut}")


EVERY: dict[str, Callable] = {
    name[6:]: check for name, check in list(globals().items()) if name.startswith("check_")
}
LOWRANK = {name: check for name, check in EVERY.items() if name.startswith("lowrank_")}
CHECKS = {name: check for name, check in EVERY.items() if name not in LOWRANK}


def run(
    backend,
    device: str = "cpu",
    scale: str = "full",
    only: Sequence[str] = tuple(EVERY),
    checks: dict[str, Callable] = EVERY,
) -> dict[str, str | None]:
    """Every check's verdict: None, or what went wrong. An exception of the backend is a verdict too."""
    verdicts: dict[str, str | None] = {}
    for name in only:
        try:
            checks[name](backend, device, scale)
            verdicts[name] = None
        except Exception as problem:
            verdicts[name] = f"{type(problem).__name__}: {problem}"
    return verdicts
