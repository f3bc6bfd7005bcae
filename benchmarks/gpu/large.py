"""One tensor of more than 2^31 elements: an index that is 32 bits wide anywhere comes out here.

Windows at both ends, around element 2^31 and, where the tensor reaches that far, around 2^32 are compared
with the CPU backend, which draws them with `first`. Everything between is compared with the same verb in
launches of odd size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from guarded import equal
from torch import Tensor

from zokern.backends import Backend, Batch, Noise, Outer, Span, Terms
from zokern.directions import resolve

from .run import Run, free_bytes, judge
from .verbs import SEED, STEP, whole

BORDERS = (2**31, 2**32)
WINDOW = 4096
NAME = 4242


@dataclass
class Giant:
    """How a verb is called on elements [first, first + n) of the one tensor.

    outs   tensors that it writes beside theta, each of theta's size
    call   (backend, theta, span, outs) -> None
    """

    dtype: torch.dtype
    outs: int
    call: Callable[[Backend, Tensor, Span, list[Tensor]], object]


def draw(backend: Backend, theta: Tensor, span: Span, outs: list[Tensor]) -> object:
    return backend.draw(Batch([theta], [span]), Noise(resolve("rademacher"), SEED, [(STEP, 0)]))


def axpy(backend: Backend, theta: Tensor, span: Span, outs: list[Tensor]) -> object:
    a = torch.tensor([1e-3], device=theta.device)
    return backend.axpy_(
        Batch([theta], [span], "stochastic"), Noise(resolve("normal"), SEED, [(STEP, 0)]), Terms(a, 0.999)
    )


def perturb(backend: Backend, theta: Tensor, span: Span, outs: list[Tensor]) -> object:
    return backend.perturb(
        Batch([theta], [span]),
        Noise(resolve("normal"), SEED, [(STEP, 0)]),
        [1e-3, -1e-3],
        [[out] for out in outs],
    )


GIANTS = {
    "draw, float32": Giant(torch.float32, 0, draw),
    "axpy_, bfloat16": Giant(torch.bfloat16, 0, axpy),
    "perturb both sides, bfloat16": Giant(torch.bfloat16, 2, perturb),
}


def windows(count: int, borders: Sequence[int]) -> list[slice]:
    """Ends first: [0, w), [border - w, border + w) for each border inside, and [count - w - 3, count)."""
    inside = [slice(max(0, b - WINDOW), min(count, b + WINDOW + 1)) for b in borders if b < count]
    return [slice(0, min(count, WINDOW)), *inside, slice(max(0, count - WINDOW - 3), count)]


def start(
    count: int, dtype: torch.dtype, places: Sequence[slice], device: str
) -> tuple[Tensor, list[Tensor]]:
    """The tensor before the call, and its windows on the CPU: random there, a constant that is not zero
    elsewhere."""
    theta = torch.full((count,), 0.0625, dtype=dtype, device=device)
    generator = torch.Generator().manual_seed(31)
    for place in places:
        theta[place] = (
            (0.02 * torch.randn(place.stop - place.start, generator=generator)).to(dtype).to(device)
        )
    return theta, [theta[place].cpu().clone() for place in places]


def check_giant(
    name: str, backend: Backend, device: str, count: int, borders: Sequence[int], part: int
) -> None:
    """Raises AssertionError with the first element that differs."""
    giant, places = GIANTS[name], windows(count, borders)
    theta, before = start(count, giant.dtype, places, device)
    parts = theta.clone()
    outs = [torch.full_like(theta, -77.0) for _ in range(giant.outs)]
    giant.call(backend, theta, Span(NAME), outs)
    for place, window in zip(places, before):
        expected = [torch.full_like(window, -77.0) for _ in range(giant.outs)]
        giant.call(judge(), window, Span(NAME, place.start), expected)
        for got, right in zip([theta, *outs], [window, *expected]):
            equal(got[place], right, f"{name}, {count} elements, from element {place.start}")
    for first in range(0, count, part):
        here = slice(first, min(count, first + part))
        sides = [torch.full_like(parts[here], -77.0) for _ in range(giant.outs)]
        giant.call(backend, parts[here], Span(NAME, first), sides)
        for got, right in zip([theta, *outs], [parts[here], *sides]):
            if not torch.equal(got[here] if got.numel() == count else got, right):
                equal(
                    got[here],
                    right.cpu(),
                    f"{name}, {count} elements at once and {part} at a time, from element {first}",
                )


def check_matrix(backend: Backend, device: str, rows: int, columns: int) -> None:
    """lowrank_ on a matrix of more than 2^31 elements, of small integers; strips of rows are compared with
    the CPU."""
    rank, strip = 16, max(1, WINDOW // columns + 1)
    left, right = whole(1, rows, rank), whole(5, columns, rank)
    theta = torch.full((rows, columns), 0.0625, dtype=torch.bfloat16, device=device)
    backend.lowrank_(Batch([theta], [Span(NAME)]), Outer([left.to(device)], [right.to(device)], [0.125]))
    middles = [b // columns for b in BORDERS if b < rows * columns] or [rows // 2]
    for row in (0, *middles, rows - strip):
        stop = min(rows, row + strip)
        expected = torch.full((stop - row, columns), 0.0625, dtype=torch.bfloat16)
        judge().lowrank_(Batch([expected], [Span(NAME, row * columns)]), Outer([left], [right], [0.125]))
        equal(theta[row:stop], expected, f"lowrank_, {rows} x {columns}, from row {row}")


def large(run: Run, backend: str) -> None:
    """2^31 + 2^20 + 5 elements; small here stands for the same with borders that a small tensor reaches."""
    if (found := run.backend(backend)) is None:
        return
    borders = tuple(b >> 16 for b in BORDERS) if run.quick else BORDERS
    count = borders[0] + (borders[0] >> 11) + 5
    for name, giant in GIANTS.items():
        label = f"{backend}: {name}, {count} elements"
        need = count * giant.dtype.itemsize * (2 + giant.outs) + (1 << 30)
        if need > free_bytes(run.device):
            run.skip(label, f"needs {need / 1e9:.0f} GB, {free_bytes(run.device) / 1e9:.0f} GB are free")
            continue
        run.check(
            label, lambda n=name: check_giant(n, found, run.device, count, borders, borders[0] // 3 + 1)
        )
        if run.device == "cuda":
            torch.cuda.empty_cache()
    rows, columns = (129, 256) if run.quick else (65544, 32776)
    label = f"{backend}: lowrank_, {rows} x {columns}"
    if 3 * rows * columns > free_bytes(run.device):
        run.skip(label, f"needs {3 * rows * columns / 1e9:.0f} GB")
        return
    run.check(label, lambda: check_matrix(found, run.device, rows, columns))
