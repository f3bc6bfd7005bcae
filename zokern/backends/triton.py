"""Backend ``triton``: zokern.triton_kernels on CUDA tensors, or interpreted under TRITON_INTERPRET=1.

The table of a list is packed and uploaded once and found on the device afterwards (`device_tables`); kernels
run on the current stream, and nothing waits for the device, so a repeated call can be captured in a CUDA
graph. Addresses in the table are raw, so a tensor on the wrong device is refused here: Triton itself could
not notice.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from . import binder, device_tables, pack, pack_lowrank
from .base import DIRECTIONS, SCALARS
from .device_tables import Launch
from .launch import Batch, Noise, Outer, Projected, Projection, Terms, Update, projected, rounding_bits
from .triton_launch import keys_of, round_keys, signed
from .triton_linear import Products
from .validation import Validator

_missing = ""
try:
    import triton

    from .. import triton_kernels
    from ..triton_kernels import elementwise, lowrank, project, update
except Exception as error:  # an older Triton lacks names (triton.knobs came with 3.4), or does not load
    _version = getattr(globals().get("triton"), "__version__", "missing")
    _missing = f"{type(error).__name__}: {error}; triton is {_version}"

# elements a tile of the unit path: a thread has two units of normals, or four units whose signs come from one
# block in four
BLOCK = {"normal": 2048, "rademacher": 4096}
TAIL = 256  # elements a tile of the element path
# programs a chunk: one amortises what a program does once, several fill the device where a list has few
# chunks
SPLIT, FEW_CHUNKS = 8, 2048
WARPS = 4
OPTIONS = {"num_warps": WARPS, "enable_fp_fusion": False}
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


def why_off(device: torch.device | None = None) -> str | None:
    """Returns None if this backend can run on a device, else why not, and the way out. None: on any."""
    if _missing:
        way_out = "install triton 3.6 to 3.9 and zokern with its kernels"
        return f"Triton kernels cannot be imported ({_missing}); {way_out}."
    if interpreted():
        return None
    if torch.version.hip is not None:
        way_out = "use backend='reference'"
        return f"its bits are verified on NVIDIA GPUs only, and this torch is built for ROCm; {way_out}."
    if not torch.cuda.is_available():
        way_out = "run on a GPU, or set TRITON_INTERPRET=1 before importing zokern to interpret on the CPU"
        return f"torch sees no CUDA device; {way_out}."
    return device_tables.why_off_on(device, _too_old)


def _too_old(capability: tuple[int, int]) -> str | None:
    if capability >= CAPABILITY:
        return None
    return (
        f"has compute capability {capability[0]}.{capability[1]}; expected 8.0 or newer; use "
        "backend='reference'."
    )


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

    chunks: int
    widest: int  # elements of the longest chunk
    is_scaled: bool
    types: int  # sets as bits, so that a launch compiles the branches that its tensors take and no other
    out_types: int
    both_types: int


def _bits(kinds: np.ndarray) -> int:
    return int(np.bitwise_or.reduce(1 << np.unique(kinds), initial=0))


class Triton(Products):
    name = "triton"
    most_rank = 128

    def __init__(self) -> None:
        self.tables, self.counts = device_tables.Tables(), device_tables.Counts()
        self.is_interpreted = interpreted()
        self.valid = Validator("triton", "cpu" if self.is_interpreted else "cuda", self.most_rank)

    def _or_any(self, device: torch.device | None) -> torch.device:
        """Returns the device of a call; the current one if there are no tensors."""
        if device is not None or self.valid.device_type == "cpu":
            return device or torch.device("cpu")
        return torch.device("cuda", torch.cuda.current_device())

    def _launch(
        self, name: tuple, batch: Batch, outs: Sequence[Sequence[Tensor]],
        check: Callable[[], torch.device | None], draws: bool = False,
    ) -> Launch:  # fmt: skip
        """Returns the launch of an elementwise verb.

        It has the low bits if the batch has, so they are left out where no rounding reads them.

        name   the verb, and all else that check() looks at beside lists and numbers
        draws  its tensors are results only
        """
        _, spans, _, low, scales = batch
        thetas = None if draws else batch.tensors

        def make() -> tuple[Sequence[np.ndarray], Any]:
            entries, chunks = pack.pack(thetas, spans, outs, low, scales=scales)
            kinds = entries["type"], entries["out_type"], 3 * entries["type"] + entries["out_type"]
            widest = int((chunks["end"] - chunks["begin"]).max(initial=1))
            facts = _Facts(len(chunks), widest, batch.is_scaled, *map(_bits, kinds))
            return (_rows(entries), chunks) if len(chunks) else (), facts

        return self.tables.find(
            (self.name, *name), batch, () if draws else outs, lambda: self._or_any(check()),
            lambda: device_tables.key_of(thetas, spans, outs, low, scales), make,
        )  # fmt: skip

    def _run(self, launch: Launch, kernel: Any, direction: Any, *arguments: Any, **constants: Any) -> None:
        """Runs an elementwise kernel on the table of a launch."""
        facts: _Facts = launch.facts
        meta = launch.memo.get(direction.name)
        if meta is None:
            meta = launch.memo[direction.name] = self._meta(facts, direction)
        binder.run(
            kernel, facts.chunks * meta["SPLIT"], launch, self.tables.upload(launch), (0, 1), arguments,
            {**constants, **meta}, OPTIONS,
        )  # fmt: skip

    def _meta(self, facts: _Facts, direction: Any) -> dict[str, Any]:
        """Returns the constants that a table and a direction ask for."""
        if self.is_interpreted:
            # it pays by the operation, not by the lane: few wide tiles, of a power of two of whole blocks of
            # signs
            tile = max(256, triton.next_power_of_2(facts.widest + 120))
            sizes = dict(BLOCK=tile, TAIL=tile, SPLIT=1)
        else:
            split = 1 if facts.chunks >= FEW_CHUNKS else SPLIT
            sizes = dict(BLOCK=BLOCK[direction.name], TAIL=TAIL, SPLIT=split)
        return dict(SCALED=facts.is_scaled, DIRECTION=DIRECTIONS[direction.name], **sizes)

    def philox4x32(self, counter: Tensor, key: tuple[int, int], rounds: int) -> Tensor:
        device = self.valid.philox4x32(counter)
        assert device is not None
        counter = counter.contiguous()
        words = torch.empty_like(counter)
        count = counter.shape[0]
        if count:
            block = triton.next_power_of_2(count) if self.is_interpreted else BLOCK["normal"]
            arguments = (counter, words, count, round_keys(*key, rounds), rounds, block)
            with device_tables.on(device):
                elementwise.philox[(triton.cdiv(count, block),)](*arguments, **OPTIONS)
        return words

    def project(self, projection: Projection) -> Projected:
        device = self.valid.project(projection)
        assert device is not None
        (losses, weights, scalars), lanes = projection, 32
        out, found = projected(losses, weights)
        draws = len(found.amounts)
        block = triton.next_power_of_2(draws) if self.is_interpreted else lanes
        single = out[2 * draws :].view(torch.float32)
        with device_tables.on(device):
            project.project[(1,)](losses, weights, scalars, out, single, *losses.shape, draws, BLOCK=block,
                                  num_warps=1, enable_fp_fusion=False)  # fmt: skip
        return found

    def draw(self, batch: Batch, noise: Noise) -> None:
        self.valid.number(noise.direction)
        check = partial(self.valid.draw, batch, noise)
        launch = self._launch(("draw",), batch, (batch.tensors,), check, draws=True)
        if not self.valid.fits(launch.device, (), noise.clock):
            check()
        if launch.parts:
            ((step, draw),) = noise.draws
            self._run(launch, elementwise.draw, noise.direction, signed(step), signed(draw),
                      keys_of(noise.seed), noise.clock, KINDS=launch.facts.out_types)  # fmt: skip

    def axpy_(self, batch: Batch, noise: Noise, terms: Terms) -> Tensor:
        self.valid.number(noise.direction)
        coeffs, control, draws = terms.coefficients, terms.control, noise.draws
        check = partial(self.valid.axpy_, batch, noise, terms)
        launch = self._launch(("axpy_", batch.rounding), _joined(batch), (), check)
        mixed = control is not None and terms.each not in (0, len(draws))
        if mixed or not self.valid.fits(launch.device, ((coeffs, len(draws)),), noise.clock, control):
            check()
        nonfinite = self.counts.take(launch.device)
        if not launch.parts:
            return nonfinite
        each, decays = terms.rounded()
        replay = each < len(draws)
        first = 1.0 if decays[0] == 1.0 else float(np.float32(decays[0]))
        decayed = not replay and (first != 1.0 or control is not None)
        names = self._names(launch.device, draws if replay else draws[:-1], decays if replay else ())
        self._run(launch, elementwise.axpy, noise.direction, names, coeffs.contiguous(), nonfinite,
                  len(draws), each, *map(signed, draws[-1]), first, keys_of(noise.seed), noise.clock,
                  control, ROUNDING=pack.ROUNDING[batch.rounding], DECAY=decayed, EACH=replay,
                  KINDS=launch.facts.types)  # fmt: skip
        return nonfinite

    def update_(self, batch: Batch, noise: Noise, change: Update) -> Tensor:
        self.valid.number(noise.direction)
        coeffs, rule, scalars, states, control = change
        check = partial(self.valid.update_, batch, noise, change)
        launch = self._launch(("update_", rule, batch.rounding), _joined(batch), states, check)
        draws, numbers = noise.draws, ((coeffs, len(noise.draws)), (scalars, len(SCALARS.get(rule, ()))))
        if not self.valid.fits(launch.device, numbers, noise.clock, control):
            check()
        nonfinite = self.counts.take(launch.device)
        if not launch.parts:
            return nonfinite
        self._run(launch, update.update, noise.direction, self._names(launch.device, draws[:-1]),
                  coeffs.contiguous(), scalars.contiguous(), nonfinite, len(draws),
                  *map(signed, draws[-1]), keys_of(noise.seed), noise.clock, control, RULE=pack.RULES[rule],
                  ROUNDING=pack.ROUNDING[batch.rounding], KINDS=launch.facts.types)  # fmt: skip
        return nonfinite

    def _names(
        self, device: torch.device, draws: Sequence[tuple[int, int]], decays: Sequence[float] = ()
    ) -> Tensor | None:
        """Returns draws, then decays. Of a single sum the kernel gets the last draw as an argument."""
        if not draws:
            return None
        words = np.array([step | draw << 32 for step, draw in draws], dtype=np.uint64)
        factors = np.array(decays, dtype=np.float32).view(np.uint32).astype(np.uint64)
        listed = np.concatenate([words, factors])
        launch = self.tables.get(device, lambda: ("names", listed.tobytes()), lambda: ((listed,), None))
        return self.tables.upload(launch).buffer.view(torch.int64)

    def perturb(self, batch: Batch, noise: Noise, scales, outs) -> None:
        self.valid.number(noise.direction)
        check = partial(self.valid.perturb, batch, noise, scales, outs)
        launch = self._launch(("perturb", batch.rounding, len(scales)), batch, outs, check)
        if not self.valid.fits(launch.device, (), noise.clock):
            check()
        if launch.parts:
            ((step, draw),) = noise.draws
            self._run(launch, elementwise.perturb, noise.direction, signed(step), signed(draw),
                      float(scales[0]), float(scales[-1]), keys_of(noise.seed), noise.clock,
                      SIDES=len(outs), JOIN=batch.residuals is not None,
                      KINDS=launch.facts.both_types)  # fmt: skip

    def lowrank_(self, batch: Batch, factors: Outer, noise: Noise | None = None, outs=None) -> Tensor:
        """Runs to the bound of triton_kernels/lowrank.py; ranks 1 to 128."""
        rounding, (seed, step) = batch.rounding, rounding_bits(noise)
        check = partial(self.valid.lowrank_, batch, factors, outs)
        launch = self.tables.find(
            (self.name, "lowrank_", rounding, tuple(factors.scales)), batch,
            (factors.lefts, factors.rights, outs), lambda: self._or_any(check()),
            partial(pack_lowrank.key_of, batch, factors, outs),
            partial(_product_tables, batch, factors, outs),
        )  # fmt: skip
        clock, control = None if noise is None else noise.clock, factors.control
        if not self.valid.fits(launch.device, (), clock, control):
            check()
        nonfinite = self.counts.take(launch.device)
        if not launch.parts:
            return nonfinite
        facts, upload = launch.facts, self.tables.upload(launch)
        numbers = nonfinite, float(factors.decay), signed(step), keys_of(seed), clock, control
        common = {
            "ROUNDING": pack.ROUNDING[rounding], "OUTSIDE": outs is not None,
            "JOIN": batch.residuals is not None and rounding == "residual", "EXACT": self.is_interpreted,
        }  # fmt: skip
        if facts.products:
            constants = {**common, **facts.shape, "KINDS": facts.product_kinds}
            options = {**OPTIONS, "num_warps": PRODUCT_WARPS, "num_stages": 1}
            binder.run(
                lowrank.product, facts.products, launch, upload, (0, 3, 1, 2), numbers, constants, options
            )
        if facts.elements:
            block = pack_lowrank.PIECE if self.is_interpreted else TAIL
            constants = {**common, "KINDS": facts.element_kinds, "BLOCK": block}
            binder.run(
                lowrank.element, facts.elements, launch, upload, (0, 4, 2), numbers, constants, OPTIONS
            )
        return nonfinite


def _joined(batch: Batch) -> Batch:
    """Returns a batch that is written: with the low bits if the rounding reads them."""
    is_joined = batch.rounding == "residual" or batch.residuals is None
    return batch if is_joined else batch._replace(residuals=None)


class _ProductFacts(NamedTuple):
    """Facts of the tables of lowrank_."""

    shape: dict[str, Any]  # constants of lowrank.product
    products: int  # tiles
    elements: int
    product_kinds: int  # sets as bits
    element_kinds: int


def _product_tables(
    batch: Batch, factors: Outer, outs: Sequence[Tensor] | None
) -> tuple[Sequence[np.ndarray], Any]:
    """Returns rows, frames, factors, tiles of products and of elements, and facts about them."""
    thetas, spans, _, low, _ = batch
    entries, _ = pack.pack(thetas, spans, () if outs is None else (outs,), low, numbered=True)
    if not len(entries):
        return (), None
    products, ranks = pack_lowrank.pack_factors(*factors[:3]), {right.shape[1] for right in factors.rights}
    rank = next(padded for padded in (16, 32, 64, 128) if max(ranks) <= padded)
    bm, bn = TILES[rank][bool((entries["type"] == 0).any())]
    tiles, frames = pack_lowrank.pack_tiles(entries, products, STRIPS * bm, bn)
    whole = ranks == {rank} and pack_lowrank.lies_on(products, 16)
    scale_bits = products["scale"].view(np.uint32).astype(np.int64)
    divisors = [_divisor(n) for n in products["columns"].tolist()]
    names = "left", "right", "rank", "columns"
    columns = [*(products[name] for name in names), scale_bits, *zip(*divisors)]
    factor = np.column_stack([np.asarray(c).astype(np.int64) for c in columns])
    fast, kinds = tiles["column"] >= 0, 3 * entries["type"] + entries["out_type"]
    facts = _ProductFacts(
        dict(RANK=rank, WHOLE=whole, BM=bm, BN=bn), int(fast.sum()), int((~fast).sum()),
        *(_bits(kinds[tiles["entry"][some]]) for some in (fast, ~fast)),
    )  # fmt: skip
    return (_rows(entries), frames, factor, tiles[fast], tiles[~fast]), facts


__all__ = ["Triton", "interpreted", "triton_kernels", "why_off"]
