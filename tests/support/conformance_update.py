"""update_ on every backend, bit for bit the reference:
weights, states, low bits, memory around them, and the count.

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
    Versus,
    ids,
    located,
    low_of,
    same,
    source,
    theta_of,
    weights,
)
from guarded import Guarded, equal, filled

from zokern.backends import SCALARS, STATES, Batch, Noise, Span, Update
from zokern.backends.reference import Reference
from zokern.directions import resolve

RULES = tuple(STATES)
USUAL = {
    "momentum": (0.999, 1e-3, 0.9, 0.1),
    "adam": (0.999, 2e-3, 0.9, 0.1, 0.99, 0.01, 0.0, 1.25, 1e-6),
    "sign": (0.999, 1e-3),
}
DRAWS, COEFFS = ((3, 1), (5, 0)), (0.5, -0.25)


class Updates(Versus):
    def update(
        self, thetas: Sequence[Guarded], spans, rule: str, states, direction="normal", draws=DRAWS[:1],
        coeffs=None, scalars=(), rounding="nearest", residuals=(),
    ) -> None:  # fmt: skip
        def call(backend, groups, device):
            theta, low, *kept = groups
            numbers, a = (
                torch.tensor(x, dtype=torch.float32, device=device)
                for x in (scalars or USUAL[rule], coeffs or COEFFS[: len(draws)])
            )
            batch = Batch(theta, located(spans, device), rounding, low or None)
            return backend.update_(
                batch, Noise(resolve(direction), SEED, list(draws)), Update(a, rule, numbers, kept)
            )

        mine, right = self._both([thetas, residuals, *states], call)
        what = f"update_ {rule} {direction} K={len(draws)} {rounding}"
        same(mine[0], right[0], f"{what}, tensor")
        same(mine[1], right[1], f"{what}, residual")
        for name, got, expected in zip(STATES[rule], mine[2:], right[2:]):
            same(got, expected, f"{what}, {name}")
        equal(mine[-1], right[-1], f"{what}, how many results are inf or NaN")


def states_of(generator, rule: str, thetas: Sequence[Guarded], offset: int = 0) -> list[list[Guarded]]:
    """m of any size and sign, v of any size and not below 0, zeros among both;
    contiguous, at any alignment of float32."""
    kept = []
    for name in STATES[rule]:
        tensors = [filled(weights(t.shape, torch.float32, generator), offset=offset) for t in thetas]
        for t in tensors if name == "v" else ():
            t.view.abs_()
        kept.append(tensors)
    return kept


def check_update_sizes(backend, device="cpu", scale="full") -> None:
    generator, versus = source(check_update_sizes), Updates(check_update_sizes, backend, device, scale)
    for rule in RULES:
        for direction in DIRECTIONS:
            for offset in (0, 3) if scale == "quick" else (0, 1, 4, 7):
                thetas, spans = conformance.spread(generator, scale, offset)
                versus.update(thetas, spans, rule, states_of(generator, rule, thetas, offset), direction)


def check_update_firsts(backend, device="cpu", scale="full") -> None:
    generator, versus = source(check_update_firsts), Updates(check_update_firsts, backend, device, scale)
    for rule in RULES:
        for direction in DIRECTIONS:
            thetas, spans = conformance.far(generator, scale)
            versus.update(thetas, spans, rule, states_of(generator, rule, thetas), direction)


def check_update_strides(backend, device="cpu", scale="full") -> None:
    """Any stride of theta, in states that stay contiguous; slices of columns."""
    generator, versus = source(check_update_strides), Updates(check_update_strides, backend, device, scale)
    for rule in RULES:
        for cases in (conformance.strided, conformance.column_slices):
            for rounding in (
                ("nearest", "residual") if scale == "quick" else ("nearest", "stochastic", "residual")
            ):
                thetas, spans = cases(generator, scale)
                lows = [low_of(generator, t) for t in thetas] if rounding == "residual" else []
                states = states_of(generator, rule, thetas, 1)
                versus.update(thetas, spans, rule, states, rounding=rounding, residuals=lows)


def check_update_roundings(backend, device="cpu", scale="full") -> None:
    """One or several draws; stochastic rounding spends the bits of the last draw's step;
    low bits make an exact float32."""
    generator = source(check_update_roundings)
    versus = Updates(check_update_roundings, backend, device, scale)
    for rule in RULES:
        for rounding in ("nearest", "stochastic", "residual"):
            for direction, count, offset in (("normal", 2, 0), ("rademacher", 1, 3)):
                thetas, spans = conformance.spread(generator, scale, offset)
                spans = [s._replace(first=s.first // 8 * 8) for s in spans] if offset == 0 else spans
                lows = (
                    [filled(low_of(generator, t).view, offset) for t in thetas]
                    if rounding == "residual"
                    else []
                )
                states = states_of(generator, rule, thetas, offset)
                versus.update(
                    thetas, spans, rule, states, direction, DRAWS[:count], rounding=rounding, residuals=lows
                )  # fmt: skip


def check_update_scalars(backend, device="cpu", scale="full") -> None:
    """Numbers of all sizes, both places of eps, zeros,
    and quotients and roots that are subnormal or overflow."""
    generator, versus = source(check_update_scalars), Updates(check_update_scalars, backend, device, scale)
    size = 67 if scale == "quick" else 1003
    cases = {
        "momentum": [(1.0, 0.0, 0.9, 0.1), (0.0, 1e-30, 0.0, 1.0), (-1.5, 3.0, 1.0, -1e-40),
            (1e-40, 1e38, 1e-3, 1e30)],
        "adam": [
            (1.0, 1e-3, 0.9, 0.1, 0.999, 0.001, 0.0, 31.6, 1e-8),
            (0.99, 1e-3, 0.0, 1.0, 0.0, 1.0, 1e-8, 1.0, 0.0),
            (1.0, 0.0, 0.9, 0.1, 0.999, 0.001, 0.0, 1.0, 1e-8),
            (0.0, 1.0, 1e-30, 1e-38, 1e-10, 1e-38, 0.0, 1.0, 1e30),
            (1.0, 1e-10, 1.0, 0.0, 1.0, 0.0, 0.0, 1.0, 1e-45),
            (-1.0, 1e30, 0.5, 1e10, 0.5, 1e20, 1e-40, 1e-5, 0.0),
        ],
        "sign": [(1.0, 0.0), (0.0, 1e-30), (-1.5, 3.0), (1e-40, 1e38)],
    }  # fmt: skip
    for rule in RULES:
        for i, scalars in enumerate(cases[rule]):
            assert len(scalars) == len(SCALARS[rule])
            thetas = [theta_of(generator, (size,), dtype, offset=i) for dtype in DTYPES]
            spans = [Span(who, i) for who in ids(generator, 3)]
            # the last two make g = 0, of both signs
            for coeffs in ((1.0,), (1e-25,), (3e22,), (0.0,), (-1e-45,)):
                versus.update(
                    thetas, spans, rule, states_of(generator, rule, thetas), coeffs=coeffs, scalars=scalars
                )


def check_update_roots(backend, device="cpu", scale="full") -> None:
    """sqrt and division correctly rounded, over many mantissas and all exponents:
    theta = 0 and lr = 1 show the move itself."""
    generator, versus = source(check_update_roots), Updates(check_update_roots, backend, device, scale)
    size = 2000 if scale == "quick" else 1 << 12
    theta = [filled(torch.zeros(size), offset=j) for j in range(2)]
    for exponents in ((0, 1), (-148, 127)):
        powers = 2.0 ** torch.randint(*exponents, (3, 2, size), generator=generator).double()
        m, v, _ = (powers * (1 + torch.rand(3, 2, size, generator=generator).double())).float()
        states = [
            [filled(row) for row in (m * torch.randn(2, size, generator=generator).sign())],
            [filled(row) for row in v],
        ]
        for inside, eps in ((0.0, 0.0), (0.0, 1e-8)):
            scalars = (0.0, 1.0, 1.0, 0.0, 1.0, 0.0, inside, 1.0, eps)
            versus.update(theta, [Span(1), Span(2)], "adam", states, coeffs=(1e-30,), scalars=scalars)


def check_update_special(backend, device="cpu", scale="full") -> None:
    """inf and NaN in weights, states and coefficients; overflow; subnormals; an exact count."""
    generator, versus = source(check_update_special), Updates(check_update_special, backend, device, scale)
    size = 67 if scale == "quick" else 4099
    for rule in RULES:
        for rounding in ("nearest", "stochastic", "residual"):
            for dtype in DTYPES:
                largest = (torch.finfo(dtype).max * torch.randn(size, generator=generator).sign()).to(dtype)
                broken = weights((size,), dtype, generator)
                broken[::7], broken[1::11], broken[2::13] = float("inf"), float("-inf"), float("nan")
                subnormal = (torch.randn(size, generator=generator) * torch.finfo(dtype).smallest_normal).to(
                    dtype
                )
                for values, lr in (
                    (largest, torch.finfo(dtype).max / 100),
                    (broken, 1e-3),
                    (subnormal, 1e-38),
                ):
                    theta = filled(values, offset=8 if dtype == torch.float32 else 2)
                    low = [low_of(generator, theta)] if rounding == "residual" else []
                    states = states_of(generator, rule, [theta])
                    scalars = (USUAL[rule][0], lr, *USUAL[rule][2:])
                    versus.update(
                        [theta], [Span(9, 3)], rule, states, scalars=scalars, rounding=rounding, residuals=low
                    )
        theta = theta_of(generator, (size,), torch.float32)
        states = states_of(generator, rule, [theta])
        for kept in states:
            kept[0].view[::5], kept[0].view[1::17] = float("inf"), float("nan")
        for coeff in (1.0, float("inf"), float("nan")):
            versus.update([theta], [Span(9, 3)], rule, states, coeffs=(coeff,))


def check_update_large(backend, device="cpu", scale="full") -> None:
    """Several chunks, threads or programs, whole tiles of signs, and elements before and after them."""
    generator, versus = source(check_update_large), Updates(check_update_large, backend, device, scale)
    sizes = ((8225, 24), (5, 3))
    for rule in RULES:
        for direction in DIRECTIONS:
            cases = [(size, first, dtype) for size, first in sizes for dtype in DTYPES]
            cases += (
                [(40_001, 3, torch.float32)] if (rule, direction, scale) == ("adam", "normal", "full") else []
            )
            thetas = [theta_of(generator, (size,), dtype) for size, _, dtype in cases]
            for theta in thetas:
                theta.view[torch.randint(0, len(theta.view), (3,), generator=generator)] = float("inf")
            spans = [Span(who, first) for who, (_, first, _) in zip(ids(generator, len(cases)), cases)]
            versus.update(thetas, spans, rule, states_of(generator, rule, thetas), direction)


def check_update_shards(backend, device="cpu", scale="full") -> None:
    """1, 2 and 8 shards, in either order, give the bits of the whole, states too."""
    generator = source(check_update_shards)
    size = 203 if scale == "quick" else 10007
    for rule in RULES:
        for dtype, rounding in ((torch.float32, "nearest"), (torch.bfloat16, "stochastic")):
            start, first = weights((size,), dtype, generator), 2**31 - 100
            kept = [torch.rand(size, generator=generator) for _ in STATES[rule]]
            expected = None
            for shards in (1, 2, 8, -8):
                whole, states = start.to(device, copy=True), [k.to(device, copy=True) for k in kept]
                parts, pieces = (
                    [list(torch.tensor_split(x, abs(shards))) for x in some] for some in ([whole], states)
                )
                if shards < 0:
                    parts, pieces = ([x[::-1] for x in some] for some in (parts, pieces))
                spans = [Span(77, first + p.storage_offset()) for p in parts[0]]
                numbers, coeffs = (torch.tensor(x, device=device) for x in (USUAL[rule], COEFFS))
                backend.update_(
                    Batch(parts[0], spans, rounding),
                    Noise(resolve("normal"), SEED, list(DRAWS)),
                    Update(coeffs, rule, numbers, pieces),
                )
                found = [t.cpu() for t in (whole, *states)]
                expected = found if expected is None else expected
                for got, want in zip(found, expected):
                    equal(got, want, f"update_ {rule} {rounding}, {shards} shards")


def check_update_clock(backend, device="cpu", scale="full") -> None:
    """A clock is added to every step number, modulo 2^32; the scalars are read when the call runs."""
    generator = source(check_update_clock)
    values, who = weights((300,), torch.bfloat16, generator), ids(generator, 1)[0]
    clock = torch.zeros(1, dtype=torch.int64, device=device)
    for rule in RULES:
        for time in (7, 2**32 - 2):
            clock.fill_(time)
            for count, rounding in ((1, "nearest"), (2, "stochastic")):
                kept = [torch.rand(300, generator=generator) for _ in STATES[rule]]
                results = []
                for side, where in ((backend, device), (Reference(), "cpu")):
                    theta, states = values.clone().to(where), [[k.clone().to(where)] for k in kept]
                    moved = [
                        ((step + (0 if side is backend else time)) % 2**32, draw)
                        for step, draw in DRAWS[:count]
                    ]
                    numbers, a = (torch.tensor(x, device=where) for x in (USUAL[rule], COEFFS[:count]))
                    noise = Noise(resolve("normal"), SEED, moved, clock if side is backend else None)
                    side.update_(
                        Batch([theta], [Span(who)], rounding), noise, Update(a, rule, numbers, states)
                    )
                    results.append([theta, *(s[0] for s in states)])
                for got, want in zip(*results):
                    equal(got, want, f"update_ {rule} K={count} {rounding} at clock {time}")


def check_update_empty(backend, device="cpu", scale="full") -> None:
    """No tensor, and only empty tensors, are launches that do nothing and count nothing."""
    for rule in RULES:
        for tensors in ([], [torch.empty(0, device=device)], [torch.empty(3, 0, device=device)] * 2):
            states = [[t.clone() for t in tensors] for _ in STATES[rule]]
            numbers, coeffs = (torch.tensor(x, device=device) for x in (USUAL[rule], COEFFS[:1]))
            spans = [Span(1)] * len(tensors)
            count = backend.update_(
                Batch(tensors, spans),
                Noise(resolve("normal"), SEED, [(0, 0)]),
                Update(coeffs, rule, numbers, states),
            )
            equal(count, torch.zeros(1, dtype=torch.int64), "update_ of nothing")


CHECKS: dict[str, Callable] = {
    name[6:]: check for name, check in list(globals().items()) if name.startswith("check_")
}


def run(
    backend, device: str = "cpu", scale: str = "full", only: Sequence[str] = tuple(CHECKS)
) -> dict[str, str | None]:
    """As conformance.run."""
    return conformance.run(backend, device, scale, only, CHECKS)
