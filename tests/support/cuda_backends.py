"""The CUDA backend where there is no GPU:
csrc/*.cu compiled for the host, and nvcc's PTX in an interpreter."""

from __future__ import annotations

import ctypes
import struct
import types
from collections.abc import Iterator

import numpy as np
import ptx
import sass
import torch

from zokern.backends import cuda

BLOCKS, THREADS = 2, 256
M0, M1 = 0x9E3779B9, 0xBB67AE85


class OnHost(cuda.Cuda):
    """The backend with a module for the host in the place of zokern._cuda; `blocks` asks for a grid."""

    name = "cuda on the host"
    device_type = "cpu"

    def __init__(self, module: types.ModuleType, blocks: int = 0) -> None:
        super().__init__()
        self.module, self.blocks = module, blocks

    def _call(self, verb, device, held, *arguments, **named) -> None:
        getattr(self.module, verb)(*arguments, self.blocks, 0, **named)


def storage(tensor: torch.Tensor) -> np.ndarray:
    """All bytes that a tensor's storage has, at their address."""
    whole = tensor.untyped_storage()
    return torch.empty(0, dtype=torch.uint8).set_(whole, 0, (whole.nbytes(),)).numpy()


def tensors_in(held) -> Iterator[torch.Tensor]:
    """All tensors in tuples and lists."""
    if isinstance(held, torch.Tensor):
        yield held
    elif isinstance(held, (list, tuple)):
        for part in held:
            yield from tensors_in(part)


class OnPtx(cuda.Cuda):
    """The backend with the interpreter in the place of zokern._cuda.
    Only the tensors of a call may be touched."""

    name = "cuda through PTX"
    device_type = "cpu"

    def __init__(self, text: str, parts_log2: int = 0) -> None:
        super().__init__()
        self.text, self.parts_log2, self.executed = text, parts_log2, 0

    def _run(self, prefix: str, arguments: list, tensors) -> None:
        memory = [storage(t) for t in tensors]
        counts = ptx.run(self.text, prefix, BLOCKS, THREADS, arguments, memory)
        self.executed += sum(counts.values())

    def _call(
        self, verb, device, held, *arguments, clock=0, device_draws=0, coefficients=0, scaled=False,
        control=0,
    ) -> None:  # fmt: skip
        tensors = list(tensors_in(held))
        if verb == "philox":
            counters, count, k0, k1, rounds, words = arguments
            return self._run(sass.symbol("philox"), [counters, count, k0, k1, rounds, words], tensors)
        entries, chunks, count, direction, seed, *rest = arguments
        keys = [(seed & 0xFFFFFFFF) + i * M0 & 0xFFFFFFFF for i in range(10)]
        keys += [(seed >> 32) + i * M1 & 0xFFFFFFFF for i in range(10)]
        # struct List
        table = struct.pack("<QQqi20I4xQQ", entries, chunks, count, self.parts_log2, *keys, clock, control)
        kind = "scaled_" if scaled else ""
        if verb == "draw":
            return self._run(sass.symbol(kind + verb, direction), [table, *rest], tensors)
        if verb == "perturb":
            step, draw, scales = rest
            both = np.frombuffer((ctypes.c_float * 2).from_address(scales), np.float32)
            return self._run(sass.symbol(kind + verb, direction), [table, step, draw, *both], tensors)
        if verb == "update":
            draws, draw_count, rule, scalars, rounding, nonfinite = rest
            last = bytes((ctypes.c_char * 16).from_address(draws + 16 * (draw_count - 1)))
            arguments = [table, device_draws, coefficients, draw_count, last, scalars, nonfinite]
            return self._run(sass.update_symbol(direction, rule, rounding, kind), arguments, tensors)
        draws, draw_count, each, rounding, nonfinite = rest
        last = bytes((ctypes.c_char * 16).from_address(draws + 16 * (draw_count - 1)))  # struct Draw
        if control and (draw_count, direction, rounding) == (1, 1, 0):
            scaled, kind = True, "scaled_"  # as axpy.cu, kReadsDecay
        if scaled:
            terms = sass.DECAYED_TERM if draw_count == 1 else sass.TERMS
        elif draw_count == 1:
            terms = sass.TERM if struct.unpack("<IIff", last)[3] == 1.0 and not control else sass.DECAYED_TERM
        else:
            terms = sass.STEPS if each == 1 else sass.TERMS
        arguments = [table, device_draws, coefficients, draw_count, each, last, nonfinite]
        return self._run(sass.symbol(kind + "axpy", direction, rounding, terms), arguments, tensors)
