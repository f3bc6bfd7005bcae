"""Backend ``cuda``: the compiled kernels of csrc/*.cu, on torch's current stream.

A verb is one launch, for tensors of one CUDA device. The table of its list is packed and uploaded once and
found on the device afterwards (`device_tables`). Coefficients and clock are read where they lie. So no call
waits for the device, a repeated call copies nothing to it, and a call can be captured in a CUDA graph. A
call allocates and frees its memory on the stream of its launch, which torch's allocators order by, so
nothing has to live longer than the call. A caller with tensors of another stream orders the two.
"""

from __future__ import annotations

import re
from array import array
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from . import device_tables, pack, pack_lowrank
from .base import SCALARS
from .device_tables import Launch
from .launch import Batch, Noise, Outer, Projected, Projection, Terms, Update, projected, rounding_bits
from .operands import given
from .validation import Validator

_cuda: Any = None
_error = ""
try:
    from .. import _cuda  # type: ignore[no-redef, attr-defined]
except ImportError as error:
    _error = str(error)


def why_off(device: torch.device | None = None) -> str | None:
    """Returns None if this backend can run on a device, else why not, and the way out. None: on any."""
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
        way_out = "install an NVIDIA driver for CUDA 13 or newer, on a machine with a GPU"
        return f"no CUDA device can be used ({problem}); {way_out}."
    if count == 0 or not torch.cuda.is_available():
        return "torch finds no CUDA device; check CUDA_VISIBLE_DEVICES and the NVIDIA driver."
    return device_tables.why_off_on(device, _uncovered)


def _uncovered(capability: tuple[int, int]) -> str | None:
    """Returns None if the module has code for a compute capability, else why not.

    Machine code (sm_86) serves later devices of its major number too, PTX (compute_100) every later one."""
    names = _cuda.architectures()
    for kind, major, minor in re.findall(r"(sm|compute)_(\d+)(\d)", " ".join(names)):
        number = int(major), int(minor)
        if number <= capability and (kind == "compute" or number[0] == capability[0]):
            return None
    return (
        f"has compute capability {capability[0]}.{capability[1]}, and zokern._cuda has code for "
        f"{', '.join(names)}; use backend='reference', or, for 8.0 and newer, put nvcc on PATH and run "
        "`pip install --no-build-isolation .` on this machine."
    )


class Cuda:
    """Runs the verbs on the tensors of one CUDA device."""

    name = "cuda"
    most_rank = 128
    device_type = "cuda"

    def __init__(self) -> None:
        self.tables, self.counts = device_tables.Tables(), device_tables.Counts()
        self.valid = Validator(self.name, self.device_type, self.most_rank)

    def _call(self, verb: str, device: torch.device, held: Any, *arguments: Any, **named: int) -> None:
        """Calls the module on the device's current stream.

        `held` has all tensors that the arguments point to, in tuples and lists."""
        if _cuda is None:
            raise RuntimeError(f"backend 'cuda' is off: {why_off()}")
        with device_tables.on(device):
            getattr(_cuda, verb)(*arguments, 0, device_tables.stream_of(device), **named)

    def _or_any(self, device: torch.device | None) -> torch.device:
        """Returns the device of a call; the current one if there are no tensors."""
        if device is not None or self.device_type == "cpu":
            return device or torch.device("cpu")
        return torch.device("cuda", torch.cuda.current_device())

    def _launch(
        self, name: tuple, batch: Batch, outs: Sequence[Sequence[Tensor]],
        check: Callable[[], torch.device | None], draws: bool = False,
    ) -> Launch:  # fmt: skip
        """Returns the launch of an elementwise verb.

        name   the verb, and all else that check() looks at beside lists and numbers
        draws  its tensors are results
        """
        _, spans, _, residuals, scales = batch
        thetas = None if draws else batch.tensors

        def make() -> tuple[Sequence[np.ndarray], Any]:
            entries, chunks = pack.pack(thetas, spans, outs, residuals, scales=scales)
            facts = len(chunks), {"scaled": True} if batch.is_scaled else {}
            return (entries, chunks) if len(chunks) else (), facts

        return self.tables.find(
            (self.name, *name), batch, () if draws else outs, lambda: self._or_any(check()),
            lambda: device_tables.key_of(thetas, spans, outs, residuals, scales), make,
        )  # fmt: skip

    def _table(self, launch: Launch) -> tuple[Tensor, tuple[int, int, int], dict[str, bool]]:
        """Returns the table of a launch, and the module's first three arguments and last ones."""
        (buffer, places), (chunks, named) = self.tables.upload(launch), launch.facts
        return buffer, (*places, chunks), named

    def _terms(
        self, device: torch.device, noise: Noise, decays: Sequence[float]
    ) -> tuple[np.ndarray | array, Tensor | None]:
        """Returns the names and decays of a sum, and those of several terms on the device.

        Coefficients lie apart."""
        if len(noise.draws) == 1:  # as struct Draw: NumPy would take as long as the rest of the call
            return pack.pack_draw(*noise.draws[0], bytes(4), decays[0]), None
        terms = pack.pack_draws(noise.draws, 0.0, decays)
        launch = self.tables.get(device, lambda: ("terms", terms.tobytes()), lambda: ((terms,), None))
        return terms, self.tables.upload(launch).buffer

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
        self._call("project", device, [losses, *given(weights), scalars, out], losses.data_ptr(),
                   *losses.shape, _address(weights), len(found.amounts), scalars.data_ptr(),
                   out.data_ptr())  # fmt: skip
        return found

    def draw(self, batch: Batch, noise: Noise) -> None:
        number, clock = self.valid.number(noise.direction), noise.clock
        check = partial(self.valid.draw, batch, noise)
        launch = self._launch(("draw",), batch, (batch.tensors,), check, draws=True)
        if not self.valid.fits(launch.device, (), clock):
            check()
        if launch.parts:
            ((step, draw),), (buffer, place, named) = noise.draws, self._table(launch)
            self._call("draw", launch.device, (batch, buffer, clock), *place, number, noise.seed, step, draw,
                       clock=_address(clock), **named)  # fmt: skip

    def axpy_(self, batch: Batch, noise: Noise, terms: Terms) -> Tensor:
        number, count, clock = self.valid.number(noise.direction), len(noise.draws), noise.clock
        coeffs, control = terms.coefficients, terms.control
        check = partial(self.valid.axpy_, batch, noise, terms)
        launch = self._launch(("axpy_", batch.rounding), batch, (), check)
        device, mixed = launch.device, control is not None and terms.each not in (0, count)
        if mixed or not self.valid.fits(device, ((coeffs, count),), clock, control):
            check()
        nonfinite = self.counts.take(device)
        if not launch.parts:
            return nonfinite
        coeffs, (each, decays) = coeffs.contiguous(), terms.rounded()
        summed, uploaded = self._terms(device, noise, decays)
        buffer, place, named = self._table(launch)
        self._call("axpy", device, (batch, buffer, uploaded, coeffs, nonfinite, clock, control), *place,
                   number, noise.seed, pack.address(summed), count, each, pack.ROUNDING[batch.rounding],
                   nonfinite.data_ptr(), clock=_address(clock), device_draws=_address(uploaded),
                   coefficients=coeffs.data_ptr(), control=_address(control), **named)  # fmt: skip
        return nonfinite

    def update_(self, batch: Batch, noise: Noise, update: Update) -> Tensor:
        number, count, clock = self.valid.number(noise.direction), len(noise.draws), noise.clock
        coeffs, rule, scalars, states, control = update
        check = partial(self.valid.update_, batch, noise, update)
        launch = self._launch(("update_", rule, batch.rounding), batch, states, check)
        device, numbers = launch.device, ((coeffs, count), (scalars, len(SCALARS.get(rule, ()))))
        if not self.valid.fits(device, numbers, clock, control):
            check()
        nonfinite = self.counts.take(device)
        if not launch.parts:
            return nonfinite
        coeffs, scalars = coeffs.contiguous(), scalars.contiguous()
        summed, uploaded = self._terms(device, noise, [1.0] * count)
        buffer, place, named = self._table(launch)
        held = batch, states, buffer, uploaded, coeffs, scalars, nonfinite, clock, control
        self._call("update", device, held, *place, number, noise.seed, pack.address(summed), count,
                   pack.RULES[rule], scalars.data_ptr(), pack.ROUNDING[batch.rounding],
                   nonfinite.data_ptr(), clock=_address(clock), device_draws=_address(uploaded),
                   coefficients=coeffs.data_ptr(), control=_address(control), **named)  # fmt: skip
        return nonfinite

    def perturb(
        self, batch: Batch, noise: Noise, scales: Sequence[float], outs: Sequence[Sequence[Tensor]]
    ) -> None:
        number, clock = self.valid.number(noise.direction), noise.clock
        check = partial(self.valid.perturb, batch, noise, scales, outs)
        launch = self._launch(("perturb", batch.rounding, len(scales)), batch, outs, check)
        if not self.valid.fits(launch.device, (), clock):
            check()
        if launch.parts:
            ((step, draw),), both = noise.draws, array("f", (*scales, 0.0)[:2])
            buffer, place, named = self._table(launch)
            self._call("perturb", launch.device, (batch, outs, buffer, clock), *place, number, noise.seed,
                       step, draw, pack.address(both), clock=_address(clock), **named)  # fmt: skip

    def lowrank_(
        self, batch: Batch, factors: Outer, noise: Noise | None = None, outs: Sequence[Tensor] | None = None
    ) -> Tensor:
        """Runs to the bound that csrc/lowrank.cu states; ranks 1 to 128."""
        rounding, decay, (seed, step) = batch.rounding, factors.decay, rounding_bits(noise)
        clock, control = None if noise is None else noise.clock, factors.control
        check = partial(self.valid.lowrank_, batch, factors, outs)
        launch = self.tables.find(
            (self.name, "lowrank_", rounding, tuple(factors.scales)), batch,
            (factors.lefts, factors.rights, outs), lambda: self._or_any(check()),
            partial(pack_lowrank.key_of, batch, factors, outs),
            partial(_product_tables, batch, factors, outs),
        )  # fmt: skip
        if not self.valid.fits(launch.device, (), clock, control):
            check()
        nonfinite = self.counts.take(launch.device)
        if not launch.parts:
            return nonfinite
        buffer, (entries, tiles, frames, products) = self.tables.upload(launch)
        count, rank, general, types, whole = launch.facts
        known = decay == 1.0 or control is not None
        simple = known and outs is None and (rounding == "nearest" or types == 1)
        held = batch, factors[:2], outs, buffer, nonfinite, clock, control
        self._call("lowrank_tiles", launch.device, held, entries, tiles, count, frames, products, rank,
                   general, types, simple, whole, seed, step, decay, pack.ROUNDING[rounding],
                   nonfinite.data_ptr(), clock=_address(clock), control=_address(control))  # fmt: skip
        return nonfinite


def _product_tables(
    batch: Batch, factors: Outer, outs: Sequence[Tensor] | None
) -> tuple[Sequence[np.ndarray], Any]:
    """Returns entries, tiles, frames and factors of lowrank_, and the module's facts about them: tiles,
    highest rank, general, types, whole."""
    thetas, spans, _, low, _ = batch
    entries, _ = pack.pack(thetas, spans, () if outs is None else (outs,), low, numbered=True)
    if not len(entries):
        return (), None
    products = pack_lowrank.pack_factors(*factors[:3])
    tiles, frames = pack_lowrank.pack_tiles(entries, products)
    fast = tiles["column"] >= 0
    types = sum(1 << int(kind) for kind in np.unique(entries["type"][tiles["entry"][fast]]))
    ranks = {right.shape[1] for right in factors.rights}
    # the kernel then reads two float32 of a factor at once
    whole = len(ranks) == 1 and ranks <= {16, 32, 64, 128} and pack_lowrank.lies_on(products, 8)
    return (entries, tiles, frames, products), (len(tiles), max(ranks), not fast.all(), types, whole)


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


__all__ = ["Cuda", "why_off"]
