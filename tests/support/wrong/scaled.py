"""Mistakes with the factors of z. tests/backends/test_scaled.py runs them."""

from __future__ import annotations

import torch

from zokern.backends import reference

from .patched import Patched

scaled, factors_of = reference.scaled, reference.factors_of


class Wrong(Patched):
    verbs = ("draw", "axpy_", "perturb", "update_")

    def update_(self, *arguments, **named):
        return self._run("update_", *arguments, **named)


class Ignored(Wrong):
    """There are no factors."""

    rejected_by = ("scaled_sizes", "scaled_roundings", "scaled_places", "scaled_rows", "scaled_update",
        "scaled_tiles",
                   "scaled_special", "scaled_shards")  # fmt: skip
    replaced = {"scaled": lambda values, factors: values}


class AfterTheSum(Wrong):
    """The sum of several draws is multiplied, and not each z:
    one rounding where there should be one for each draw."""

    rejected_by = ("scaled_roundings", "scaled_update")

    def _sum(self, verb, batch, noise, rest):
        last = len(noise.draws) - 1
        calls = {"scaled": 0}

        def late(values, factors):
            calls["scaled"] += 1
            return scaled(values, factors) if (calls["scaled"] - 1) % (last + 1) == last else values

        self.replaced = {"scaled": late}
        return self._run(verb, batch, noise, rest)

    def axpy_(self, batch, noise, terms):
        return self._sum("axpy_", batch, noise, terms)

    def update_(self, batch, noise, update):
        return self._sum("update_", batch, noise, update)


class InTheCoefficient(Wrong):
    """a (z s) is computed as (a s) z: perturb rounds the product of the amount and the factor."""

    rejected_by = ("scaled_sizes", "scaled_tiles")

    def perturb(self, batch, noise, amounts, outs):
        amount = torch.tensor(amounts[0], dtype=torch.float32)
        self.replaced = {
            "scaled": lambda values, s: values if s is None else (values * (amount * s.float())) / amount
        }
        return self._run("perturb", batch, noise, amounts, outs)


class OfAnotherTensor(Wrong):
    """The factors of the tensor before, where it has as many."""

    rejected_by = ("scaled_roundings", "scaled_tiles", "scaled_update")

    @staticmethod
    def _of(batch, i):
        right, other = factors_of(batch, i), factors_of(batch, i - 1)
        return right if right is None or other is None or len(other) != len(right) else other

    replaced = {"factors_of": _of}


class Inverted(Wrong):
    """A mask keeps what it should drop."""

    rejected_by = ("scaled_sizes", "scaled_rows")
    replaced = {"scaled": lambda values, s: scaled(values, s if s is None or s.dtype != torch.bool else ~s)}


class Squared(Wrong):
    """z is multiplied twice."""

    rejected_by = ("scaled_sizes", "scaled_roundings", "scaled_update")
    replaced = {"scaled": lambda values, s: scaled(scaled(values, s), s)}


class InHalf(Wrong):
    """Float32 factors are read in bfloat16."""

    rejected_by = ("scaled_sizes", "scaled_update")
    replaced = {"scaled": lambda values, s: scaled(values, s if s is None else s.to(torch.bfloat16))}


class Fused(Wrong):
    """z s is not rounded before it is multiplied and added:
    in float64, as a contracting compiler might have it."""

    rejected_by = ("scaled_sizes", "scaled_special")
    replaced = {"scaled": lambda values, s: values if s is None else values.double() * s.double()}

    def draw(self, batch, noise):  # one product, so nothing can be fused
        return reference.Reference.draw(self, batch, noise)


class RowsFromZero(Wrong):
    """Looked-up rows take the first rows of the factors."""

    rejected_by = ("scaled_rows",)

    @staticmethod
    def _of(batch, i):
        scale, rows = batch.scale(i), batch.spans[i].rows
        if scale is None or rows is None:
            return factors_of(batch, i)
        return scale[torch.arange(rows.numel()) % scale.shape[0]].reshape(-1)

    replaced = {"factors_of": _of}


class ByMemory(Wrong):
    """The factors of a transposed tensor are read in the order of its memory."""

    rejected_by = ("scaled_places",)

    @staticmethod
    def _of(batch, i):
        theta, right = batch.tensors[i], factors_of(batch, i)
        if (
            right is None
            or theta.dim() != 2
            or batch.spans[i].rows is not None
            or theta.stride(0) >= theta.stride(1)
        ):
            return right
        return right.view(theta.shape[1], theta.shape[0]).t().reshape(-1)

    replaced = {"factors_of": _of}


class FirstOfAll(Wrong):
    """Every shard or chunk takes the factors from the first element of the tensor's numbering."""

    rejected_by = ("scaled_shards",)

    def axpy_(self, batch, noise, terms):
        if batch.scales is not None and len(batch.tensors) > 1 and batch.scales[0] is not None:
            scales = [batch.scales[0][: len(t)] for t in batch.tensors[1:]]
            if all(len(s) == len(t) for s, t in zip(scales, batch.tensors[1:])):
                batch = batch._replace(scales=[batch.scales[0], *scales])
        return self._run("axpy_", batch, noise, terms)


BACKENDS = [
    kind
    for kind in vars().copy().values()
    if isinstance(kind, type) and issubclass(kind, Wrong) and kind is not Wrong
]
