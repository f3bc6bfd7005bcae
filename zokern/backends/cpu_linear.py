"""Products of backend ``cpu``, with z made beside them: csrc/linear.cpp.

    y_j = shrink x_j (W + scales[j] z_j)^T + biases[j] + thin products

xs      (rows, n) each, of W's dtype;  W (m, n), contiguous, or (n, m) transposed
thins   of bfloat16 weights, first, last and x_j first^T middle are rounded to bfloat16 before they
        are multiplied
room    bytes that the threads may take for what they work in (linear_bytes). Where it is scarce,
        some rows at a time are multiplied, each time with z made anew, and where that does not help,
        by fewer threads
outs    contiguous (rows, m) each, of W's dtype, which take the results
W + scales[j] z_j is rounded to W's dtype, as perturb writes it. The sums are float32 in a fixed
order, rounded once (csrc/linear.cpp).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache

import torch
from torch import Tensor

from . import pack
from .cpu_module import module, pairs
from .launch import Noise, Sides, Thin, Weight, step_at
from .operands import described
from .validation import Validator

# rows of all sides that are worth a z of their own: about a tenth of their products (bench_matmul.py)
SHARED_ROWS = 512
VALID = Validator("cpu", "cpu")


class Products:
    """Multiplies CPU tensors by perturbed weights."""

    def linear(
        self, weight: Weight, sides: Sides, noise: Noise | None = None, room: int | None = None,
        outs: Sequence[Tensor] | None = None,
    ) -> list[Tensor]:  # fmt: skip
        """Computes y_j. The head of this file says what each argument is."""
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
            module().linear(tensor.data_ptr(), pack.TYPES[tensor.dtype], transposed, m, n, number, seed,
                            span.first, span.who, step, shrink, operands, products, threads)  # fmt: skip
        return ys

    def linear_bytes(self, counts: Sequence[int], room: int | None = None) -> int:
        """Returns the memory that linear() takes for so many rows of each side.

        Results and rows of thin products are not counted.

        It is more than `room` only where one thread takes more."""
        threads, _, memory = _linear_plan(counts, room)
        return threads * memory


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
    compiled = module()
    base = compiled.linear_memory(0)
    return _plan_of(
        tuple(counts), room, torch.get_num_threads(), base, compiled.linear_memory(1) - base, SHARED_ROWS
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


__all__ = ["Products"]
