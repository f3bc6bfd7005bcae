"""Mistakes in the last step, from float32 to the weights' type."""

from __future__ import annotations

import math

import torch

from zokern import stream
from zokern.backends import Terms, reference
from zokern.backends.launch import step_at

from .patched import Patched

random16, split, stochastic, join = reference.random16, reference.split, reference.stochastic, reference.join


class RoundsEveryDraw(Patched):
    """Each term of the sum is rounded to the weights' type, as K calls of an in-place add would."""

    rejected_by = ("axpy_many_draws",)

    def axpy_(self, batch, noise, terms):
        count = None
        for k, draw in enumerate(noise.draws):
            here = Terms(terms.coefficients[k : k + 1], 1.0 if k else terms.decay)
            count = super().axpy_(batch, noise._replace(draws=[draw]), here)
        return count


class DrawsByWayOfBfloat16(Patched):
    """float16 draws are made from bfloat16 ones: two roundings."""

    rejected_by = ("draw_sizes", "dtypes_share_z")

    def draw(self, batch, noise):
        super().draw(batch, noise)
        for out in batch.tensors:
            if out.dtype == torch.float16:
                out.copy_(out.to(torch.bfloat16))


class RoundsDecay(Patched):
    """decay * theta is stored before z is added: two roundings."""

    rejected_by = ("axpy_many_draws", "axpy_stochastic")

    def axpy_(self, batch, noise, terms):
        for theta in batch.tensors:
            theta.copy_((theta.float() * terms.decay).to(theta.dtype))
        return super().axpy_(batch, noise, terms._replace(decay=1.0))


class RoundsOnce(Patched):
    """A replay of several steps is one long sum, rounded at its end."""

    rejected_by = ("axpy_each", "axpy_each_is_calls")

    def axpy_(self, batch, noise, terms):
        coeffs, decay, each = terms
        count = len(coeffs)
        decays = [decay] * (count // (each or count)) if isinstance(decay, float) else decay
        after = [math.prod(decays[k // each + 1 :]) for k in range(count)] if each else [1.0] * count
        coeffs = coeffs * torch.tensor(after, device=coeffs.device)
        return super().axpy_(batch, noise, Terms(coeffs, math.prod(decays)))


class BitsOfLastStep(Patched):
    """Every rounding of a replay spends the bits of its last step."""

    rejected_by = ("axpy_each", "axpy_each_is_calls")

    def axpy_(self, batch, noise, terms):
        last = step_at(noise.draws[-1][0], noise.clock)
        self.replaced = {"random16": lambda index, who, step, seed: random16(index, who, last, seed)}
        return super().axpy_(batch, noise, terms)


class ReusedBits(Patched):
    """Stochastic rounding spends the same 16 bits on two neighbours."""

    rejected_by = ("axpy_stochastic", "lowrank_arithmetic")
    replaced = {"random16": lambda index, *names: random16(index // 2 * 2, *names)}


class BitsOfDirection(Patched):
    """Stochastic rounding reads the words that made the direction, so its error correlates with z."""

    rejected_by = ("axpy_stochastic",)

    @staticmethod
    def _random16(index, who, step, seed):
        word = stream.words(index // 8, who, step, stream.draw_word(1), seed).gather(
            1, (index % 8 // 2)[:, None]
        )[:, 0]
        return word >> index % 2 * 16 & 0xFFFF

    replaced = {"random16": _random16}


class StepOfFirstDraw(Patched):
    """The rounding bits are named by the first draw's step and not by the last one's."""

    rejected_by = ("axpy_stochastic",)

    def axpy_(self, batch, noise, terms):
        self.replaced = {
            "random16": lambda index, who, step, seed: random16(index, who, noise.draws[0][0], seed)
        }
        return super().axpy_(batch, noise, terms)


class NearestInstead(Patched):
    """Stochastic rounding was asked for and nearest is what runs."""

    rejected_by = ("axpy_stochastic", "axpy_strides")
    replaced = {"stochastic": lambda value, dtype, random: value.to(dtype)}


class HalfSubnormalsDeterministic(Patched):
    """Stochastic rounding stops at the smallest normal float16: below it the nearest value is taken."""

    rejected_by = ("axpy_special", "axpy_stochastic")

    @staticmethod
    def _stochastic(value, dtype, random):
        rounded = stochastic(value, dtype, random)
        small = (dtype == torch.float16) & (value.abs() < 2.0**-14)
        return torch.where(small, value.to(dtype), rounded)

    replaced = {"stochastic": _stochastic}


class ResidualTie(Patched):
    """The split rounds ties to even, so that low = +32768 is needed where int16 ends at 32767."""

    rejected_by = ("axpy_residual",)

    @staticmethod
    def _split(value):
        high, low = split(value)
        even = value.to(torch.bfloat16)
        tie_down = (low == -32768) & (even.view(torch.int16) != high.view(torch.int16))
        return torch.where(tie_down, even, high), torch.where(tie_down, torch.full_like(low, 32767), low)

    replaced = {"split": _split}


class ResidualUnsigned(Patched):
    """The low bits are joined as if they were unsigned."""

    rejected_by = ("axpy_residual", "perturb_arithmetic", "lowrank_arithmetic")
    replaced = {"join": lambda high, low: join(high, low.to(torch.int32) & 0xFFFF)}


class ResidualIgnored(Patched):
    """Perturbed copies are formed from the stored half without its low bits."""

    rejected_by = ("perturb_arithmetic", "perturb_rows")

    def perturb(self, batch, *rest):
        super().perturb(batch._replace(residuals=None), *rest)


class Truncates(Patched):
    """The low half is cut off instead of rounded."""

    rejected_by = ("axpy_sizes", "axpy_many_draws")

    def axpy_(self, batch, *rest):
        self.replaced = {
            "stochastic": lambda value, dtype, random: stochastic(value, dtype, torch.zeros_like(random))
        }
        rounding = "stochastic" if batch.rounding == "nearest" else batch.rounding
        return super().axpy_(batch._replace(rounding=rounding), *rest)


class FlushesSubnormals(Patched):
    """Results below the smallest normal number become zero, as in flush-to-zero mode."""

    rejected_by = ("axpy_special",)

    def axpy_(self, batch, *rest):
        count = super().axpy_(batch, *rest)
        for theta in batch.tensors:
            theta.masked_fill_(theta.abs() < torch.finfo(theta.dtype).tiny, 0)
        return count


class SaturatesOverflow(Patched):
    """A result beyond the largest number becomes the largest number."""

    rejected_by = ("axpy_special",)

    def axpy_(self, batch, *rest):
        before = [t.isfinite() for t in batch.tensors]
        count = super().axpy_(batch, *rest)
        for theta, finite in zip(batch.tensors, before):
            theta.copy_(
                torch.where(finite & theta.isinf(), theta.sign() * torch.finfo(theta.dtype).max, theta)
            )
        return count
