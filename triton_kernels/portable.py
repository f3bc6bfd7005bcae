"""portable: what a GPU has an instruction for and Triton's interpreter computes otherwise (csrc/zo/portable.h
in Triton)

equal    both forms give the same bits: the interpreted one is compared with the reference, and so is the PTX
         of the compiled one
"""

import triton
import triton.language as tl

HARDWARE: tl.constexpr = tl.constexpr(not triton.knobs.runtime.interpret)


@triton.jit
def insert_bits(word, MASK: tl.constexpr, FILL: tl.constexpr):
    """(word & MASK) | FILL. Written out as one LOP3, because ptxas makes two of it when both constants are
    literals."""
    if HARDWARE:
        mask, fill = tl.full([], MASK, tl.uint32), tl.full([], FILL, tl.uint32)
        return tl.inline_asm_elementwise(
            "lop3.b32 $0, $1, $2, $3, 0xEA;",
            "=r,r,r,r",
            [word, mask, fill],
            dtype=tl.uint32,
            is_pure=True,
            pack=1,
        )
    else:
        return (word & MASK) | FILL
