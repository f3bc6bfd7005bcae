"""Random streams of the process: torch's on the CPU and on CUDA devices, `random` and NumPy's."""

from __future__ import annotations

import hashlib
import random
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from typing import Any

import torch


def seed_of(seed: int, step: int, part: int = 0) -> int:
    """Returns the seed of the readings of a step's micro-batch:
    all of them see the same dropout masks, and no two steps or micro-batches do."""
    digest = hashlib.sha256((f"dropout {seed} {step}" + (f" {part}" if part else "")).encode()).digest()
    return int.from_bytes(digest[:8], "little")


@contextmanager
def preserved() -> Iterator[None]:
    """Puts every stream back at the end."""
    states = torch.get_rng_state(), random.getstate()
    put_back = _numpy() if "numpy" in sys.modules else None
    cuda = torch.cuda.get_rng_state_all() if _can_seed_cuda() else None
    try:
        yield
    finally:
        torch.set_rng_state(states[0])
        random.setstate(states[1])
        if put_back is not None:
            put_back()
        if cuda is not None:
            torch.cuda.set_rng_state_all(cuda)


def _numpy() -> Callable[[], None]:
    """Returns what puts NumPy's stream back, for which another generator stands in where it can.

    To exchange generators takes less time than to write the words of one. A second normal that waits belongs
    to the state alone, and a reading inside another one has the generator of that one."""
    stream: Any = sys.modules["numpy"].random
    state = stream.get_state()
    waits = not isinstance(state, tuple) or state[3]
    own = None if waits or not hasattr(stream, "set_bit_generator") else stream.get_bit_generator()
    if own is None or own is _stand_in():  # NumPy can exchange them from 1.24 on
        return partial(stream.set_state, state)
    stream.set_bit_generator(_stand_in())
    return partial(stream.set_bit_generator, own)


@cache
def _stand_in() -> Any:
    return sys.modules["numpy"].random.MT19937()


def seed(number: int) -> None:
    """Starts every stream from one number."""
    torch.default_generator.manual_seed(number)
    if _can_seed_cuda():
        torch.cuda.manual_seed_all(number)
    random.seed(number)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(number % 2**32)


def _can_seed_cuda() -> bool:
    """Whether CUDA's streams can be set: not while a graph is captured, which draws from its own."""
    return torch.cuda.is_initialized() and not torch.cuda.is_current_stream_capturing()
