"""Backend ``cuda``: the compiled kernels of csrc/*.cu, on torch's current stream.

A verb is one launch, for tensors of one CUDA device. The table of its list is packed and uploaded once and
found on the device afterwards (`device_tables`). Coefficients and clock are read where they lie. So no call
waits for the device, a repeated call copies nothing to it, and a call can be captured in a CUDA graph. A
call allocates and frees its memory on the stream of its launch, which torch's allocators order by, so
nothing has to live longer than the call. A caller with tensors of another stream orders the two.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from . import device_tables, pack, pack_lowrank
from .launch import Batch, Noise, Outer, Projected, Projection, Span, Terms, Update, projected, rounding_bits
from .validation import Validator, given

_cuda: Any = None
_error = ""
try:
    from .. import _cuda  # type: ignore[no-redef, attr-defined]
except ImportError as error:
    _error = str(error)


def why_off() -> str | None:
    """Returns None if this backend can run here, else why not, and the way out."""
    if _cuda is None:
        return (
            f"the compiled module zokern._cuda is missing ({_error}); install a wheel that has it, or put "
            "nvcc on PATH and run "
            "`pip install --no-build-isolation .` (without a GPU, with ZOKERN_CUDA_ARCHITECTURES=all)."
        )
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA; install a CUDA build of torch."
    try:
        count = _cuda.device_count()
    except RuntimeError as problem:
        return f"no CUDA device can be used ({problem}); install an NVIDIA driver for CUDA 13 or newer, on a machine with a GPU."
    if count == 0 or not torch.cuda.is_available():
        return "torch finds no CUDA device; check CUDA_VISIBLE_DEVICES and the NVIDIA driver."
    return None


class Cuda:
    """Runs the verbs on the tensors of one CUDA device."""

    name = "cuda"
    most_rank = 128
    device_type = "cuda"

    def __init__(self) -> None:
        self.tables = device_tables.Tables()
        self.valid = Validator(self.name, self.device_type, self.most_rank)

    def _call(
        self, verb: str, device: torch.device, tensors: Sequence[Tensor], *arguments: Any, **named: int
    ) -> None:
        """Calls the module on the device's current stream.

        `tensors` are all tensors that the arguments point to."""
        if _cuda is None:
            raise RuntimeError(f"backend 'cuda' is off: {why_off()}")
        with torch.cuda.device(device):
            getattr(_cuda, verb)(*arguments, 0, torch.cuda.current_stream(device).cuda_stream, **named)

    def _or_any(self, device: torch.device | None) -> torch.device:
        """Returns the device of a call; the current one if there are no tensors."""
        return device or torch.device(self.device_type)

    def _table(
        self, device: torch.device, batch: Batch, outs: Sequence[Sequence[Tensor]] = (), draws: bool = False
    ) -> tuple[list[Tensor], tuple[int, int, int]]:
        """Returns the table of a batch, and the module's first three arguments.

        draws  its tensors are results
        """
        thetas = None if draws else batch.tensors

        def make():
            entries, chunks = pack.pack(thetas, batch.spans, outs, batch.residuals, scales=batch.scales)
            return (entries, chunks) if len(chunks) else (), (entries.nbytes, len(chunks))

        key = device_tables.key_of(thetas, batch.spans, outs, batch.residuals, batch.scales)
        kept = self.tables.get(key, device, make)
        if kept.buffer is None:
            return [], (0, 0, 0)
        (entries_bytes, chunks), start = kept.facts, kept.buffer.data_ptr()
        return [kept.buffer], (start, start + entries_bytes, chunks)

    def _terms(self, device: torch.device, terms: np.ndarray) -> Tensor | None:
        """Returns the names and decays of a sum of several terms, on the device. Coefficients lie apart."""
        if len(terms) == 1:
            return None
        return self.tables.get(("terms", terms.tobytes()), device, lambda: ((terms,), None)).buffer

    def philox4x32(self, counter: Tensor, key: tuple[int, int], rounds: int) -> Tensor:
        device = self._or_any(self.valid.philox4x32(counter))
        given = counter.contiguous().view(torch.int32)[..., ::2].contiguous()  # the low half of each int64
        words = torch.empty_like(given)
        if len(given):
            self._call(
                "philox", device, [given, words], given.data_ptr(), len(given), *key, rounds, words.data_ptr()
            )
        return words.to(torch.int64) & 0xFFFFFFFF

    def project(self, projection: Projection) -> Projected:
        losses, weights, scalars = projection
        device = self._or_any(self.valid.project(projection))
        out, found = projected(losses, weights)
        self._call("project", device, [losses, *given(weights), scalars, out], losses.data_ptr(), *losses.shape,
                   _address(weights), len(found.amounts), scalars.data_ptr(), out.data_ptr())  # fmt: skip
        return found

    def draw(self, batch: Batch, noise: Noise) -> None:
        number, device = self.valid.number(noise.direction), self._or_any(self.valid.draw(batch, noise))
        kept, place = self._table(device, batch, (batch.tensors,), draws=True)
        if kept:
            ((step, draw),), clock = noise.draws, noise.clock
            self._call("draw", device, [*kept, *_given(batch), *given(clock)], *place, number, noise.seed,
                step, draw,
                       clock=_address(clock), **_scaled(batch))  # fmt: skip

    def axpy_(self, batch: Batch, noise: Noise, terms: Terms) -> Tensor:
        number, device = (
            self.valid.number(noise.direction),
            self._or_any(self.valid.axpy_(batch, noise, terms)),
        )
        nonfinite = torch.zeros(1, dtype=torch.int64, device=device)
        kept, place = self._table(device, batch)
        if not kept:
            return nonfinite
        coeffs, (each, decays) = terms.coefficients.contiguous(), terms.rounded()
        summed = pack.pack_draws(noise.draws, 0.0, decays)
        uploaded, clock = self._terms(device, summed), noise.clock
        tensors = [*kept, *given(uploaded), coeffs, nonfinite, *_given(batch), *given(clock)]
        tensors += given(terms.control)
        self._call("axpy", device, tensors, *place, number, noise.seed, pack.address(summed), len(summed),
            each,
                   pack.ROUNDING[batch.rounding], nonfinite.data_ptr(), clock=_address(clock),
                   device_draws=_address(uploaded),
                   coefficients=coeffs.data_ptr(), **_scaled(batch), **_controlled(terms.control))  # fmt: skip
        return nonfinite

    def update_(self, batch: Batch, noise: Noise, update: Update) -> Tensor:
        number, device = (
            self.valid.number(noise.direction),
            self._or_any(self.valid.update_(batch, noise, update)),
        )
        nonfinite = torch.zeros(1, dtype=torch.int64, device=device)
        kept, place = self._table(device, batch, update.states)
        if not kept:
            return nonfinite
        coeffs, scalars = update.coefficients.contiguous(), update.scalars.contiguous()
        summed = pack.pack_draws(noise.draws, 0.0, [1.0] * len(noise.draws))
        uploaded, clock = self._terms(device, summed), noise.clock
        flat = [tensor for state in update.states for tensor in state]
        tensors = [*kept, *given(uploaded), coeffs, scalars, nonfinite, *flat, *_given(batch), *given(clock)]
        tensors += given(update.control)
        self._call("update", device, tensors, *place, number, noise.seed, pack.address(summed), len(summed),
                   pack.RULES[update.rule], scalars.data_ptr(), pack.ROUNDING[batch.rounding],
                   nonfinite.data_ptr(),
                   clock=_address(clock), device_draws=_address(uploaded), coefficients=coeffs.data_ptr(),
                   **_scaled(batch), **_controlled(update.control))  # fmt: skip
        return nonfinite

    def perturb(
        self, batch: Batch, noise: Noise, scales: Sequence[float], outs: Sequence[Sequence[Tensor]]
    ) -> None:
        number = self.valid.number(noise.direction)
        device = self._or_any(self.valid.perturb(batch, noise, scales, outs))
        kept, place = self._table(device, batch, outs)
        if kept:
            ((step, draw),), clock = noise.draws, noise.clock
            both, flat = (
                np.array([*scales, 0.0][:2], dtype=np.float32),
                [tensor for side in outs for tensor in side],
            )
            self._call("perturb", device, [*kept, *flat, *_given(batch), *given(clock)], *place, number,
                noise.seed, step, draw,
                       both.ctypes.data, clock=_address(clock), **_scaled(batch))  # fmt: skip

    def lowrank_(
        self, batch: Batch, factors: Outer, noise: Noise | None = None, outs: Sequence[Tensor] | None = None
    ) -> Tensor:
        """Runs to the bound that csrc/lowrank.cu states; ranks 1 to 128."""
        device = self._or_any(self.valid.lowrank_(batch, factors, outs))
        (thetas, spans, rounding, low, _), (lefts, rights, scales, decay, control) = batch, factors
        seed, step = rounding_bits(noise)
        clock = None if noise is None else noise.clock
        nonfinite = torch.zeros(1, dtype=torch.int64, device=device)
        entries, _ = pack.pack(thetas, spans, () if outs is None else (outs,), low, numbered=True)
        if not len(entries):
            return nonfinite
        products = pack_lowrank.pack_factors(lefts, rights, scales)
        tiles, frames = pack_lowrank.pack_tiles(entries, products)
        parts = [array.view(np.uint8).reshape(-1) for array in (entries, tiles, frames, products)]
        both = device_tables.upload(parts, device)
        assert both is not None
        at = [both.data_ptr() + sum(part.size for part in parts[:i]) for i in range(4)]
        fast = tiles["column"] >= 0
        types = sum(1 << int(kind) for kind in np.unique(entries["type"][tiles["entry"][fast]]))
        simple = (
            (decay == 1.0 or control is not None) and outs is None and (rounding == "nearest" or types == 1)
        )
        ranks = {right.shape[1] for right in rights}
        whole = ranks <= {16, 32, 64, 128} and len(ranks) == 1
        self._call("lowrank_tiles", device, [both, nonfinite, *lefts, *rights, *(outs or ()), *_given(batch), *given(clock),
            *given(control)], at[0], at[1],
                   len(tiles), at[2], at[3], max(ranks), bool((~fast).any()), types, simple, whole, seed,
                   step, decay,
                   pack.ROUNDING[rounding], nonfinite.data_ptr(), clock=_address(clock),
                   **_controlled(control))  # fmt: skip
        return nonfinite


def _given(batch: Batch) -> list[Tensor]:
    """Returns the tensors whose addresses the table of a batch holds."""
    factors = [scale for scale in batch.scales or () if scale is not None]
    return [*batch.tensors, *(batch.residuals or ()), *_rows(batch.spans), *factors]


def _scaled(batch: Batch) -> dict[str, bool]:
    """Returns the argument that asks for the kernels with factors of z."""
    return {"scaled": True} if batch.is_scaled else {}


def _controlled(control: Tensor | None) -> dict[str, int]:
    """Returns the argument of kernels that read {decay, go, finite}."""
    return {} if control is None else {"control": control.data_ptr()}


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _rows(spans: Sequence[Span]) -> list[Tensor]:
    return [span.rows for span in spans if span.rows is not None]


__all__ = ["Cuda", "why_off"]
