"""A backend that runs nothing and writes down what it was asked: the launches of a step, without a GPU.

    recorder = Recorder()
    zokern.step(zokern.MeZO(model, backend=recorder), closure)      # a model on the meta device
    recorder.calls                                                  # every verb call, in order

Tensors of the meta device have no values, so a step that reads one fails there. Recorder(inner) has another
backend run the calls as well, for tensors that have memory: the same record of a step on a CPU.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from zokern.backends import Backend, Batch, Noise, Outer, Projected, Projection, Terms, Update
from zokern.backends.validation import Validator

META = torch.device("meta")
Sizes = list[tuple[torch.dtype, int]]  # dtype and elements of some pieces of memory


@dataclass(frozen=True)
class Call:
    """One verb call, which is one launch.

    tensors   of its list
    elements  that it works on, of all tensors; of looked-up rows, those rows
    bytes     by dtype: what must move. Memory that is read and written counts twice, and z is made in
              registers
    draws     directions that it adds;  sides  results for each tensor"""

    verb: str
    tensors: int
    elements: int
    bytes: dict[torch.dtype, int] = field(default_factory=dict)
    draws: int = 0
    sides: int = 1

    @property
    def traffic(self) -> int:
        """Bytes of all dtypes."""
        return sum(self.bytes.values())


class Recorder:
    """Takes the calls of every verb; `calls` holds them in order.

    inner  a backend that runs each call too; None: nothing is run, and all tensors are of the meta device"""

    name = "recorder"

    def __init__(self, inner: Backend | None = None) -> None:
        self.inner, self.calls = inner, list[Call]()
        self.most_rank: int | None = getattr(inner, "most_rank", None)
        self.valid = Validator(self.name, META.type) if inner is None else None

    def count(self, *verbs: str) -> int:
        """Returns the number of launches of some verbs, of all without any."""
        return sum(not verbs or call.verb in verbs for call in self.calls)

    def philox4x32(self, counter: Tensor, key: tuple[int, int], rounds: int) -> Tensor:
        self._add("philox4x32", _of([counter]), _of([counter, counter]))
        return (
            torch.empty_like(counter) if self.inner is None else self.inner.philox4x32(counter, key, rounds)
        )

    def draw(self, batch: Batch, noise: Noise) -> None:
        if self.valid is not None:
            self.valid.draw(batch, noise)
        self._add("draw", _of(batch.tensors), _of(batch.tensors) + _scales(batch), 1)
        if self.inner is not None:
            self.inner.draw(batch, noise)

    def axpy_(self, batch: Batch, noise: Noise, terms: Terms) -> Tensor:
        if self.valid is not None:
            self.valid.axpy_(batch, noise, terms)
        moved = 2 * (_worked(batch) + _low(batch)) + _scales(batch) + _of([terms.coefficients])
        self._add("axpy_", _worked(batch), moved, len(noise.draws))
        return _none(batch) if self.inner is None else self.inner.axpy_(batch, noise, terms)

    def update_(self, batch: Batch, noise: Noise, update: Update) -> Tensor:
        if self.valid is not None:
            self.valid.update_(batch, noise, update)
        states = _of(state for states in update.states for state in states)
        numbers = _of([update.coefficients, update.scalars])
        moved = 2 * (_worked(batch) + _low(batch) + states) + _scales(batch) + numbers
        self._add("update_", _worked(batch), moved, len(noise.draws))
        return _none(batch) if self.inner is None else self.inner.update_(batch, noise, update)

    def perturb(
        self, batch: Batch, noise: Noise, scales: Sequence[float], outs: Sequence[Sequence[Tensor]]
    ) -> None:
        if self.valid is not None:
            self.valid.perturb(batch, noise, scales, outs)
        results = _of(out for side in outs for out in side)
        moved = _worked(batch) + _low(batch._replace(rounding="residual")) + results + _scales(batch)
        self._add("perturb", _worked(batch), moved, 1, len(outs))
        if self.inner is not None:
            self.inner.perturb(batch, noise, scales, outs)

    def lowrank_(
        self, batch: Batch, factors: Outer, noise: Noise | None = None, outs: Sequence[Tensor] | None = None
    ) -> Tensor:
        if self.valid is not None:
            self.valid.lowrank_(batch, factors, outs)
        written = _worked(batch) + _low(batch) if outs is None else _of(outs)
        moved = _worked(batch) + _low(batch) + written + _of([*factors.lefts, *factors.rights])
        self._add("lowrank_", _worked(batch), moved)
        return _none(batch) if self.inner is None else self.inner.lowrank_(batch, factors, noise, outs)

    def project(self, projection: Projection) -> Projected:
        losses, weights, _ = projection
        if self.valid is not None:
            self.valid.project(projection)
        self._add("project", _of([losses]), _of(part for part in projection if part is not None))
        if self.inner is not None:
            return self.inner.project(projection)
        count = losses.shape[1] if weights is None else weights.shape[0]
        doubles = [torch.empty(count, dtype=torch.float64, device=META) for _ in range(2)]
        singles = [torch.empty(size, dtype=torch.float32, device=META) for size in (count, 3)]
        return Projected(*doubles, *singles)

    def _add(self, verb: str, worked: Sizes, moved: Sizes, draws: int = 0, sides: int = 1) -> None:
        sizes = Counter[torch.dtype]()
        for dtype, count in moved:
            sizes[dtype] += count * dtype.itemsize
        self.calls.append(Call(verb, len(worked), sum(n for _, n in worked), dict(sizes), draws, sides))


def _of(tensors: Iterable[Tensor]) -> Sizes:
    return [(tensor.dtype, tensor.numel()) for tensor in tensors]


def _worked(batch: Batch) -> Sizes:
    """Returns the elements that a launch works on: of looked-up rows, those rows."""
    pairs = zip(batch.tensors, batch.spans)
    return [(t.dtype, t.numel() if s.rows is None else s.rows.numel() * t.shape[1]) for t, s in pairs]


def _low(batch: Batch) -> Sizes:
    """Returns the low bits beside the elements that a launch works on."""
    sizes = enumerate(_worked(batch))
    return [(torch.int16, count) for i, (_, count) in sizes if batch.low_bits(i) is not None]


def _scales(batch: Batch) -> Sizes:
    """Returns the factors of z beside the elements that a launch works on."""
    sizes, given = _worked(batch), [batch.scale(i) for i in range(len(batch.tensors))]
    return [(scale.dtype, count) for scale, (_, count) in zip(given, sizes) if scale is not None]


def _none(batch: Batch) -> Tensor:
    """Returns a count of non-finite results, without a value."""
    device = batch.tensors[0].device if len(batch.tensors) else META
    return torch.empty(1, dtype=torch.int64, device=device)


__all__ = ["Call", "Recorder"]
