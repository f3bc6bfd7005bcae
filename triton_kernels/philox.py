"""philox: Philox4x32-R, the block function of the stream (csrc/zo/philox.h in Triton)

math     Salmon et al. 2011: R rounds of (x0, x1, x2, x3) <- (hi(M1 x2) ^ x1 ^ k0, lo(M1 x2), hi(M0 x0) ^ x3 ^
         k1, lo(M0 x0)); k0 += W0, k1 += W1
keys     a kernel takes the key of every round as an argument of its own: arguments are operands that cost no
         instruction
types    uint32 scalars or tensors. Counter words that are the same for a whole tile stay scalars, so the
         first round is half uniform. The 64-bit product becomes one IMAD.WIDE for both halves; tl.umulhi and
         a second product would be two.
equal    tests/vectors/philox4x32.txt
"""

import triton
import triton.language as tl

M0: tl.constexpr = tl.constexpr(0xD2511F53)
M1: tl.constexpr = tl.constexpr(0xCD9E8D57)


@triton.jit
def philox4x32(x0, x1, x2, x3, keys, ROUNDS: tl.constexpr = 10):
    """keys: uint32 of every round, k0 and k1 in turns"""
    for r in tl.static_range(ROUNDS):
        p0 = x0.to(tl.uint64) * M0
        p1 = x2.to(tl.uint64) * M1
        x0 = (p1 >> 32).to(tl.uint32) ^ x1 ^ keys[2 * r].to(tl.uint32, bitcast=True)
        x1 = p1.to(tl.uint32)
        x2 = (p0 >> 32).to(tl.uint32) ^ x3 ^ keys[2 * r + 1].to(tl.uint32, bitcast=True)
        x3 = p0.to(tl.uint32)
    return x0, x1, x2, x3
