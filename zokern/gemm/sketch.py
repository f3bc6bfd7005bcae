"""Products with a sum of directions that is never held."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..backends import Backend, Span
from ..backends.validation import described


def sketch_of(
    backend: Backend, direction: object, seed: int, span: Span, shape: tuple[int, int], draws: Sequence[tuple[int, int]], coeffs: Sequence[float],
    omega: Tensor, transposed: bool = False, tile: int = 1 << 20,
) -> Tensor:  # fmt: skip
    """Y = G Omega, or G^T Omega, of G = sum_k coeffs[k] z(*draws[k]), m x n: float32, about `tile` elements of G at a time."""
    rows, columns = shape
    device = omega.device
    if omega.dtype != torch.float32:
        raise ValueError(f"sketch: omega is {described(omega)}; expected float32: .float() it")
    table = torch.tensor(list(coeffs), dtype=torch.float32, device=device)
    result = torch.zeros(columns if transposed else rows, omega.shape[1], dtype=torch.float32, device=device)
    step = max(1, min(rows, tile // columns))
    buffer = torch.empty(step, columns, dtype=torch.float32, device=device)
    for start in range(0, rows, step):
        stop = min(rows, start + step)
        part = buffer[: stop - start].zero_()
        here = Span(span.who, span.first + start * columns)
        backend.axpy_([part], [here], direction, seed, draws, table, 1.0, "nearest", None)
        if transposed:
            result += part.t() @ omega[start:stop]
        else:
            torch.mm(part, omega, out=result[start:stop])
    return result
