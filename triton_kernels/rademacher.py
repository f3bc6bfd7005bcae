"""rademacher: one bit a sign, 128 signs a block (csrc/zo/rademacher.h in Triton)

math     z(i) = -1 where bit i mod 32 of word (i mod 128) / 32 of block i / 128 is set, +1 elsewhere
source   Spall 1992
"""

import triton
import triton.language as tl


@triton.jit
def rademacher_sign(word, bit):
    return (((word >> bit) << 31) | 0x3F800000).to(tl.float32, bitcast=True)
