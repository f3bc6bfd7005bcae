"""The stream, version 1: which random number belongs to which element, in prose and then in PyTorch.

A value z is a pure function of names. It never depends on a device, a grid, a thread count, a shard, the
order of the parameters, their dtype, or what else is trained:

    z(seed, who, step, draw, i) = value (i mod P) of block (i div P),   P = 8 (normal) or 128 (rademacher)
    block = Philox4x32-10(counter = (i div P, who, step, draw), key = (seed mod 2**32, seed div 2**32))

    seed   the run's seed, any integer in [0, 2**64); it is the key and never changes inside a run
    who    the parameter's id: the first four bytes (little endian) of SHA-256 of its qualified name
    step   the number of the step, from 0, below 2**32
    draw   purpose * 2**24 + query: queries of one step, and purposes (below) that never read each other's
           words
    i      the element's row-major number in the *unsharded* tensor, below 2**35

The words become values with IEEE single operations in a written order: csrc/zo/normal.h and
csrc/zo/rademacher.h say it in C++, `directions/` says it in PyTorch, and both give the same bits. PyTorch has
no fused multiply-add on a CPU, and some of its operations fuse or round twice (`add(alpha=)`, `addcmul`,
`lerp`, `sqrt`): none is used here, and `fma` below is exact.

Version 1 is frozen by tests/vectors/. A changed bit would be version 2.
Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3" (Philox); Box and Muller 1958.
"""

from __future__ import annotations

import hashlib
import operator
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

VERSION = 1
ROUNDS = 10
INDEX_LIMIT = 2**35  # block numbers of `normal` fill 32 bits

# Purposes: the top byte of the draw word.
DIRECTION, RADIUS, BASIS, MASK, ROUNDING, DROPOUT, LAYERS, PRIVACY = range(8)

_M0, _M1, _W0, _W1 = 0xD2511F53, 0xCD9E8D57, 0x9E3779B9, 0xBB67AE85
_LOW = 0xFFFFFFFF


@lru_cache(maxsize=1 << 16)
def parameter_id(name: str) -> int:
    """The 32-bit id of a parameter: the first four bytes, little endian, of SHA-256 of its qualified name."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "little")


def draw_word(query: int, purpose: int = DIRECTION) -> int:
    """Counter word 3: ``purpose * 2**24 + query``, query in [0, 2**24)."""
    if not 0 <= query < 2**24:
        raise ValueError(f"draw_word: query is {query}; expected 0 <= query < 2**24")
    return purpose << 24 | query


def check_seed(seed: int) -> int:
    """Any integer in [0, 2**64) is a seed, 0 too; everything else is refused."""
    try:
        number = operator.index(seed)
    except TypeError:
        raise ValueError(f"seed is {seed!r}; expected an integer, 0 <= seed < 2**64") from None
    if isinstance(seed, bool) or not 0 <= number < 2**64:
        raise ValueError(f"seed is {seed!r}; expected an integer, 0 <= seed < 2**64")
    return number


def check_word(name: str, value: int) -> int:
    """A counter word: an integer in [0, 2**32)."""
    try:
        number = operator.index(value)
    except TypeError:
        raise ValueError(f"{name} is {value!r:.80}; expected an integer, 0 <= {name} < 2**32") from None
    if isinstance(value, bool) or not 0 <= number < 2**32:
        raise ValueError(f"{name} is {value!r}; expected an integer, 0 <= {name} < 2**32")
    return number


def _multiply(constant: int, word: Tensor) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of constant * word, by 16-bit halves:
    no product leaves the positive int64 range."""
    low, high = constant * (word & 0xFFFF), constant * (word >> 16)
    return (high + (low >> 16)) >> 16, (low + ((high & 0xFFFF) << 16)) & _LOW


def philox4x32(counter: Tensor, key: tuple[int, int], rounds: int = ROUNDS) -> Tensor:
    """Philox4x32-R of int64[n, 4] counter words (each in [0, 2**32)); int64[n, 4] output words."""
    x0, x1, x2, x3 = counter.to(torch.int64).unbind(-1)
    k0, k1 = key
    for _ in range(rounds):
        high0, low0 = _multiply(_M0, x0)
        high1, low1 = _multiply(_M1, x2)
        x0, x1, x2, x3 = high1 ^ x1 ^ k0, low1, high0 ^ x3 ^ k1, low0
        k0, k1 = (k0 + _W0) & _LOW, (k1 + _W1) & _LOW
    return torch.stack((x0, x1, x2, x3), dim=-1)


def words(blocks: Tensor, who: int, step: int, draw: int, seed: int) -> Tensor:
    """The four words of each block of (seed; who, step, draw): int64[n] block numbers to int64[n, 4]."""
    counter = torch.stack([blocks, *(torch.full_like(blocks, word) for word in (who, step, draw))], dim=-1)
    return philox4x32(counter, (seed & _LOW, seed >> 32))


def to_float(bits: Tensor) -> Tensor:
    """int64 words in [0, 2**32) as the float32 with these bits."""
    return torch.where(bits < 2**31, bits, bits - 2**32).to(torch.int32).view(torch.float32)


def to_bits(value: Tensor) -> Tensor:
    """The bits of a float32, as int64 in [0, 2**32)."""
    return value.view(torch.int32).to(torch.int64) & _LOW


def fma(a: Tensor | float, b: Tensor | float, c: Tensor | float) -> Tensor:
    """round(a * b + c), float32, rounded once.

    The product of two float32 is exact in float64. Its sum with c is rounded there *to odd* (the error of the
    sum, from Knuth's two-sum, says in which direction), so that the cut to float32 is the only rounding that
    shows.
    """
    a, b, c = (x.double() if isinstance(x, Tensor) else x for x in (a, b, c))
    product: Any = a * b
    total: Tensor = product + c
    part = total - product
    error = (product - (total - part)) + (c - part)
    bits = total.view(torch.int64)
    inexact_even = (error != 0) & (bits & 1 == 0) & torch.isfinite(total)
    towards_zero = (error < 0) == (total > 0)
    odd = torch.where(inexact_even, torch.where(towards_zero, bits - 1, bits + 1), bits)
    return odd.view(torch.float64).float()
