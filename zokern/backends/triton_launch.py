"""What every launch of backend ``triton`` needs: round keys, words as int32."""

from __future__ import annotations

from functools import lru_cache

from ..stream import ROUNDS


def signed(word: int) -> int:
    """Returns a 32-bit word as the int32 with its bits.

    Triton would choose another argument type for large values, and compile again."""
    return (word & 0xFFFFFFFF) - ((word & 0x80000000) << 1)


@lru_cache(maxsize=64)
def round_keys(k0: int, k1: int, rounds: int = ROUNDS) -> tuple[int, ...]:
    """Returns the keys of every round, k0 and k1 in turns (Salmon et al. 2011)."""
    return tuple(signed(k + r * w) for r in range(rounds) for k, w in ((k0, 0x9E3779B9), (k1, 0xBB67AE85)))


def keys_of(seed: int) -> tuple[int, ...]:
    return round_keys(seed & 0xFFFFFFFF, seed >> 32)


__all__ = ["keys_of", "round_keys", "signed"]
