"""Backend ``cpu``: the compiled kernels of csrc, for AVX-512, AVX2 or any processor.

One call is one parallel region over the chunks of a table, on ``torch.get_num_threads()`` threads. The
environment variable ``ZOKERN_CPU_ISA`` (avx512bf16, avx512, avx2 or scalar) forces one of the paths that
this machine can run; all give the same bits.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from functools import lru_cache, partial
from operator import is_
from typing import Any, NamedTuple

import numpy as np
import torch  # before _cpu: both then share one OpenMP runtime, and torch's threads are not oversubscribed
from torch import Tensor

from . import pack, pack_lowrank
from .base import SCALARS
from .launch import (
    Batch,
    Noise,
    Outer,
    Projected,
    Projection,
    Sides,
    Span,
    Terms,
    Thin,
    Update,
    Weight,
    projected,
    rounding_bits,
    step_at,
)
from .lists import prepared
from .validation import Validator, described

_cpu: Any = None
_error = ""
try:
    from .. import _cpu  # type: ignore[no-redef, attr-defined]
except ImportError as error:
    _error = str(error)

# above it lowrank_ is bound by arithmetic, and a panel in the first cache is worth a longer chunk
ARITHMETIC_RANK = 32
# rows of all sides that are worth a z of their own: about a tenth of their products (bench_matmul.py)
SHARED_ROWS = 512
SMALL = 1 << 16  # elements of a launch below which waking a second thread costs more than it saves
VALID = Validator("cpu", "cpu")
_CPU = torch.device("cpu")


def why_off() -> str | None:
    """Returns None if this backend can run here, else why not, and the way out."""
    if _cpu is not None:
        return None
    if "libgomp" in _error:  # older builds of torch bring it under a name of their own
        return (
            f"the compiled module zokern._cpu cannot be loaded ({_error}); install the OpenMP library "
            "of the system (Debian: apt-get install libgomp1), or torch 2.13, which brings it"
        )
    return (
        f"the compiled module zokern._cpu is missing ({_error}); install a wheel that has it, or g++ and run "
        "`pip install --no-build-isolation .`; backend 'reference' needs neither"
    )


def same_values(dicts: list[dict], kept: list) -> bool:
    """Tells whether the values of some dicts, one dict after another, are the very objects of a list."""
    if _cpu is not None:
        return bool(_cpu.same_values(dicts, kept))
    now = [value for held in dicts for value in held.values()]
    return len(now) == len(kept) and all(map(is_, now, kept))


def isa() -> str:
    """Returns the instruction set in use: 'avx512bf16', 'avx512', 'avx2' or 'scalar'."""
    return str(_module().implementation())


def pairs() -> bool:
    """Tells whether linear() multiplies bfloat16 by the processor's dot product of pairs."""
    return bool(_module().linear_pairs())


def select(name: str) -> None:
    """Selects another of `architectures()`. ValueError if it cannot run here."""
    _module().select(name)


def architectures() -> list[str]:
    """Returns the instruction sets that this machine can run, best first."""
    return list(_module().architectures())


def _module() -> Any:
    if _cpu is None:
        raise RuntimeError(f"backend 'cpu' is off: {why_off()}")
    return _cpu


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
    name: Hashable, batch: Batch, outs: Sequence[Sequence[Tensor]], check: Callable[[], Any]
) -> _Table:
    """Returns the table of a launch, checked: made once for lists that the caller keeps."""

    def make() -> _Table:
        check()
        return _table(batch.tensors, batch.spans, outs, batch.residuals, scales=batch.scales)

    return prepared(("cpu", name, batch.rounding), batch, outs, make)


class Cpu:
    """Runs the verbs on CPU tensors."""

    name = "cpu"

    def philox4x32(self, counter: Tensor, key: tuple[int, int], rounds: int) -> Tensor:
        VALID.philox4x32(counter)
        given = np.ascontiguousarray(counter.numpy().astype(np.uint32))
        words = np.empty_like(given)
        _module().philox(given.ctypes.data, len(given), key[0], key[1], rounds, words.ctypes.data, 1, 0)
        return torch.from_numpy(words.astype(np.int64))

    def project(self, projection: Projection) -> Projected:
        VALID.project(projection)
        losses, weights, scalars = projection
        out, found = projected(losses, weights)
        _module().project(losses.data_ptr(), *losses.shape, 0 if weights is None else weights.data_ptr(),
                          len(found.amounts), scalars.data_ptr(), out.data_ptr(), 0, 0)  # fmt: skip
        return found

    def draw(self, batch: Batch, noise: Noise) -> None:
        number = VALID.number(noise.direction)
        VALID.draw(batch, noise)
        ((step, draw),) = noise.draws
        table = _table(None, batch.spans, (batch.tensors,), scales=batch.scales)
        _module().draw(*table.place, number, noise.seed, step_at(step, noise.clock), draw, _threads(table), 0)

    def axpy_(self, batch: Batch, noise: Noise, terms: Terms) -> Tensor:
        number = VALID.number(noise.direction)
        nonfinite = torch.zeros(1, dtype=torch.int64, device=_CPU)
        if terms.control is not None:
            VALID.axpy_(batch, noise, terms)
            decay, go, _ = terms.control.tolist()
            if not go:
                return nonfinite
            terms = Terms(terms.coefficients, decay)
        check = partial(VALID.axpy_, batch, noise, terms)
        table = _found("axpy_", batch, (), check)
        if not VALID.fits(_CPU, ((terms.coefficients, len(noise.draws)),), noise.clock):
            check()
        each, decays = terms.rounded()
        summed = _summed(noise, terms.coefficients, decays)
        _module().axpy(*table.place, number, noise.seed, pack.address(summed), len(summed), each,
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
        _module().update(*table.place, number, noise.seed, pack.address(summed), len(summed),
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
        sides = np.zeros(2, dtype=np.float32)
        sides[: len(scales)] = scales
        step = step_at(step, noise.clock)
        _module().perturb(*table.place, number, noise.seed, step, draw, sides.ctypes.data, _threads(table), 0)

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
            _module().lowrank_one(
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
        _module().lowrank(*table.place, pack.address(products), len(products), seed, step, decay,
            pack.ROUNDING[rounding],
                          nonfinite.data_ptr(), _threads(table), 0)  # fmt: skip
        return nonfinite

    def linear(
        self, weight: Weight, sides: Sides, noise: Noise | None = None, room: int | None = None,
        outs: Sequence[Tensor] | None = None,
    ) -> list[Tensor]:  # fmt: skip
        """Computes y_j = shrink x_j (W + scales[j] z_j)^T + biases[j] + thin products.

        z is made beside the product.

        xs      (rows, n) each, of W's dtype;  W (m, n), contiguous, or (n, m) transposed
        thins   of bfloat16 weights, first, last and x_j first^T middle are rounded to bfloat16 before they
                are multiplied
        room    bytes that the threads may take for what they work in (linear_bytes). Where it is scarce,
                some rows at a time are multiplied, each time with z made anew, and where that does not help,
                by fewer threads
        outs    contiguous (rows, m) each, of W's dtype, which take the results
        W + scales[j] z_j is rounded to W's dtype, as perturb writes it. The sums are float32 in a fixed
        order, rounded once (csrc/linear.cpp)."""
        VALID.linear(weight, sides, noise)
        tensor, span, transposed, shrink = weight
        xs, biases, scales, thins = sides
        m, n = tensor.shape[::-1] if transposed else tensor.shape
        counts = [x.shape[0] for x in xs]
        words = (
            [-1] * len(xs)
            if noise is None
            else [word if a else -1 for (_, word), a in zip(noise.draws, scales)]
        )
        dense = noise is not None and max(words) >= 0
        number, seed, step = (
            (VALID.number(noise.direction), noise.seed, step_at(noise.draws[0][0], noise.clock))
            if noise and dense
            else (0, 0, 0)
        )
        # sides of a draw follow one another
        order = sorted(range(len(xs)), key=words.__getitem__) if dense else range(len(xs))
        ys = list(outs) if outs is not None else [tensor.new_empty(count, m) for count in counts]
        for y, count in zip(ys, counts):
            if y.shape != (count, m) or not y.is_cpu or y.dtype != tensor.dtype or not y.is_contiguous():
                wanted = f"contiguous {tensor.dtype}[{count}, {m}] on cpu"
                raise ValueError(f"backend 'cpu': linear: an out is {described(y)}; expected {wanted}")
        read = torch.bfloat16 if tensor.dtype == torch.bfloat16 and pairs() else torch.float32
        held: list[Tensor] = []
        rows = [
            _hold(held, "an x", x, (count, n), read, x.is_contiguous()).data_ptr()
            for x, count in zip(xs, counts)
        ]
        added = [
            0 if b is None else _hold(held, "a bias", b, (m,), torch.float32, b.is_contiguous()).data_ptr()
            for b in biases
        ]
        products = [product for thin in thins for product in _thin_products(held, thin, m, n, counts, order)]
        pitch, out_pitch = n * read.itemsize, m * tensor.element_size()
        threads, parts, _ = _linear_plan(counts, room)
        for part in range(parts):
            operands = []
            for j in order:
                begin, end = counts[j] * part // parts, counts[j] * (part + 1) // parts
                into, scale = ys[j].data_ptr() + begin * out_pitch, scales[j] if dense else 0.0
                operands.append((rows[j] + begin * pitch, end - begin, into, added[j], scale, words[j]))
            _module().linear(tensor.data_ptr(), pack.TYPES[tensor.dtype], transposed, m, n, number, seed,
                span.first, span.who,
                             step, shrink, operands, products, threads)  # fmt: skip
        return ys

    def linear_bytes(self, counts: Sequence[int], room: int | None = None) -> int:
        """Returns the memory that linear() takes for so many rows of each side.

        Results and rows of thin products are not counted.

        It is more than `room` only where one thread takes more."""
        threads, _, memory = _linear_plan(counts, room)
        return threads * memory


def _summed(noise: Noise, coefficients: Tensor, decays: Sequence[float]) -> np.ndarray:
    """Returns the table of the terms of a sum, with the steps that the clock makes of theirs."""
    draws = (
        noise.draws
        if noise.clock is None
        else [(step_at(step, noise.clock), draw) for step, draw in noise.draws]
    )
    return pack.pack_draws(draws, coefficients.detach().numpy(), decays)


def _hold(
    held: list[Tensor], what: str, tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype, is_flat: bool
) -> Tensor:
    """Returns an operand, or a copy in the dtype that the kernel reads; `held` keeps it."""
    if tensor.shape != shape or not tensor.is_cpu:
        raise ValueError(
            f"backend 'cpu': linear: {what} is {described(tensor)}; expected {list(shape)} on cpu"
        )
    if tensor.dtype != dtype or not is_flat:
        tensor = tensor.to(dtype).contiguous()
    held.append(tensor)
    return tensor


def _thin_products(
    held: list[Tensor], thin: Thin, m: int, n: int, counts: Sequence[int], order: Sequence[int]
) -> Iterator[tuple]:
    """Yields the thin products of the sides that have rows, as the kernel reads them."""
    r, q = thin.middles.shape[1:]
    first = _hold(held, "a first factor", thin.first, (r, n), torch.float32, thin.first.is_contiguous())
    last = _hold(held, "a last factor", thin.last, (m, q), torch.float32, thin.last.stride(1) == 1)
    for j, middle in zip(thin.sides, thin.middles.unbind(0)):
        if counts[j]:
            middle = _hold(held, "a middle", middle, (r, q), torch.float32, True)
            ends = last.data_ptr(), q, last.stride(0)
            yield order.index(j), first.data_ptr(), r, middle.data_ptr(), *middle.stride(), *ends


def _linear_plan(counts: Sequence[int], room: int | None) -> tuple[int, int, int]:
    """Returns the threads, the number of parts of the rows, and the memory of a thread."""
    module = _module()
    base = module.linear_memory(0)
    return _plan_of(
        tuple(counts), room, torch.get_num_threads(), base, module.linear_memory(1) - base, SHARED_ROWS
    )


@lru_cache(maxsize=1024)
def _plan_of(
    counts: tuple[int, ...], room: int | None, threads: int, base: int, row: int, shared: int
) -> tuple[int, int, int]:
    """Plans so few parts that making z again costs little beside the products."""

    def memory(parts: int) -> int:
        return base + row * sum([-(-count // parts) for count in counts])

    if room is None or threads * memory(1) <= room:
        return threads, 1, memory(1)
    most = max(1, sum(counts) // shared)
    parts = next((parts for parts in range(2, most + 1) if threads * memory(parts) <= room), most)
    return max(1, min(threads, room // memory(parts))), parts, memory(parts)


def _elements(rights: Sequence[Tensor]) -> int:
    """Returns the elements of a chunk of lowrank_.

    At high ranks these are about 32 rows, which share the part of `right` that the first cache holds."""
    if len(rights) == 1 and rights[0].shape[1] <= ARITHMETIC_RANK:
        return pack.CHUNK_ELEMENTS
    longest = max([right.shape[0] for right in rights if right.shape[1] > ARITHMETIC_RANK], default=0)
    return min(max(pack.CHUNK_ELEMENTS, 32 * longest // pack.ALIGN * pack.ALIGN), 8 * pack.CHUNK_ELEMENTS)


__all__ = ["Cpu", "architectures", "isa", "select", "why_off"]
