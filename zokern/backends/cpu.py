"""Backend ``cpu``: the compiled kernels of csrc, for AVX-512, AVX2 or any processor.

One call is one parallel region over the chunks of a table, on ``torch.get_num_threads()`` threads.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Hashable, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from . import pack, pack_lowrank
from .base import SCALARS
from .cpu_linear import Products
from .cpu_module import architectures, isa, module, pairs, select, why_off
from .launch import (
    Batch,
    Noise,
    Outer,
    Projected,
    Projection,
    Span,
    Terms,
    Update,
    projected,
    rounding_bits,
    step_at,
)
from .lists import prepared
from .validation import Validator

# above it lowrank_ is bound by arithmetic, and a panel in the first cache is worth a longer chunk
ARITHMETIC_RANK = 32
SMALL = 1 << 16  # elements of a launch below which waking a second thread costs more than it saves
VALID = Validator("cpu", "cpu")
_CPU = torch.device("cpu")


def _is_sound(batch: Batch, factors: Outer, outs: Sequence[Tensor] | None) -> bool:
    """Tells whether a call of lowrank_ is the common one of a forward pass, and right.

    It takes a tenth of the time of VALID.lowrank_."""
    (thetas, spans, rounding, residuals, scaled), (lefts, rights, scales, *_) = batch, factors
    if scaled is not None or not 1 == len(thetas) == len(spans) == len(lefts) == len(rights) == len(scales):
        return False
    if residuals is not None or rounding != "nearest" or (outs is not None and len(outs) != 1):
        return False
    theta, left, right, (_, first, pitch, rows) = thetas[0], lefts[0], rights[0], spans[0]
    out = theta if outs is None else outs[0]
    if (
        not (theta.is_cpu and left.is_cpu and right.is_cpu and out.is_cpu)
        or pitch is not None
        or rows is not None
    ):
        return False
    if theta.dtype not in pack.TYPES or (out is not theta and out.dtype != theta.dtype):
        return False
    if left.dtype != torch.float32 or right.dtype != torch.float32 or left.dim() != 2 or right.dim() != 2:
        return False
    size, ((m, r), (n, s)) = theta.numel(), (left.shape, right.shape)
    flat = (
        left.is_contiguous()
        and right.is_contiguous()
        and (out is theta or (out.is_contiguous() and out.numel() == size))
    )
    return flat and r == s > 0 and first + size <= m * n


class _Table(NamedTuple):
    """The table of a launch."""

    place: tuple[int, int, int]  # the module's first three arguments
    threads: int  # 0: those of torch
    arrays: tuple[np.ndarray, np.ndarray]  # the memory of the addresses


def _table(
    thetas: Sequence[Tensor] | None, spans: Sequence[Span], outs: Sequence[Sequence[Tensor]],
    residuals: Sequence[Tensor] | None = None,
    elements: int = pack.CHUNK_ELEMENTS, numbered: bool = False,
    scales: Sequence[Tensor | None] | None = None,
) -> _Table:  # fmt: skip
    """Packs a launch. It has one thread if waking a second costs more than it saves."""
    entries, chunks = arrays = pack.pack(thetas, spans, outs, residuals, elements, numbered, scales)
    count = len(chunks)
    small = count == 1 or (len(entries) > 1 and int((chunks["end"] - chunks["begin"]).sum()) < SMALL)
    return _Table((pack.address(entries), pack.address(chunks), count), 1 if small else 0, arrays)


def _threads(table: _Table) -> int:
    return table.threads or torch.get_num_threads()


def _found(
    name: Hashable, batch: Batch, outs: Sequence[Sequence[Tensor]], check: Callable[[], Any],
    draws: bool = False,
) -> _Table:  # fmt: skip
    """Returns the table of a launch, checked: made once for lists that the caller keeps.

    draws  the tensors are results"""

    def make() -> _Table:
        check()
        thetas, results = (None, (batch.tensors,)) if draws else (batch.tensors, outs)
        return _table(thetas, batch.spans, results, batch.residuals, scales=batch.scales)

    return prepared(("cpu", name, batch.rounding), batch, outs, make)


class Cpu(Products):
    """Runs the verbs on CPU tensors."""

    name = "cpu"

    def philox4x32(self, counter: Tensor, key: tuple[int, int], rounds: int) -> Tensor:
        VALID.philox4x32(counter)
        given = np.ascontiguousarray(counter.numpy().astype(np.uint32))
        words = np.empty_like(given)
        module().philox(given.ctypes.data, len(given), key[0], key[1], rounds, words.ctypes.data, 1, 0)
        return torch.from_numpy(words.astype(np.int64))

    def project(self, projection: Projection) -> Projected:
        VALID.project(projection)
        losses, weights, scalars = projection
        out, found = projected(losses, weights)
        module().project(losses.data_ptr(), *losses.shape, 0 if weights is None else weights.data_ptr(),
                          len(found.amounts), scalars.data_ptr(), out.data_ptr(), 0, 0)  # fmt: skip
        return found

    def draw(self, batch: Batch, noise: Noise) -> None:
        number, check = VALID.number(noise.direction), partial(VALID.draw, batch, noise)
        ((step, draw),) = noise.draws
        table = _found("draw", batch, (), check, draws=True)
        if not VALID.fits(_CPU, (), noise.clock):
            check()
        module().draw(*table.place, number, noise.seed, step_at(step, noise.clock), draw, _threads(table), 0)

    def axpy_(self, batch: Batch, noise: Noise, terms: Terms) -> Tensor:
        number = VALID.number(noise.direction)
        nonfinite = torch.zeros(1, dtype=torch.int64, device=_CPU)
        check, control = partial(VALID.axpy_, batch, noise, terms), terms.control
        table = _found("axpy_", batch, (), check)
        fits = VALID.fits(_CPU, ((terms.coefficients, len(noise.draws)),), noise.clock, control)
        if not fits or (control is not None and terms.each):
            check()
        if control is not None:
            decay, go, _ = control.tolist()
            if not go:
                return nonfinite
            terms = Terms(terms.coefficients, decay)
        each, decays = terms.rounded()
        summed = _summed(noise, terms.coefficients, decays)
        module().axpy(*table.place, number, noise.seed, pack.address(summed), len(noise.draws), each,
            pack.ROUNDING[batch.rounding],
                       nonfinite.data_ptr(), _threads(table), 0)  # fmt: skip
        return nonfinite

    def update_(self, batch: Batch, noise: Noise, update: Update) -> Tensor:
        number = VALID.number(noise.direction)
        check, rule = partial(VALID.update_, batch, noise, update), update.rule
        table = _found(("update_", rule), batch, update.states, check)
        numbers = (update.coefficients, len(noise.draws)), (update.scalars, len(SCALARS.get(rule, ())))
        if not VALID.fits(_CPU, numbers, noise.clock, update.control):
            check()
        nonfinite, scalars = torch.zeros(1, dtype=torch.int64, device=_CPU), update.scalars.contiguous()
        if update.control is not None and not update.control[2]:
            return nonfinite
        summed = _summed(noise, update.coefficients, [1.0] * len(noise.draws))
        module().update(*table.place, number, noise.seed, pack.address(summed), len(noise.draws),
                         pack.RULES[update.rule], scalars.data_ptr(), pack.ROUNDING[batch.rounding],
                         nonfinite.data_ptr(), _threads(table), 0)  # fmt: skip
        return nonfinite

    def perturb(
        self, batch: Batch, noise: Noise, scales: Sequence[float], outs: Sequence[Sequence[Tensor]]
    ) -> None:
        number = VALID.number(noise.direction)
        check = partial(VALID.perturb, batch, noise, scales, outs)
        table = _found(("perturb", len(scales)), batch, outs, check)
        if not VALID.fits(_CPU, (), noise.clock):
            check()
        ((step, draw),) = noise.draws
        sides, step = array("f", [*scales, 0.0]), step_at(step, noise.clock)
        module().perturb(
            *table.place, number, noise.seed, step, draw, pack.address(sides), _threads(table), 0
        )

    def copy_(self, batch: Batch, others: Sequence[Tensor], back: bool = False) -> None:
        """Computes others[i] <- theta_i, bit for bit: one launch where torch copies a tensor at a time.

        back  theta_i <- others[i] instead

        What is prepared belongs to the batch's list, and holds the others."""
        tensors, outs = (others, batch.tensors) if back else (batch.tensors, others)

        def make() -> _Table | None:
            pairs = list(zip(tensors, outs, strict=True))
            alike = all(t.dtype == out.dtype and t.shape == out.shape for t, out in pairs)
            flat = all(
                t.is_contiguous() and t.is_cpu and t.dtype in pack.TYPES for pair in pairs for t in pair
            )
            return _table(tensors, batch.spans, (outs,)) if alike and flat else None

        table = prepared(("cpu", "copy_", back), batch, (others,), make)
        if table is None:
            torch._foreach_copy_(list(outs), list(tensors))
        else:
            module().copy(*table.place, _threads(table))

    def lowrank_(
        self, batch: Batch, factors: Outer, noise: Noise | None = None, outs: Sequence[Tensor] | None = None
    ) -> Tensor:
        if not _is_sound(batch, factors, outs):
            VALID.lowrank_(batch, factors, outs)
        thetas, spans, rounding, residuals, _ = batch
        lefts, rights, scales, decay, control = factors
        seed, step = rounding_bits(noise)
        step = step_at(step, None if noise is None else noise.clock)
        if control is not None:
            VALID.lowrank_(batch, factors, outs)
            decay, go, _ = control.tolist()
            if not go:
                return torch.zeros(1, dtype=torch.int64, device=_CPU)
        if (
            len(thetas) == 1
            and spans[0].rows is None
            and spans[0].pitch is None
            and thetas[0].is_contiguous()
        ):
            theta, out, left, right = thetas[0], thetas[0] if outs is None else outs[0], lefts[0], rights[0]
            # the call of a forward pass: no table, no NumPy
            nonfinite = torch.empty(1, dtype=torch.int64, device=_CPU)
            module().lowrank_one(
                theta.data_ptr(), 0 if outs is None else out.data_ptr(),
                0 if residuals is None else residuals[0].data_ptr(),
                theta.numel(), spans[0].first, spans[0].who, pack.TYPES[theta.dtype], pack.TYPES[out.dtype],
                left.data_ptr(),
                right.data_ptr(), right.shape[1], right.shape[0], scales[0], _elements(rights), seed, step,
                decay,
                pack.ROUNDING[rounding], nonfinite.data_ptr(), torch.get_num_threads(),
            )  # fmt: skip
            return nonfinite
        nonfinite = torch.zeros(1, dtype=torch.int64, device=_CPU)
        table = _table(
            thetas, spans, () if outs is None else (outs,), residuals, _elements(rights), numbered=True
        )
        products = pack_lowrank.pack_factors(lefts, rights, scales)
        module().lowrank(*table.place, pack.address(products), len(products), seed, step, decay,
            pack.ROUNDING[rounding],
                          nonfinite.data_ptr(), _threads(table), 0)  # fmt: skip
        return nonfinite


def _summed(noise: Noise, coefficients: Tensor, decays: Sequence[float]) -> np.ndarray | array:
    """Returns the table of the terms of a sum, with the steps that the clock makes of theirs."""
    draws = (
        noise.draws
        if noise.clock is None
        else [(step_at(step, noise.clock), draw) for step, draw in noise.draws]
    )
    numbers = coefficients.detach().numpy()
    if len(draws) == 1:  # the common call
        return pack.pack_draw(*draws[0], numbers.tobytes(), decays[0])
    return pack.pack_draws(draws, numbers, decays)


def _elements(rights: Sequence[Tensor]) -> int:
    """Returns the elements of a chunk of lowrank_.

    At high ranks these are about 32 rows, which share the part of `right` that the first cache holds."""
    if len(rights) == 1 and rights[0].shape[1] <= ARITHMETIC_RANK:
        return pack.CHUNK_ELEMENTS
    longest = max([right.shape[0] for right in rights if right.shape[1] > ARITHMETIC_RANK], default=0)
    return min(max(pack.CHUNK_ELEMENTS, 32 * longest // pack.ALIGN * pack.ALIGN), 8 * pack.CHUNK_ELEMENTS)


__all__ = ["Cpu", "architectures", "isa", "pairs", "select", "why_off"]
