"""linear: y_j = shrink x_j (W + scale_j z_j)^T + thin products + bias_j in Triton, for sides of few rows
(csrc/linear.h says what it computes)

math     the transposed result, y^T = (W + scale z) x^T: W's rows fill the matrix units, whose smallest tile
         has more rows than x. W + scale z is rounded to W's dtype, the bits of `perturb`; sums are float32
table    int64[groups, 2, 8] in device memory: for each side of a group its first row in x and in y, rows,
         draw, bits of scale, whether it has a bias, the bias's row, and its middle factor. A group is two
         sides of one draw
tile     BM of W's rows by BK of its columns, or, where W is (n, m), BK by BM, turned in registers. z of the
         tile is made once for both sides, between the load of W and its first use, so that it hides the load
unit     eight consecutive weights a Philox block, as elementwise.py has them, where every row of W begins
         with a unit; elsewhere each element computes its own block
thin     first is rounded to W's dtype and multiplies the tile of x in the same loop. After it, t = x first^T
         meets middle and last, each as two bfloat16 terms: 2^-16 of themselves
parts    a program has a part of W's columns, so that small matrices fill a device; float32 sums of parts go
         to memory, and `finish` adds them in order
traffic  W once for both sides of a draw, from the caches for other draws; no tile of W + scale z
work     instructions a weight for both signs, bfloat16, 16 rows a side, from sm_80 to sm_120: normal 28.9 to
         31.7, signs 17.6 to 19.3; one side, normal: 25.7 and 26.6 (`pytest
         tests/kernels_triton/test_linear_triton.py -k compiled -s`, Triton 3.9). docs/kernels.md has more
bound    2^-21 of the sum of the sizes of all products of W, 2^-15 of those of thin ones, and one rounding to
         the dtype of y (tests/kernels_triton/test_linear_triton.py)
types    EXACT, under the interpreter: roundings are done on bits and products of float32, because its cast to
         bfloat16 truncates and its dot of bfloat16 is not one; the values are the same
launch   enable_fp_fusion=False is part of the definition of z
source   csrc/linear.h; Frantar et al. 2024 (Marlin) for weights that are made beside a product of few rows;
         stream: zokern/stream.py, version 1
"""

import triton
import triton.language as tl

from .elements import NORMAL, name_of, pick, z_of
from .lowrank import contract, dot
from .normal import normal_pair
from .philox import philox4x32
from .rademacher import rademacher_sign
from .rounding import bf16_nearest, bf16_to_float, fp16_nearest, fp16_to_float, to_float

FLOAT32: tl.constexpr = tl.constexpr(0)
BFLOAT16: tl.constexpr = tl.constexpr(1)
STILL: tl.constexpr = tl.constexpr(-1)  # a direction: there is no z

SIDE: tl.constexpr = tl.constexpr(8)  # columns of a side
Y_ROW: tl.constexpr = tl.constexpr(1)
ROWS: tl.constexpr = tl.constexpr(2)
DRAW: tl.constexpr = tl.constexpr(3)
SCALE: tl.constexpr = tl.constexpr(4)
HAS_BIAS: tl.constexpr = tl.constexpr(5)
BIAS_ROW: tl.constexpr = tl.constexpr(6)
MIDDLE: tl.constexpr = tl.constexpr(7)


@triton.jit
def wide(raw, TYPE: tl.constexpr, EXACT: tl.constexpr):
    """Numbers of a type as float32."""
    if not EXACT:
        return raw.to(tl.float32)
    elif TYPE == FLOAT32:
        return raw
    elif TYPE == BFLOAT16:
        return bf16_to_float(raw.to(tl.uint16, bitcast=True))
    else:
        return fp16_to_float(raw.to(tl.uint16, bitcast=True))


@triton.jit
def rounded(value, TYPE: tl.constexpr, EXACT: tl.constexpr):
    """float32 rounded to a type."""
    if TYPE == FLOAT32:
        return value
    elif TYPE == BFLOAT16:
        if EXACT:
            return bf16_nearest(value).to(tl.bfloat16, bitcast=True)
        else:
            return value.to(tl.bfloat16)
    else:
        if EXACT:
            return fp16_nearest(value).to(tl.float16, bitcast=True)
        else:
            return value.to(tl.float16)


@triton.jit
def operand(raw, TYPE: tl.constexpr, EXACT: tl.constexpr):
    """Numbers of a type as a product takes them."""
    if EXACT:
        return wide(raw, TYPE, EXACT)
    else:
        return raw


@triton.jit
def z_of_units(unit, who, step, draw, keys, DIRECTION: tl.constexpr):
    """The z of [A, U] units of eight, [A, 8 U]."""
    A: tl.constexpr = unit.shape[0]
    U: tl.constexpr = unit.shape[1]
    if DIRECTION == NORMAL:
        w0, w1, w2, w3 = philox4x32(unit, who, step, draw, keys)
    else:
        w0, w1, w2, w3 = philox4x32(unit >> 4, who, step, draw, keys)
        w0 = pick((unit >> 2) & 3, w0, w1, w2, w3) >> ((unit & 3) * 8)
        w1, w2, w3 = w0 >> 2, w0 >> 4, w0 >> 6
    words = tl.reshape(tl.join(tl.join(w0, w2), tl.join(w1, w3)), [A, 4 * U])  # of pairs
    if DIRECTION == NORMAL:
        even, odd = normal_pair(words)
    else:
        even, odd = rademacher_sign(words, 0), rademacher_sign(words, 1)
    return tl.reshape(tl.join(even, odd), [A, 8 * U])


@triton.jit
def moved(raw, z, scale, TYPE: tl.constexpr, EXACT: tl.constexpr):
    """W + scale z of a tile, with the bits of perturb."""
    return rounded(tl.fma(z, scale, wide(raw, TYPE, EXACT)), TYPE, EXACT)


@triton.jit
def z_of_tile(begin, place, units, who, step, draw, keys, DIRECTION: tl.constexpr, UNIT: tl.constexpr):
    """The z of a tile: `place` says where its elements are, `units` where its units are, from `begin` on."""
    if UNIT:
        return z_of_units((begin >> 3).to(tl.uint32) + units, who, step, draw, keys, DIRECTION)
    else:
        return z_of(begin + place, who, step, draw, keys, DIRECTION)


@triton.jit
def add_product(total, matrix, x, TRANSPOSED: tl.constexpr, TYPE: tl.constexpr, EXACT: tl.constexpr):
    """total + matrix x^T, [BM, R]."""
    turned = tl.trans(operand(matrix, TYPE, EXACT)) if TRANSPOSED else operand(matrix, TYPE, EXACT)
    return dot(turned, tl.trans(operand(x, TYPE, EXACT)), total, EXACT or TYPE == FLOAT32)


@triton.jit
def add_thin(total, t, middle, last, row, m, rank, width, stride_r, stride_q, stride_last,
             EXACT: tl.constexpr):  # fmt: skip
    """total + last (t^T middle)^T for t = first x^T, [RANK, R]."""
    RANK: tl.constexpr = t.shape[0]
    k = tl.arange(0, RANK)
    for at in range(0, width, RANK):
        q = at + k
        core = tl.load(
            middle + q[:, None] * stride_q + k[None, :] * stride_r,
            mask=(q < width)[:, None] & (k < rank)[None, :],
            other=0.0,
        )
        inner = contract(core, t, tl.zeros([RANK, t.shape[1]], tl.float32), 2, EXACT)
        end = tl.load(
            last + row.to(tl.int64)[:, None] * stride_last + q[None, :],
            mask=(row < m)[:, None] & (q < width)[None, :],
            other=0.0,
        )
        total = contract(end, inner, total, 2, EXACT)
    return total


@triton.jit
def write(y, parts, total, bias, side, row, m, y_rows, TYPE: tl.constexpr, BIAS: tl.constexpr,
          PARTS: tl.constexpr, EXACT: tl.constexpr):  # fmt: skip
    """y <- the rounded sums of a side, with its bias; or, of one of several parts, its sums."""
    r = tl.arange(0, total.shape[1])
    part = tl.program_id(2)
    if BIAS:
        if (part == 0) & (tl.load(side + HAS_BIAS) != 0):
            added = tl.load(bias + tl.load(side + BIAS_ROW) * m + row, mask=row < m, other=0.0)
            total += added.to(tl.float32)[:, None]
    mask = (r < tl.load(side + ROWS))[:, None] & (row < m)[None, :]
    place = (tl.load(side + Y_ROW) + r)[:, None] * m + row[None, :]
    if PARTS:
        tl.store(parts + part.to(tl.int64) * y_rows * m + place, tl.trans(total), mask=mask)
    else:
        tl.store(y + place, rounded(tl.trans(total), TYPE, EXACT), mask=mask)


@triton.jit(
    do_not_specialize=[
        "m", "n", "y_rows", "each", "number", "who", "step", "shrink", "rank", "width", "stride_side",
        "stride_last", "keys", "clock",
    ]
)  # fmt: skip
def product(x, weight, y, parts, bias, first, middles, last, table, m, n, y_rows, each, number, who, step,
            shrink, rank, width, stride_side, stride_r, stride_q, stride_last, keys, clock,
            TYPE: tl.constexpr, DIRECTION: tl.constexpr, SIDES: tl.constexpr, TRANSPOSED: tl.constexpr,
            UNIT: tl.constexpr, RANK: tl.constexpr, BIAS: tl.constexpr, PARTS: tl.constexpr,
            EXACT: tl.constexpr, R: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr):  # fmt: skip
    """Program (group, tile of rows, part of `each` tiles of columns). RANK: 16 or 32, padded; 0: no thin
    products."""
    A: tl.constexpr = BK if TRANSPOSED else BM  # of a tile, as W is stored
    B: tl.constexpr = BM if TRANSPOSED else BK
    step = name_of(step, clock)
    who = who.to(tl.uint32, bitcast=True)
    side = table + tl.program_id(0).to(tl.int64) * (2 * SIDE)
    draw = tl.load(side + DRAW).to(tl.uint32)
    top = tl.program_id(1) * BM
    begin = tl.program_id(2) * each * BK
    if UNIT:  # tells the compiler that all rows lie on 16 bytes
        n = n // 8 * 8
    columns = n
    if TRANSPOSED:
        columns = m // 8 * 8 if UNIT else m
    # of a tile: where its elements are from its first one, and its units of eight from its first unit
    i, j, k, r = tl.arange(0, A), tl.arange(0, B), tl.arange(0, BK), tl.arange(0, R)
    place = i[:, None] * columns + j[None, :]
    units = (i[:, None] * (columns // 8) + tl.arange(0, B // 8)[None, :]).to(tl.uint32)
    origin = top.to(tl.int64) * (1 if TRANSPOSED else columns)
    x_place = r[:, None] * n + k[None, :]
    x0 = x + tl.load(side) * n
    x1 = x + tl.load(side + SIDE) * n
    here0 = (r < tl.load(side + ROWS))[:, None]
    here1 = (r < tl.load(side + SIDE + ROWS))[:, None]
    scale0 = to_float(tl.load(side + SCALE).to(tl.uint32))
    scale1 = to_float(tl.load(side + SIDE + SCALE).to(tl.uint32))
    total0 = tl.zeros([BM, R], tl.float32)
    total1 = total0
    t0 = tl.zeros([RANK if RANK else 1, R], tl.float32)
    t1 = t0
    for at in range(begin, min(begin + each * BK, n), BK):
        left = n - at
        inside = (k // 8 < left // 8)[None, :] if UNIT else (k < left)[None, :]
        if TRANSPOSED:
            shift = origin + at * columns.to(tl.int64)
            beside = columns - top
            mask = (i < left)[:, None] & ((j // 8 < beside // 8) if UNIT else j < beside)[None, :]
        else:
            shift = origin + at
            mask = (top + i < m)[:, None] & inside
        raw = tl.load(weight + shift + place, mask=mask, other=0.0)
        a0 = tl.load(x0 + at + x_place, mask=here0 & inside, other=0.0)
        a1 = a0
        if SIDES == 2:
            a1 = tl.load(x1 + at + x_place, mask=here1 & inside, other=0.0)
        if DIRECTION == STILL:
            total0 = add_product(total0, raw, a0, TRANSPOSED, TYPE, EXACT)
            if SIDES == 2:
                total1 = add_product(total1, raw, a1, TRANSPOSED, TYPE, EXACT)
        else:
            z = z_of_tile(number.to(tl.int64) + shift, place, units, who, step, draw, keys, DIRECTION, UNIT)
            total0 = add_product(total0, moved(raw, z, scale0, TYPE, EXACT), a0, TRANSPOSED, TYPE, EXACT)
            if SIDES == 2:
                total1 = add_product(total1, moved(raw, z, scale1, TYPE, EXACT), a1, TRANSPOSED, TYPE, EXACT)
        if RANK:
            q = tl.arange(0, RANK)
            factor = tl.load(first + at + q[:, None] * n + k[None, :], mask=(q < rank)[:, None] & inside,
                             other=0.0)  # fmt: skip
            factor = rounded(factor, TYPE, EXACT)
            t0 = add_product(t0, factor, a0, False, TYPE, EXACT)
            if SIDES == 2:
                t1 = add_product(t1, factor, a1, False, TYPE, EXACT)
    out = top + tl.arange(0, BM)
    total0 *= shrink
    if RANK:
        middle = middles + tl.load(side + MIDDLE) * stride_side
        total0 = add_thin(total0, t0, middle, last, out, m, rank, width, stride_r, stride_q, stride_last,
                          EXACT)  # fmt: skip
    write(y, parts, total0, bias, side, out, m, y_rows, TYPE, BIAS, PARTS, EXACT)
    if SIDES == 2:
        total1 *= shrink
        if RANK:
            middle = middles + tl.load(side + SIDE + MIDDLE) * stride_side
            total1 = add_thin(total1, t1, middle, last, out, m, rank, width, stride_r, stride_q, stride_last,
                              EXACT)  # fmt: skip
        write(y, parts, total1, bias, side + SIDE, out, m, y_rows, TYPE, BIAS, PARTS, EXACT)


@triton.jit(do_not_specialize=["size", "count"])
def finish(parts, y, size, count, TYPE: tl.constexpr, EXACT: tl.constexpr, BLOCK: tl.constexpr):
    """y <- the rounded sum of `count` parts, in order."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = at < size
    total = tl.load(parts + at, mask=mask, other=0.0)
    for part in range(1, count):
        total += tl.load(parts + part * size.to(tl.int64) + at, mask=mask, other=0.0)
    tl.store(y + at, rounded(total, TYPE, EXACT), mask=mask)
