"""Backend ``triton``: zokern.triton_kernels on CUDA tensors, or interpreted under TRITON_INTERPRET=1.

The table of a list is packed and uploaded once and found on the device afterwards (`device_tables`); kernels
run on the current stream, and nothing waits for the device, so a repeated call can be captured in a CUDA
graph. Addresses in the table are raw, so a tensor on the wrong device is refused here: Triton itself could
not notice.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from . import device_tables, pack, pack_lowrank
from .base import DIRECTIONS
from .launch import Batch, Noise, Outer, Terms, Update, rounding_bits
from .triton_launch import guard, keys_of, round_keys, signed
from .triton_linear import Products
from .validation import Validator

_missing = ""
try:
    import triton

    from .. import triton_kernels
    from ..triton_kernels import elementwise, lowrank, update
except ImportError as error:
    _missing = str(error)

# elements a tile of the unit path: a thread has two units of normals, or four units whose signs come from one
# block in four
BLOCK = {"normal": 2048, "rademacher": 4096}
TAIL = 256  # elements a tile of the element path
# programs a chunk: one amortises what a program does once, several fill the device where a list has few
# chunks
SPLIT, FEW_CHUNKS = 8, 2048
WARPS = 4
# lowrank_, by padded rank, without and with float32 tensors, which have more terms: operands fit the 99 KB of
# the smallest device
TILES = {
    16: ((128, 128), (64, 64)),
    32: ((128, 128), (64, 64)),
    64: ((128, 128), (64, 64)),
    128: ((128, 128), (64, 64)),
}
STRIPS, PRODUCT_WARPS = 4, 8  # row blocks a program; warps
CAPABILITY = (8, 0)


def interpreted() -> bool:
    """Tells whether the kernels were defined under TRITON_INTERPRET=1; setting it later changes nothing."""
    return not isinstance(elementwise.axpy, triton.JITFunction)


def why_off() -> str | None:
    if _missing:
        return f"Triton kernels cannot be imported ({_missing}); install triton 3.6 to 3.9 and zokern with its kernels."
    if interpreted():
        return None
    if torch.version.hip is not None:
        return "its bits are verified on NVIDIA GPUs only, and this torch is built for ROCm; use backend='reference'."
    if not torch.cuda.is_available():
        return "torch sees no CUDA device; run on a GPU, or set TRITON_INTERPRET=1 before importing zokern to interpret on the CPU."
    if torch.cuda.get_device_capability() < CAPABILITY:
        major, minor = torch.cuda.get_device_capability()
        return f"the CUDA device has compute capability {major}.{minor}; expected 8.0 or newer; use backend='reference'."
    return None


def _groups(entries: np.ndarray) -> np.ndarray:
    """Returns 1 for entries of the unit path: contiguous, whole Philox blocks, 16-byte addresses."""
    addresses = entries["theta"] | entries["out"][:, 0] | entries["out"][:, 1] | entries["residual"]
    flat = (entries["rows"] == 0) & (entries["row_count"] == 1) & (entries["column_stride"] == 1)
    factors = (
        entries["scale"] % np.where(entries["scale_type"] == pack.SCALES[torch.bool], 8, 16).astype(np.uint64)
        == 0
    )
    return flat & (entries["first"] % 8 == 0) & (addresses % 16 == 0) & factors


def _divisor(d: int) -> tuple[int, int]:
    """Returns (m, s) with p // d = p m >> 41 + s for p < 2^40 (Granlund and Montgomery 1994).

    s = ceil(log2 d), m = ceil(2^(41 + s) / d)"""
    s = (d - 1).bit_length()
    return -(-(1 << 41 + s) // d), s


def _rows(entries: np.ndarray) -> np.ndarray:
    """Returns int64[E, 18]: the entries, then the columns that elementwise.py reads beside them."""
    columns = entries["columns"].tolist()
    factors, shifts = zip(*map(_divisor, columns)) if columns else ((), ())
    words = entries.view(np.int64).reshape(-1, pack.ENTRY.itemsize // 8)
    return np.column_stack([words, _groups(entries), factors, shifts]).astype(np.int64)


class _Facts(NamedTuple):
    """Facts of a table that the host uses."""

    entries: int  # bytes
    chunks: int
    widest: int  # elements of the longest chunk
    types: int  # sets as bits, so that a launch compiles the branches that its tensors take and no other
    out_types: int
    both_types: int


def _bits(kinds: np.ndarray) -> int:
    return int(np.bitwise_or.reduce(1 << np.unique(kinds), initial=0))


class Triton(Products):
    name = "triton"
    most_rank = 128

    def __init__(self) -> None:
        self.tables = device_tables.Tables()
        self.valid = Validator("triton", "cpu" if interpreted() else "cuda", self.most_rank)

    def _table(self, device: torch.device, batch: Batch, outs=(), draws: bool = False) -> device_tables.Kept:
        """Returns the table of a batch; draws: its tensors are results only."""
        thetas, low = None if draws else batch.tensors, batch.residuals

        def make():
            entries, chunks = pack.pack(thetas, batch.spans, outs, low, scales=batch.scales)
            rows = _rows(entries).reshape(-1)
            kinds = entries["type"], entries["out_type"], 3 * entries["type"] + entries["out_type"]
            widest = int((chunks["end"] - chunks["begin"]).max(initial=1))
            facts = _Facts(rows.nbytes, len(chunks), widest, *map(_bits, kinds))
            return (rows, chunks) if len(chunks) else (), facts

        return self.tables.get(
            device_tables.key_of(thetas, batch.spans, outs, low, batch.scales), device, make
        )

    def _launch(
        self, device: torch.device, kernel, kept: device_tables.Kept, direction, *arguments, **constants
    ) -> None:
        facts: _Facts = kept.facts
        assert kept.buffer is not None
        entries, chunks = (
            part.view(torch.int64) for part in kept.buffer.split([facts.entries, 24 * facts.chunks])
        )
        if (
            interpreted()
            # it pays by the operation, not by the lane: few wide tiles, of a power of two of whole blocks of
            # signs
        ):
            tile = max(256, triton.next_power_of_2(facts.widest + 120))
            meta: dict[str, Any] = dict(BLOCK=tile, TAIL=tile, SPLIT=1)
        else:
            split = 1 if facts.chunks >= FEW_CHUNKS else SPLIT
            meta = dict(BLOCK=BLOCK[direction.name], TAIL=TAIL, SPLIT=split)
        meta |= dict(DIRECTION=DIRECTIONS[direction.name], **constants)
        with guard(device):
            grid = (facts.chunks * meta["SPLIT"],)
            kernel[grid](entries, chunks, *arguments, **meta, num_warps=WARPS, enable_fp_fusion=False)

    def philox4x32(self, counter: Tensor, key: tuple[int, int], rounds: int) -> Tensor:
        device = self.valid.philox4x32(counter)
        assert device is not None
        counter = counter.contiguous()
        words = torch.empty_like(counter)
        count = counter.shape[0]
        if count:
            block = triton.next_power_of_2(count) if interpreted() else BLOCK["normal"]
            arguments = (counter, words, count, round_keys(*key, rounds), rounds, block)
            with guard(device):
                elementwise.philox[(triton.cdiv(count, block),)](
                    *arguments, num_warps=WARPS, enable_fp_fusion=False
                )
        return words

    def draw(self, batch: Batch, noise: Noise) -> None:
        self.valid.number(noise.direction)
        device = self.valid.draw(batch, noise)
        if not batch.tensors:
            return
        assert device is not None
        kept, ((step, draw),) = self._table(device, batch, (batch.tensors,), draws=True), noise.draws
        if kept.buffer is not None:
            self._launch(device, elementwise.draw, kept, noise.direction, signed(step), signed(draw),
                keys_of(noise.seed),
                         noise.clock, SCALED=batch.is_scaled, KINDS=kept.facts.out_types)  # fmt: skip

    def axpy_(self, batch: Batch, noise: Noise, terms: Terms) -> Tensor:
        self.valid.number(noise.direction)
        device = self.valid.axpy_(batch, noise, terms)
        assert device is not None
        nonfinite = torch.zeros(1, dtype=torch.int64, device=device)
        kept = self._joined_table(device, batch)
        if kept is None:
            return nonfinite
        draws, (each, decays) = noise.draws, terms.rounded()
        replay, first = each < len(draws), float(np.float32(decays[0]))
        names = self._names(device, draws, decays) if replay else self._names(device, draws[:-1])
        self._launch(device, elementwise.axpy, kept, noise.direction, names, terms.coefficients.contiguous(),
            nonfinite,
                     len(draws), each, *map(signed, draws[-1]), first, keys_of(noise.seed), noise.clock,
                     ROUNDING=pack.ROUNDING[batch.rounding], DECAY=not replay and first != 1.0, EACH=replay,
                     SCALED=batch.is_scaled, KINDS=kept.facts.types)  # fmt: skip
        return nonfinite

    def update_(self, batch: Batch, noise: Noise, change: Update) -> Tensor:
        self.valid.number(noise.direction)
        device = self.valid.update_(batch, noise, change)
        assert device is not None
        nonfinite = torch.zeros(1, dtype=torch.int64, device=device)
        kept = self._joined_table(device, batch, change.states)
        if kept is None:
            return nonfinite
        draws, coeffs, scalars = noise.draws, change.coefficients.contiguous(), change.scalars.contiguous()
        self._launch(device, update.update, kept, noise.direction, self._names(device, draws[:-1]), coeffs,
            scalars, nonfinite,
                     len(draws), *map(signed, draws[-1]), keys_of(noise.seed), noise.clock,
                     RULE=pack.RULES[change.rule],
                     ROUNDING=pack.ROUNDING[batch.rounding], SCALED=batch.is_scaled,
                     KINDS=kept.facts.types)  # fmt: skip
        return nonfinite

    def _joined_table(self, device: torch.device, batch: Batch, outs=()) -> device_tables.Kept | None:
        """Returns the table of a batch that is written, or None for no elements.

        It has the low bits if the rounding reads them."""
        if not batch.tensors:
            return None
        kept = self._table(
            device, batch if batch.rounding == "residual" else batch._replace(residuals=None), outs
        )
        return None if kept.buffer is None else kept

    def _names(
        self, device: torch.device, draws: Sequence[tuple[int, int]], decays: Sequence[float] = ()
    ) -> Tensor | None:
        """Returns draws, then decays. Of a single sum the kernel gets the last draw as an argument."""
        if not draws:
            return None
        words = np.array([step | draw << 32 for step, draw in draws], dtype=np.uint64)
        factors = np.array(decays, dtype=np.float32).view(np.uint32).astype(np.uint64)
        listed = np.concatenate([words, factors])
        buffer = self.tables.get(("names", listed.tobytes()), device, lambda: ((listed,), None)).buffer
        assert buffer is not None
        return buffer.view(torch.int64)

    def perturb(self, batch: Batch, noise: Noise, scales, outs) -> None:
        self.valid.number(noise.direction)
        device = self.valid.perturb(batch, noise, scales, outs)
        if not batch.tensors:
            return
        assert device is not None
        kept, ((step, draw),) = self._table(device, batch, outs), noise.draws
        if kept.buffer is not None:
            self._launch(device, elementwise.perturb, kept, noise.direction, signed(step), signed(draw),
                float(scales[0]),
                         float(scales[-1]), keys_of(noise.seed), noise.clock, SIDES=len(outs),
                         JOIN=batch.residuals is not None, SCALED=batch.is_scaled,
                         KINDS=kept.facts.both_types)  # fmt: skip

    def lowrank_(self, batch: Batch, factors: Outer, noise: Noise | None = None, outs=None) -> Tensor:
        """Runs to the bound of triton_kernels/lowrank.py; ranks 1 to 128."""
        found = self.valid.lowrank_(batch, factors, outs)
        device = found or torch.device("cpu" if interpreted() else "cuda")
        nonfinite = torch.zeros(1, dtype=torch.int64, device=device)
        thetas, spans, rounding, low, _ = batch
        entries, _ = pack.pack(thetas, spans, () if outs is None else (outs,), low, numbered=True)
        if not len(entries):
            return nonfinite
        seed, step = rounding_bits(noise)
        shape, tiles, tables = _product_tables(entries, factors)
        rows, frame, factor, product_tiles, element_tiles = _uploaded(tables, device)
        common = {
            "ROUNDING": pack.ROUNDING[rounding], "OUTSIDE": outs is not None,
            "JOIN": low is not None and rounding == "residual",
            "EXACT": interpreted(), "enable_fp_fusion": False,
        }  # fmt: skip
        names = nonfinite, float(factors.decay), signed(step), keys_of(seed)
        kinds = 3 * entries["type"] + entries["out_type"]
        fast = tiles["column"] >= 0
        with guard(device):
            if fast.any():
                lowrank.product[(int(fast.sum()),)](rows, product_tiles, frame, factor, *names, **common,
                    **shape,
                    KINDS=_bits(kinds[tiles["entry"][fast]]), num_warps=PRODUCT_WARPS,
                    num_stages=1)  # fmt: skip
            if not fast.all():
                block = pack_lowrank.PIECE if interpreted() else TAIL
                lowrank.element[(int((~fast).sum()),)](rows, element_tiles, factor, *names, **common,
                    KINDS=_bits(kinds[tiles["entry"][~fast]]), BLOCK=block, num_warps=WARPS)  # fmt: skip
        return nonfinite


def _product_tables(
    entries: np.ndarray, factors: Outer
) -> tuple[dict[str, Any], np.ndarray, list[np.ndarray]]:
    """Returns the constants of lowrank.product, the tiles, and the five tables of the kernels.

    The tables are rows, frames, factors, and tiles of products and of elements."""
    products, ranks = pack_lowrank.pack_factors(*factors[:3]), {right.shape[1] for right in factors.rights}
    rank = next(padded for padded in (16, 32, 64, 128) if max(ranks) <= padded)
    bm, bn = TILES[rank][bool((entries["type"] == 0).any())]
    tiles, frames = pack_lowrank.pack_tiles(entries, products, STRIPS * bm, bn)
    whole = ranks == {rank} and not ((products["left"] | products["right"]) % 16).any()
    scale_bits = products["scale"].view(np.uint32).astype(np.int64)
    divisors = [_divisor(n) for n in products["columns"].tolist()]
    columns = (
        products["left"],
        products["right"],
        products["rank"],
        products["columns"],
        scale_bits,
        *zip(*divisors),
    )
    parts = [
        _rows(entries),
        frames.view(np.int64),
        np.column_stack([np.asarray(c).astype(np.int64) for c in columns]),
    ]
    fast = tiles["column"] >= 0
    parts += [tiles[fast].view(np.int64), tiles[~fast].view(np.int64)]
    return dict(RANK=rank, WHOLE=whole, BM=bm, BN=bn), tiles, parts


def _uploaded(parts: Sequence[np.ndarray], device: torch.device) -> Sequence[Tensor]:
    """Returns tables of int64 on the device, by one copy."""
    flat = [np.ascontiguousarray(part).reshape(-1) for part in parts]
    buffer = torch.from_numpy(np.concatenate(flat))
    if device.type == "cuda":
        buffer = buffer.pin_memory().to(device, non_blocking=True)
    return buffer.split([part.size for part in flat])


__all__ = ["Triton", "interpreted", "triton_kernels", "why_off"]
