"""Products with a sum of directions that is never held."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import devices
from ..backends import Backend, Batch, Noise, Span, Terms
from ..backends.operands import described


def sketch_of(
    backend: Backend, noise: Noise, coeffs: Sequence[float] | Tensor, span: Span, shape: tuple[int, int],
    omega: Tensor, transposed: bool = False, tile: int | None = None,
) -> Tensor:  # fmt: skip
    """Returns G Omega, or G^T Omega, of G = sum_k coeffs[k] z_k, m x n, in float32.

    About `tile` elements of G exist at a time; None: as many as suit the device. A z by itself is drawn into
    the tile, and a sum is added up there."""
    rows, columns = shape
    device = omega.device
    if omega.dtype != torch.float32:
        raise ValueError(f"sketch: omega is {described(omega)}; expected float32: .float() it")
    is_alone = not isinstance(coeffs, Tensor) and list(coeffs) == [1.0]
    if not isinstance(coeffs, Tensor):
        coeffs = torch.tensor(list(coeffs), dtype=torch.float32, device=device)
    table = coeffs.float()
    result = torch.zeros(columns if transposed else rows, omega.shape[1], dtype=torch.float32, device=device)
    step = max(1, min(rows, (tile or devices.of(device).sketched) // columns))
    buffer = torch.empty(step, columns, dtype=torch.float32, device=device)
    for start in range(0, rows, step):
        stop = min(rows, start + step)
        part = buffer[: stop - start]
        batch = Batch([part], [Span(span.who, span.first + start * columns)])
        if is_alone:
            backend.draw(batch, noise)
        else:
            part.zero_()
            backend.axpy_(batch, noise, Terms(table))
        if transposed:
            result += part.t() @ omega[start:stop]
        else:
            torch.mm(part, omega, out=result[start:stop])
    return result
