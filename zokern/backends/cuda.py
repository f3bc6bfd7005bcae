"""Backend ``cuda``: the compiled kernels of csrc/elementwise.cu, update.cu and lowrank.cu, for tensors of one CUDA device and on
torch's current stream.

A verb is one launch. The table of its list is packed and uploaded once and found on the device afterwards (`device_tables`); the
coefficients and the clock are read where they lie. So no call waits for the device, a repeated call copies nothing to it, and a
call can be captured in a CUDA graph. Everything a call allocates is allocated and freed on the stream that it launches on, which
is what torch's allocators order by: nothing has to be kept alive after the call. Whoever gives it tensors of another stream has to
order the two, as zokern/overlap.py does.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from . import device_tables, pack, pack_lowrank
from .base import Span, check_rows, rounded_sums
from .validation import Validator, given

_cuda: Any = None
_error = ""
try:
    from .. import _cuda  # type: ignore[no-redef, attr-defined]
except ImportError as error:
    _error = str(error)


def why_off() -> str | None:
    """None if this backend can run here; otherwise why not, and the way out."""
    if _cuda is None:
        return (
            f"the compiled module zokern._cuda is missing ({_error}); install a wheel that has it, or put nvcc on PATH and run "
            "`pip install --no-build-isolation .`."
        )
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA; install a CUDA build of torch."
    try:
        count = _cuda.device_count()
    except RuntimeError as problem:
        return (
            f"no CUDA device can be used ({problem}); install an NVIDIA driver for CUDA 13 or newer, on a machine with a GPU."
        )
    if count == 0 or not torch.cuda.is_available():
        return "torch finds no CUDA device; check CUDA_VISIBLE_DEVICES and the NVIDIA driver."
    return None


def _direction(direction) -> int:
    number = pack.DIRECTIONS.get(direction.name)
    if number is None:
        raise NotImplementedError(
            f"direction {direction.name!r} has no compiled kernel; backend 'cuda' has {sorted(pack.DIRECTIONS)}, "
            "backend 'reference' takes any direction"
        )
    return number


class Cuda:
    """base.Backend on the tensors of one CUDA device."""

    name = "cuda"
    most_rank = 128
    device_type = "cuda"

    def __init__(self) -> None:
        self.tables = device_tables.Tables()
        self.valid = Validator(self.name, self.device_type)

    def _call(self, verb: str, device: torch.device, tensors: Sequence[Tensor], *arguments: Any, **named: int) -> None:
        """One function of the module on the device's current stream; `tensors` is everything that the arguments point to."""
        if _cuda is None:
            raise RuntimeError(f"backend 'cuda' is off: {why_off()}")
        with torch.cuda.device(device):
            getattr(_cuda, verb)(*arguments, 0, torch.cuda.current_stream(device).cuda_stream, **named)

    def _or_any(self, device: torch.device | None) -> torch.device:
        """The device of a call; of one without tensors, the current one."""
        return device or torch.device(self.device_type)

    def _table(self, device: torch.device, thetas, spans, outs=(), residuals=None) -> tuple[list[Tensor], tuple[int, int, int]]:
        """The table of a list, and the module's first three arguments."""

        def make():
            entries, chunks = pack.pack(thetas, spans, outs, residuals)
            return (entries, chunks) if len(chunks) else (), (entries.nbytes, len(chunks))

        kept = self.tables.get(device_tables.key_of(thetas, spans, outs, residuals), device, make)
        if kept.buffer is None:
            return [], (0, 0, 0)
        (entries_bytes, chunks), start = kept.facts, kept.buffer.data_ptr()
        return [kept.buffer], (start, start + entries_bytes, chunks)

    def _terms(self, device: torch.device, terms: np.ndarray) -> Tensor | None:
        """The names and decays of a sum of several terms, on the device; their coefficients lie apart."""
        if len(terms) == 1:
            return None
        return self.tables.get(("terms", terms.tobytes()), device, lambda: ((terms,), None)).buffer

    def philox4x32(self, counter: Tensor, key: tuple[int, int], rounds: int) -> Tensor:
        device = self._or_any(self.valid.philox4x32(counter))
        given = counter.contiguous().view(torch.int32)[..., ::2].contiguous()  # the low half of each int64
        words = torch.empty_like(given)
        if len(given):
            self._call("philox", device, [given, words], given.data_ptr(), len(given), *key, rounds, words.data_ptr())
        return words.to(torch.int64) & 0xFFFFFFFF

    def draw(self, outs: Sequence[Tensor], spans: Sequence[Span], direction, seed: int, step: int, draw: int,
             clock: Tensor | None = None) -> None:  # fmt: skip
        number, device = _direction(direction), self._or_any(self.valid.draw(outs, spans, clock))
        kept, place = self._table(device, None, spans, (outs,))
        if kept:
            self._call("draw", device, [*kept, *outs, *_rows(spans), *given(clock)], *place, number, seed, step, draw,
                       clock=_address(clock))  # fmt: skip

    def axpy_(self, thetas: Sequence[Tensor], spans: Sequence[Span], direction, seed: int, draws: Sequence[tuple[int, int]],
              coeffs: Tensor, decay: float | Sequence[float], rounding: str, residuals: Sequence[Tensor] | None,
              clock: Tensor | None = None, each: int = 0) -> Tensor:  # fmt: skip
        number, low = _direction(direction), residuals or ()
        device = self._or_any(self.valid.axpy_(thetas, spans, draws, coeffs, rounding, residuals, clock))
        coeffs = coeffs.contiguous()
        nonfinite = torch.zeros(1, dtype=torch.int64, device=device)
        kept, place = self._table(device, thetas, spans, (), residuals)
        if not kept:
            return nonfinite
        each, decays = rounded_sums(decay, len(draws), each)
        terms = pack.pack_draws(draws, 0.0, decays)
        uploaded = self._terms(device, terms)
        tensors = [*kept, *given(uploaded), coeffs, nonfinite, *thetas, *low, *_rows(spans), *given(clock)]
        self._call("axpy", device, tensors, *place, number, seed, pack.address(terms), len(draws), each, pack.ROUNDING[rounding],
                   nonfinite.data_ptr(), clock=_address(clock), device_draws=_address(uploaded),
                   coefficients=coeffs.data_ptr())  # fmt: skip
        return nonfinite

    def update_(self, thetas: Sequence[Tensor], spans: Sequence[Span], direction, seed: int, draws: Sequence[tuple[int, int]],
                coeffs: Tensor, rule: str, scalars: Tensor, states: Sequence[Sequence[Tensor]], rounding: str,
                residuals: Sequence[Tensor] | None, clock: Tensor | None = None) -> Tensor:  # fmt: skip
        number, low, flat = _direction(direction), residuals or (), [tensor for state in states for tensor in state]
        check_rows(spans, None, "update_")
        found = self.valid.update_(thetas, spans, draws, coeffs, rule, scalars, states, rounding, residuals, clock)
        device, coeffs, scalars = self._or_any(found), coeffs.contiguous(), scalars.contiguous()
        nonfinite = torch.zeros(1, dtype=torch.int64, device=device)
        kept, place = self._table(device, thetas, spans, states, residuals)
        if not kept:
            return nonfinite
        terms = pack.pack_draws(draws, 0.0, [1.0] * len(draws))
        uploaded = self._terms(device, terms)
        tensors = [*kept, *given(uploaded), coeffs, scalars, nonfinite, *thetas, *flat, *low, *given(clock)]
        self._call("update", device, tensors, *place, number, seed, pack.address(terms), len(draws), pack.RULES[rule],
                   scalars.data_ptr(), pack.ROUNDING[rounding], nonfinite.data_ptr(), clock=_address(clock),
                   device_draws=_address(uploaded), coefficients=coeffs.data_ptr())  # fmt: skip
        return nonfinite

    def perturb(self, thetas: Sequence[Tensor], spans: Sequence[Span], direction, seed: int, step: int, draw: int,
                scales: Sequence[float], outs: Sequence[Sequence[Tensor]], residuals: Sequence[Tensor] | None,
                clock: Tensor | None = None) -> None:  # fmt: skip
        number, low, sides = _direction(direction), residuals or (), [tensor for side in outs for tensor in side]
        device = self._or_any(self.valid.perturb(thetas, spans, scales, outs, residuals, clock))
        kept, place = self._table(device, thetas, spans, outs, residuals)
        if kept:
            both = np.array([*scales, 0.0][:2], dtype=np.float32)
            self._call("perturb", device, [*kept, *thetas, *sides, *low, *_rows(spans), *given(clock)], *place, number, seed, step,
                       draw, both.ctypes.data, clock=_address(clock))  # fmt: skip

    def lowrank_(self, thetas: Sequence[Tensor], spans: Sequence[Span], lefts: Sequence[Tensor], rights: Sequence[Tensor],
                 scales: Sequence[float], decay: float, rounding: str, residuals: Sequence[Tensor] | None, seed: int = 0, step: int = 0,
                 outs: Sequence[Tensor] | None = None) -> Tensor:  # fmt: skip
        """To the bound that csrc/lowrank.cu states; ranks 1 to 128."""
        low, sides = residuals or (), outs or ()
        device = self._or_any(self.valid.lowrank_(thetas, spans, lefts, rights, scales, rounding, residuals, outs))
        check_rows(spans, outs)
        ranks = {right.shape[1] for right in rights}
        if ranks and not 1 <= min(ranks) <= max(ranks) <= self.most_rank:
            raise ValueError(
                f"lowrank_: ranks are {sorted(ranks)}; backend 'cuda' has 1 to 128, backends 'cpu' and 'reference' any"
            )
        nonfinite = torch.zeros(1, dtype=torch.int64, device=device)
        entries, _ = pack.pack(thetas, spans, () if outs is None else (outs,), residuals, numbered=True)
        if not len(entries):
            return nonfinite
        factors = pack_lowrank.pack_factors(lefts, rights, scales)
        tiles, frames = pack_lowrank.pack_tiles(entries, factors)
        parts = [array.view(np.uint8).reshape(-1) for array in (entries, tiles, frames, factors)]
        both = device_tables.upload(parts, device)
        assert both is not None
        at = [both.data_ptr() + sum(part.size for part in parts[:i]) for i in range(4)]
        fast = tiles["column"] >= 0
        types = sum(1 << int(kind) for kind in np.unique(entries["type"][tiles["entry"][fast]]))
        simple = decay == 1.0 and outs is None and (rounding == "nearest" or types == 1)
        rank = max(ranks)
        whole = ranks <= {16, 32, 64, 128} and len(ranks) == 1
        self._call("lowrank_tiles", device, [both, nonfinite, *thetas, *lefts, *rights, *sides, *low, *_rows(spans)], at[0], at[1],
                   len(tiles), at[2], at[3], rank, bool((~fast).any()), types, simple, whole, seed, step, decay,
                   pack.ROUNDING[rounding], nonfinite.data_ptr())  # fmt: skip
        return nonfinite


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _rows(spans: Sequence[Span]) -> list[Tensor]:
    return [span.rows for span in spans if span.rows is not None]


__all__ = ["Cuda", "why_off"]
