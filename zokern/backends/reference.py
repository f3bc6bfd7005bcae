"""Backend ``reference``: the definition in plain PyTorch, on any device. It is slow."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .. import stream
from ..stream import fma, to_bits, to_float
from .launch import Batch, Noise, Outer, Projected, Projection, Span, Terms, Update, rounding_bits, step_at
from .validation import Validator

CHUNK = 1 << 20  # elements at a time, so that the float64 temporaries stay small
VALID = Validator("reference", None)


def numbers(theta: Tensor, span: Span) -> Tensor:
    """Returns the stream's element numbers of a tensor, int64, row-major and flat."""
    if span.rows is None and span.pitch is None:
        return torch.arange(span.first, span.first + theta.numel(), dtype=torch.int64, device=theta.device)
    columns = theta.shape[-1]
    rows = (
        torch.arange(theta.shape[0], dtype=torch.int64, device=theta.device)
        if span.rows is None
        else span.rows
    )
    pitch = columns if span.pitch is None else span.pitch
    return (
        span.first + rows[:, None] * pitch + torch.arange(columns, dtype=torch.int64, device=theta.device)
    ).flatten()


def z(direction, index: Tensor, who: int, step: int, draw: int, seed: int) -> Tensor:
    """Returns float32 values of the elements with these numbers."""
    blocks, where = torch.unique(index // direction.per_block, return_inverse=True)
    values = direction.values(stream.words(blocks, who, step, draw, seed))
    return values[where, index % direction.per_block]


def factors_of(batch: Batch, i: int) -> Tensor | None:
    """Returns the factors of a tensor's elements, flat: those of the rows that its span looks up."""
    scale, rows = batch.scale(i), batch.spans[i].rows
    return None if scale is None else (scale if rows is None else scale[rows]).reshape(-1)


def scaled(values: Tensor, factors: Tensor | None) -> Tensor:
    """Returns float32(z * s), or z where a tensor has no factors."""
    return values if factors is None else values * factors.float()


def random16(index: Tensor, who: int, step: int, seed: int) -> Tensor:
    """Returns the 16 bits that stochastic rounding spends on each element."""
    blocks, where = torch.unique(index // 8, return_inverse=True)
    word = stream.words(blocks, who, step, stream.draw_word(0, stream.ROUNDING), seed)[where, index % 8 // 2]
    return word >> index % 2 * 16 & 0xFFFF


def stochastic(value: Tensor, dtype: torch.dtype, random: Tensor) -> Tensor:
    """Returns (|x| + r) cut towards zero, r uniform over the bits that go (csrc/zo/rounding.h)."""
    x = to_bits(value)
    special = x & 0x7FFFFFFF >= 0x7F800000
    if dtype == torch.bfloat16:
        rounded = to_float((x + random & 0xFFFF0000) & 0xFFFFFFFF).to(dtype)
    else:
        a, exponent = x & 0x7FFFFFFF, x >> 23 & 0xFF
        normal = exponent >= 113
        magnitude = torch.where(normal, a, x & 0x7FFFFF | torch.where(exponent > 0, 0x800000, 0))
        shift = torch.where(normal, 13, torch.where(exponent > 95, 126 - exponent, 31))
        half = (magnitude + ((random << 16) >> (32 - shift)) >> shift) - torch.where(normal, 112 << 10, 0)
        half = half.clamp(max=0x7C00) | (x >> 16 & 0x8000)
        rounded = torch.where(half < 2**15, half, half - 2**16).to(torch.int16).view(dtype)
    return torch.where(special, value.to(dtype), rounded)


def join(high: Tensor, low: Tensor) -> Tensor:
    """Joins bfloat16 and its 16 low bits to the float32 that they make."""
    bits = (high.view(torch.int16).to(torch.int64) << 16) + low.to(torch.int64)
    return to_float(bits & 0xFFFFFFFF)


def split(value: Tensor) -> tuple[Tensor, Tensor]:
    """Splits float32 into the nearest bfloat16, ties away from zero, and its signed low bits."""
    x = to_bits(value)
    special = x & 0x7FFFFFFF >= 0x7F800000
    high = (x + 0x8000) >> 16 & 0xFFFF
    high = torch.where(high < 2**15, high, high - 2**16).to(torch.int16).view(torch.bfloat16)
    low = x & 0xFFFF
    low = torch.where(low < 2**15, low, low - 2**16).to(torch.int16)
    return torch.where(special, value.to(torch.bfloat16), high), torch.where(
        special, torch.zeros_like(low), low
    )


def contract(left: Tensor, right: Tensor, index: Tensor) -> Tensor:
    """Returns (left right^T) at these element numbers: fma over k in order, from zero."""
    row, column = index // right.shape[0], index % right.shape[0]
    total = torch.zeros(index.numel(), dtype=torch.float32, device=index.device)
    for k in range(right.shape[1]):
        total = fma(left[row, k], right[column, k], total)
    return total


def momentum(scalars: Sequence[Tensor], g: Tensor, m: Tensor) -> Tensor:
    """Returns the move of theta; writes m."""
    beta, alpha = scalars
    m.copy_(fma(alpha, g, beta * m))
    return m


def adam(scalars: Sequence[Tensor], g: Tensor, m: Tensor, v: Tensor) -> Tensor:
    """Returns the move of theta; writes m and v.

    Square roots and quotients are rounded correctly everywhere, because they go through float64."""
    beta1, alpha1, beta2, alpha2, inside, correction, eps = scalars
    m.copy_(fma(alpha1, g, beta1 * m))
    v.copy_(fma(alpha2, g * g, beta2 * v))
    root = (v + inside).double().sqrt().float()
    return (m.double() / fma(root, correction, eps).double()).float()


def sign(scalars: Sequence[Tensor], g: Tensor) -> Tensor:
    """Returns the move of theta: 1, -1, or g itself where it is 0 or NaN."""
    return torch.where(g > 0, torch.ones_like(g), torch.where(g < 0, -torch.ones_like(g), g))


def in_order(terms: Sequence[Tensor]) -> Tensor:
    """Returns the sum of a term or more, from the first on."""
    total = terms[0]
    for term in terms[1:]:
        total = total + term
    return total


def project(projection: Projection) -> Projected:
    """Turns losses into the numbers of an update; see Backend.project."""
    losses, weights, scalars = projection
    eps, lr, weight_decay, clip, sign, count = scalars.unbind(0)
    means = in_order(losses.unbind(0)) / len(losses)
    if weights is not None:
        # a weight of 0 is no term: 0 times an infinite loss would be NaN. -0.0 is what changes no sum
        nothing = torch.full_like(means, -0.0)
        terms = [torch.where(row != 0.0, row * means, nothing) for row in weights.unbind(0)]
        sums = torch.stack([in_order(row.unbind(0)) for row in terms])
        means = torch.where((weights != 0.0).any(1), sums, torch.zeros_like(sums)) / eps
    found = means
    if weights is not None:
        found = found.float().double()
        found = torch.where(found.isnan(), found, found.clamp(-clip, clip))
    told = sign * found / count
    amounts, decay = lr * told, 1.0 - lr * weight_decay
    every = torch.cat([found, told, amounts, torch.stack([lr, decay])])
    finite = (every.float().abs() < math.inf).all()
    told, amounts = (torch.where(finite, x, torch.zeros_like(x)) for x in (told, amounts))
    decay = torch.where(finite, decay, torch.ones_like(decay)).float()
    amounts = amounts.float()
    go = finite & ((decay != 1.0) | (amounts != 0.0).any())
    return Projected(found, told, amounts, torch.stack([decay, go.float(), finite.float()]))


class Reference:
    name = "reference"

    def project(self, projection: Projection) -> Projected:
        VALID.project(projection)
        return project(projection)

    def philox4x32(self, counter: Tensor, key: tuple[int, int], rounds: int) -> Tensor:
        VALID.philox4x32(counter)
        return stream.philox4x32(counter, key, rounds)

    def draw(self, batch: Batch, noise: Noise) -> None:
        VALID.draw(batch, noise)
        (direction, seed, ((step, draw),), clock) = noise
        step = step_at(step, clock)
        for i, (out, span) in enumerate(zip(batch.tensors, batch.spans)):
            index, factors = numbers(out, span), factors_of(batch, i)
            values = torch.empty(index.numel(), dtype=out.dtype, device=out.device)
            for part in range(0, index.numel(), CHUNK):
                here = slice(part, part + CHUNK)
                drawn = z(direction, index[here], span.who, step, draw, seed)
                values[here] = scaled(drawn, None if factors is None else factors[here]).to(out.dtype)
            out.copy_(values.view(out.shape))

    def axpy_(self, batch: Batch, noise: Noise, terms: Terms) -> Tensor:
        VALID.axpy_(batch, noise, terms)
        thetas, spans, rounding, *_ = batch
        direction, seed, draws, clock = noise
        draws, coeffs = [(step_at(step, clock), draw) for step, draw in draws], terms.coefficients
        if terms.control is not None:
            if not terms.control[1]:
                return torch.zeros(1, dtype=torch.int64, device=coeffs.device)
            terms = terms._replace(decay=float(terms.control[0]))
        nonfinite = torch.zeros(1, dtype=torch.int64, device=coeffs.device)
        each, decays = terms.rounded()
        decay = torch.tensor(decays, dtype=torch.float32, device=coeffs.device)
        for i, (theta, span) in enumerate(zip(thetas, spans)):
            index, factors = numbers(theta, span), factors_of(batch, i)
            old = theta.flatten()  # row-major order for any stride
            low = old if (kept := batch.low_bits(i)) is None else kept.flatten()
            new = torch.empty_like(old)
            for part in range(0, index.numel(), CHUNK):
                here = slice(part, part + CHUNK)
                new[here] = old[here]
                for k, (step, draw) in enumerate(draws):
                    if k % each == 0:
                        value = decay[k] * (
                            join(new[here], low[here]) if kept is not None else new[here].float()
                        )
                    drawn = z(direction, index[here], span.who, step, draw, seed)
                    value = fma(coeffs[k], scaled(drawn, None if factors is None else factors[here]), value)
                    if (k + 1) % each:
                        continue
                    if kept is not None:
                        new[here], low[here] = split(value)
                    elif rounding == "stochastic" and theta.dtype != torch.float32:
                        new[here] = stochastic(
                            value, theta.dtype, random16(index[here], span.who, step, seed)
                        )
                    else:
                        new[here] = value.to(theta.dtype)
            theta.copy_(new.view(theta.shape))
            if kept is not None:
                kept.copy_(low.view(kept.shape))
            nonfinite += (~torch.isfinite(new)).sum()
        return nonfinite

    def update_(self, batch: Batch, noise: Noise, update: Update) -> Tensor:
        VALID.update_(batch, noise, update)
        thetas, spans, rounding, *_ = batch
        direction, seed, draws, clock = noise
        coeffs, rule, scalars, states, control = update
        if control is not None and not control[2]:
            return torch.zeros(1, dtype=torch.int64, device=coeffs.device)
        draws = [(step_at(step, clock), draw) for step, draw in draws]
        nonfinite = torch.zeros(1, dtype=torch.int64, device=coeffs.device)
        decay, lr, *rest = scalars
        for i, (theta, span) in enumerate(zip(thetas, spans)):
            index, factors = numbers(theta, span), factors_of(batch, i)
            old, state = theta.flatten(), [member[i].view(-1) for member in states]
            low = old if (kept := batch.low_bits(i)) is None else kept.flatten()
            new = torch.empty_like(old)
            for part in range(0, index.numel(), CHUNK):
                here = slice(part, part + CHUNK)
                g = torch.zeros(index[here].numel(), dtype=torch.float32, device=theta.device)
                for (step, draw), coefficient in zip(draws, coeffs):
                    drawn = z(direction, index[here], span.who, step, draw, seed)
                    g = fma(coefficient, scaled(drawn, None if factors is None else factors[here]), g)
                moves: dict[str, Callable[..., Tensor]] = {"momentum": momentum, "adam": adam, "sign": sign}
                move = moves[rule](rest, g, *[kind[here] for kind in state])
                value = fma(
                    lr, move, decay * (join(old[here], low[here]) if kept is not None else old[here].float())
                )
                if kept is not None:
                    new[here], low[here] = split(value)
                elif rounding == "stochastic" and theta.dtype != torch.float32:
                    new[here] = stochastic(
                        value, theta.dtype, random16(index[here], span.who, draws[-1][0], seed)
                    )
                else:
                    new[here] = value.to(theta.dtype)
            theta.copy_(new.view(theta.shape))
            if kept is not None:
                kept.copy_(low.view(kept.shape))
            nonfinite += (~torch.isfinite(new)).sum()
        return nonfinite

    def perturb(
        self, batch: Batch, noise: Noise, scales: Sequence[float], outs: Sequence[Sequence[Tensor]]
    ) -> None:
        VALID.perturb(batch, noise, scales, outs)
        thetas, spans, _, residuals, _ = batch
        (direction, seed, ((step, draw),), clock) = noise
        step = step_at(step, clock)
        for i, (theta, span) in enumerate(zip(thetas, spans)):
            index = numbers(theta, span)
            source = theta if span.rows is None else theta[span.rows]
            value = source.flatten()
            if residuals is not None and theta.dtype == torch.bfloat16:
                low = residuals[i] if span.rows is None else residuals[i][span.rows]
                value = join(value, low.flatten())
            value = value.float()
            direction_z = scaled(z(direction, index, span.who, step, draw, seed), factors_of(batch, i))
            for amount, out in zip(scales, outs):
                scale = torch.tensor(amount, dtype=torch.float32, device=theta.device)
                out[i].copy_(fma(scale, direction_z, value).to(out[i].dtype).view(out[i].shape))

    def lowrank_(
        self, batch: Batch, factors: Outer, noise: Noise | None = None, outs: Sequence[Tensor] | None = None
    ) -> Tensor:
        device = VALID.lowrank_(batch, factors, outs)
        thetas, spans, rounding, *_ = batch
        lefts, rights, scales, *_ = factors
        seed, step = rounding_bits(noise)
        step = step_at(step, None if noise is None else noise.clock)
        nonfinite = torch.zeros(1, dtype=torch.int64, device=device or "cpu")
        decay = torch.tensor(factors.decay, dtype=torch.float32, device=nonfinite.device)
        if factors.control is not None:
            decay = factors.control[0]
            if not factors.control[1]:
                return nonfinite
        for i, (theta, span, left, right) in enumerate(zip(thetas, spans, lefts, rights)):
            index = numbers(theta, span)
            scale = torch.tensor(scales[i], dtype=torch.float32, device=theta.device)
            kept = batch.low_bits(i)
            old = (theta if span.rows is None else theta[span.rows]).flatten()
            low = old if kept is None else (kept if span.rows is None else kept[span.rows]).flatten()
            new = torch.empty_like(old, dtype=theta.dtype if outs is None else outs[i].dtype)
            for part in range(0, index.numel(), CHUNK):
                here = slice(part, part + CHUNK)
                value = decay * (join(old[here], low[here]) if kept is not None else old[here].float())
                value = fma(scale, contract(left, right, index[here]), value)
                if kept is not None and outs is None:
                    new[here], low[here] = split(value)
                elif rounding == "stochastic" and new.dtype != torch.float32:
                    new[here] = stochastic(value, new.dtype, random16(index[here], span.who, step, seed))
                else:
                    new[here] = value.to(new.dtype)
            target = theta if outs is None else outs[i]
            target.copy_(new.view(target.shape))
            if kept is not None and outs is None:
                kept.copy_(low.view(kept.shape))
            nonfinite += (~torch.isfinite(new)).sum()
        return nonfinite
