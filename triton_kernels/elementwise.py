"""elementwise: draw, axpy_ and perturb in Triton, one launch for a list of tensors (csrc/elementwise.h says
what they compute)

table    entries int64[E, 18] and chunks int64[C, 3] in device memory: the bytes of `Entry` (15) and of
         `Chunk`; then 1 where the entry can take the unit path, and how to divide by its columns. draws
         int64[K] = step | draw << 32. Addresses become typed pointers here.
paths    unit     eight consecutive elements a Philox block: contiguous, first a multiple of 8, every address
         a multiple of 16. A
                  thread has all four words of a unit, and a word makes the even and the odd value of a pair,
                  so nothing moves between threads: 16-bit types are read and written as words of two halves
                  (16 bytes a thread), float32 as two words of 8 bytes, twice. Signs share a block between 16
                  units: a tile starts where a block does.
         element  everything else, and the last n mod 8 of a chunk: each element computes its own block.
work     axpy_ normal, K = 1, instructions an element from sm_80 to sm_120: 16-bit 24.6 to 24.9, float32 19.5
         to 25.7; of signs, 7.9 to 8.1 and 8.5; both signs of perturb in bfloat16 26.1
         (`pytest tests/kernels_triton/test_triton.py -k compiled -s`, Triton 3.9; 3.6 adds up to 0.6); the
         element path repeats z's block for each element
scaled   with SCALED, z is multiplied by the factors of its element (csrc/elementwise.h); without it, there is
         no instruction for it
launch   SPLIT programs a chunk. enable_fp_fusion=False is part of the definition: contraction would change
         bits.
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
    bf16_nearest_pair,
    bf16_stochastic,
    bf16_to_float,
    fp16_nearest,
    fp16_nearest_pair,
    fp16_pair_to_float,
    fp16_stochastic,
    fp16_to_float,
    residual_join,
    residual_split,
    to_bits,
    to_float,
    watch_bf16,
    watch_fp16,
)

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


# --- the element path: `number` is the stream's number of each element --------------------------------------


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


# --- the unit path: words of two values ---------------------------------------------------------------------
#
# A tile has N units, so [N, 4] pairs; W of the four are handled at a time: 4 in 16-bit types, 2 where float32
# is read or written, so that a thread's access is 16 bytes.


@triton.jit
def four(a0, a1, a2, a3):
    """Four [N] to [N, 4]."""
    return tl.reshape(tl.join(tl.join(a0, a2), tl.join(a1, a3)), [a0.shape[0], 4])


@triton.jit
def some(words, PART: tl.constexpr, W: tl.constexpr):
    """Words W PART to W PART + W - 1 of each unit: [N, W]."""
    if W == 4:
        return four(words[0], words[1], words[2], words[3])
    else:
        return tl.join(words[2 * PART], words[2 * PART + 1])


@triton.jit
def words_of(unit, who, step, draw, keys, N: tl.constexpr, DIRECTION: tl.constexpr):
    """What makes the z of units unit to unit + N - 1: for normal four [N] of words, for signs one [N] whose
    low 8 bits they are.

    For signs, `unit` is the first of a block: N / 16 blocks are computed, and each of their 16 bytes goes to
    its unit."""
    if DIRECTION == NORMAL:
        return philox4x32((unit + tl.arange(0, N)).to(tl.uint32), who, step, draw, keys)
    else:
        w0, w1, w2, w3 = philox4x32(
            ((unit >> 4) + tl.arange(0, N // 16)).to(tl.uint32), who, step, draw, keys
        )
        words = tl.broadcast_to(four(w0, w1, w2, w3)[:, :, None], [N // 16, 4, 4])
        return (tl.reshape(words, [N]) >> ((tl.arange(0, N) & 3) * 8).to(tl.uint32),)


@triton.jit
def z_pair(words, PART: tl.constexpr, W: tl.constexpr, DIRECTION: tl.constexpr):
    """The even and the odd values [N, W]."""
    if DIRECTION == NORMAL:
        return normal_pair(some(words, PART, W))
    else:
        bit = (2 * (PART * W + tl.arange(0, W))[None, :]).to(tl.uint32)
        return rademacher_sign(words[0][:, None], bit), rademacher_sign(words[0][:, None], bit + 1)


@triton.jit
def pairs(address, begin, TYPE: tl.constexpr):
    """Words of two elements, from element `begin` on, which is at a 16-byte boundary."""
    if TYPE == FLOAT32:
        return tl.multiple_of(address.to(tl.pointer_type(tl.uint64)) + (begin >> 1), 16)
    else:
        return tl.multiple_of(address.to(tl.pointer_type(tl.uint32)) + (begin >> 1), 16)


@triton.jit
def read_pair(theta, low, place, mask, TYPE: tl.constexpr, JOIN: tl.constexpr):
    word = tl.load(theta + place, mask=mask)
    if TYPE == FLOAT32:
        return to_float(word.to(tl.uint32)), to_float((word >> 32).to(tl.uint32))
    elif TYPE == FLOAT16:
        return fp16_pair_to_float(word)
    elif JOIN:
        low_word = tl.load(low + place, mask=mask)
        even = (word << 16) + ((low_word << 16).to(tl.int32, bitcast=True) >> 16).to(tl.uint32, bitcast=True)
        odd = (word & 0xFFFF0000) + (low_word.to(tl.int32, bitcast=True) >> 16).to(tl.uint32, bitcast=True)
        return to_float(even), to_float(odd)
    else:
        return to_float(word << 16), to_float(word & 0xFFFF0000)


@triton.jit
def factor_pair(entry, begin, place, mask, N: tl.constexpr, W: tl.constexpr):
    """The factors of words of two elements, `place` words after element `begin`; 1 where an entry has
    none."""
    address = tl.load(entry + SCALE)
    kind = tl.load(entry + SCALE_TYPE).to(tl.int32)
    even = tl.full([N, W], 1.0, tl.float32)
    odd = tl.full([N, W], 1.0, tl.float32)
    here = (begin >> 1) + place
    if address != 0:
        if kind == FLOAT32:
            wide = tl.load(address.to(tl.pointer_type(tl.uint64)) + here, mask=mask, other=0)
            even = to_float(wide.to(tl.uint32))
            odd = to_float((wide >> 32).to(tl.uint32))
        elif kind == BFLOAT16:
            word = tl.load(address.to(tl.pointer_type(tl.uint32)) + here, mask=mask, other=0)
            even = to_float(word << 16)
            odd = to_float(word & 0xFFFF0000)
        else:
            half = tl.load(address.to(tl.pointer_type(tl.uint16)) + here, mask=mask, other=0).to(tl.int32)
            even = (half & 0xFF).to(tl.float32)
            odd = (half >> 8).to(tl.float32)
    return even, odd


@triton.jit
def both(even, odd):
    return even.to(tl.uint32) | (odd.to(tl.uint32) << 16)


@triton.jit
def nearest_pair(even, odd, TYPE: tl.constexpr):
    if TYPE == FLOAT32:
        return to_bits(even).to(tl.uint64) | (to_bits(odd).to(tl.uint64) << 32)
    elif TYPE == BFLOAT16:
        return bf16_nearest_pair(even, odd)
    else:
        return fp16_nearest_pair(even, odd)


@triton.jit
def watch(state, word, TYPE: tl.constexpr):
    """The state of a watch, 0 until a value of a word is inf or NaN."""
    if TYPE == FLOAT32:
        state = tl.fma(to_float(word.to(tl.uint32)), 0.0, to_float(state))
        return to_bits(tl.fma(to_float((word >> 32).to(tl.uint32)), 0.0, state))
    elif TYPE == BFLOAT16:
        return watch_bf16(state, word)
    else:
        return watch_fp16(state, word)


@triton.jit
def nonfinite_pair(word, TYPE: tl.constexpr):
    """How many of a word's two values are inf or NaN."""
    if TYPE == FLOAT32:
        return ((word & 0x7F800000) == 0x7F800000).to(tl.int32) + (
            ((word >> 32) & 0x7F800000) == 0x7F800000
        ).to(tl.int32)
    elif TYPE == BFLOAT16:
        return ((word & 0x7F80) == 0x7F80).to(tl.int32) + (((word >> 16) & 0x7F80) == 0x7F80).to(tl.int32)
    else:
        return ((word & 0x7C00) == 0x7C00).to(tl.int32) + (((word >> 16) & 0x7C00) == 0x7C00).to(tl.int32)


@triton.jit
def start_of(unit, part, N: tl.constexpr, DIRECTION: tl.constexpr):
    """The first row of a program's first tile; for signs up to 15 rows before the chunk's, where the block of
    unit 0 begins."""
    if DIRECTION == NORMAL:
        return part * N
    else:
        return part * N - (unit & 15).to(tl.int32)


@triton.jit
def rows_of(at, units, N: tl.constexpr, W: tl.constexpr, DIRECTION: tl.constexpr):
    """Where the words [N, W] of a tile's part 0 lie, as a scalar plus a tensor, and the mask [N, 1] of the
    chunk's rows.

    A thread has one row of a tile of normals, whose address is cheapest in one piece; it has four of a tile
    of signs, which then differ by a constant if the scalar moves alone."""
    row = tl.arange(0, N)
    if DIRECTION == NORMAL:
        row += at
        return 0, row[:, None] * 4 + tl.arange(0, W)[None, :], (row < units)[:, None]
    else:
        inside = (at + row).to(tl.uint32) < units.to(tl.uint32)  # also false before row 0
        return at * 4, row[:, None] * 4 + tl.arange(0, W)[None, :], inside[:, None]


# --- the verbs ----------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["count", "keys"])
def philox(counters, words, count, keys, ROUNDS: tl.constexpr, BLOCK: tl.constexpr):
    """int64[count, 4] counters to int64[count, 4] words."""
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = row < count
    x = counters + row * 4
    x0 = tl.load(x, mask=mask, other=0).to(tl.uint32)
    x1 = tl.load(x + 1, mask=mask, other=0).to(tl.uint32)
    x2 = tl.load(x + 2, mask=mask, other=0).to(tl.uint32)
    x3 = tl.load(x + 3, mask=mask, other=0).to(tl.uint32)
    w0, w1, w2, w3 = philox4x32(x0, x1, x2, x3, keys, ROUNDS)
    w = words + row * 4
    tl.store(w, w0.to(tl.int64), mask=mask)
    tl.store(w + 1, w1.to(tl.int64), mask=mask)
    tl.store(w + 2, w2.to(tl.int64), mask=mask)
    tl.store(w + 3, w3.to(tl.int64), mask=mask)


@triton.jit(do_not_specialize=["entries", "chunks", "step", "draw", "keys", "clock"])
def draw(entries, chunks, step, draw, keys, clock, DIRECTION: tl.constexpr, SCALED: tl.constexpr,
    KINDS: tl.constexpr,
         BLOCK: tl.constexpr, TAIL: tl.constexpr, SPLIT: tl.constexpr):  # fmt: skip
    """out <- nearest(z). KINDS: bit t is set when the launch has an output of type t."""
    N: tl.constexpr = BLOCK // 8
    step = name_of(step, clock)
    draw = draw.to(tl.uint32, bitcast=True)
    entry, begin, size, units, part = chunk_of(entries, chunks, SPLIT)
    who = tl.load(entry + WHO_TYPE).to(tl.uint32)
    kind = tl.load(entry + TYPE_OUT).to(tl.int32)
    unit = (tl.load(entry + FIRST) + begin) >> 3
    for TYPE in tl.static_range(3):
        if (KINDS >> TYPE) & 1:
            if kind == TYPE:
                W: tl.constexpr = 2 if TYPE == FLOAT32 else 4
                out = pairs(tl.load(entry + OUT), begin, TYPE)
                for at in range(start_of(unit, part, N, DIRECTION), units, SPLIT * N):
                    from_word, place, mask = rows_of(at, units, N, W, DIRECTION)
                    words = words_of(unit + at, who, step, draw, keys, N, DIRECTION)
                    for PART in tl.static_range(4 // W):
                        even, odd = z_pair(words, PART, W, DIRECTION)
                        if SCALED:
                            f_even, f_odd = factor_pair(
                                entry, begin, from_word + (place + PART * W), mask, N, W
                            )
                            even, odd = even * f_even, odd * f_odd
                        tl.store(
                            out + from_word + (place + PART * W), nearest_pair(even, odd, TYPE), mask=mask
                        )
                out = pointer(tl.load(entry + OUT), begin, TYPE)
                for at in range(units * 8 + part * TAIL, size, SPLIT * TAIL):
                    i = at + tl.arange(0, TAIL)
                    number, place, low_place = locate(entry, begin + i, i < size)
                    z = z_of(number, who, step, draw, keys, DIRECTION)
                    if SCALED:
                        z = z * factor_of(entry, low_place, i < size)
                    tl.store(out + i, nearest(z, TYPE), mask=i < size)


@triton.jit
def term(k, draws, step, draw, draw_count, clock):
    """The name of term k: the last one is an argument, the others are in a list."""
    if draw_count == 1:
        return step, draw
    else:
        name = tl.load(draws + tl.minimum(k, draw_count - 2))
        other = name_of(name.to(tl.int32), clock)
        return tl.where(k < draw_count - 1, other, step), tl.where(
            k < draw_count - 1, (name >> 32).to(tl.uint32), draw
        )


@triton.jit
def add_pair(even, odd, f_even, f_odd, words, coefficient, PART: tl.constexpr, W: tl.constexpr,
    DIRECTION: tl.constexpr,
             SCALED: tl.constexpr):  # fmt: skip
    """Adds a term to a word of two sums; f_even and f_odd are the factors of z, which only SCALED reads."""
    z_even, z_odd = z_pair(words, PART, W, DIRECTION)
    if SCALED:
        z_even, z_odd = z_even * f_even, z_odd * f_odd
    return tl.fma(coefficient, z_even, even), tl.fma(coefficient, z_odd, odd)


@triton.jit
def write_pair(
    theta, low, place, mask, even, odd, random, TYPE: tl.constexpr, ROUNDING: tl.constexpr, JOIN: tl.constexpr
):
    """Stores a word of two results, and returns it: in rows outside the mask too, where it may be
    anything."""
    if TYPE != FLOAT32 and ROUNDING == STOCHASTIC:
        if TYPE == BFLOAT16:
            word = both(bf16_stochastic(even, random & 0xFFFF), bf16_stochastic(odd, random >> 16))
        else:
            word = both(fp16_stochastic(even, random & 0xFFFF), fp16_stochastic(odd, random >> 16))
    elif JOIN:
        high_even, low_even = residual_split(even)
        high_odd, low_odd = residual_split(odd)
        word = both(high_even, high_odd)
        tl.store(
            low + place,
            both(low_even.to(tl.uint16, bitcast=True), low_odd.to(tl.uint16, bitcast=True)),
            mask=mask,
        )
    else:
        word = nearest_pair(even, odd, TYPE)
    tl.store(theta + place, word, mask=mask)
    return word


@triton.jit
def listed(k, draws, draw_count, clock):
    """The name of term k of a replay, and the factor of what stands before it: all of them are in a list,
    decays after the names."""
    name = tl.load(draws + k)
    decay = to_float(tl.load(draws + draw_count + k).to(tl.uint32))
    return name_of(name.to(tl.int32), clock), (name >> 32).to(tl.uint32), decay


@triton.jit
def round_pair(
    even,
    odd,
    unit,
    who,
    step,
    keys,
    N: tl.constexpr,
    TYPE: tl.constexpr,
    ROUNDING: tl.constexpr,
    W: tl.constexpr,
):
    """What storing two values in a 16-bit type and loading them again would make of them."""
    if ROUNDING == STOCHASTIC:
        purpose = tl.full([], ROUNDING_DRAW, tl.uint32)
        random = some(philox4x32((unit + tl.arange(0, N)).to(tl.uint32), who, step, purpose, keys), 0, W)
        if TYPE == BFLOAT16:
            word = both(bf16_stochastic(even, random & 0xFFFF), bf16_stochastic(odd, random >> 16))
        else:
            word = both(fp16_stochastic(even, random & 0xFFFF), fp16_stochastic(odd, random >> 16))
    else:
        word = nearest_pair(even, odd, TYPE)
    if TYPE == FLOAT16:
        return fp16_pair_to_float(word)
    else:
        return to_float(word << 16), to_float(word & 0xFFFF0000)


@triton.jit
def replay_units(even, odd, even2, odd2, f_even, f_odd, f_even2, f_odd2, unit, who, draws, coefficients,
    draw_count, each, keys, clock,
                 DIRECTION: tl.constexpr, ROUNDING: tl.constexpr, SCALED: tl.constexpr, TYPE: tl.constexpr,
                 N: tl.constexpr,
                 W: tl.constexpr):  # fmt: skip
    """Sums of `each` terms, every one with its decay and its rounding."""
    for start in range(0, draw_count, each):
        step, draw, decay = listed(start, draws, draw_count, clock)
        even, odd, even2, odd2 = even * decay, odd * decay, even2 * decay, odd2 * decay
        for k in range(start, start + each):
            step, draw, decay = listed(k, draws, draw_count, clock)
            words = words_of(unit, who, step, draw, keys, N, DIRECTION)
            coefficient = tl.load(coefficients + k)
            even, odd = add_pair(even, odd, f_even, f_odd, words, coefficient, 0, W, DIRECTION, SCALED)
            if W == 2:
                even2, odd2 = add_pair(
                    even2, odd2, f_even2, f_odd2, words, coefficient, 1, W, DIRECTION, SCALED
                )
        # the split of a float32 into a bfloat16 and its low bits is exact
        if TYPE != FLOAT32 and not (TYPE == BFLOAT16 and ROUNDING == RESIDUAL):
            even, odd = round_pair(even, odd, unit, who, step, keys, N, TYPE, ROUNDING, W)
    return even, odd, even2, odd2


@triton.jit
def axpy_units(entry, begin, theta, low, unit, at, units, who, step, draw, draws, coefficients, only,
    draw_count, each, decay, keys, clock, state,
               DIRECTION: tl.constexpr, ROUNDING: tl.constexpr, DECAY: tl.constexpr, EACH: tl.constexpr,
               SCALED: tl.constexpr,
               TYPE: tl.constexpr, N: tl.constexpr, W: tl.constexpr):  # fmt: skip
    """One tile of axpy_ over units; the watch's new state."""
    JOIN: tl.constexpr = TYPE == BFLOAT16 and ROUNDING == RESIDUAL
    from_word, place, mask = rows_of(at, units, N, W, DIRECTION)
    theta += from_word
    low += from_word
    even, odd = read_pair(theta, low, place, mask, TYPE, JOIN)
    even2, odd2 = even, odd
    if W == 2:
        even2, odd2 = read_pair(theta, low, place + 2, mask, TYPE, JOIN)
    f_even, f_odd, f_even2, f_odd2 = even, odd, even2, odd2
    if SCALED:
        f_even, f_odd = factor_pair(entry, begin, from_word + place, mask, N, W)
        if W == 2:
            f_even2, f_odd2 = factor_pair(entry, begin, from_word + (place + 2), mask, N, W)
    if EACH:
        even, odd, even2, odd2 = replay_units(even, odd, even2, odd2, f_even, f_odd, f_even2, f_odd2,
            unit + at, who, draws,
                                              coefficients, draw_count, each, keys, clock, DIRECTION,
                                              ROUNDING, SCALED, TYPE, N,
                                              W)  # fmt: skip
    else:
        if DECAY:
            even, odd, even2, odd2 = even * decay, odd * decay, even2 * decay, odd2 * decay
        for k in range(draw_count):
            step_k, draw_k = term(k, draws, step, draw, draw_count, clock)
            words = words_of(unit + at, who, step_k, draw_k, keys, N, DIRECTION)
            coefficient = only
            if draw_count > 1:
                coefficient = tl.load(coefficients + k)
            even, odd = add_pair(even, odd, f_even, f_odd, words, coefficient, 0, W, DIRECTION, SCALED)
            if W == 2:
                even2, odd2 = add_pair(
                    even2, odd2, f_even2, f_odd2, words, coefficient, 1, W, DIRECTION, SCALED
                )
    random = place
    LAST: tl.constexpr = NEAREST if EACH else ROUNDING  # a replay has rounded its last sum
    if TYPE != FLOAT32 and LAST == STOCHASTIC:
        purpose = tl.full([], ROUNDING_DRAW, tl.uint32)
        random = some(philox4x32((unit + at + tl.arange(0, N)).to(tl.uint32), who, step, purpose, keys), 0, W)
    state = watch(state, write_pair(theta, low, place, mask, even, odd, random, TYPE, LAST, JOIN), TYPE)
    if W == 2:
        state = watch(
            state, write_pair(theta, low, place + 2, mask, even2, odd2, random, TYPE, LAST, JOIN), TYPE
        )
    return state


@triton.jit
def round_element(value, number, who, step, keys, TYPE: tl.constexpr, ROUNDING: tl.constexpr):
    """A value in a type, to nearest or with the bits of a step."""
    if TYPE != FLOAT32 and ROUNDING == STOCHASTIC:
        random = random16(number, who, step, keys)
        if TYPE == BFLOAT16:
            return bf16_stochastic(value, random)
        else:
            return fp16_stochastic(value, random)
    else:
        return nearest(value, TYPE)


@triton.jit
def axpy_elements(entry, theta, place, low, low_place, number, mask, who, step, draw, draws, coefficients,
    draw_count, each, decay, keys,
                  clock, DIRECTION: tl.constexpr, ROUNDING: tl.constexpr, DECAY: tl.constexpr,
                  EACH: tl.constexpr,
                  SCALED: tl.constexpr, TYPE: tl.constexpr):  # fmt: skip
    """One tile of axpy_ over elements; 1 where a result is inf or NaN."""
    JOIN: tl.constexpr = TYPE == BFLOAT16 and ROUNDING == RESIDUAL
    value = read(theta, place, low, low_place, mask, TYPE, JOIN)
    scale = value
    if SCALED:
        scale = factor_of(entry, low_place, mask)
    if EACH:
        for start in range(0, draw_count, each):
            step, draw, factor = listed(start, draws, draw_count, clock)
            value = value * factor
            for k in range(start, start + each):
                step, draw, factor = listed(k, draws, draw_count, clock)
                z = z_of(number, who, step, draw, keys, DIRECTION)
                if SCALED:
                    z = z * scale
                value = tl.fma(tl.load(coefficients + k), z, value)
            if TYPE == FLOAT16:
                value = fp16_to_float(round_element(value, number, who, step, keys, TYPE, ROUNDING))
            elif TYPE == BFLOAT16 and not JOIN:
                value = bf16_to_float(round_element(value, number, who, step, keys, TYPE, ROUNDING))
    else:
        if DECAY:
            value = value * decay
        for k in range(draw_count):
            step_k, draw_k = term(k, draws, step, draw, draw_count, clock)
            z = z_of(number, who, step_k, draw_k, keys, DIRECTION)
            if SCALED:
                z = z * scale
            value = tl.fma(tl.load(coefficients + k), z, value)
    if JOIN:
        rounded, bits = residual_split(value)
        tl.store(low + low_place, bits, mask=mask)
    else:
        rounded = round_element(value, number, who, step, keys, TYPE, NEAREST if EACH else ROUNDING)
    tl.store(theta + place, rounded, mask=mask)
    return tl.where(mask, nonfinite_of(rounded, TYPE), 0)


@triton.jit(
    do_not_specialize=["entries", "chunks", "draws", "step", "draw", "keys", "clock", "control"],
    do_not_specialize_on_alignment=["draw_count", "each"],
)
def axpy(entries, chunks, draws, coefficients, nonfinite, draw_count, each, step, draw, decay, keys, clock,
         control,
         DIRECTION: tl.constexpr, ROUNDING: tl.constexpr, DECAY: tl.constexpr, EACH: tl.constexpr,
         SCALED: tl.constexpr,
         KINDS: tl.constexpr, BLOCK: tl.constexpr, TAIL: tl.constexpr, SPLIT: tl.constexpr):  # fmt: skip
    """theta <- round(decay theta + sum_k coefficients[k] z_k); nonfinite[0] += results that are inf or NaN.

    step and draw name the last term, draws the others. KINDS: bit t is set when the launch has a tensor of
    type t. Without DECAY, decay is 1 and no instruction. EACH: a replay of sums of `each` terms; draws names
    all terms, and their decays follow. control: {decay, go, finite} of project.py, or None.
    """
    N: tl.constexpr = BLOCK // 8
    step = name_of(step, clock)
    draw = draw.to(tl.uint32, bitcast=True)
    entry, begin, size, units, part = chunk_of(entries, chunks, SPLIT)
    if control is not None:
        decay = tl.load(control)
        size, units = unless_stopped(size, control, GO), unless_stopped(units, control, GO)
    who_type = tl.load(entry + WHO_TYPE)
    who = who_type.to(tl.uint32)
    kind = (who_type >> 32).to(tl.int32)
    unit = (tl.load(entry + FIRST) + begin) >> 3
    for TYPE in tl.static_range(3):
        if (KINDS >> TYPE) & 1:
            if kind == TYPE:
                W: tl.constexpr = 2 if TYPE == FLOAT32 else 4
                theta = pairs(tl.load(entry + THETA), begin, TYPE)
                low = pairs(tl.load(entry + LOW), begin, INT16)
                state = tl.zeros([N, W], tl.uint32)
                # of a sum of one term: a store could change it, for all the compiler knows
                only = tl.load(coefficients)
                for at in range(start_of(unit, part, N, DIRECTION), units, SPLIT * N):
                    state = axpy_units(entry, begin, theta, low, unit, at, units, who, step, draw, draws,
                        coefficients, only,
                                       draw_count, each, decay, keys, clock, state, DIRECTION, ROUNDING,
                                       DECAY, EACH, SCALED, TYPE,
                                       N, W)  # fmt: skip
                # the loop only watches whether a result (or a row outside the mask) was not finite; then the
                # results are counted
                if tl.max(((state & (0x7FFFFFFF if TYPE == FLOAT32 else 0xFFFFFFFF)) != 0).to(tl.int32)) != 0:
                    tl.debug_barrier()
                    count = tl.zeros([N, W], tl.int32)
                    for at in range(start_of(unit, part, N, DIRECTION), units, SPLIT * N):
                        from_word, place, mask = rows_of(at, units, N, W, DIRECTION)
                        for PART in tl.static_range(4 // W):
                            count += nonfinite_pair(
                                tl.load(theta + from_word + (place + PART * W), mask=mask, other=0), TYPE
                            )
                    tl.atomic_add(nonfinite, tl.sum(count).to(tl.int64), sem="relaxed")
                theta = pointer(tl.load(entry + THETA), 0, TYPE)
                low = pointer(tl.load(entry + LOW), 0, INT16)
                for at in range(units * 8 + part * TAIL, size, SPLIT * TAIL):
                    i = at + tl.arange(0, TAIL)
                    number, place, low_place = locate(entry, begin + i, i < size)
                    broken = axpy_elements(entry, theta, place, low, low_place, number, i < size, who, step,
                        draw, draws, coefficients,
                                           draw_count, each, decay, keys, clock, DIRECTION, ROUNDING, DECAY,
                                           EACH, SCALED,
                                           TYPE)  # fmt: skip
                    tl.atomic_add(
                        nonfinite + tl.zeros([TAIL], tl.int32),
                        broken.to(tl.int64),
                        mask=broken != 0,
                        sem="relaxed",
                    )


@triton.jit(do_not_specialize=["entries", "chunks", "step", "draw", "keys", "clock"])
def perturb(entries, chunks, step, draw, scale0, scale1, keys, clock, DIRECTION: tl.constexpr,
    SIDES: tl.constexpr,
            JOIN: tl.constexpr, SCALED: tl.constexpr, KINDS: tl.constexpr, BLOCK: tl.constexpr,
            TAIL: tl.constexpr,
            SPLIT: tl.constexpr):  # fmt: skip
    """out_j <- nearest(theta + scale_j z), j < SIDES. JOIN: bfloat16 thetas have low bits.

    KINDS: bit 3 t + u is set when the launch has a tensor of type t with outputs of type u.
    """
    N: tl.constexpr = BLOCK // 8
    step = name_of(step, clock)
    draw = draw.to(tl.uint32, bitcast=True)
    entry, begin, size, units, part = chunk_of(entries, chunks, SPLIT)
    who_type = tl.load(entry + WHO_TYPE)
    who = who_type.to(tl.uint32)
    kind = 3 * (who_type >> 32).to(tl.int32) + tl.load(entry + TYPE_OUT).to(tl.int32)
    unit = (tl.load(entry + FIRST) + begin) >> 3
    for KIND in tl.static_range(9):
        if (KINDS >> KIND) & 1:
            TYPE: tl.constexpr = KIND // 3
            OUT_TYPE: tl.constexpr = KIND % 3
            if kind == KIND:
                W: tl.constexpr = 2 if TYPE * OUT_TYPE == 0 else 4  # FLOAT32 is 0
                theta = pairs(tl.load(entry + THETA), begin, TYPE)
                low = pairs(tl.load(entry + LOW), begin, INT16)
                out0 = pairs(tl.load(entry + OUT), begin, OUT_TYPE)
                out1 = pairs(tl.load(entry + OUT + 1), begin, OUT_TYPE)
                for at in range(start_of(unit, part, N, DIRECTION), units, SPLIT * N):
                    from_word, place, mask = rows_of(at, units, N, W, DIRECTION)
                    words = words_of(unit + at, who, step, draw, keys, N, DIRECTION)
                    for PART in tl.static_range(4 // W):
                        here = place + PART * W
                        even, odd = read_pair(
                            theta + from_word, low + from_word, here, mask, TYPE, JOIN and TYPE == BFLOAT16
                        )
                        z_even, z_odd = z_pair(words, PART, W, DIRECTION)
                        if SCALED:
                            f_even, f_odd = factor_pair(entry, begin, from_word + here, mask, N, W)
                            z_even, z_odd = z_even * f_even, z_odd * f_odd
                        word = nearest_pair(
                            tl.fma(z_even, scale0, even), tl.fma(z_odd, scale0, odd), OUT_TYPE
                        )
                        tl.store(out0 + from_word + here, word, mask=mask)
                        if SIDES == 2:
                            word = nearest_pair(
                                tl.fma(z_even, scale1, even), tl.fma(z_odd, scale1, odd), OUT_TYPE
                            )
                            tl.store(out1 + from_word + here, word, mask=mask)
                theta = pointer(tl.load(entry + THETA), 0, TYPE)
                low = pointer(tl.load(entry + LOW), 0, INT16)
                out0 = pointer(tl.load(entry + OUT), begin, OUT_TYPE)
                out1 = pointer(tl.load(entry + OUT + 1), begin, OUT_TYPE)
                for at in range(units * 8 + part * TAIL, size, SPLIT * TAIL):
                    i = at + tl.arange(0, TAIL)
                    number, place, low_place = locate(entry, begin + i, i < size)
                    value = read(theta, place, low, low_place, i < size, TYPE, JOIN)
                    z = z_of(number, who, step, draw, keys, DIRECTION)
                    if SCALED:
                        z = z * factor_of(entry, low_place, i < size)
                    tl.store(out0 + i, nearest(tl.fma(z, scale0, value), OUT_TYPE), mask=i < size)
                    if SIDES == 2:
                        tl.store(out1 + i, nearest(tl.fma(z, scale1, value), OUT_TYPE), mask=i < size)
