"""Mistakes in project, and in verbs that read its control. tests/backends/test_project.py runs them.

``Spelled`` is project once more, number by number and without torch. Each class after it has one step wrong.
"""

from __future__ import annotations

import numpy as np
import torch

from zokern.backends import Projected, Projection
from zokern.backends.reference import Reference

from .patched import Patched


class Spelled(Reference):
    """The formulas of Backend.project in float64 of NumPy."""

    def term(self, weight, loss):
        return weight * loss

    def add(self, total, term):
        return total + term

    def is_term(self, weight) -> bool:
        return weight != 0

    def ordered(self, numbers: list) -> list:
        return numbers

    def sum(self, numbers: list):
        total, *rest = self.ordered(numbers)
        for number in rest:
            total = self.add(total, number)
        return total

    def mean(self, reads: list):
        return self.sum(reads) / np.float64(len(reads))

    def of_nothing(self):
        return np.float64(0.0)

    def single(self, x):
        return np.float64(np.float32(x))

    def cut(self, x, clip):
        c = self.single(x)
        return c if np.isnan(c) else clip if np.isnan(clip) else min(max(c, -clip), clip)

    def told(self, sign, c, count):
        return sign * c / count

    def moved(self, lr, w, c, sign, count):
        return lr * w

    def decay(self, lr, weight_decay):
        return np.float64(1.0) - lr * weight_decay

    def is_finite(self, x) -> bool:
        return bool(np.isfinite(np.float32(x)))

    def watched(self, c, w, a, lr, decay) -> list:
        return [*c, *w, *a, lr, decay]

    def goes(self, decay, amounts, c, w) -> bool:
        return bool(decay != 1 or np.any(amounts != 0))

    def stop(self, w, amounts, decay):
        return np.zeros_like(w), np.zeros_like(amounts), np.float32(1)

    def project(self, projection: Projection) -> Projected:
        with np.errstate(all="ignore"):
            return self._project(projection)

    def _project(self, projection: Projection) -> Projected:
        losses, weights, scalars = (None if x is None else x.numpy() for x in projection)
        eps, lr, weight_decay, clip, sign, count = scalars
        means = [self.mean(list(column)) for column in losses.T]
        if weights is None:
            c = np.array(means)
        else:
            rows = [[(w, x) for w, x in zip(row, means) if self.is_term(w)] for row in weights]
            sums = [self.sum([self.term(*t) for t in row]) if row else self.of_nothing() for row in rows]
            c = np.array([self.cut(total / eps, clip) for total in sums])
        w = np.array([self.told(sign, x, count) for x in c])
        a = np.array([self.moved(lr, x, y, sign, count) for x, y in zip(w, c)])
        decay, amounts = self.decay(lr, weight_decay), a.astype(np.float32)
        finite = all(map(self.is_finite, self.watched(c, w, a, lr, decay)))
        decay = np.float32(decay)
        if not finite:
            w, amounts, decay = self.stop(w, amounts, decay)
        control = [decay, finite and self.goes(decay, amounts, c, w), finite]
        return Projected(*map(torch.from_numpy, (c, w, amounts, np.array(control, np.float32))))


class Wrong(Spelled, Patched):
    """One mistake."""


class Contracted(Wrong):
    """A product and the sum after it are rounded together."""

    rejected_by = ("project_order",)

    def term(self, weight, loss):
        return np.longdouble(weight) * np.longdouble(loss)

    def add(self, total, term):
        return np.float64(np.longdouble(np.float64(total)) + term)


class DecayContracted(Wrong):
    """1 - lr weight_decay by one fma."""

    rejected_by = ("project_order",)

    def decay(self, lr, weight_decay):
        return np.float64(np.longdouble(1.0) - np.longdouble(lr) * np.longdouble(weight_decay))


class SingleSums(Wrong):
    """Sums in float32."""

    rejected_by = ("project_order", "project_sizes")

    def add(self, total, term):
        return np.float64(np.float32(total) + np.float32(term))


class LastFirst(Wrong):
    """Sums from the last term on."""

    rejected_by = ("project_order",)

    def ordered(self, numbers):
        return numbers[::-1]


class Pairwise(Wrong):
    """Sums of pairs, as np.sum and a tree over lanes have them."""

    rejected_by = ("project_order",)

    def sum(self, numbers):
        while len(numbers) > 1:
            pairs = [self.add(*numbers[i : i + 2]) for i in range(0, len(numbers) - 1, 2)]
            numbers = pairs + numbers[2 * len(pairs) :]
        return numbers[0]


class SumOfReads(Wrong):
    """Micro-batches are summed, and no mean is taken."""

    rejected_by = ("project_sizes",)

    def mean(self, reads):
        return self.sum(reads)


class ZeroTimesLoss(Wrong):
    """A weight of 0 is multiplied: 0 times inf is NaN."""

    rejected_by = ("project_zeros",)

    def is_term(self, weight):
        return True


class NegativeNothing(Wrong):
    """A sum of nothing keeps the -0.0 that it began with."""

    rejected_by = ("project_zeros",)

    def of_nothing(self):
        return np.float64(-0.0)


class PositiveZero(Wrong):
    """A sum begins with 0.0 and loses the sign of a term -0.0."""

    rejected_by = ("project_zeros",)

    def sum(self, numbers):
        return np.float64(0.0) + super().sum(numbers)


class NanCut(Wrong):
    """fmin and fmax: a NaN is cut to a bound, and a broken step goes on."""

    rejected_by = ("project_clip",)

    def cut(self, x, clip):
        return np.fmin(np.fmax(self.single(x), -clip), clip)


class CutFirst(Wrong):
    """The bound is for the number before it is rounded, so a coefficient may be rounded beyond it."""

    rejected_by = ("project_clip",)

    def cut(self, x, clip):
        return self.single(min(max(x, -clip), clip))


class Reciprocal(Wrong):
    """The sum over draws is multiplied by 1 / count."""

    rejected_by = ("project_order", "project_sizes")

    def told(self, sign, c, count):
        return sign * c * (np.float64(1) / count)


class CountFirst(Wrong):
    """sign (c / count) in the place of (sign c) / count."""

    rejected_by = ("project_order",)

    def told(self, sign, c, count):
        return sign * (c / count)


class SingleTold(Wrong):
    """What a rule is told is rounded to float32."""

    rejected_by = ("project_order", "project_sizes")

    def told(self, sign, c, count):
        return self.single(sign * c / count)


class FiniteInDouble(Wrong):
    """1e39 is finite, and inf where a kernel reads it."""

    rejected_by = ("project_control",)

    def is_finite(self, x):
        return bool(np.isfinite(x))


class AmountsUnwatched(Wrong):
    """Only the coefficients are looked at."""

    rejected_by = ("project_control",)

    def watched(self, c, w, a, lr, decay):
        return list(c)


class GoOfCoefficients(Wrong):
    """A step goes where a loss difference is not 0, and not where a weight would move."""

    rejected_by = ("project_control",)

    def goes(self, decay, amounts, c, w):
        return bool(decay != 1 or np.any(c != 0))


class NeverIdle(Wrong):
    """A step of zeros rewrites every weight."""

    rejected_by = ("project_control", "project_zeros")

    def goes(self, decay, amounts, c, w):
        return True


class DecaysAnyway(Wrong):
    """A step that is not finite still decays."""

    rejected_by = ("project_control", "project_zeros")

    def stop(self, w, amounts, decay):
        return *super().stop(w, amounts, decay)[:2], decay


class ToldAnyway(Wrong):
    """A rule is told the numbers of a step that is not finite."""

    rejected_by = ("project_control", "project_zeros")

    def stop(self, w, amounts, decay):
        return w, *super().stop(w, amounts, decay)[1:]


class LossesWritten(Wrong):
    """The losses are averaged in place."""

    rejected_by = ("project_sizes",)

    def project(self, projection):
        found = super().project(projection)
        projection.losses[0] = projection.losses.mean(0)
        return found


class Controlled(Patched):
    """A mistake in what verbs read: ``read`` answers with another control."""

    rejected_by = ("control_axpy", "control_lowrank", "control_update")

    def read(self, control: torch.Tensor, verb: str) -> torch.Tensor | None:
        return control

    def axpy_(self, batch, noise, terms):
        told = None if terms.control is None else self.read(terms.control, "axpy_")
        return Reference.axpy_(self, batch, noise, terms._replace(control=told))

    def update_(self, batch, noise, update):
        told = None if update.control is None else self.read(update.control, "update_")
        return Reference.update_(self, batch, noise, update._replace(control=told))

    def lowrank_(self, batch, factors, noise=None, outs=None):
        told = None if factors.control is None else self.read(factors.control, "lowrank_")
        return Reference.lowrank_(self, batch, factors._replace(control=told), noise, outs)


class Unread(Controlled):
    """The decay of the host, and no stop."""

    def read(self, control, verb):
        return None


class DecaysAsItStops(Controlled):
    """Weights decay where the step stopped."""

    rejected_by = ("control_axpy", "control_lowrank")

    def read(self, control, verb):
        return control if verb == "update_" else torch.stack([control[0], control[0] * 0 + 1, control[2]])


class FiniteForGo(Controlled):
    """axpy_ and lowrank_ stop for finite alone."""

    rejected_by = ("control_axpy", "control_lowrank")

    def read(self, control, verb):
        return control[[0, 2, 2]]


class GoForFinite(Controlled):
    """A rule stops where no amount moves, and its states stand still."""

    rejected_by = ("control_update",)

    def read(self, control, verb):
        return control[[0, 1, 1]]


class CountsAsItStops(Controlled):
    """A stopped verb counts the weights that are not finite anyway."""

    def _count(self, batch, control, by, count):
        broken = sum(int((~t.isfinite()).sum()) for t in batch.tensors)
        return count if control is None or control[by] else count + broken

    def axpy_(self, batch, noise, terms):
        return self._count(batch, terms.control, 1, super().axpy_(batch, noise, terms))

    def update_(self, batch, noise, update):
        return self._count(batch, update.control, 2, super().update_(batch, noise, update))

    def lowrank_(self, batch, factors, noise=None, outs=None):
        count = super().lowrank_(batch, factors, noise, outs)
        return self._count(batch, factors.control, 1, count)


class ClockUnread(Controlled):
    """lowrank_ spends the bits of the host's step."""

    rejected_by = ("lowrank_clock",)

    def lowrank_(self, batch, factors, noise=None, outs=None):
        return super().lowrank_(batch, factors, noise and noise._replace(clock=None), outs)


BACKENDS: list[type[Patched]] = [
    kind
    for kind in vars().copy().values()
    if isinstance(kind, type)
    and issubclass(kind, (Wrong, Controlled))
    and kind not in (Wrong, Controlled, Patched)
]
