"""Random streams of the process: torch's on the CPU and on CUDA devices, `random` and NumPy's."""

from __future__ import annotations

import hashlib
import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch


def seed_of(seed: int, step: int, part: int = 0) -> int:
    """Returns the seed of the readings of a step's micro-batch:
    all of them see the same dropout masks, and no two steps or micro-batches do."""
    digest = hashlib.sha256((f"dropout {seed} {step}" + (f" {part}" if part else "")).encode()).digest()
    return int.from_bytes(digest[:8], "little")


@contextmanager
def preserved() -> Iterator[None]:
    """Puts every stream back at the end."""
    numpy = sys.modules.get("numpy")
    states = torch.get_rng_state(), random.getstate(), numpy.random.get_state() if numpy else None
    cuda = torch.cuda.get_rng_state_all() if _can_seed_cuda() else None
    try:
        yield
    finally:
        torch.set_rng_state(states[0])
        random.setstate(states[1])
        if states[2] is not None:
            sys.modules["numpy"].random.set_state(states[2])
        if cuda is not None:
            torch.cuda.set_rng_state_all(cuda)


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
