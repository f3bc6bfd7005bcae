"""Mistakes in who gets which number: the value no longer
is a function of (seed, who, step, draw, i) alone."""

from __future__ import annotations

import torch

from zokern import stream
from zokern.backends import reference

from .patched import Patched, only

numbers, z, random16, philox4x32 = reference.numbers, reference.z, reference.random16, stream.philox4x32


class ThreadKeyed(Patched):
    """Each thread of 64 elements has a generator of its own,
    numbered from the start of the tensor at hand."""

    rejected_by = ("shards", "axpy_firsts", "axpy_sizes", "draw_sizes")

    @staticmethod
    def _z(direction, index, who, step, draw, seed):
        place = torch.arange(index.numel())
        parts = [
            z(direction, place[i : i + 64] % 64, who + i // 64, step, draw, seed)
            for i in range(0, len(place), 64)
        ]
        return torch.cat(parts) if parts else torch.empty(0)

    replaced = {"z": _z}


class Int32Index(Patched):
    """Element numbers in 32 bits: they wrap, as a signed int does, and come back small."""

    rejected_by = (
        "draw_firsts",
        "axpy_firsts",
        "perturb_firsts",
        "draw_pitch",
        "perturb_rows",
        "lowrank_firsts",
    )
    replaced = {"numbers": lambda theta, span: numbers(theta, span) & 0x7FFFFFFF}


class Uint32Index(Patched):
    """Element numbers in 32 unsigned bits."""

    rejected_by = ("draw_firsts", "axpy_firsts", "perturb_firsts", "draw_pitch", "lowrank_firsts")
    replaced = {"numbers": lambda theta, span: numbers(theta, span) & 0xFFFFFFFF}


class SeedPlusId(Patched):
    """The parameter's id is added to the seed instead of being a word of the counter:
    parameters share streams."""

    rejected_by = ("draw_sizes", "axpy_sizes", "draw_names")
    replaced = {"z": lambda d, index, who, step, draw, seed: z(d, index, 0, step, draw, (seed + who) % 2**64)}


class SeedCut(Patched):
    """Only the low half of the seed reaches the key."""

    rejected_by = ("draw_names", "axpy_sizes")
    replaced = {"z": lambda d, index, who, step, draw, seed: z(d, index, who, step, draw, seed & 0xFFFFFFFF)}


class ByPosition(Patched):
    """The id comes from the position in the list, so another order gives other values."""

    rejected_by = ("order", "axpy_sizes")

    def axpy_(self, batch, *rest):
        return super().axpy_(
            batch._replace(spans=[s._replace(who=i) for i, s in enumerate(batch.spans)]), *rest
        )


class ByDtype(Patched):
    """z is rounded to the weights' type before it is used."""

    rejected_by = ("axpy_sizes", "axpy_many_draws", "perturb_sizes")

    def axpy_(self, batch, *rest):
        count = torch.zeros(1, dtype=torch.int64)
        for i, theta in enumerate(batch.tensors):
            self.replaced = {"z": lambda *names, dtype=theta.dtype: z(*names).to(dtype).float()}
            count += super().axpy_(only(batch, i), *rest)
        return count

    def perturb(self, batch, noise, scales, outs):
        for i, theta in enumerate(batch.tensors):
            self.replaced = {"z": lambda *names, dtype=theta.dtype: z(*names).to(dtype).float()}
            super().perturb(only(batch, i), noise, scales, [side[i : i + 1] for side in outs])


class FirstByBlock(Patched):
    """A first element inside a block is rounded down to the block."""

    rejected_by = ("draw_sizes", "axpy_sizes", "shards", "perturb_firsts")
    replaced = {"numbers": lambda theta, span: numbers(theta, span._replace(first=span.first // 8 * 8))}


class PitchIgnored(Patched):
    """A slice of columns is numbered as if its rows followed one another."""

    rejected_by = ("draw_pitch", "axpy_pitch", "perturb_pitch", "perturb_rows", "lowrank_pitch")
    replaced = {"numbers": lambda theta, span: numbers(theta, span._replace(pitch=None))}


class RowsByPosition(Patched):
    """Looked-up rows are numbered by their position in the lookup and not by their row."""

    rejected_by = ("perturb_rows", "lowrank_rows")

    @staticmethod
    def _numbers(theta, span):
        return numbers(
            theta, span if span.rows is None else span._replace(rows=torch.arange(span.rows.numel()))
        )

    replaced = {"numbers": _numbers}


class SevenRounds(Patched):
    """Philox4x32-7 instead of 10, in the verbs and in the block function."""

    rejected_by = ("philox_known_answers", "philox_random_counters", "draw_sizes")

    @staticmethod
    def _z(direction, index, who, step, draw, seed):
        blocks, where = torch.unique(index // direction.per_block, return_inverse=True)
        counter = torch.stack(
            [blocks, *(torch.full_like(blocks, word) for word in (who, step, draw))], dim=-1
        )
        words = philox4x32(counter, (seed & 0xFFFFFFFF, seed >> 32), 7)
        return direction.values(words)[where, index % direction.per_block]

    replaced = {"z": _z}

    def philox4x32(self, counter, key, rounds):
        return super().philox4x32(counter, key, 7)


class PlanarMapping(Patched):
    """The sines of a block come first and its cosines after them: the right values at the wrong elements."""

    rejected_by = ("draw_sizes", "axpy_sizes", "perturb_sizes")

    @staticmethod
    def _z(direction, index, *names):
        place = index % 8
        return z(direction, index - place + (place % 4 * 2 + place // 4), *names)

    replaced = {"z": _z}


class ClockOnce(Patched):
    """The clock is read when the first call is made and never again,
    as a captured graph would do with a host's number."""

    rejected_by = ("clock",)

    def __init__(self) -> None:
        self.first: int | None = None

    def _step_at(self, step, clock):
        self.first = self.first if self.first is not None or clock is None else int(clock)
        return step + (self.first or 0)

    def _run(self, verb, *arguments, **named):
        self.replaced = {"step_at": self._step_at}
        return super()._run(verb, *arguments, **named)


class TileStart(Patched):
    """Elements are numbered from the start of each tile of 4096 once there is more than one tile."""

    rejected_by = ("tiles",)
    replaced = {
        "numbers": lambda theta, span: numbers(theta, span) - (torch.arange(theta.numel()) // 8192 * 4096)
    }
