"""Mistakes in the arithmetic: a contraction, an order, a sign, an approximation."""

from __future__ import annotations

import torch

from zokern import stream
from zokern.backends import Batch, reference
from zokern.directions import normal

from .patched import Patched

z, fma, random16 = reference.z, stream.fma, reference.random16


def unfused(a, b, c):
    """round(round(a * b) + c): float32 with two roundings."""
    return torch.as_tensor(a * b, dtype=torch.float32) + c


class UnfusedUpdate(Patched):
    """theta + a z with the product rounded on its own."""

    rejected_by = ("axpy_sizes", "axpy_many_draws", "perturb_sizes")
    replaced = {"fma": unfused}


class UnfusedNormal(Patched):
    """The polynomials of the direction without fused multiply-adds."""

    rejected_by = ("draw_sizes", "axpy_sizes", "perturb_sizes")

    replaced = {"normal.fma": unfused}


class TwiceRoundedFma(Patched):
    """An fma by way of float64 whose sum is rounded to nearest there and again to float32:
    wrong once in 2^29 or so."""

    rejected_by = ("axpy_one_rounding",)
    replaced = {"fma": lambda a, b, c: (torch.as_tensor(a).double() * b.double() + c.double()).float()}


class ContractedRoot(Patched):
    """The compiler fuses the product square * y into the step that follows it: 1 - (square y) y from
    unrounded square y."""

    rejected_by = ("draw_sizes", "axpy_sizes")

    @staticmethod
    def _radius(word):
        f = stream.to_float(word & 0xFFFFF | 0x4B000000) + -8388607.5
        bits = stream.to_bits(f)
        mantissa = stream.to_float(bits & 0x7FFFFF | 0x3F800000)
        square = fma(
            bits.to(torch.int32).float(), normal._MINUS_2_LN2, normal._horner(normal._LOG2, mantissa)
        )
        y = stream.to_float(normal._ROOT_MAGIC - (stream.to_bits(square) >> 1))
        s = square * y
        e = fma(-square, y * y, 1.0)
        h = fma(e, normal._ROOT[0], normal._ROOT[1]) * e
        return fma(s, h, s)

    replaced = {"normal.radius": _radius}


class ContractedDecay(Patched):
    """decay * theta + a z as one fma(decay, theta, round(a z)):
    the contraction that a compiler picks from the formula."""

    rejected_by = ("axpy_sizes", "axpy_many_draws")

    def axpy_(self, batch, noise, terms):
        def contracted(a, b, c):
            return fma(torch.tensor(terms.decay, dtype=torch.float32), c, a * b)

        self.replaced = {"fma": contracted}
        return super().axpy_(batch, noise, terms._replace(decay=1.0))


class Folded(Patched):
    """theta + (a r) sin phi: the coefficient is folded into the radius,
    which saves a product and moves the rounding."""

    rejected_by = ("axpy_sizes", "axpy_many_draws", "perturb_sizes")

    @staticmethod
    def _z(direction, index, who, step, draw, seed):
        if direction.name != "normal":
            return z(direction, index, who, step, draw, seed)
        word = stream.words(index // 8, who, step, draw, seed).gather(1, (index % 8 // 2)[:, None])[:, 0]
        return normal.radius(word), torch.where(index % 2 == 0, *normal.angle(word))

    @staticmethod
    def _fma(a, b, c):
        return fma(a * b[0], b[1], c) if isinstance(b, tuple) else fma(a, b, c)

    replaced = {"z": _z, "fma": _fma}
    verbs = ("axpy_", "perturb")


class SignFlip(Patched):
    """theta - a z."""

    rejected_by = ("axpy_sizes", "perturb_sizes")
    replaced = {"fma": lambda a, b, c: fma(-a, b, c)}


class SecondSideFromFirst(Patched):
    """theta - eps z computed from the stored theta + eps z, as an in-place walk does."""

    rejected_by = ("perturb_sizes", "perturb_firsts", "perturb_strides")

    def perturb(self, batch, noise, scales, outs):
        super().perturb(batch, noise, scales[:1], outs[:1])
        if len(scales) == 2:
            whole = [s if s.rows is None else reference.Span(s.who, s.first) for s in batch.spans]
            super().perturb(Batch(outs[0], whole), noise, [scales[1] - scales[0]], outs[1:])


class DecayAfter(Patched):
    """decay * (theta + sum): the update decays too."""

    rejected_by = ("axpy_many_draws", "axpy_stochastic")

    def axpy_(self, batch, noise, terms):
        return super().axpy_(batch, noise, terms._replace(coefficients=terms.coefficients * terms.decay))


class FirstDecayOnly(Patched):
    """A replay takes the decay of its first step for all."""

    rejected_by = ("axpy_each", "axpy_each_is_calls")

    def axpy_(self, batch, noise, terms):
        decay = terms.decay if isinstance(terms.decay, float) else terms.decay[0]
        return super().axpy_(batch, noise, terms._replace(decay=decay))


class MissingLastDraw(Patched):
    """A loop over draws that ends one early when there are several."""

    rejected_by = ("axpy_many_draws",)

    def axpy_(self, batch, noise, terms):
        coeffs = terms.coefficients
        if len(coeffs) > 1:
            coeffs = torch.cat([coeffs[:-1], torch.zeros_like(coeffs[-1:])])
        return super().axpy_(batch, noise, terms._replace(coefficients=coeffs))


class DrawsReversed(Patched):
    """The right terms in another order: a sum in float32 depends on it."""

    rejected_by = ("axpy_many_draws",)

    def axpy_(self, batch, noise, terms):
        last = noise.draws[-1][0]
        self.replaced = {"random16": lambda index, who, step, seed: random16(index, who, last, seed)}
        flipped = terms._replace(coefficients=terms.coefficients.flip(0))
        return super().axpy_(batch, noise._replace(draws=noise.draws[::-1]), flipped)


class Libm(Patched):
    """Box-Muller by way of the library's log, sqrt, sin and cos: as good a normal, and not the same bits."""

    rejected_by = ("draw_sizes", "axpy_sizes", "perturb_sizes")

    @staticmethod
    def _z(direction, index, who, step, draw, seed):
        if direction.name != "normal":
            return z(direction, index, who, step, draw, seed)
        word = stream.words(index // 8, who, step, draw, seed).gather(1, (index % 8 // 2)[:, None])[:, 0]
        radius = (-2 * (((word & 0xFFFFF) + 0.5) * 2.0**-20).log()).sqrt()
        angle = torch.where(word < 2**31, word, word - 2**32) * (torch.pi * 2.0**-31)
        return (radius * torch.where(index % 2 == 0, angle.sin(), angle.cos())).float()

    replaced = {"z": _z}
