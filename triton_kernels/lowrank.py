"""lowrank: theta <- decay theta + scale left right^T in Triton, for a list of tensors (csrc/lowrank.h says
what it computes)

math     as csrc/lowrank.cu: factors as TERMS bfloat16 terms, tl.dot with float32 sums, small products first;
         then fma, decay and one rounding. The bound is that of tests/support/lowrank_bound.py.
table    int64 in device memory: entries[E, 18] as elementwise.py has them; tiles[T, 3] = begin, end, entry |
         column << 32; frames[E, 5]; factors[N, 7] = left, right, rank, n, bits of scale, and how to divide by
         n
product  one program a tile of up to 4 BM x BN elements of an aligned rectangle, BM rows at a time; `right` is
         read and split once. The products come out in the layout of the matrix units and go through shared
         memory, so that theta moves 16 bytes a thread.
element  everything else: the sum in the definition's order, so these elements are bit for bit the reference's
types    16-bit floats are uint16 bit patterns in memory. EXACT, under the interpreter: the terms stay float32
         and roundings are done on bits, because its cast to bfloat16 truncates and its dot of bfloat16 is not
         one; the values are the same.
work     the loop over row blocks, instructions per element on sm_90 at rank 16, 32, 64, 128: 14.4, 15.2,
         14.8, 15.8 for bfloat16 and 22.8, 28.3, 51.7, 56.2 for float32; from rank 64 on float32 has 122 to
         134 on sm_80 and sm_120, where it will be bound by instructions (`pytest
         tests/kernels_triton/test_lowrank_triton.py -k compiled -s`, triton 3.9). Not timed on a GPU.
source   Chen et al. 2024, LOZO; Henry, Tang and Heinecke 2019 (arXiv 1904.06376) for sums of bfloat16
         products
"""

import triton
import triton.language as tl

from .elements import GO, name_of, unless_stopped
from .philox import philox4x32
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
STOCHASTIC: tl.constexpr = tl.constexpr(1)
RESIDUAL: tl.constexpr = tl.constexpr(2)
ROUNDING_DRAW: tl.constexpr = tl.constexpr(4 << 24)
ENTRY: tl.constexpr = tl.constexpr(18)  # columns of entries, frames and factors
DIVIDE: tl.constexpr = tl.constexpr(16)  # of an entry: how to divide by its columns
SHIFT: tl.constexpr = tl.constexpr(17)
FRAME: tl.constexpr = tl.constexpr(5)
FACTORS: tl.constexpr = tl.constexpr(7)


@triton.jit
def typed(address, TYPE: tl.constexpr):
    """A pointer to elements of a type; 16-bit floats are uint16."""
    if TYPE == FLOAT32:
        return address.to(tl.pointer_type(tl.float32))
    else:
        return address.to(tl.pointer_type(tl.uint16))


@triton.jit
def read(theta, low, mask, TYPE: tl.constexpr, JOIN: tl.constexpr, EXACT: tl.constexpr):
    raw = tl.load(theta, mask=mask, other=0)
    if TYPE == FLOAT32:
        return raw
    elif JOIN:
        return residual_join(raw, tl.load(low, mask=mask, other=0))
    elif TYPE == BFLOAT16:
        return bf16_to_float(raw)
    elif EXACT:
        return fp16_to_float(raw)
    else:
        return raw.to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def write(out, low, value, random, mask, TYPE: tl.constexpr, ROUNDING: tl.constexpr, SPLIT: tl.constexpr,
          EXACT: tl.constexpr):  # fmt: skip
    """Stores the rounded values; 1 where one is inf or NaN."""
    if TYPE == FLOAT32:
        tl.store(out, value, mask=mask)
        return tl.where(mask & ((to_bits(value) & 0x7F800000) == 0x7F800000), 1, 0)
    else:
        if SPLIT:
            rounded, bits = residual_split(value)
            tl.store(low, bits, mask=mask)
        elif ROUNDING == STOCHASTIC:
            rounded = bf16_stochastic(value, random) if TYPE == BFLOAT16 else fp16_stochastic(value, random)
        elif EXACT:
            rounded = bf16_nearest(value) if TYPE == BFLOAT16 else fp16_nearest(value)
        else:
            rounded = value.to(tl.bfloat16 if TYPE == BFLOAT16 else tl.float16).to(tl.uint16, bitcast=True)
        tl.store(out, rounded, mask=mask)
        exponent: tl.constexpr = 0x7F80 if TYPE == BFLOAT16 else 0x7C00
        return tl.where(mask & ((rounded & exponent) == exponent), 1, 0)


@triton.jit
def random16(number, who, step, keys):
    """The 16 bits of stochastic rounding of [M, G] aligned groups of eight, as [M, 8 G]."""
    purpose = tl.full([], ROUNDING_DRAW, tl.uint32)
    w0, w1, w2, w3 = philox4x32((number >> 3).to(tl.uint32), who, step, purpose, keys)
    words = tl.join(tl.join(w0, w2), tl.join(w1, w3))  # [M, G, 2, 2], in the order of the words
    return tl.reshape(tl.join(words & 0xFFFF, words >> 16), [number.shape[0], number.shape[1] * 8])


@triton.jit
def term_of(x, EXACT: tl.constexpr):
    """The leading bfloat16 of a float32, as the operand of a product and as a float32."""
    if EXACT:
        high = bf16_to_float(bf16_nearest(x))
        return high, high
    else:
        high = x.to(tl.bfloat16)
        return high, high.to(tl.float32)


@triton.jit
def dot(a, b, total, EXACT: tl.constexpr):
    if EXACT:
        return tl.dot(a, b, total, input_precision="ieee")
    else:
        return tl.dot(a, b, total)


@triton.jit
def contract(left, right, total, TERMS: tl.constexpr, EXACT: tl.constexpr):
    """total + left right, float32 [BM, R] and [R, BN]."""
    a0, a = term_of(left, EXACT)
    b0, b = term_of(right, EXACT)
    if TERMS >= 2:
        a1, c = term_of(left - a, EXACT)
        b1, d = term_of(right - b, EXACT)
        if TERMS == 3:
            a2, _ = term_of(left - a - c, EXACT)
            b2, _ = term_of(right - b - d, EXACT)
            total = dot(a2, b0, total, EXACT)
            total = dot(a0, b2, total, EXACT)
            total = dot(a1, b1, total, EXACT)
        total = dot(a1, b0, total, EXACT)
        total = dot(a0, b1, total, EXACT)
    return dot(a0, b0, total, EXACT)


@triton.jit
def rows_of(
    address,
    factor,
    first,
    i,
    here,
    start: tl.constexpr,
    WIDTH: tl.constexpr,
    RANK: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """Rows first + i of a factor, columns [start, start + WIDTH), zero where it ends."""
    base = typed(tl.load(address), FLOAT32)
    k = start + tl.arange(0, WIDTH)
    if WHOLE:
        return tl.load(
            tl.multiple_of(base + first * RANK, 16) + i[:, None] * RANK + k[None, :],
            mask=here[:, None],
            other=0.0,
        )
    else:
        rank = tl.load(factor + 2).to(tl.int32)
        mask = here[:, None] & (k < rank)[None, :]
        return tl.load(base + first * rank + i[:, None] * rank + k[None, :], mask=mask, other=0.0)


@triton.jit(do_not_specialize=["entries", "tiles", "frames", "factors", "step", "keys", "clock", "control"])
def product(entries, tiles, frames, factors, nonfinite, decay, step, keys, clock, control,
            ROUNDING: tl.constexpr, KINDS: tl.constexpr, OUTSIDE: tl.constexpr, JOIN: tl.constexpr,
            RANK: tl.constexpr, WHOLE: tl.constexpr, EXACT: tl.constexpr,
            BM: tl.constexpr, BN: tl.constexpr):  # fmt: skip
    """One tile. KINDS: bit 3 type + type of the result is set when the launch has such a tensor; RANK: 16 to
    128, padded.

    WHOLE: every rank is RANK and every factor lies on 16 bytes. control: as for elementwise.axpy."""
    step = name_of(step, clock)
    tile = tiles + tl.program_id(0).to(tl.int64) * 3
    begin = tl.load(tile)
    rows = (tl.load(tile + 1) - begin).to(tl.int32)
    if control is not None:
        decay = tl.load(control)
        rows = unless_stopped(rows, control, GO)
    which = tl.load(tile + 2)
    column = which >> 32
    entry = entries + (which & 0xFFFFFFFF) * ENTRY
    frame = frames + (which & 0xFFFFFFFF) * FRAME
    who_type = tl.load(entry + 11)
    who = who_type.to(tl.uint32)
    out_type = tl.load(entry + 12)
    factor = factors + (out_type >> 32) * FACTORS
    kind = (3 * (who_type >> 32) + (out_type & 0xFFFFFFFF)).to(tl.int32)
    n = tl.load(factor + 3)
    scale = tl.load(factor + 4).to(tl.uint32).to(tl.float32, bitcast=True)
    i = tl.arange(0, BM)
    j = tl.arange(0, BN)
    inside = (n - column).to(tl.int32)
    # strides, shifts and ends are multiples of eight elements, and the first element of a tile lies on 16
    # bytes
    ends = (tl.load(frame + 4) - column).to(tl.int32)
    columns = (j // 8 < ends // 8)[None, :]
    stride = tl.load(frame) // 8 * 8
    out_stride = tl.load(frame + 2) // 8 * 8
    place = i.to(tl.int64)[:, None] * stride + j[None, :]
    out_place = i.to(tl.int64)[:, None] * out_stride + j[None, :]
    for KIND in tl.static_range(9):
        if (KINDS >> KIND) & 1:
            if kind == KIND:
                TYPE: tl.constexpr = KIND // 3
                RESULT: tl.constexpr = KIND % 3
                TERMS: tl.constexpr = (
                    (3 if RANK <= 64 else 2) if TYPE == FLOAT32 else (2 if RANK <= 32 else 1)
                )
                SPLIT: tl.constexpr = JOIN and TYPE == BFLOAT16 and not OUTSIDE
                # a float32 theta has so many terms that only a slice of the ranks fits the registers
                SLICE: tl.constexpr = 32 if TYPE == FLOAT32 and RANK > 32 else RANK
                count = tl.zeros([BM], tl.int32)
                if SLICE == RANK:
                    right = rows_of(factor + 1, factor, column, j, j < inside, 0, RANK, RANK, WHOLE)
                for start in range(0, rows, BM):
                    row = begin + start
                    mask = (i < rows - start)[:, None] & columns
                    at = row * stride + column + tl.load(frame + 1)
                    out_at = row * out_stride + column + tl.load(frame + 3)
                    theta = tl.multiple_of(typed(tl.load(entry), TYPE) + at, 16)
                    low = tl.multiple_of(tl.load(entry + 3).to(tl.pointer_type(tl.int16)) + out_at, 16)
                    old = read(theta + place, low + out_place, mask, TYPE, JOIN and TYPE == BFLOAT16, EXACT)
                    total = tl.zeros([BM, BN], tl.float32)
                    for part in tl.static_range(RANK // SLICE):
                        left = rows_of(
                            factor, factor, row, i, i < rows - start, part * SLICE, SLICE, RANK, WHOLE
                        )
                        if SLICE < RANK:
                            right = rows_of(
                                factor + 1, factor, column, j, j < inside, part * SLICE, SLICE, RANK, WHOLE
                            )
                        total = contract(left, tl.trans(right), total, TERMS, EXACT)
                    value = tl.fma(total, scale, old * decay)
                    random = 0
                    if ROUNDING == STOCHASTIC and RESULT != FLOAT32:
                        number = (row + i)[:, None] * n + column + tl.arange(0, BN // 8)[None, :] * 8
                        random = random16(number, who, step, keys)
                    if OUTSIDE:
                        out = tl.multiple_of(typed(tl.load(entry + 1), RESULT) + out_at, 16)
                        broken = write(
                            out + out_place,
                            low + out_place,
                            value,
                            random,
                            mask,
                            RESULT,
                            ROUNDING,
                            False,
                            EXACT,
                        )
                    else:
                        broken = write(
                            theta + place,
                            low + out_place,
                            value,
                            random,
                            mask,
                            RESULT,
                            ROUNDING,
                            SPLIT,
                            EXACT,
                        )
                    count += tl.sum(broken, axis=1)
                broken_count = tl.sum(count)
                if broken_count != 0:
                    tl.atomic_add(nonfinite, broken_count.to(tl.int64), sem="relaxed")


@triton.jit
def divide(p, factor, shift):
    """p // d for p < 2^40, from a product: a division would go through an approximate reciprocal."""
    return (tl.umulhi((p << 23).to(tl.uint64), factor.to(tl.uint64)) >> shift.to(tl.uint64)).to(tl.int64)


@triton.jit(do_not_specialize=["entries", "tiles", "factors", "step", "keys", "clock", "control"])
def element(entries, tiles, factors, nonfinite, decay, step, keys, clock, control, ROUNDING: tl.constexpr,
    KINDS: tl.constexpr,
            OUTSIDE: tl.constexpr, JOIN: tl.constexpr, EXACT: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """Elements [begin, end) of an entry, one at a time."""
    step = name_of(step, clock)
    tile = tiles + tl.program_id(0).to(tl.int64) * 3
    begin = tl.load(tile)
    end = tl.load(tile + 1)
    if control is not None:
        decay = tl.load(control)
        end = tl.where(tl.load(control + GO) != 0.0, end, begin)
    entry = entries + (tl.load(tile + 2) & 0xFFFFFFFF) * ENTRY
    who_type = tl.load(entry + 11)
    out_type = tl.load(entry + 12)
    factor = factors + (out_type >> 32) * FACTORS
    kind = (3 * (who_type >> 32) + (out_type & 0xFFFFFFFF)).to(tl.int32)
    rank = tl.load(factor + 2)
    n = tl.load(factor + 3)
    scale = tl.load(factor + 4).to(tl.uint32).to(tl.float32, bitcast=True)
    left = typed(tl.load(factor), FLOAT32)
    right = typed(tl.load(factor + 1), FLOAT32)
    rows = tl.load(entry + 4)
    columns = tl.load(entry + 6)
    for KIND in tl.static_range(9):
        if (KINDS >> KIND) & 1:
            if kind == KIND:
                TYPE: tl.constexpr = KIND // 3
                RESULT: tl.constexpr = KIND % 3
                SPLIT: tl.constexpr = JOIN and TYPE == BFLOAT16 and not OUTSIDE
                theta = typed(tl.load(entry), TYPE)
                low = tl.load(entry + 3).to(tl.pointer_type(tl.int16))
                count = tl.zeros([BLOCK], tl.int32)
                for start in range(begin, end, BLOCK):
                    p = start + tl.arange(0, BLOCK).to(tl.int64)
                    mask = p < end
                    r = divide(p, tl.load(entry + DIVIDE), tl.load(entry + SHIFT))
                    c = p - r * columns
                    if rows != 0:
                        r = tl.load(rows.to(tl.pointer_type(tl.int64)) + r, mask=mask, other=0)
                    number = tl.load(entry + 9) + r * tl.load(entry + 10) + c
                    i = divide(number, tl.load(factor + 5), tl.load(factor + 6))
                    j = number - i * n
                    total = tl.zeros([BLOCK], tl.float32)
                    for k in range(rank):
                        x = tl.load(left + i * rank + k, mask=mask, other=0.0)
                        total = tl.fma(x, tl.load(right + j * rank + k, mask=mask, other=0.0), total)
                    place = r * tl.load(entry + 7) + c * tl.load(entry + 8)
                    low_place = low + r * columns + c
                    old = read(theta + place, low_place, mask, TYPE, JOIN and TYPE == BFLOAT16, EXACT)
                    value = tl.fma(total, scale, old * decay)
                    random = 0
                    if ROUNDING == STOCHASTIC and RESULT != FLOAT32:
                        purpose = tl.full([], ROUNDING_DRAW, tl.uint32)
                        block = (number >> 3).to(tl.uint32)
                        w0, w1, w2, w3 = philox4x32(block, who_type.to(tl.uint32), step, purpose, keys)
                        pair = (number >> 1) & 3
                        word = tl.where(pair < 2, tl.where(pair == 0, w0, w1), tl.where(pair == 2, w2, w3))
                        random = (word >> ((number & 1) * 16).to(tl.uint32)) & 0xFFFF
                    if OUTSIDE:
                        out = typed(tl.load(entry + 1), RESULT) + p
                        count += write(out, low_place, value, random, mask, RESULT, ROUNDING, False, EXACT)
                    else:
                        count += write(
                            theta + place, low_place, value, random, mask, RESULT, ROUNDING, SPLIT, EXACT
                        )
                total_count = tl.sum(count)
                if total_count != 0:
                    tl.atomic_add(nonfinite, total_count.to(tl.int64), sem="relaxed")
