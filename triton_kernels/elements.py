"""elements: the path of elements that stand alone, and how all kernels find theirs, in Triton

table    the columns of an entry, which elementwise.py describes
element  each computes its own block of z. `number` is its number in the stream
equal    bit for bit to zokern/backends/reference.py
"""

import triton
import triton.language as tl

from .normal import normal_pair
from .philox import philox4x32
from .rademacher import rademacher_sign
from .rounding import bf16_nearest, bf16_to_float, fp16_nearest, fp16_to_float, residual_join, to_bits

FLOAT32: tl.constexpr = tl.constexpr(0)
BFLOAT16: tl.constexpr = tl.constexpr(1)
FLOAT16: tl.constexpr = tl.constexpr(2)
INT16: tl.constexpr = tl.constexpr(3)
NORMAL: tl.constexpr = tl.constexpr(0)
STOCHASTIC: tl.constexpr = tl.constexpr(1)
RESIDUAL: tl.constexpr = tl.constexpr(2)
NEAREST: tl.constexpr = tl.constexpr(0)
ROUNDING_DRAW: tl.constexpr = tl.constexpr(4 << 24)

# columns of an entry
THETA: tl.constexpr = tl.constexpr(0)
OUT: tl.constexpr = tl.constexpr(1)
LOW: tl.constexpr = tl.constexpr(3)
ROWS: tl.constexpr = tl.constexpr(4)
COLUMNS: tl.constexpr = tl.constexpr(6)
ROW_STRIDE: tl.constexpr = tl.constexpr(7)
COLUMN_STRIDE: tl.constexpr = tl.constexpr(8)
FIRST: tl.constexpr = tl.constexpr(9)
PITCH: tl.constexpr = tl.constexpr(10)
WHO_TYPE: tl.constexpr = tl.constexpr(11)
TYPE_OUT: tl.constexpr = tl.constexpr(12)
SCALE: tl.constexpr = tl.constexpr(13)
SCALE_TYPE: tl.constexpr = tl.constexpr(14)
IN_UNITS: tl.constexpr = tl.constexpr(15)
DIVIDE: tl.constexpr = tl.constexpr(16)
SHIFT: tl.constexpr = tl.constexpr(17)
ENTRY: tl.constexpr = tl.constexpr(18)

GO: tl.constexpr = tl.constexpr(1)  # of a control; 0 is its decay
FINITE: tl.constexpr = tl.constexpr(2)

SCALE_MASK: tl.constexpr = tl.constexpr(2)  # types of factors: 0 float32, 1 bfloat16, 2 one byte


@triton.jit
def pick(which, a0, a1, a2, a3):
    return tl.where(which < 2, tl.where(which == 0, a0, a1), tl.where(which == 2, a2, a3))


@triton.jit
def z_of(number, who, step, draw, keys, DIRECTION: tl.constexpr):
    if DIRECTION == NORMAL:
        w0, w1, w2, w3 = philox4x32((number >> 3).to(tl.uint32), who, step, draw, keys)
        even, odd = normal_pair(pick((number >> 1) & 3, w0, w1, w2, w3))
        return tl.where((number & 1) == 0, even, odd)
    else:
        w0, w1, w2, w3 = philox4x32((number >> 7).to(tl.uint32), who, step, draw, keys)
        return rademacher_sign(pick((number >> 5) & 3, w0, w1, w2, w3), (number & 31).to(tl.uint32))


@triton.jit
def random16(number, who, step, keys):
    """The 16 bits that stochastic rounding spends on each element: half-word number mod 8 of block number /
    8."""
    w0, w1, w2, w3 = philox4x32(
        (number >> 3).to(tl.uint32), who, step, tl.full([], ROUNDING_DRAW, tl.uint32), keys
    )
    return (pick((number >> 1) & 3, w0, w1, w2, w3) >> ((number & 1) * 16).to(tl.uint32)) & 0xFFFF


@triton.jit
def pointer(address, begin, TYPE: tl.constexpr):
    """Element `begin` of the tensor at an address; 16-bit floats are uint16."""
    if TYPE == FLOAT32:
        return address.to(tl.pointer_type(tl.float32)) + begin
    elif TYPE == INT16:
        return address.to(tl.pointer_type(tl.int16)) + begin
    else:
        return address.to(tl.pointer_type(tl.uint16)) + begin


@triton.jit
def read(theta, place, low, low_place, mask, TYPE: tl.constexpr, JOIN: tl.constexpr):
    raw = tl.load(theta + place, mask=mask, other=0)
    if TYPE == FLOAT32:
        return raw
    elif TYPE == FLOAT16:
        return fp16_to_float(raw)
    elif JOIN:
        return residual_join(raw, tl.load(low + low_place, mask=mask, other=0))
    else:
        return bf16_to_float(raw)


@triton.jit
def nearest(value, TYPE: tl.constexpr):
    if TYPE == BFLOAT16:
        return bf16_nearest(value)
    elif TYPE == FLOAT16:
        return fp16_nearest(value)
    else:
        return value


@triton.jit
def nonfinite_of(rounded, TYPE: tl.constexpr):
    """1 where a rounded result is inf or NaN."""
    if TYPE == FLOAT32:
        return ((to_bits(rounded) & 0x7F800000) == 0x7F800000).to(tl.int32)
    elif TYPE == BFLOAT16:
        return ((rounded & 0x7F80) == 0x7F80).to(tl.int32)
    else:
        return ((rounded & 0x7C00) == 0x7C00).to(tl.int32)


@triton.jit
def chunk_of(entries, chunks, SPLIT: tl.constexpr):
    """The entry of this program's chunk, the chunk's first element, its length, its units, and which of its
    SPLIT parts is ours."""
    program = tl.program_id(0).to(tl.int64)
    chunk = chunks + program // SPLIT * 3
    begin = tl.load(chunk)
    size = (tl.load(chunk + 1) - begin).to(tl.int32)
    entry = entries + tl.load(chunk + 2) * ENTRY
    units = (size // 8) * tl.load(entry + IN_UNITS).to(tl.int32)
    return entry, begin, size, units, (program % SPLIT).to(tl.int32)


@triton.jit
def name_of(step, clock):
    """A step number as the kernel has it: the host's, and what the device's clock shows."""
    step = step.to(tl.uint32, bitcast=True)
    if clock is not None:
        step += tl.load(clock).to(tl.uint32)
    return step


@triton.jit
def unless_stopped(count, control, BY: tl.constexpr):
    """A number of turns, none where a number of {decay, go, finite} (csrc/project.h) is 0."""
    return tl.where(tl.load(control + BY) != 0.0, count, 0)


@triton.jit
def locate(entry, p, mask):
    """Elements p of an entry: their numbers in the stream, their places in theta and in the residual."""
    rows = tl.load(entry + ROWS)
    columns = tl.load(entry + COLUMNS)
    # p // columns for p < 2^40, from a product: a division would go through an approximate reciprocal
    quotient = tl.umulhi((p << 23).to(tl.uint64), tl.load(entry + DIVIDE).to(tl.uint64))
    r = (quotient >> tl.load(entry + SHIFT).to(tl.uint64)).to(tl.int64)
    c = p - r * columns
    if rows != 0:
        r = tl.load(rows.to(tl.pointer_type(tl.int64)) + r, mask=mask, other=0)
    number = tl.load(entry + FIRST) + r * tl.load(entry + PITCH) + c
    return number, r * tl.load(entry + ROW_STRIDE) + c * tl.load(entry + COLUMN_STRIDE), r * columns + c


@triton.jit
def factor_of(entry, place, mask):
    """The factors of elements at these places; 1 where an entry has none."""
    address = tl.load(entry + SCALE)
    kind = tl.load(entry + SCALE_TYPE).to(tl.int32)
    factor = tl.full([place.shape[0]], 1.0, tl.float32)
    if address != 0:
        if kind == FLOAT32:
            factor = tl.load(address.to(tl.pointer_type(tl.float32)) + place, mask=mask, other=0)
        elif kind == BFLOAT16:
            factor = bf16_to_float(
                tl.load(address.to(tl.pointer_type(tl.uint16)) + place, mask=mask, other=0)
            )
        else:
            byte = tl.load(address.to(tl.pointer_type(tl.uint8)) + place, mask=mask, other=0)
            factor = byte.to(tl.int32).to(tl.float32)
    return factor
