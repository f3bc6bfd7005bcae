"""Mistakes in update_: its rules, its states, and what it shares with axpy_.
tests/ops/test_update.py runs them."""

from __future__ import annotations

import torch

from zokern import stream
from zokern.backends import reference
from zokern.stream import fma

from .patched import Patched

momentum, adam, z, random16 = reference.momentum, reference.adam, reference.z, reference.random16


class Wrong(Patched):
    """Only update_ sees the replacements; the others are right."""

    verbs = ("update_",)

    def update_(self, *arguments, **named):
        return self._run("update_", *arguments, **named)


class BetaFused(Wrong):
    """The other product of the average is the fused one: fma(beta, m, round(alpha g))."""

    rejected_by = ("update_sizes", "update_scalars")

    @staticmethod
    def _momentum(scalars, g, m):
        beta, alpha = scalars
        return m.copy_(fma(beta, m, alpha * g))

    replaced = {"momentum": _momentum}


class SignOfZero(Wrong):
    """Elements whose g is 0 move too."""

    rejected_by = ("update_scalars",)
    replaced = {"sign": lambda scalars, g: torch.where(g < 0, -torch.ones_like(g), torch.ones_like(g))}


class NoSign(Wrong):
    """Weights move along g and not along its sign."""

    rejected_by = ("update_sizes", "update_strides", "update_roundings")
    replaced = {"sign": lambda scalars, g: g.clone()}


class SignOfNan(Wrong):
    """A NaN of g is a 0, as torch.sign has it, so that a broken coefficient is not seen."""

    rejected_by = ("update_special",)
    replaced = {"sign": lambda scalars, g: g.sign()}


class OldMomentum(Wrong):
    """The weights move along the momentum of the step before."""

    rejected_by = ("update_firsts", "update_special", "update_large")

    @staticmethod
    def _momentum(scalars, g, m):
        before = m.clone()
        momentum(scalars, g, m)
        return before

    replaced = {"momentum": _momentum}


class NearlyRounded(Wrong):
    """sqrt and division through approximations good to two units in the last place,
    as a fast-math build has them."""

    rejected_by = ("update_roots", "update_sizes")

    @staticmethod
    def _adam(scalars, g, m, v):
        move = adam(scalars, g, m, v)
        bits = move.view(torch.int32)
        return torch.where((bits & 7 == 3) & move.isfinite(), bits + 1, bits).view(torch.float32)

    replaced = {"adam": _adam}


class SquareFused(Wrong):
    """v <- fma(g, alpha2 g, beta2 v): the square is never rounded,
    as a contracting compiler would have it."""

    rejected_by = ("update_sizes", "update_scalars")

    @staticmethod
    def _adam(scalars, g, m, v):
        beta1, alpha1, beta2, alpha2, *rest = scalars
        v.copy_(fma(g, alpha2 * g, beta2 * v))
        return adam((beta1, alpha1, torch.tensor(1.0), torch.tensor(0.0), *rest), g, m, v)

    replaced = {"adam": _adam}


class EpsSwapped(Wrong):
    """eps inside the root is added outside and the other way round."""

    rejected_by = ("update_sizes", "update_scalars")
    replaced = {"adam": lambda s, *rest: adam((*s[:4], s[6], s[5], s[4]), *rest)}


class StateUnwritten(Wrong):
    """The last state is computed and not kept."""

    rejected_by = ("update_sizes", "update_clock")

    def update_(self, batch, noise, update):
        kept = [*update.states[:-1], *([t.clone() for t in last] for last in update.states[-1:])]
        return super().update_(batch, noise, update._replace(states=kept))


class StateInHalf(Wrong):
    """The states are kept in bfloat16."""

    rejected_by = ("update_sizes", "update_large")

    def update_(self, batch, noise, update):
        count = super().update_(batch, noise, update)
        for state in update.states:
            for t in state:
                t.copy_(t.bfloat16())
        return count


class StateByMemory(Wrong):
    """The state of a strided tensor is read in the order of the tensor's memory."""

    rejected_by = ("update_strides",)

    def update_(self, batch, noise, update):
        turned = [t.dim() == 2 and t.stride(0) < t.stride(1) for t in batch.tensors]
        for state in update.states:
            for t, turn in zip(state, turned):
                if turn:
                    t.copy_(t.flatten().view(t.shape[1], t.shape[0]).t().clone())
        return super().update_(batch, noise, update)


class DecayForgotten(Wrong):
    """decay is taken for 1."""

    rejected_by = ("update_sizes", "update_clock")

    def update_(self, batch, noise, update):
        scalars = update.scalars.clone()
        scalars[0] = 1.0
        return super().update_(batch, noise, update._replace(scalars=scalars))


class OneDraw(Wrong):
    """Only the last draw of a sum is there."""

    rejected_by = ("update_roundings", "update_clock")

    def update_(self, batch, noise, update):
        last = update._replace(coefficients=update.coefficients[-1:])
        return super().update_(batch, noise._replace(draws=noise.draws[-1:]), last)


class TensorFirst(Wrong):
    """A first element inside a block is rounded down to the block."""

    rejected_by = ("update_sizes", "update_firsts", "update_shards")
    replaced = {
        "numbers": lambda theta, span, right=reference.numbers: right(
            theta, span._replace(first=span.first // 8 * 8)
        )
    }


class FirstStepsBits(Wrong):
    """The rounding bits are named by the first draw's step and not by the last one's."""

    rejected_by = ("update_roundings",)

    def update_(self, batch, noise, update):
        self.replaced = {
            "random16": lambda index, who, step, seed: random16(index, who, noise.draws[0][0], seed)
        }
        return super().update_(batch, noise, update)


class BitsOfDirection(Wrong):
    """Stochastic rounding reads the words that made the direction."""

    rejected_by = ("update_roundings",)

    @staticmethod
    def _random16(index, who, step, seed):
        word = stream.words(index // 8, who, step, stream.draw_word(1), seed).gather(
            1, (index % 8 // 2)[:, None]
        )[:, 0]
        return word >> index % 2 * 16 & 0xFFFF

    replaced = {"random16": _random16}


class CountsStates(Wrong):
    """States that are inf or NaN are counted beside the weights."""

    rejected_by = ("update_special",)

    def update_(self, batch, noise, update):
        count = super().update_(batch, noise, update)
        return count + sum(int((~t.isfinite()).sum()) for state in update.states[:1] for t in state)


class EmptyFails(Wrong):
    """A launch without elements asks for a grid of no blocks."""

    rejected_by = ("update_empty",)

    def update_(self, batch, noise, update):
        if not any(t.numel() for t in batch.tensors):
            raise RuntimeError("invalid configuration argument")
        return super().update_(batch, noise, update)


BACKENDS = [
    kind
    for kind in vars().copy().values()
    if isinstance(kind, type) and issubclass(kind, Wrong) and kind is not Wrong
]
