"""The raw block function of the stream, `philox4x32`."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from .. import backends
from ..checks import whole_number
from ..stream import ROUNDS, check_word
from .registered import operation, register, traced


def philox4x32(counter, key, rounds: int = ROUNDS, backend: str | None = None) -> Tensor:
    """Returns words of Philox4x32-R, the raw block function, of counters (x0, x1, x2, x3) and key (k0,
    k1).

    counter  int64 tensor of shape (..., 4), or a nested sequence of ints, each word in [0, 2**32); only
             read
    key      two words in [0, 2**32)
    rounds   1 to 16; the stream uses 10
    backend  as for zokern.draw

    Returns int64 of shape (..., 4) on the counter's device. Equal on every backend.
    Raises ValueError for words out of range, another last dimension, or rounds out of range.
    Salmon et al. 2011; known answers of Random123 in tests/vectors/philox4x32.txt."""
    counter = _integers("counter", counter)
    if counter.dim() == 0 or counter.shape[-1] != 4:
        raise ValueError(f"philox4x32: counter has shape {tuple(counter.shape)}; expected [..., 4]")
    if counter.numel() and not (0 <= int(counter.min()) and int(counter.max()) < 2**32):
        raise ValueError("philox4x32: counter has words outside [0, 2**32)")
    words = _integers("key", key)
    if words.shape != (2,):
        raise ValueError(f"philox4x32: key is {key!r:.80}; expected two words in [0, 2**32)")
    low, high = (check_word(f"key[{i}]", word) for i, word in enumerate(words.tolist()))
    rounds = whole_number("philox4x32: rounds", rounds, 1, 16, "an integer, 1 to 16")
    flat = counter.reshape(-1, 4).contiguous()
    chosen = backends.resolve(backend, counter.device)
    if traced(backend):
        return operation("philox4x32", chosen, None, counter=counter, key=[low, high], rounds=rounds)
    return chosen.philox4x32(flat, (low, high), rounds).view(counter.shape)


def _integers(what: str, words) -> Tensor:
    """Returns counter words as int64; refuses those that are no integers."""
    if not isinstance(words, Tensor):
        listed = np.asarray(words)
        if listed.size and listed.dtype.kind not in "iu":
            raise ValueError(f"philox4x32: {what} is {words!r:.80}; expected integers in [0, 2**32)")
        return torch.tensor(listed.astype(np.int64), dtype=torch.int64, device="cpu")
    if words.is_floating_point() or words.is_complex() or words.dtype == torch.bool:
        raise ValueError(f"philox4x32: {what} is {words.dtype}; expected integers in [0, 2**32)")
    return words.to(torch.int64)


register(
    "philox4x32",
    philox4x32,
    "(Tensor counter, int[] key, int rounds, str backend) -> Tensor",
    lambda given: torch.empty_like(given.counter),
)
