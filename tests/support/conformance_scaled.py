"""Factors of z (Batch.scales) in every verb and on every backend, bit for bit the reference: also the memory
around the factors.

As conformance.py, whose cases these checks take:
each ``check_*(backend, device, scale)`` raises AssertionError.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import conformance
import torch
from conformance import (
    DIRECTIONS,
    DTYPES,
    SEED,
    ids,
    located,
    low_of,
    out_like,
    same,
    source,
    theta_of,
    weights,
)
from conformance_update import DRAWS, RULES, USUAL, Updates, states_of
from guarded import Guarded, equal, filled

from zokern.backends import ROUNDINGS, Batch, Noise, Span, Terms, Update
from zokern.directions import resolve

# None: a tensor without factors beside others that have some
KINDS = (torch.float32, torch.bfloat16, torch.bool, None)


def factors_of(generator, shape, kind: torch.dtype | None, offset: int = 0) -> Guarded | None:
    """Factors of any sign and size, zeros among them; or a mask of half of the elements."""
    if kind is None:
        return None
    values = weights(tuple(shape), torch.float32, generator)
    return filled(values > 0 if kind == torch.bool else (values * 64).to(kind), offset)


def factors_for(generator, thetas: Sequence[Guarded], turn: int = 0, offset: int = 0) -> list[Guarded | None]:
    """Every kind of factors with every dtype of weights; `turn` says which kind comes first."""
    return [factors_of(generator, t.shape, KINDS[(i + turn) % 4], offset) for i, t in enumerate(thetas)]


class Scaled(Updates):
    """Runs a verb with factors, which no backend may write."""

    def _scaled(
        self, what: str, groups: Sequence[Sequence[Guarded]], scales: Sequence[Guarded | None], call: Callable
    ) -> None:
        given = [s for s in scales if s is not None]

        def with_factors(backend, views, device):
            left = iter(views[-1])
            return call(backend, views[:-1], [None if s is None else next(left) for s in scales], device)

        mine, right = self._both([*groups, given], with_factors)
        for j, (got, expected) in enumerate(zip(mine[:-1], right[:-1])):
            same(got, expected, f"{what}, group {j}, tensor")
        if mine[-1] is not None:
            equal(mine[-1], right[-1], f"{what}, how many results are inf or NaN")

    def draw(self, outs, spans, direction, scales) -> None:  # type: ignore[override]
        def call(backend, groups, factors, device):
            batch = Batch(groups[0], located(spans, device), scales=factors)
            backend.draw(batch, Noise(resolve(direction), SEED, [(3, 1)]))

        self._scaled(f"draw {direction}", [outs], scales, call)

    def axpy(self, thetas, spans, direction, scales, draws=((3, 1),), coeffs=(1e-2,), decay=1.0,
        rounding="nearest",
             residuals=(), each=0) -> None:  # type: ignore[override]  # fmt: skip
        def call(backend, groups, factors, device):
            a = torch.tensor(coeffs, dtype=torch.float32, device=device)
            batch = Batch(groups[0], located(spans, device), rounding, groups[1] or None, factors)
            return backend.axpy_(batch, Noise(resolve(direction), SEED, list(draws)), Terms(a, decay, each))

        self._scaled(f"axpy_ {direction} K={len(draws)} {rounding}", [thetas, residuals], scales, call)

    def perturb(self, thetas, spans, direction, outs, scales, amounts=(1e-2, -1e-2), residuals=()) -> None:
        def call(backend, groups, factors, device):
            theta, low, *sides = groups
            batch = Batch(theta, located(spans, device), residuals=low or None, scales=factors)
            backend.perturb(batch, Noise(resolve(direction), SEED, [(3, 1)]), list(amounts), sides)

        self._scaled(f"perturb {direction}", [thetas, residuals, *outs], scales, call)

    def update(self, thetas, spans, rule, states, scales, direction="normal", draws=DRAWS[:1],
               rounding="nearest", residuals=()) -> None:  # fmt: skip
        def call(backend, groups, factors, device):
            theta, low, *kept = groups
            numbers, a = (torch.tensor(x, device=device) for x in (USUAL[rule], (0.5, -0.25)[: len(draws)]))
            batch = Batch(theta, located(spans, device), rounding, low or None, factors)
            return backend.update_(
                batch, Noise(resolve(direction), SEED, list(draws)), Update(a, rule, numbers, kept)
            )

        self._scaled(f"update_ {rule} {direction} {rounding}", [thetas, residuals, *states], scales, call)


def check_scaled_sizes(backend, device="cpu", scale="full") -> None:
    """Every size and alignment of weights, results and factors."""
    generator, versus = source(check_scaled_sizes), Scaled(check_scaled_sizes, backend, device, scale)
    for direction in DIRECTIONS:
        for turn, offset in enumerate((0, 3) if scale == "quick" else (0, 0, 1, 3, 4, 5, 7)):
            thetas, spans = conformance.spread(generator, scale, offset)
            spans = [s._replace(first=s.first // 8 * 8) for s in spans] if turn == 0 else spans
            factors = factors_for(generator, thetas, turn, offset)
            versus.draw([out_like(t, offset=offset) for t in thetas], spans, direction, factors)
            versus.axpy(thetas, spans, direction, factors)
            dtype = torch.float32 if turn % 2 else None
            outs = [
                [out_like(t, dtype, offset=(offset * 5 + j) % 8) for t in thetas] for j in range(1 + turn % 2)
            ]
            versus.perturb(thetas, spans, direction, outs, factors, (1e-2, -1e-2)[: len(outs)])


def check_scaled_roundings(backend, device="cpu", scale="full") -> None:
    """One draw, a short sum, a long one, replays: every rounding, a decay, aligned and not."""
    generator, versus = source(check_scaled_roundings), Scaled(check_scaled_roundings, backend, device, scale)
    for number, rounding in enumerate(ROUNDINGS):
        for turn, (count, each) in enumerate(((1, 0), (3, 0), (11, 0), (40, 0), (3, 1), (4, 2))):
            if scale == "quick" and count > 4 and (turn + number) % 3:
                continue  # a long sum is a loop over terms, of which rounding knows nothing
            direction, offset = DIRECTIONS[turn % 2], (0, 0, 3, 0, 0, 1)[turn]
            cases = [
                (size, dtype)
                for size in ((29, 300) if scale == "quick" else (29, 300, 1029))
                for dtype in DTYPES
            ]
            thetas = [theta_of(generator, (size,), dtype, offset) for size, dtype in cases]
            spans = [Span(who, 8 * i + offset) for i, who in enumerate(ids(generator, len(cases)))]
            lows = (
                [filled(low_of(generator, t).view, offset) for t in thetas] if rounding == "residual" else []
            )
            draws, coeffs, decays = conformance.replay(generator, count, each or count)
            factors = factors_for(generator, thetas, turn, offset)
            versus.axpy(
                thetas,
                spans,
                direction,
                factors,
                draws,
                coeffs,
                decays if each else decays[0],
                rounding,
                lows,
                each,
            )


def check_scaled_places(backend, device="cpu", scale="full") -> None:
    """Factors are addressed in the tensor's logical order: any stride, slices of columns with a pitch."""
    generator, versus = source(check_scaled_places), Scaled(check_scaled_places, backend, device, scale)
    for turn, cases in enumerate((conformance.strided, conformance.column_slices)):
        for direction in DIRECTIONS:
            for rounding in ("nearest", "residual") if scale == "quick" else ROUNDINGS:
                thetas, spans = cases(generator, scale)
                lows = [low_of(generator, t) for t in thetas] if rounding == "residual" else []
                factors = factors_for(generator, thetas, turn, 1)
                versus.axpy(thetas, spans, direction, factors, rounding=rounding, residuals=lows)
            outs = [[out_like(t, offset=j) for t in thetas] for j in range(2)]
            versus.perturb(
                thetas, spans, direction, outs, factors, residuals=[low_of(generator, t) for t in thetas]
            )
            versus.draw([out_like(t) for t in thetas], spans, direction, factors)


def check_scaled_rows(backend, device="cpu", scale="full") -> None:
    """Looked-up rows take their own rows of the factors, which have the shape of the whole matrix."""
    generator, versus = source(check_scaled_rows), Scaled(check_scaled_rows, backend, device, scale)
    for direction in DIRECTIONS:
        thetas, spans = [], []
        for count, columns in (
            [(11, 9), (50, 64)] if scale == "quick" else [(11, 9), (50, 64), (1, 8), (40, 200)]
        ):
            for dtype in DTYPES:
                for looked_up in (0, 1, 24):  # the last one's rows are whole units on 16 bytes
                    rows = torch.randint(0, count, (looked_up,), generator=generator)
                    thetas.append(theta_of(generator, (count, columns), dtype, offset=looked_up % 3))
                    spans.append(
                        Span(ids(generator, 1)[0], looked_up, None if looked_up else columns + 5, rows)
                    )
        factors = factors_for(generator, thetas)
        outs = [[out_like(t, None, s.rows) for t, s in zip(thetas, spans)] for _ in range(2)]
        versus.perturb(thetas, spans, direction, outs, factors)
        versus.draw([out_like(t, None, s.rows) for t, s in zip(thetas, spans)], spans, direction, factors)


def check_scaled_update(backend, device="cpu", scale="full") -> None:
    """Every rule, rounding and kind of factors; one draw or two; strides and slices."""
    generator, versus = source(check_scaled_update), Scaled(check_scaled_update, backend, device, scale)
    for rule in RULES:
        for turn, rounding in enumerate(ROUNDINGS):
            spread = conformance.spread(generator, scale, turn)
            for thetas, spans in (spread, conformance.strided(generator, scale)):
                lows = [low_of(generator, t) for t in thetas] if rounding == "residual" else []
                spans = [s._replace(first=s.first // 8 * 8) for s in spans] if turn == 0 else spans
                states = states_of(generator, rule, thetas, turn)
                factors = factors_for(generator, thetas, turn, turn)
                draws, direction = DRAWS[: 1 + turn % 2], DIRECTIONS[turn % 2]
                versus.update(thetas, spans, rule, states, factors, direction, draws, rounding, lows)


def check_scaled_tiles(backend, device="cpu", scale="full") -> None:
    """Tensors of several chunks, and long enough for the tiles that share Philox blocks,
    with elements before and after them."""
    generator, versus = source(check_scaled_tiles), Scaled(check_scaled_tiles, backend, device, scale)
    sizes = ((8225, 24), (33_000, 0)) if scale == "quick" else ((8225, 24), (70_001, 3), (36_000, 8 * 15))
    for direction in DIRECTIONS:
        cases = [(size, first, dtype) for size, first in sizes for dtype in (*DTYPES, torch.bfloat16)]
        thetas = [theta_of(generator, (size,), dtype) for size, _, dtype in cases]
        for theta in thetas:
            theta.view[torch.randint(0, len(theta.view), (3,), generator=generator)] = float("inf")
        spans = [Span(who, first) for who, (_, first, _) in zip(ids(generator, len(cases)), cases)]
        factors = factors_for(generator, thetas)
        versus.axpy(thetas, spans, direction, factors)
        versus.draw([out_like(t) for t in thetas], spans, direction, factors)
        versus.perturb(thetas, spans, direction, [[out_like(t) for t in thetas] for _ in range(2)], factors)


def check_scaled_special(backend, device="cpu", scale="full") -> None:
    """inf, NaN of any payload, overflow and subnormal products; the count is exact. A product is rounded
    before it is added."""
    generator, versus = source(check_scaled_special), Scaled(check_scaled_special, backend, device, scale)
    size = 67 if scale == "quick" else 4099
    payload = torch.tensor(0x7FFFFFFF, dtype=torch.int32).view(torch.float32)
    for rounding in ROUNDINGS:
        for kind in (torch.float32, torch.bfloat16):
            factors = []
            for _ in DTYPES:
                values = weights((size,), torch.float32, generator) * 64
                values[::7], values[1::11], values[2::13], values[3::17] = float("inf"), payload, 3e38, 1e-39
                values[4::17] = -payload
                factors.append(filled(values.to(kind)))
            for count in (1, 2):
                thetas = [theta_of(generator, (size,), dtype) for dtype in DTYPES]
                spans = [Span(who, 8) for who in ids(generator, 3)]
                lows = [low_of(generator, t) for t in thetas] if rounding == "residual" else []
                draws, coeffs = DRAWS[:count], (1e-3, 0.5)[:count]
                versus.axpy(
                    thetas, spans, "normal", factors, draws, coeffs, rounding=rounding, residuals=lows
                )
                versus.perturb(thetas, spans, "normal", [[out_like(t) for t in thetas]], factors, (1e-3,))


def check_scaled_shards(backend, device="cpu", scale="full") -> None:
    """1, 2 and 4 shards give the bits of the whole, each with its part of the factors; a list without factors
    is one without scales."""
    generator, size = source(check_scaled_shards), 203 if scale == "quick" else 10007
    for kind in KINDS:
        start, coeffs = weights((size,), torch.bfloat16, generator), torch.tensor([1e-2], device=device)
        factors = factors_of(generator, (size,), kind)
        expected = None
        for shards in (1, 2, 4):
            whole = start.to(device, copy=True)
            parts = list(torch.tensor_split(whole, shards))
            scales = (
                [None] * shards
                if factors is None
                else list(torch.tensor_split(factors.copy_to(device).view, shards))
            )
            spans = [Span(77, 5 + p.storage_offset()) for p in parts]
            backend.axpy_(
                Batch(parts, spans, scales=scales), Noise(resolve("normal"), SEED, [(3, 1)]), Terms(coeffs)
            )
            if expected is None:
                expected = whole.cpu()
                plain = start.to(device, copy=True)
                backend.axpy_(
                    Batch([plain], [Span(77, 5)]), Noise(resolve("normal"), SEED, [(3, 1)]), Terms(coeffs)
                )
                if (kind is None) != torch.equal(plain.cpu(), expected):
                    raise AssertionError(f"axpy_ with factors {kind} against one without")
            equal(whole, expected, f"axpy_ with factors {kind}, {shards} shards")


CHECKS: dict[str, Callable] = {
    name[6:]: check for name, check in list(globals().items()) if name.startswith("check_")
}


def run(
    backend, device: str = "cpu", scale: str = "full", only: Sequence[str] = tuple(CHECKS)
) -> dict[str, str | None]:
    """As conformance.run."""
    return conformance.run(backend, device, scale, only, CHECKS)


__all__ = ["CHECKS", "run"]
