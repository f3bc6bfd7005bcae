"""Mistakes in low-rank products: which row and column an element is, the order and the width of the sum,
where the scale goes."""

from __future__ import annotations

import torch

from zokern import stream
from zokern.backends import Outer, reference

from .patched import Patched, only

contract, fma = reference.contract, stream.fma


class TransposedFactors(Patched):
    """Element e of the product right left^T, a matrix of m columns."""

    rejected_by = ("lowrank_ranks", "lowrank_shapes", "lowrank_large")

    @staticmethod
    def _contract(left, right, index):
        row, column = index % left.shape[0], index // left.shape[0] % right.shape[0]
        return contract(left, right, row * right.shape[0] + column)

    replaced = {"contract": _contract}


class RanksReversed(Patched):
    """The sum runs from the last k to the first: the same terms, another float32."""

    rejected_by = ("lowrank_ranks", "lowrank_arithmetic")
    replaced = {"contract": lambda left, right, index: contract(left.flip(1), right.flip(1), index)}


class WideSum(Patched):
    """The sum is kept in float64 and rounded once: better, and not the definition."""

    rejected_by = ("lowrank_ranks", "lowrank_shards")
    calls = 0

    def lowrank_(self, batch, *rest):
        WideSum.calls += (
            # a reproducible mistake would pass lowrank_shards, which has no reference:
            # every second call makes it
            1
        )
        wrong = WideSum.calls % 2 == 0 or len(batch.tensors) > 4
        self.replaced = {"contract": self._contract} if wrong else {}
        return super().lowrank_(batch, *rest)

    @staticmethod
    def _contract(left, right, index):
        n = right.shape[0]
        return (left[index // n].double() * right[index % n].double()).sum(1).float()


class UnfusedSum(Patched):
    """Each product of the sum is rounded before it is added."""

    rejected_by = ("lowrank_ranks", "lowrank_arithmetic")

    @staticmethod
    def _contract(left, right, index):
        n, total = right.shape[0], torch.zeros(index.numel())
        for k in range(right.shape[1]):
            total = left[index // n, k] * right[index % n, k] + total
        return total

    replaced = {"contract": _contract}


class LastRankForgotten(Patched):
    """A loop over k that goes in twos drops the last of an odd rank."""

    rejected_by = ("lowrank_ranks", "lowrank_firsts", "lowrank_strides")

    @staticmethod
    def _contract(left, right, index):
        even = max(1, right.shape[1] // 2 * 2)
        return contract(left[:, :even], right[:, :even], index)

    replaced = {"contract": _contract}


class ScaleIntoLeft(Patched):
    """scale * left is rounded before the sum: the fused factor of the definition is applied after it."""

    rejected_by = ("lowrank_ranks", "lowrank_arithmetic")

    def lowrank_(self, batch, factors, *rest):
        pairs = zip(factors.lefts, factors.scales)
        lefts = [left * torch.tensor(scale, dtype=torch.float32) for left, scale in pairs]
        return super().lowrank_(batch, factors._replace(lefts=lefts, scales=[1.0] * len(lefts)), *rest)


class DecaysTheProduct(Patched):
    """decay * (theta + scale left right^T)."""

    rejected_by = ("lowrank_arithmetic", "lowrank_strides")

    def lowrank_(self, batch, factors, *rest):
        return super().lowrank_(
            batch, factors._replace(scales=[s * factors.decay for s in factors.scales]), *rest
        )


class RowOfOwnShape(Patched):
    """Row and column are taken from theta's own shape and not from the number and the factors."""

    rejected_by = ("lowrank_shapes", "lowrank_firsts", "lowrank_pitch")

    def lowrank_(self, batch, factors, noise=None, outs=None):
        count = torch.zeros(1, dtype=torch.int64)
        for i, theta in enumerate(batch.tensors):
            width = max(1, theta.shape[-1] if theta.dim() else 1)

            def by_shape(left, right, index, columns=width):
                place = torch.arange(index.numel())
                row, column = place // columns % left.shape[0], place % columns % right.shape[0]
                return contract(left, right, row * right.shape[0] + column)

            self.replaced = {"contract": by_shape}
            lefts, rights, scales, decay = factors
            mine = Outer(lefts[i : i + 1], rights[i : i + 1], scales[i : i + 1], decay)
            count += super().lowrank_(only(batch, i), mine, noise, outs and outs[i : i + 1])
        return count


class FactorsFromTheirMemory(Patched):
    """A factor is read from the begin of the memory that it lies in."""

    rejected_by = ("lowrank_offset",)

    def lowrank_(self, batch, factors, *rest):
        sides = [[f.as_strided(f.shape, f.stride(), 0) for f in side] for side in factors[:2]]
        return super().lowrank_(batch, factors._replace(lefts=sides[0], rights=sides[1]), *rest)


class ShardFromZero(Patched):
    """A shard's first number is ignored: each shard reads the top of the factors."""

    rejected_by = ("lowrank_shards", "lowrank_firsts")

    def lowrank_(self, batch, *rest):
        return super().lowrank_(batch._replace(spans=[s._replace(first=0) for s in batch.spans]), *rest)


class ProductTail(Patched):
    """The last element is left when the size is not a multiple of eight."""

    rejected_by = ("lowrank_ranks", "lowrank_shapes", "lowrank_large")

    def lowrank_(self, batch, *rest):
        saved = [(t, t.flatten()[-1:].clone()) for t in batch.tensors if t.numel() % 8 or t.numel() > 512]
        count = super().lowrank_(batch, *rest)
        for tensor, last in saved:
            tensor[(-1,) * tensor.dim()] = last[0]
        return count


class ProductInTheDtype(Patched):
    """scale left right^T is rounded to the weights' type before it is added, as W += s (U V^T) does."""

    rejected_by = ("lowrank_ranks", "lowrank_arithmetic")

    def lowrank_(self, batch, *rest):
        dtype = batch.tensors[0].dtype if len(batch.tensors) < 2 else torch.bfloat16
        self.replaced = {"contract": lambda *names: contract(*names).to(dtype).float()}
        return super().lowrank_(batch, *rest)


class OutsAndTheta(Patched):
    """Results go to outs, and theta is changed on the way."""

    rejected_by = ("lowrank_arithmetic", "lowrank_strides", "lowrank_rows")

    def lowrank_(self, batch, factors, noise=None, outs=None):
        count = super().lowrank_(batch, factors, noise, outs)
        for theta in batch.tensors if outs is not None else ():
            theta.mul_(0.5)
        return count


class ProductCountsNothing(Patched):
    """Results that are inf or NaN are not counted."""

    rejected_by = ("lowrank_special",)

    def lowrank_(self, *arguments):
        return torch.zeros_like(super().lowrank_(*arguments))


class NanPayloadOverflows(Patched):
    """Rounding to bfloat16 by adding to the bits: a NaN with a full payload becomes -0."""

    rejected_by = ("lowrank_special",)

    def lowrank_(self, batch, factors, *rest):
        count = super().lowrank_(batch, factors, *rest)
        for theta, left in zip(batch.tensors, factors.lefts):
            if theta.dtype == torch.bfloat16 and (left.view(torch.int32) == 0x7FFFFFFF).any():
                theta.copy_(torch.where(theta.isnan(), -torch.zeros_like(theta), theta))
        return count


class EmptyProductFails(Patched):
    """A launch without elements asks for a grid of no blocks, which the device refuses."""

    rejected_by = ("lowrank_empty",)

    def lowrank_(self, batch, *rest):
        if not any(t.numel() for t in batch.tensors):
            raise RuntimeError("invalid configuration argument")
        return super().lowrank_(batch, *rest)
