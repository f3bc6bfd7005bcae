"""normal: one Philox word to one Box-Muller pair (csrc/zo/normal.h in Triton, the same operations in the same
order)

math     u = ((word mod 2^20) + 1/2) 2^-20, phi = pi int32(word) 2^-31, r = sqrt(-2 ln u); the pair is (r sin
         phi, r cos phi)
equal    bit for bit to zokern/directions/normal.py when compiled with enable_fp_fusion=False: every fusion is
         a tl.fma, and no product feeds a sum. No tl.sqrt, tl.log, tl.sin and no division: their code differs
         between GPUs.
"""

import triton
import triton.language as tl

from .portable import insert_bits

_h = float.fromhex
LOG2_4: tl.constexpr = tl.constexpr(_h("0x1.cf6f9ap-4"))
LOG2_3: tl.constexpr = tl.constexpr(_h("-0x1.c9e934p-1"))
LOG2_2: tl.constexpr = tl.constexpr(_h("0x1.784dfep+1"))
LOG2_1: tl.constexpr = tl.constexpr(_h("-0x1.10631ep+2"))
LOG2_0: tl.constexpr = tl.constexpr(_h("0x1.9bc3dcp+7"))
MINUS_2_LN2: tl.constexpr = tl.constexpr(_h("-0x1.62e430p-23"))
ROOT_1: tl.constexpr = tl.constexpr(_h("0x1.80a102p-2"))
ROOT_0: tl.constexpr = tl.constexpr(_h("0x1.008f72p-1"))
SINE_4: tl.constexpr = tl.constexpr(_h("0x1.06404ep-4"))
SINE_3: tl.constexpr = tl.constexpr(_h("-0x1.29e97ap-1"))
SINE_2: tl.constexpr = tl.constexpr(_h("0x1.45779ep+1"))
SINE_1: tl.constexpr = tl.constexpr(_h("-0x1.4aa654p+2"))
SINE_0: tl.constexpr = tl.constexpr(_h("0x1.921d96p+1"))
COSINE_4: tl.constexpr = tl.constexpr(_h("0x1.6d2c2ep-3"))
COSINE_3: tl.constexpr = tl.constexpr(_h("-0x1.499d3ep+0"))
COSINE_2: tl.constexpr = tl.constexpr(_h("0x1.02b198p+2"))
COSINE_1: tl.constexpr = tl.constexpr(_h("-0x1.3bb258p+2"))
COSINE_0: tl.constexpr = tl.constexpr(_h("0x1.fffabcp-1"))


@triton.jit
def normal_radius(word):
    """r = sqrt(-2 ln u) of the low 20 bits."""
    # 2^23 + n read as a float, less 2^23 - 1/2: n + 1/2, exactly, without a conversion
    f = insert_bits(word, 0xFFFFF, 0x4B000000).to(tl.float32, bitcast=True) + -8388607.5
    bits = f.to(tl.uint32, bitcast=True)
    m = insert_bits(bits, 0x7FFFFF, 0x3F800000).to(tl.float32, bitcast=True)
    p = tl.fma(m, LOG2_4, LOG2_3)
    p = tl.fma(p, m, LOG2_2)
    p = tl.fma(p, m, LOG2_1)
    p = tl.fma(p, m, LOG2_0)
    square = tl.fma(bits.to(tl.int32, bitcast=True).to(tl.float32), MINUS_2_LN2, p)
    # reciprocal square root from the bit pattern, then one third-order step fused with the product
    y = (0x5F375800 - (square.to(tl.uint32, bitcast=True) >> 1)).to(tl.float32, bitcast=True)
    s = square * y
    e = tl.fma(-s, y, 1.0)
    h = tl.fma(e, ROOT_1, ROOT_0) * e
    return tl.fma(s, h, s)


@triton.jit
def normal_angle(word):
    """sin and cos of pi int32(word) 2^-31."""
    t = word.to(tl.int32, bitcast=True).to(tl.float32) * 4.656612873077392578125e-10  # 2^-31
    q = t * t
    p = tl.fma(q, SINE_4, SINE_3)
    p = tl.fma(p, q, SINE_2)
    p = tl.fma(p, q, SINE_1)
    p = tl.fma(p, q, SINE_0)
    c = tl.fma(q, COSINE_4, COSINE_3)
    c = tl.fma(c, q, COSINE_2)
    c = tl.fma(c, q, COSINE_1)
    return p * t, tl.fma(c, q, COSINE_0)


@triton.jit
def normal_pair(word):
    r = normal_radius(word)
    sine, cosine = normal_angle(word)
    return r * sine, r * cosine
