"""Overlap: tiles are made and used in turns; on a CUDA device the next is made while the one before it is used.

    side      fill 0 | fill 1 | -> fill 2 | -> fill 3 ...        -> waits for the current stream: the use that read this slot
    current          -> use 0 | -> use 1  | -> use 2 ...         -> waits for the side stream: the fill of this tile

Two slots of memory take turns, so fill k + 1 runs beside use k and no slot is written while it is read. The order is kept by
events, the host waits for nothing, and a CUDA graph captures it as a fork that joins. A side stream works for one stream alone: it
waits for that one before every fill and is waited for at the end, whatever raised, so that memory of either is free for the other
again when ahead() returns, as if all of it had run on one stream. That is what torch's allocator goes by, and no tensor has to be
recorded.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor

SLOTS = 2  # one is filled while the other is read: a third would only wait longer


class Job(NamedTuple):
    """Tiles of rows (or columns) start .. stop of a matrix, one for each of `sides`."""

    start: int
    stop: int
    sides: Sequence[int]
    shape: tuple[int, int]


Step = Callable[[Job, list[Tensor]], None]


def slots(device: torch.device, tiles: int) -> int:
    """How many slots a matrix of this many tiles is worked through with: with one tile there is nothing to make ahead."""
    return SLOTS if device.type == "cuda" and tiles > 1 else 1


def in_turn(
    jobs: Sequence[Job], make: Step, use: Step, take: Callable[[tuple[int, ...]], Tensor], release: Callable[[], None]
) -> None:
    """make(job, tiles), then use(job, tiles), and the memory is given back before the next."""
    for job in jobs:
        tiles = [take(job.shape) for _ in job.sides]
        make(job, tiles)
        use(job, tiles)
        del tiles
        release()


def ahead(
    jobs: Sequence[Job],
    make: Step,
    use: Step,
    take: Callable[[tuple[int, ...]], Tensor],
    release: Callable[[], None],
    device: torch.device,
) -> None:
    """The same on a CUDA device, each tile made on a side stream while the one before it is used on the current one."""
    current, side = streams(device)
    largest, most = max(prod(job.shape) for job in jobs), max(len(job.sides) for job in jobs)
    memory = [[take((largest,)) for _ in range(most)] for _ in range(SLOTS)]  # before the side stream first waits for its users

    def made(number: int) -> list[Tensor]:
        job = jobs[number]
        tiles = [slot[: prod(job.shape)].view(job.shape) for slot in memory[number % SLOTS][: len(job.sides)]]
        side.wait_stream(current)  # for what the caller did before, then for the use before the last, which read this slot
        with torch.cuda.stream(side):
            make(job, tiles)
        return tiles

    try:
        tiles = made(0)
        for number, job in enumerate(jobs):
            current.wait_stream(side)  # for this tile; the next is not asked for yet
            coming = made(number + 1) if number + 1 < len(jobs) else []
            use(job, tiles)
            tiles = coming
    finally:
        current.wait_stream(side)  # a tile that was made in vain is still being written
    release()


def streams(device: torch.device) -> tuple[Any, Any]:
    """The current stream of a CUDA device, and the side stream that works for it."""
    current = torch.cuda.current_stream(device)
    return current, _side_of(current.device, current.cuda_stream)


@cache
def _side_of(device: torch.device, current: int) -> Any:
    """The same one each time: tables on the device are kept by stream."""
    return torch.cuda.Stream(device)


__all__ = ["SLOTS", "Job", "ahead", "in_turn", "slots", "streams"]
