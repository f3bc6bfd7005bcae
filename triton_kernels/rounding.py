"""rounding: float32 to the weights' type and back (csrc/zo/rounding.h in Triton)

math     nearest (ties to even), stochastic ((|x| + r) cut towards zero), residual (bfloat16 with ties away
         from zero, and int16 low bits that make it an exact float32)
types    16-bit floats are uint16 bit patterns from load to store. Triton's interpreter truncates where a GPU
         rounds, and a cast knows only nearest; integers give the same bits everywhere, with and without
         flush-to-zero.
"""

import triton
import triton.language as tl

from .portable import HARDWARE


@triton.jit
def to_bits(value):
    return value.to(tl.uint32, bitcast=True)


@triton.jit
def to_float(bits):
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def bf16_to_float(half):
    return to_float(half.to(tl.uint32) << 16)


@triton.jit
def bf16_nearest(value):
    x = to_bits(value)
    # one comparison and one select a NaN: cheaper than keeping a payload that is not part of the contract
    rounded = tl.where(value != value, 0x7FC00000, x + 0x7FFF + ((x >> 16) & 1))
    return (rounded >> 16).to(tl.uint16)


@triton.jit
def bf16_stochastic(value, random):
    """random: 16 uniform bits"""
    # the low half of an infinity is 0, so that random never carries out of it; only a NaN needs a case of its
    # own
    return (tl.where(value != value, 0x7FC00000, to_bits(value) + random) >> 16).to(tl.uint16)


@triton.jit
def residual_join(high, low):
    return to_float((high.to(tl.uint32) << 16) + low.to(tl.int32).to(tl.uint32, bitcast=True))


@triton.jit
def residual_split(value):
    """The high half (uint16) and the low bits (int16)."""
    x = to_bits(value)
    magnitude = x & 0x7FFFFFFF
    special = tl.where(magnitude > 0x7F800000, (x >> 16) | 0x40, x >> 16)
    broken = magnitude >= 0x7F800000
    high = tl.where(broken, special, (x + 0x8000) >> 16)
    low = tl.where(broken, 0, x & 0xFFFF)
    return high.to(tl.uint16), low.to(tl.uint16).to(tl.int16, bitcast=True)


@triton.jit
def fp16_to_float(half):
    half = half.to(tl.uint32)
    sign = (half & 0x8000) << 16
    exponent = (half >> 10) & 0x1F
    fraction = half & 0x3FF
    # subnormal: fraction 2^-24, exact in float32
    subnormal = to_bits(fraction.to(tl.int32, bitcast=True).to(tl.float32) * 5.9604644775390625e-8)
    normal = ((exponent + tl.where(exponent == 31, 224, 112).to(tl.uint32)) << 23) | (fraction << 13)
    return to_float(sign | tl.where(exponent == 0, subnormal, normal))


@triton.jit
def fp16_cut(x):
    """(magnitude, shift, rebias) of rounding.h: `shift` bits go, then the exponent moves by `rebias`."""
    a = x & 0x7FFFFFFF
    exponent = a >> 23
    whole = exponent >= 113  # a normal float16 or an overflow; below, the leading one becomes explicit
    magnitude = tl.where(whole, a, (a & 0x7FFFFF) | tl.where(exponent != 0, 0x800000, 0).to(tl.uint32))
    shift = tl.where(whole, 13, tl.where(exponent > 95, 126 - exponent, 31)).to(tl.uint32)
    return magnitude, shift, tl.where(whole, 114688, 0).to(tl.uint32)


@triton.jit
def fp16_finish(x, magnitude, shift, rebias, offset):
    half = ((magnitude + offset) >> shift) - rebias
    half = tl.where(half < 0x7C00, half, 0x7C00)
    half = tl.where((x & 0x7FFFFFFF) > 0x7F800000, 0x7E00, half)
    return (((x >> 16) & 0x8000) | half.to(tl.uint32)).to(tl.uint16)


@triton.jit
def fp16_nearest(value):
    x = to_bits(value)
    magnitude, shift, rebias = fp16_cut(x)
    one = tl.full([], 1, tl.uint32)
    even = (magnitude >> shift) & 1
    return fp16_finish(x, magnitude, shift, rebias, (one << (shift - 1)) - 1 + even)


@triton.jit
def fp16_stochastic(value, random):
    x = to_bits(value)
    magnitude, shift, rebias = fp16_cut(x)
    return fp16_finish(x, magnitude, shift, rebias, (random << 16) >> (32 - shift))


# --- two halves in one word, as elementwise.py loads and stores them ----------------------------------------


@triton.jit
def bf16_nearest_pair(even, odd):
    if HARDWARE:
        return tl.inline_asm_elementwise(
            "cvt.rn.bf16x2.f32 $0, $2, $1;", "=r,f,f", [even, odd], dtype=tl.uint32, is_pure=True, pack=1
        )
    else:
        return bf16_nearest(even).to(tl.uint32) | (bf16_nearest(odd).to(tl.uint32) << 16)


@triton.jit
def fp16_nearest_pair(even, odd):
    if HARDWARE:
        return tl.inline_asm_elementwise(
            "cvt.rn.f16x2.f32 $0, $2, $1;", "=r,f,f", [even, odd], dtype=tl.uint32, is_pure=True, pack=1
        )
    else:
        return fp16_nearest(even).to(tl.uint32) | (fp16_nearest(odd).to(tl.uint32) << 16)


@triton.jit
def fp16_pair_to_float(word):
    if HARDWARE:
        return tl.inline_asm_elementwise(
            "{.reg .b16 e, o; mov.b32 {e, o}, $2; cvt.f32.f16 $0, e; cvt.f32.f16 $1, o;}",
            "=f,=f,r", [word], dtype=(tl.float32, tl.float32), is_pure=True, pack=1,
        )  # fmt: skip
    else:
        return fp16_to_float((word & 0xFFFF).to(tl.uint16)), fp16_to_float((word >> 16).to(tl.uint16))


@triton.jit
def watch_bf16(state, word):
    """Not 0 once a half was inf or NaN: 0 x + state is 0 until then, and a NaN from then on."""
    if HARDWARE:
        zero = tl.full([], 0, tl.uint32)
        return tl.inline_asm_elementwise(
            "fma.rn.bf16x2 $0, $1, $2, $3;",
            "=r,r,r,r",
            [word, zero, state],
            dtype=tl.uint32,
            is_pure=True,
            pack=1,
        )
    else:
        return state | (((word & 0x7F807F80) + 0x00800080) & 0x80008000)


@triton.jit
def watch_fp16(state, word):
    if HARDWARE:
        zero = tl.full([], 0, tl.uint32)
        return tl.inline_asm_elementwise(
            "fma.rn.f16x2 $0, $1, $2, $3;",
            "=r,r,r,r",
            [word, zero, state],
            dtype=tl.uint32,
            is_pure=True,
            pack=1,
        )
    else:
        return state | (((word & 0x7C007C00) + 0x04000400) & 0x80008000)
