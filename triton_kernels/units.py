"""units: the path of eight consecutive elements, as words of two values, in Triton

A tile has N units, so [N, 4] pairs; W of the four are handled at a time: 4 in 16-bit types, 2 where float32
is read or written, so that a thread's access is 16 bytes. elementwise.py says which elements are in units.
"""

import triton
import triton.language as tl

from .elements import BFLOAT16, FLOAT16, FLOAT32, NORMAL, SCALE, SCALE_TYPE
from .normal import normal_pair
from .philox import philox4x32
from .rademacher import rademacher_sign
from .rounding import (
    bf16_nearest_pair,
    fp16_nearest_pair,
    fp16_pair_to_float,
    to_bits,
    to_float,
    watch_bf16,
    watch_fp16,
)


@triton.jit
def four(a0, a1, a2, a3):
    """Four [N] to [N, 4]."""
    return tl.reshape(tl.join(tl.join(a0, a2), tl.join(a1, a3)), [a0.shape[0], 4])


@triton.jit
def some(words, PART: tl.constexpr, W: tl.constexpr):
    """Words W PART to W PART + W - 1 of each unit: [N, W]."""
    if W == 4:
        return four(words[0], words[1], words[2], words[3])
    else:
        return tl.join(words[2 * PART], words[2 * PART + 1])


@triton.jit
def words_of(unit, who, step, draw, keys, N: tl.constexpr, DIRECTION: tl.constexpr):
    """What makes the z of units unit to unit + N - 1: for normal four [N] of words, for signs one [N] whose
    low 8 bits they are.

    For signs, `unit` is the first of a block: N / 16 blocks are computed, and each of their 16 bytes goes to
    its unit."""
    if DIRECTION == NORMAL:
        return philox4x32((unit + tl.arange(0, N)).to(tl.uint32), who, step, draw, keys)
    else:
        w0, w1, w2, w3 = philox4x32(
            ((unit >> 4) + tl.arange(0, N // 16)).to(tl.uint32), who, step, draw, keys
        )
        words = tl.broadcast_to(four(w0, w1, w2, w3)[:, :, None], [N // 16, 4, 4])
        return (tl.reshape(words, [N]) >> ((tl.arange(0, N) & 3) * 8).to(tl.uint32),)


@triton.jit
def z_pair(words, PART: tl.constexpr, W: tl.constexpr, DIRECTION: tl.constexpr):
    """The even and the odd values [N, W]."""
    if DIRECTION == NORMAL:
        return normal_pair(some(words, PART, W))
    else:
        bit = (2 * (PART * W + tl.arange(0, W))[None, :]).to(tl.uint32)
        return rademacher_sign(words[0][:, None], bit), rademacher_sign(words[0][:, None], bit + 1)


@triton.jit
def pairs(address, begin, TYPE: tl.constexpr):
    """Words of two elements, from element `begin` on, which is at a 16-byte boundary."""
    if TYPE == FLOAT32:
        return tl.multiple_of(address.to(tl.pointer_type(tl.uint64)) + (begin >> 1), 16)
    else:
        return tl.multiple_of(address.to(tl.pointer_type(tl.uint32)) + (begin >> 1), 16)


@triton.jit
def read_pair(theta, low, place, mask, TYPE: tl.constexpr, JOIN: tl.constexpr):
    word = tl.load(theta + place, mask=mask)
    if TYPE == FLOAT32:
        return to_float(word.to(tl.uint32)), to_float((word >> 32).to(tl.uint32))
    elif TYPE == FLOAT16:
        return fp16_pair_to_float(word)
    elif JOIN:
        low_word = tl.load(low + place, mask=mask)
        even = (word << 16) + ((low_word << 16).to(tl.int32, bitcast=True) >> 16).to(tl.uint32, bitcast=True)
        odd = (word & 0xFFFF0000) + (low_word.to(tl.int32, bitcast=True) >> 16).to(tl.uint32, bitcast=True)
        return to_float(even), to_float(odd)
    else:
        return to_float(word << 16), to_float(word & 0xFFFF0000)


@triton.jit
def factor_pair(entry, begin, place, mask, N: tl.constexpr, W: tl.constexpr):
    """The factors of words of two elements, `place` words after element `begin`; 1 where an entry has
    none."""
    address = tl.load(entry + SCALE)
    kind = tl.load(entry + SCALE_TYPE).to(tl.int32)
    even = tl.full([N, W], 1.0, tl.float32)
    odd = tl.full([N, W], 1.0, tl.float32)
    here = (begin >> 1) + place
    if address != 0:
        if kind == FLOAT32:
            wide = tl.load(address.to(tl.pointer_type(tl.uint64)) + here, mask=mask, other=0)
            even = to_float(wide.to(tl.uint32))
            odd = to_float((wide >> 32).to(tl.uint32))
        elif kind == BFLOAT16:
            word = tl.load(address.to(tl.pointer_type(tl.uint32)) + here, mask=mask, other=0)
            even = to_float(word << 16)
            odd = to_float(word & 0xFFFF0000)
        else:
            half = tl.load(address.to(tl.pointer_type(tl.uint16)) + here, mask=mask, other=0).to(tl.int32)
            even = (half & 0xFF).to(tl.float32)
            odd = (half >> 8).to(tl.float32)
    return even, odd


@triton.jit
def both(even, odd):
    return even.to(tl.uint32) | (odd.to(tl.uint32) << 16)


@triton.jit
def nearest_pair(even, odd, TYPE: tl.constexpr):
    if TYPE == FLOAT32:
        return to_bits(even).to(tl.uint64) | (to_bits(odd).to(tl.uint64) << 32)
    elif TYPE == BFLOAT16:
        return bf16_nearest_pair(even, odd)
    else:
        return fp16_nearest_pair(even, odd)


@triton.jit
def watch(state, word, TYPE: tl.constexpr):
    """The state of a watch, 0 until a value of a word is inf or NaN."""
    if TYPE == FLOAT32:
        state = tl.fma(to_float(word.to(tl.uint32)), 0.0, to_float(state))
        return to_bits(tl.fma(to_float((word >> 32).to(tl.uint32)), 0.0, state))
    elif TYPE == BFLOAT16:
        return watch_bf16(state, word)
    else:
        return watch_fp16(state, word)


@triton.jit
def nonfinite_pair(word, TYPE: tl.constexpr):
    """How many of a word's two values are inf or NaN."""
    if TYPE == FLOAT32:
        return ((word & 0x7F800000) == 0x7F800000).to(tl.int32) + (
            ((word >> 32) & 0x7F800000) == 0x7F800000
        ).to(tl.int32)
    elif TYPE == BFLOAT16:
        return ((word & 0x7F80) == 0x7F80).to(tl.int32) + (((word >> 16) & 0x7F80) == 0x7F80).to(tl.int32)
    else:
        return ((word & 0x7C00) == 0x7C00).to(tl.int32) + (((word >> 16) & 0x7C00) == 0x7C00).to(tl.int32)


@triton.jit
def start_of(unit, part, N: tl.constexpr, DIRECTION: tl.constexpr):
    """The first row of a program's first tile; for signs up to 15 rows before the chunk's, where the block of
    unit 0 begins."""
    if DIRECTION == NORMAL:
        return part * N
    else:
        return part * N - (unit & 15).to(tl.int32)


@triton.jit
def rows_of(at, units, N: tl.constexpr, W: tl.constexpr, DIRECTION: tl.constexpr):
    """Where the words [N, W] of a tile's part 0 lie, as a scalar plus a tensor, and the mask [N, 1] of the
    chunk's rows.

    A thread has one row of a tile of normals, whose address is cheapest in one piece; it has four of a tile
    of signs, which then differ by a constant if the scalar moves alone."""
    row = tl.arange(0, N)
    if DIRECTION == NORMAL:
        row += at
        return 0, row[:, None] * 4 + tl.arange(0, W)[None, :], (row < units)[:, None]
    else:
        inside = (at + row).to(tl.uint32) < units.to(tl.uint32)  # also false before row 0
        return at * 4, row[:, None] * 4 + tl.arange(0, W)[None, :], inside[:, None]
