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

from .elements import (
    BFLOAT16,
    FIRST,
    FLOAT32,
    GO,
    INT16,
    LOW,
    OUT,
    THETA,
    TYPE_OUT,
    WHO_TYPE,
    chunk_of,
    factor_of,
    locate,
    name_of,
    nearest,
    pointer,
    read,
    unless_stopped,
    z_of,
)
from .philox import philox4x32
from .terms import axpy_elements, axpy_units
from .units import (
    factor_pair,
    nearest_pair,
    nonfinite_pair,
    pairs,
    read_pair,
    rows_of,
    start_of,
    words_of,
    z_pair,
)


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
