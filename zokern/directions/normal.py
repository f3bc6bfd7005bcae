"""Direction ``normal``: independent standard normals, eight a Philox block. The definition of
csrc/zo/normal.h, in PyTorch.

Each word x makes one Box-Muller pair: u = ((x mod 2^20) + 1/2) 2^-20, phi = pi int32(x) 2^-31,

    z = (r sin phi, r cos phi),   r = sqrt(-2 ln u),   |z| <= 5.3956

with fixed polynomials for log2 and for sin and cos on the whole circle, and a reciprocal square root from the
bit pattern. Element 8 b + 2 j is r sin phi and 8 b + 2 j + 1 is r cos phi of word j of block b. Box and
Muller 1958.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..stream import fma, to_bits, to_float

_h = float.fromhex
_LOG2 = [
    _h(c) for c in ("0x1.cf6f9ap-4", "-0x1.c9e934p-1", "0x1.784dfep+1", "-0x1.10631ep+2", "0x1.9bc3dcp+7")
]
_MINUS_2_LN2 = _h("-0x1.62e430p-23")
_ROOT_MAGIC, _ROOT = 0x5F375800, (_h("0x1.80a102p-2"), _h("0x1.008f72p-1"))
_SINE = [
    _h(c) for c in ("0x1.06404ep-4", "-0x1.29e97ap-1", "0x1.45779ep+1", "-0x1.4aa654p+2", "0x1.921d96p+1")
]
_COSINE = [
    _h(c) for c in ("0x1.6d2c2ep-3", "-0x1.499d3ep+0", "0x1.02b198p+2", "-0x1.3bb258p+2", "0x1.fffabcp-1")
]


def _horner(coefficients: list[float], x: Tensor) -> Tensor:
    value = torch.full_like(x, coefficients[0])
    for coefficient in coefficients[1:]:
        value = fma(value, x, coefficient)
    return value


def radius(word: Tensor) -> Tensor:
    """r = sqrt(-2 ln u) of the low 20 bits of each word, float32."""
    f = to_float(word & 0xFFFFF | 0x4B000000) + -8388607.5
    bits = to_bits(f)
    mantissa = to_float(bits & 0x7FFFFF | 0x3F800000)
    square = fma(bits.to(torch.int32).float(), _MINUS_2_LN2, _horner(_LOG2, mantissa))
    y = to_float(_ROOT_MAGIC - (to_bits(square) >> 1))
    s = square * y
    e = fma(-s, y, 1.0)
    h = fma(e, _ROOT[0], _ROOT[1]) * e
    return fma(s, h, s)


def angle(word: Tensor) -> tuple[Tensor, Tensor]:
    """sin and cos of pi int32(word) 2^-31, float32."""
    signed = torch.where(word < 2**31, word, word - 2**32).to(torch.int32)
    t = signed.float() * 2.0**-31
    q = t * t
    return _horner(_SINE, q) * t, _horner(_COSINE, q)


class Normal:
    """Draws every element of z from the standard normal distribution N(0, 1), independently; E[z z^T] =
    I.

    It has no arguments. z is float32, within +-5.3956, and a function of (seed, name, step, query,
    element) alone: docs/stream.md. Salmon et al. 2011 (Philox); Box and Muller 1958."""

    name = "normal"
    per_block = 8

    def values(self, words: Tensor) -> Tensor:
        """int64[n, 4] words to float32[n, 8] values."""
        r = radius(words)
        sine, cosine = angle(words)
        return torch.stack((r * sine, r * cosine), dim=-1).flatten(-2)
