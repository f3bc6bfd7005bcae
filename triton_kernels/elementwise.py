"""elementwise: draw, axpy_ and perturb in Triton, one launch for a list of tensors (csrc/elementwise.h says what they compute)

table    entries int64[E, 16] and chunks int64[C, 3] in device memory: the bytes of `Entry` (13) and of `Chunk`; then 1 where the
         entry can take the group path, and how to divide by its columns. draws int64[K] = step | draw << 32. Addresses become
         typed pointers here.
paths    group    eight consecutive elements a Philox block: contiguous, first a multiple of 8, every address a multiple of 16.
                  Tiles are [BLOCK / 8, 8] with all eight of a row in one thread, so 16-bit types move 16 bytes a thread.
         element  everything else, and the last n mod 8 of a chunk: each element computes its own block.
work     axpy_ normal, K = 1: 36.8 to 41.0 instructions an element in bfloat16 and 30.0 to 34.9 in float32 from sm_80 to sm_120,
         about 25 of them z (`pytest tests/test_triton.py -k compiled -s`); the element path repeats z's block for each element
launch   SPLIT programs a chunk. enable_fp_fusion=False is part of the definition: contraction would change bits.
equal    bit for bit to zokern/backends/reference.py
source   Malladi et al. 2023, Algorithm 1; stream: zokern/stream.py, version 1
"""

import triton
import triton.language as tl

from .normal import normal_pair
from .philox import philox4x32
from .rademacher import rademacher_sign
from .rounding import (
    bf16_nearest,
    bf16_stochastic,
    bf16_to_float,
    fp16_nearest,
    fp16_stochastic,
    fp16_to_float,
    residual_join,
    residual_split,
    to_bits,
)

FLOAT32: tl.constexpr = tl.constexpr(0)
BFLOAT16: tl.constexpr = tl.constexpr(1)
FLOAT16: tl.constexpr = tl.constexpr(2)
INT16: tl.constexpr = tl.constexpr(3)
NORMAL: tl.constexpr = tl.constexpr(0)
STOCHASTIC: tl.constexpr = tl.constexpr(1)
RESIDUAL: tl.constexpr = tl.constexpr(2)
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
IN_GROUPS: tl.constexpr = tl.constexpr(13)
DIVIDE: tl.constexpr = tl.constexpr(14)
SHIFT: tl.constexpr = tl.constexpr(15)
ENTRY: tl.constexpr = tl.constexpr(16)


# --- values: `number` is the stream's number of each element, or of the first element of each group (GROUPS) -----------------------


@triton.jit
def interleave(a0, a1):
    """[...] and [...] to [..., 2], flattened into the last dimension."""
    joined = tl.join(a0, a1)
    return tl.reshape(joined, [a0.shape[0], joined.numel // a0.shape[0]])


@triton.jit
def four(a0, a1, a2, a3):
    """Four [N] to [N, 4]."""
    return tl.reshape(tl.join(tl.join(a0, a2), tl.join(a1, a3)), [a0.shape[0], 4])


@triton.jit
def pick(which, a0, a1, a2, a3):
    return tl.where(which < 2, tl.where(which == 0, a0, a1), tl.where(which == 2, a2, a3))


@triton.jit
def z_of(number, who, step, draw, k0, k1, DIRECTION: tl.constexpr, GROUPS: tl.constexpr):
    """float32 [N, 8] of [N] groups, or a value for each element."""
    if DIRECTION == NORMAL:
        w0, w1, w2, w3 = philox4x32((number >> 3).to(tl.uint32), who, step, draw, k0, k1)
        if GROUPS:
            even, odd = normal_pair(four(w0, w1, w2, w3))
            return interleave(even, odd)
        else:
            even, odd = normal_pair(pick((number >> 1) & 3, w0, w1, w2, w3))
            return tl.where((number & 1) == 0, even, odd)
    else:
        w0, w1, w2, w3 = philox4x32((number >> 7).to(tl.uint32), who, step, draw, k0, k1)
        word = pick((number >> 5) & 3, w0, w1, w2, w3)
        bit = (number & 31).to(tl.uint32)
        if GROUPS:
            return rademacher_sign(word[:, None], bit[:, None] + tl.arange(0, 8)[None, :].to(tl.uint32))
        else:
            return rademacher_sign(word, bit)


@triton.jit
def random16(number, who, step, k0, k1, GROUPS: tl.constexpr):
    """The 16 bits that stochastic rounding spends on each element: half-word number mod 8 of block number / 8."""
    purpose = tl.full([], ROUNDING_DRAW, tl.uint32)
    w0, w1, w2, w3 = philox4x32((number >> 3).to(tl.uint32), who, step, purpose, k0, k1)
    if GROUPS:
        words = four(w0, w1, w2, w3)
        return interleave(words & 0xFFFF, words >> 16)
    else:
        word = pick((number >> 1) & 3, w0, w1, w2, w3)
        return (word >> ((number & 1) * 16).to(tl.uint32)) & 0xFFFF


# --- memory ------------------------------------------------------------------------------------------------------------------------


@triton.jit
def pointer(address, begin, TYPE: tl.constexpr, GROUPS: tl.constexpr):
    """Element `begin` of the tensor at an address; 16-bit floats are uint16."""
    if TYPE == FLOAT32:
        base = address.to(tl.pointer_type(tl.float32)) + begin
    elif TYPE == INT16:
        base = address.to(tl.pointer_type(tl.int16)) + begin
    else:
        base = address.to(tl.pointer_type(tl.uint16)) + begin
    if GROUPS:
        base = tl.multiple_of(base, 16)
    return base


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
    """The entry of this program's chunk, the chunk's first element, its length, its groups, and which of its SPLIT parts is ours."""
    program = tl.program_id(0).to(tl.int64)
    chunk = chunks + program // SPLIT * 3
    begin = tl.load(chunk)
    size = (tl.load(chunk + 1) - begin).to(tl.int32)
    entry = entries + tl.load(chunk + 2) * ENTRY
    groups = (size // 8) * tl.load(entry + IN_GROUPS).to(tl.int32)
    return entry, begin, size, groups, (program % SPLIT).to(tl.int32)


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


# --- the verbs ---------------------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["count", "k0", "k1"])
def philox(counters, words, count, k0, k1, ROUNDS: tl.constexpr, BLOCK: tl.constexpr):
    """int64[count, 4] counters to int64[count, 4] words."""
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = row < count
    x = counters + row * 4
    x0 = tl.load(x, mask=mask, other=0).to(tl.uint32)
    x1 = tl.load(x + 1, mask=mask, other=0).to(tl.uint32)
    x2 = tl.load(x + 2, mask=mask, other=0).to(tl.uint32)
    x3 = tl.load(x + 3, mask=mask, other=0).to(tl.uint32)
    k0 = k0.to(tl.uint32, bitcast=True)
    k1 = k1.to(tl.uint32, bitcast=True)
    w0, w1, w2, w3 = philox4x32(x0, x1, x2, x3, k0, k1, ROUNDS)
    w = words + row * 4
    tl.store(w, w0.to(tl.int64), mask=mask)
    tl.store(w + 1, w1.to(tl.int64), mask=mask)
    tl.store(w + 2, w2.to(tl.int64), mask=mask)
    tl.store(w + 3, w3.to(tl.int64), mask=mask)


@triton.jit(do_not_specialize=["entries", "chunks", "step", "draw", "k0", "k1"])
def draw(entries, chunks, step, draw, k0, k1,
         DIRECTION: tl.constexpr, KINDS: tl.constexpr, BLOCK: tl.constexpr, TAIL: tl.constexpr, SPLIT: tl.constexpr):  # fmt: skip
    """out <- nearest(z). KINDS: bit t is set when the launch has an output of type t."""
    k0 = k0.to(tl.uint32, bitcast=True)
    k1 = k1.to(tl.uint32, bitcast=True)
    step = step.to(tl.uint32, bitcast=True)
    draw = draw.to(tl.uint32, bitcast=True)
    entry, begin, size, groups, part = chunk_of(entries, chunks, SPLIT)
    who = tl.load(entry + WHO_TYPE).to(tl.uint32)
    kind = tl.load(entry + TYPE_OUT).to(tl.int32)
    for TYPE in tl.static_range(3):
        if (KINDS >> TYPE) & 1:
            if kind == TYPE:
                first = tl.load(entry + FIRST) + begin
                out = pointer(tl.load(entry + OUT), begin, TYPE, True)
                for at in range(part * (BLOCK // 8), groups, SPLIT * (BLOCK // 8)):
                    group = at + tl.arange(0, BLOCK // 8)
                    z = z_of(first + group * 8, who, step, draw, k0, k1, DIRECTION, True)
                    place = group[:, None] * 8 + tl.arange(0, 8)[None, :]
                    tl.store(out + place, nearest(z, TYPE), mask=(group < groups)[:, None])
                out = pointer(tl.load(entry + OUT), begin, TYPE, False)
                for at in range(groups * 8 + part * TAIL, size, SPLIT * TAIL):
                    i = at + tl.arange(0, TAIL)
                    number, place, low_place = locate(entry, begin + i, i < size)
                    z = z_of(number, who, step, draw, k0, k1, DIRECTION, False)
                    tl.store(out + i, nearest(z, TYPE), mask=i < size)


@triton.jit
def axpy_tile(theta, place, low, low_place, number, mask, who, draws, coefficients, draw_count, decay, k0, k1,
              DIRECTION: tl.constexpr, ROUNDING: tl.constexpr, TYPE: tl.constexpr, GROUPS: tl.constexpr):  # fmt: skip
    """One tile of axpy_; returns 1 where a result is inf or NaN."""
    JOIN: tl.constexpr = TYPE == BFLOAT16 and ROUNDING == RESIDUAL
    value = read(theta, place, low, low_place, mask, TYPE, JOIN) * decay
    for k in range(draw_count):
        name = tl.load(draws + k)
        z = z_of(number, who, name.to(tl.uint32), (name >> 32).to(tl.uint32), k0, k1, DIRECTION, GROUPS)
        value = tl.fma(tl.load(coefficients + k), z, value)
    if TYPE != FLOAT32 and ROUNDING == STOCHASTIC:
        random = random16(number, who, tl.load(draws + draw_count - 1).to(tl.uint32), k0, k1, GROUPS)
        if TYPE == BFLOAT16:
            rounded = bf16_stochastic(value, random)
        else:
            rounded = fp16_stochastic(value, random)
    elif JOIN:
        rounded, bits = residual_split(value)
        tl.store(low + low_place, bits, mask=mask)
    else:
        rounded = nearest(value, TYPE)
    tl.store(theta + place, rounded, mask=mask)
    return tl.where(mask, nonfinite_of(rounded, TYPE), 0)


@triton.jit(do_not_specialize=["entries", "chunks", "draws", "k0", "k1"], do_not_specialize_on_alignment=["draw_count"])
def axpy(entries, chunks, draws, coefficients, nonfinite, draw_count, decay, k0, k1, DIRECTION: tl.constexpr, ROUNDING: tl.constexpr,
         KINDS: tl.constexpr, BLOCK: tl.constexpr, TAIL: tl.constexpr, SPLIT: tl.constexpr):  # fmt: skip
    """theta <- round(decay theta + sum_k coefficients[k] z_k); nonfinite[0] += results that are inf or NaN.

    KINDS: bit t is set when the launch has a tensor of type t.
    """
    k0 = k0.to(tl.uint32, bitcast=True)
    k1 = k1.to(tl.uint32, bitcast=True)
    entry, begin, size, groups, part = chunk_of(entries, chunks, SPLIT)
    who_type = tl.load(entry + WHO_TYPE)
    who = who_type.to(tl.uint32)
    kind = (who_type >> 32).to(tl.int32)
    broken = tl.zeros([BLOCK // 8], tl.int32)
    broken_tail = tl.zeros([TAIL], tl.int32)
    for TYPE in tl.static_range(3):
        if (KINDS >> TYPE) & 1:
            if kind == TYPE:
                first = tl.load(entry + FIRST) + begin
                theta = pointer(tl.load(entry + THETA), begin, TYPE, True)
                low = pointer(tl.load(entry + LOW), begin, INT16, True)
                for at in range(part * (BLOCK // 8), groups, SPLIT * (BLOCK // 8)):
                    group = at + tl.arange(0, BLOCK // 8)
                    place = group[:, None] * 8 + tl.arange(0, 8)[None, :]
                    here = axpy_tile(theta, place, low, place, first + group * 8, (group < groups)[:, None], who, draws, coefficients,
                                     draw_count, decay, k0, k1, DIRECTION, ROUNDING, TYPE, True)  # fmt: skip
                    broken += tl.sum(here, axis=1)
                theta = pointer(tl.load(entry + THETA), 0, TYPE, False)
                low = pointer(tl.load(entry + LOW), 0, INT16, False)
                for at in range(groups * 8 + part * TAIL, size, SPLIT * TAIL):
                    i = at + tl.arange(0, TAIL)
                    number, place, low_place = locate(entry, begin + i, i < size)
                    broken_tail += axpy_tile(theta, place, low, low_place, number, i < size, who, draws, coefficients, draw_count,
                                             decay, k0, k1, DIRECTION, ROUNDING, TYPE, False)  # fmt: skip
    total = tl.sum(broken) + tl.sum(broken_tail)
    if total != 0:
        tl.atomic_add(nonfinite, total.to(tl.int64), sem="relaxed")


@triton.jit
def perturb_tile(theta, place, low, low_place, out0, out1, out_place, number, mask, who, step, draw, scale0, scale1, k0, k1,
                 DIRECTION: tl.constexpr, SIDES: tl.constexpr, TYPE: tl.constexpr, OUT_TYPE: tl.constexpr, JOIN: tl.constexpr,
                 GROUPS: tl.constexpr):  # fmt: skip
    value = read(theta, place, low, low_place, mask, TYPE, JOIN)
    z = z_of(number, who, step, draw, k0, k1, DIRECTION, GROUPS)
    tl.store(out0 + out_place, nearest(tl.fma(z, scale0, value), OUT_TYPE), mask=mask)
    if SIDES == 2:
        tl.store(out1 + out_place, nearest(tl.fma(z, scale1, value), OUT_TYPE), mask=mask)


@triton.jit(do_not_specialize=["entries", "chunks", "step", "draw", "k0", "k1"])
def perturb(entries, chunks, step, draw, scale0, scale1, k0, k1, DIRECTION: tl.constexpr, SIDES: tl.constexpr, JOIN: tl.constexpr,
            KINDS: tl.constexpr, BLOCK: tl.constexpr, TAIL: tl.constexpr, SPLIT: tl.constexpr):  # fmt: skip
    """out_j <- nearest(theta + scale_j z), j < SIDES. JOIN: bfloat16 thetas have low bits.

    KINDS: bit 3 t + u is set when the launch has a tensor of type t with outputs of type u.
    """
    k0 = k0.to(tl.uint32, bitcast=True)
    k1 = k1.to(tl.uint32, bitcast=True)
    step = step.to(tl.uint32, bitcast=True)
    draw = draw.to(tl.uint32, bitcast=True)
    entry, begin, size, groups, part = chunk_of(entries, chunks, SPLIT)
    who_type = tl.load(entry + WHO_TYPE)
    who = who_type.to(tl.uint32)
    kind = 3 * (who_type >> 32).to(tl.int32) + tl.load(entry + TYPE_OUT).to(tl.int32)
    for KIND in tl.static_range(9):
        if (KINDS >> KIND) & 1:
            TYPE: tl.constexpr = KIND // 3
            OUT_TYPE: tl.constexpr = KIND % 3
            if kind == KIND:
                first = tl.load(entry + FIRST) + begin
                theta = pointer(tl.load(entry + THETA), begin, TYPE, True)
                low = pointer(tl.load(entry + LOW), begin, INT16, True)
                out0 = pointer(tl.load(entry + OUT), begin, OUT_TYPE, True)
                out1 = pointer(tl.load(entry + OUT + 1), begin, OUT_TYPE, True)
                for at in range(part * (BLOCK // 8), groups, SPLIT * (BLOCK // 8)):
                    group = at + tl.arange(0, BLOCK // 8)
                    place = group[:, None] * 8 + tl.arange(0, 8)[None, :]
                    perturb_tile(theta, place, low, place, out0, out1, place, first + group * 8, (group < groups)[:, None], who, step, draw,
                                 scale0, scale1, k0, k1, DIRECTION, SIDES, TYPE, OUT_TYPE, JOIN, True)  # fmt: skip
                theta = pointer(tl.load(entry + THETA), 0, TYPE, False)
                low = pointer(tl.load(entry + LOW), 0, INT16, False)
                out0 = pointer(tl.load(entry + OUT), begin, OUT_TYPE, False)
                out1 = pointer(tl.load(entry + OUT + 1), begin, OUT_TYPE, False)
                for at in range(groups * 8 + part * TAIL, size, SPLIT * TAIL):
                    i = at + tl.arange(0, TAIL)
                    number, place, low_place = locate(entry, begin + i, i < size)
                    perturb_tile(theta, place, low, low_place, out0, out1, i, number, i < size, who, step, draw, scale0, scale1, k0, k1,
                                 DIRECTION, SIDES, TYPE, OUT_TYPE, JOIN, False)  # fmt: skip
