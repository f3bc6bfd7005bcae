"""Backend ``cpu``: the compiled kernels of csrc/elementwise.cpp, update.cpp, lowrank.cpp and linear.cpp; AVX-512, AVX2 or scalar, chosen when the
module is loaded.

One call is one parallel region over the chunks of a table, on ``torch.get_num_threads()`` threads. The environment variable
``ZOKERN_CPU_ISA`` (avx512bf16, avx512, avx2 or scalar) forces one of the paths that this machine can run; all give the same bits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from operator import is_
from typing import Any

import numpy as np
import torch  # before _cpu: both then share one OpenMP runtime, and torch's threads are not oversubscribed
from torch import Tensor

from . import pack, pack_lowrank
from .base import Span, check_rows, rounded_sums, step_at
from .validation import Validator, described

_cpu: Any = None
_error = ""
try:
    from .. import _cpu  # type: ignore[no-redef, attr-defined]
except ImportError as error:
    _error = str(error)

ARITHMETIC_RANK = 32  # above it lowrank_ is bound by arithmetic, and a panel in the first cache is worth a longer chunk
SHARED_ROWS = 512  # rows of all sides that are worth a z of their own: about a tenth of their products (bench_matmul.py)
SMALL = 1 << 16  # elements of a launch below which waking a second thread costs more than it saves
VALID = Validator("cpu", "cpu")


def why_off() -> str | None:
    """None if this backend can run here; otherwise why not, and the way out."""
    if _cpu is not None:
        return None
    return (
        f"the compiled module zokern._cpu is missing ({_error}); install a wheel that has it, or g++ and run "
        "`pip install --no-build-isolation .`; backend 'reference' needs neither"
    )


def same_values(dicts: list[dict], kept: list) -> bool:
    """Whether the values of some dicts, one dict after another, are the very objects of a list."""
    if _cpu is not None:
        return bool(_cpu.same_values(dicts, kept))
    now = [value for held in dicts for value in held.values()]
    return len(now) == len(kept) and all(map(is_, now, kept))


def isa() -> str:
    """The instruction set in use: 'avx512bf16', 'avx512', 'avx2' or 'scalar'."""
    return str(_module().implementation())


def pairs() -> bool:
    """Whether linear() multiplies bfloat16 by the processor's dot product of pairs, and not in float32."""
    return bool(_module().linear_pairs())


def select(name: str) -> None:
    """Use another of `architectures()`; ValueError when it cannot run here."""
    _module().select(name)


def architectures() -> list[str]:
    """The instruction sets that this machine can run, best first."""
    return list(_module().architectures())


def _module() -> Any:
    if _cpu is None:
        raise RuntimeError(f"backend 'cpu' is off: {why_off()}")
    return _cpu


def _direction(direction) -> int:
    number = pack.DIRECTIONS.get(direction.name)
    if number is None:
        raise NotImplementedError(
            f"direction {direction.name!r} has no compiled kernel; backend 'cpu' has {sorted(pack.DIRECTIONS)}, "
            "backend 'reference' takes any direction"
        )
    return number


def _is_sound(
    thetas: Sequence[Tensor],
    spans: Sequence[Span],
    lefts: Sequence[Tensor],
    rights: Sequence[Tensor],
    scales: Sequence[float],
    rounding: str,
    residuals: Sequence[Tensor] | None,
    outs: Sequence[Tensor] | None,
) -> bool:
    """Tells whether a call of lowrank_ is the common one of a forward pass, and right: in a tenth of the time of VALID.lowrank_."""
    if not 1 == len(thetas) == len(spans) == len(lefts) == len(rights) == len(scales):
        return False
    if residuals is not None or rounding != "nearest" or (outs is not None and len(outs) != 1):
        return False
    theta, left, right, (_, first, pitch, rows) = thetas[0], lefts[0], rights[0], spans[0]
    out = theta if outs is None else outs[0]
    if not (theta.is_cpu and left.is_cpu and right.is_cpu and out.is_cpu) or pitch is not None or rows is not None:
        return False
    if theta.dtype not in pack.TYPES or (out is not theta and out.dtype != theta.dtype):
        return False
    if left.dtype != torch.float32 or right.dtype != torch.float32 or left.dim() != 2 or right.dim() != 2:
        return False
    size, ((m, r), (n, s)) = theta.numel(), (left.shape, right.shape)
    flat = left.is_contiguous() and right.is_contiguous() and (out is theta or (out.is_contiguous() and out.numel() == size))
    return flat and r == s > 0 and first + size <= m * n


def _tables(entries: np.ndarray, chunks: np.ndarray) -> tuple[int, int, int]:
    return pack.address(entries), pack.address(chunks), len(chunks)


def _workers(entries: np.ndarray, chunks: np.ndarray) -> int:
    """Threads of a launch: one where waking a second costs more than it saves."""
    if len(chunks) == 1:
        return 1
    if len(entries) > 1 and int((chunks["end"] - chunks["begin"]).sum()) < SMALL:
        return 1
    return torch.get_num_threads()


def _prepared(
    verb: str, thetas: Sequence[Tensor], spans: Sequence[Span], outs: Sequence[Sequence[Tensor]], check: Callable[[], Any]
) -> tuple:
    """Returns entries and chunks of a launch without residuals; checked and packed once for lists that the caller keeps."""
    kept = getattr(thetas, "kept", None)
    if kept is None or any(getattr(side, "kept", None) is None for side in outs):
        check()
        return pack.pack(thetas, spans, outs)
    key = verb, id(spans), *map(id, outs)
    known = kept.get(key)
    if known is None or known[0] is not spans or any(a is not b for a, b in zip(known[1], outs)):
        check()
        known = kept[key] = spans, tuple(outs), pack.pack(thetas, spans, outs)
    return known[2]


class Cpu:
    """base.Backend on CPU tensors."""

    name = "cpu"

    def philox4x32(self, counter: Tensor, key: tuple[int, int], rounds: int) -> Tensor:
        VALID.philox4x32(counter)
        given = np.ascontiguousarray(counter.numpy().astype(np.uint32))
        words = np.empty_like(given)
        _module().philox(given.ctypes.data, len(given), key[0], key[1], rounds, words.ctypes.data, 1, 0)
        return torch.from_numpy(words.astype(np.int64))

    def draw(self, outs: Sequence[Tensor], spans: Sequence[Span], direction, seed: int, step: int, draw: int,
             clock: Tensor | None = None) -> None:  # fmt: skip
        number = _direction(direction)
        VALID.draw(outs, spans, clock)
        step = step_at(step, clock)
        entries, chunks = pack.pack(None, spans, (outs,))
        _module().draw(*_tables(entries, chunks), number, seed, step, draw, _workers(entries, chunks), 0)

    def axpy_(self, thetas: Sequence[Tensor], spans: Sequence[Span], direction, seed: int, draws: Sequence[tuple[int, int]],
              coeffs: Tensor, decay: float | Sequence[float], rounding: str, residuals: Sequence[Tensor] | None,
              clock: Tensor | None = None, each: int = 0) -> Tensor:  # fmt: skip
        number = _direction(direction)
        check = partial(VALID.axpy_, thetas, spans, draws, coeffs, rounding, residuals, clock)
        nonfinite = torch.zeros(1, dtype=torch.int64, device="cpu")
        if residuals is None and clock is None and rounding in pack.ROUNDING:
            VALID.numbers("axpy_", "coeffs", coeffs, len(draws))
            entries, chunks = _prepared("axpy_", thetas, spans, (), check)
        else:
            check()
            entries, chunks = pack.pack(thetas, spans, residuals=residuals)
        each, decays = rounded_sums(decay, len(draws), each)
        terms = pack.pack_draws([(step_at(step, clock), draw) for step, draw in draws], coeffs.detach().numpy(), decays)
        _module().axpy(*_tables(entries, chunks), number, seed, pack.address(terms), len(terms), each, pack.ROUNDING[rounding],
                       nonfinite.data_ptr(), _workers(entries, chunks), 0)  # fmt: skip
        return nonfinite

    def update_(self, thetas: Sequence[Tensor], spans: Sequence[Span], direction, seed: int, draws: Sequence[tuple[int, int]],
                coeffs: Tensor, rule: str, scalars: Tensor, states: Sequence[Sequence[Tensor]], rounding: str,
                residuals: Sequence[Tensor] | None, clock: Tensor | None = None) -> Tensor:  # fmt: skip
        number = _direction(direction)
        check_rows(spans, None, "update_")
        VALID.update_(thetas, spans, draws, coeffs, rule, scalars, states, rounding, residuals, clock)
        nonfinite, scalars = torch.zeros(1, dtype=torch.int64, device="cpu"), scalars.contiguous()
        entries, chunks = pack.pack(thetas, spans, states, residuals)
        terms = pack.pack_draws(
            [(step_at(step, clock), draw) for step, draw in draws], coeffs.detach().numpy(), [1.0] * len(draws)
        )
        _module().update(*_tables(entries, chunks), number, seed, pack.address(terms), len(terms), pack.RULES[rule],
                         scalars.data_ptr(), pack.ROUNDING[rounding], nonfinite.data_ptr(), _workers(entries, chunks),
                         0)  # fmt: skip
        return nonfinite

    def perturb(self, thetas: Sequence[Tensor], spans: Sequence[Span], direction, seed: int, step: int, draw: int,
                scales: Sequence[float], outs: Sequence[Sequence[Tensor]], residuals: Sequence[Tensor] | None,
                clock: Tensor | None = None) -> None:  # fmt: skip
        number = _direction(direction)
        check = partial(VALID.perturb, thetas, spans, scales, outs, residuals, clock)
        if residuals is None and clock is None and len(scales) == len(outs):
            entries, chunks = _prepared("perturb", thetas, spans, outs, check)
        else:
            check()
            entries, chunks = pack.pack(thetas, spans, outs, residuals)
        step = step_at(step, clock)
        sides = np.zeros(2, dtype=np.float32)
        sides[: len(scales)] = scales
        _module().perturb(*_tables(entries, chunks), number, seed, step, draw, sides.ctypes.data, _workers(entries, chunks), 0)

    def lowrank_(self, thetas: Sequence[Tensor], spans: Sequence[Span], lefts: Sequence[Tensor], rights: Sequence[Tensor],
                 scales: Sequence[float], decay: float, rounding: str, residuals: Sequence[Tensor] | None, seed: int = 0, step: int = 0,
                 outs: Sequence[Tensor] | None = None) -> Tensor:  # fmt: skip
        check_rows(spans, outs)
        if not _is_sound(thetas, spans, lefts, rights, scales, rounding, residuals, outs):
            VALID.lowrank_(thetas, spans, lefts, rights, scales, rounding, residuals, outs)
        if len(thetas) == 1 and spans[0].rows is None and spans[0].pitch is None and thetas[0].is_contiguous():
            theta, out, left, right = thetas[0], thetas[0] if outs is None else outs[0], lefts[0], rights[0]
            nonfinite = torch.empty(1, dtype=torch.int64, device="cpu")  # the call of a forward pass: no table, no NumPy
            _module().lowrank_one(
                theta.data_ptr(), 0 if outs is None else out.data_ptr(), 0 if residuals is None else residuals[0].data_ptr(),
                theta.numel(), spans[0].first, spans[0].who, pack.TYPES[theta.dtype], pack.TYPES[out.dtype], left.data_ptr(),
                right.data_ptr(), right.shape[1], right.shape[0], scales[0], _elements(rights), seed, step, decay,
                pack.ROUNDING[rounding], nonfinite.data_ptr(), torch.get_num_threads(),
            )  # fmt: skip
            return nonfinite
        nonfinite = torch.zeros(1, dtype=torch.int64, device="cpu")
        sides = () if outs is None else (outs,)
        entries, chunks = pack.pack(thetas, spans, sides, residuals, _elements(rights), numbered=True)
        factors = pack_lowrank.pack_factors(lefts, rights, scales)
        _module().lowrank(*_tables(entries, chunks), pack.address(factors), len(factors), seed, step, decay, pack.ROUNDING[rounding],
                          nonfinite.data_ptr(), _workers(entries, chunks), 0)  # fmt: skip
        return nonfinite

    def linear(
        self, xs: Sequence[Tensor], weight: Tensor, span: Span, direction, seed: int, step: int, draws: Sequence[int], scales: Sequence[float],
        biases: Sequence[Tensor | None], thins: Sequence[tuple[int, Tensor, Tensor, Tensor]] = (), room: int | None = None,
        outs: Sequence[Tensor] | None = None, transposed: bool = False, shrink: float = 1.0,
    ) -> list[Tensor]:  # fmt: skip
        """y_j = shrink x_j (W + scales[j] z_j)^T + biases[j] + thin products, in W's dtype, with z made beside the product (csrc/linear.cpp).

        xs      (rows, n) each, of W's dtype;  weight (m, n), contiguous;  draws[j] names z_j, negative: side j reads W itself
        thins   (j, first, middle, last): y_j += x_j first^T middle last^T, float32 (r, n), (r, q) and (m, q); of bfloat16 weights, first,
                last and x_j first^T middle are rounded to bfloat16 before they are multiplied
        room    bytes that the threads may take for what they work in (linear_bytes); where it is scarce, some rows at a time are
                multiplied, each time with z made anew, and where that does not help, by fewer threads
        outs    contiguous (rows, m) each, of W's dtype, which take the results;  transposed  y_j = x_j (W + scales[j] z_j), W (n, m)
        W + scales[j] z_j is rounded to W's dtype, as perturb writes it; the sums are float32 in a fixed order, rounded once."""
        VALID.linear(xs, weight, draws, scales, biases, thins)
        m, n = weight.shape[::-1] if transposed else weight.shape
        dense = max(draws) >= 0
        number = _direction(direction) if dense else 0
        order = sorted(range(len(xs)), key=draws.__getitem__) if dense else range(len(xs))  # sides of a draw follow one another
        ys = list(outs) if outs is not None else [weight.new_empty(x.shape[0], m) for x in xs]
        counts = [x.shape[0] for x in xs]
        threads, parts, _ = _linear_plan(counts, room)
        read = torch.bfloat16 if weight.dtype == torch.bfloat16 and pairs() else torch.float32
        held = [weight, *ys]  # what the kernel reads and writes lives until the call returns

        def hold(what: str, tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype, is_flat: bool) -> Tensor:
            if tensor.shape != shape or not tensor.is_cpu:
                raise ValueError(f"backend 'cpu': linear: {what} is {described(tensor)}; expected {list(shape)} on cpu")
            if tensor.dtype != dtype or not is_flat:
                tensor = tensor.to(dtype).contiguous()
            held.append(tensor)
            return tensor

        for y, count in zip(ys, counts):
            if y.shape != (count, m) or not y.is_cpu or y.dtype != weight.dtype or not y.is_contiguous():
                raise ValueError(
                    f"backend 'cpu': linear: an out is {described(y)}; expected contiguous {weight.dtype}[{count}, {m}] on cpu"
                )
        rows = [hold("an x", x, (count, n), read, x.is_contiguous()).data_ptr() for x, count in zip(xs, counts)]
        added = [0 if b is None else hold("a bias", b, (m,), torch.float32, b.is_contiguous()).data_ptr() for b in biases]
        products = []
        for j, first, middle, last in thins:
            r, q = middle.shape
            first = hold("a first factor", first, (r, n), torch.float32, first.is_contiguous())
            last = hold("a last factor", last, (m, q), torch.float32, last.stride(1) == 1)
            middle = hold("a middle", middle, (r, q), torch.float32, True)
            ends = last.data_ptr(), q, last.stride(0)
            products.append((order.index(j), first.data_ptr(), r, middle.data_ptr(), *middle.stride(), *ends))
        pitch, out_pitch = n * read.itemsize, m * weight.element_size()
        for part in range(parts):
            sides = []
            for j in order:
                begin, end = counts[j] * part // parts, counts[j] * (part + 1) // parts
                into = ys[j].data_ptr() + begin * out_pitch
                sides.append((rows[j] + begin * pitch, end - begin, into, added[j], scales[j], draws[j]))
            _module().linear(
                weight.data_ptr(), pack.TYPES[weight.dtype], transposed, m, n, number, seed, span.first, span.who, step, shrink, sides,
                products, threads,
            )  # fmt: skip
        return ys

    def linear_bytes(self, counts: Sequence[int], room: int | None = None) -> int:
        """Memory that linear() takes for so many rows of each side, beside results and rows of thin products: more than `room` only
        where one thread does."""
        threads, _, memory = _linear_plan(counts, room)
        return threads * memory


def _linear_plan(counts: Sequence[int], room: int | None) -> tuple[int, int, int]:
    """Threads, in how many parts the rows are multiplied, and the memory of a thread."""
    module = _module()
    base = module.linear_memory(0)
    return _plan_of(tuple(counts), room, torch.get_num_threads(), base, module.linear_memory(1) - base, SHARED_ROWS)


@lru_cache(maxsize=1024)
def _plan_of(counts: tuple[int, ...], room: int | None, threads: int, base: int, row: int, shared: int) -> tuple[int, int, int]:
    """So few parts that making z again is little beside the products."""

    def memory(parts: int) -> int:
        return base + row * sum([-(-count // parts) for count in counts])

    if room is None or threads * memory(1) <= room:
        return threads, 1, memory(1)
    most = max(1, sum(counts) // shared)
    parts = next((parts for parts in range(2, most + 1) if threads * memory(parts) <= room), most)
    return max(1, min(threads, room // memory(parts))), parts, memory(parts)


def _elements(rights: Sequence[Tensor]) -> int:
    """Elements of a chunk of lowrank_: at high ranks about 32 rows, which share the part of `right` that the first cache holds."""
    longest = max([right.shape[0] for right in rights if right.shape[1] > ARITHMETIC_RANK], default=0)
    return min(max(pack.CHUNK_ELEMENTS, 32 * longest // pack.ALIGN * pack.ALIGN), 8 * pack.CHUNK_ELEMENTS)


__all__ = ["Cpu", "architectures", "isa", "select", "why_off"]
