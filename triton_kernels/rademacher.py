"""rademacher: one bit a sign, 128 signs a block (csrc/zo/rademacher.h in Triton)

math     z(i) = -1 where bit i mod 32 of word (i mod 128) / 32 of block i / 128 is set, +1 elsewhere
source   Spall 1992
"""

import triton
import triton.language as tl

from .portable import insert_bits


@triton.jit
def rademacher_sign(word, bit):
    """bit: below 32"""
    return insert_bits(word << (31 - bit), 0x80000000, 0x3F800000).to(tl.float32, bitcast=True)
