"""update: a rule, momentum, Adam or the sign, in Triton, one launch for a list of tensors (csrc/update.h says
what it computes)

table    as elementwise.py: OUT and OUT + 1 of an entry are m and v, contiguous float32; scalars float32[4],
         [9] or [2] in device memory
paths    those of elementwise.py; a thread reads and writes the 32 bytes of a unit's m, and of its v, as two
         of 16 each
work     whole loop per element, K = 1, nearest: momentum normal 34.4 instructions (bf16, sm_90), of signs
         16.8; adam normal 70.9 (bf16, sm_80 to sm_120: to 72.9), 69.2 (float32), with the calls that only
         operands at the ends of the range take (`pytest tests/kernels_triton/test_update_triton.py -k
         compiled -s`, Triton 3.9); memory leaves time for 83 and 138 (bf16, H200)
launch   SPLIT programs a chunk. enable_fp_fusion=False is part of the definition; root and quotient are the
         correctly rounded ones
equal    bit for bit to zokern/backends/reference.py
source   csrc/update.h; stream: zokern/stream.py, version 1
"""

import triton
import triton.language as tl

from .elements import (
    BFLOAT16,
    FINITE,
    FIRST,
    FLOAT32,
    INT16,
    LOW,
    OUT,
    RESIDUAL,
    ROUNDING_DRAW,
    STOCHASTIC,
    THETA,
    WHO_TYPE,
    chunk_of,
    factor_of,
    locate,
    name_of,
    nearest,
    nonfinite_of,
    pointer,
    random16,
    read,
    unless_stopped,
    z_of,
)
from .philox import philox4x32
from .rounding import bf16_stochastic, fp16_stochastic, residual_split, to_bits, to_float
from .terms import add_pair, term, write_pair
from .units import factor_pair, nonfinite_pair, pairs, read_pair, rows_of, some, start_of, watch, words_of

ADAM: tl.constexpr = tl.constexpr(1)
SIGN: tl.constexpr = tl.constexpr(2)


@triton.jit
def advance(g, theta, m, v, scalars, RULE: tl.constexpr):
    """theta, m and v after the step; momentum has no v, sign has neither."""
    if RULE == SIGN:
        bits = to_bits(g)
        magnitude = bits & 0x7FFFFFFF
        ordinary = (magnitude != 0) & (magnitude <= 0x7F800000)  # zeros and NaNs stay what they are
        move = to_float(tl.where(ordinary, (bits & 0x80000000) | 0x3F800000, bits))
    else:
        m = tl.fma(tl.load(scalars + 3), g, tl.load(scalars + 2) * m)
        move = m
    if RULE == ADAM:
        v = tl.fma(tl.load(scalars + 5), g * g, tl.load(scalars + 4) * v)
        root = tl.sqrt_rn(v + tl.load(scalars + 6))
        move = tl.div_rn(m, tl.fma(root, tl.load(scalars + 7), tl.load(scalars + 8)))
    return tl.fma(tl.load(scalars + 1), move, tl.load(scalars) * theta), m, v


@triton.jit
def state_pair(state, place, mask):
    return read_pair(state, state, place, mask, FLOAT32, False)


@triton.jit
def store_state(state, place, mask, even, odd):
    tl.store(state + place, to_bits(even).to(tl.uint64) | (to_bits(odd).to(tl.uint64) << 32), mask=mask)


@triton.jit
def advance_pair(theta, low, m, v, place, mask, even, odd, g_even, g_odd, random, scalars, RULE: tl.constexpr,
    ROUNDING: tl.constexpr,
                 TYPE: tl.constexpr, JOIN: tl.constexpr):  # fmt: skip
    """A word of two elements forward; the word that was stored."""
    m_even, m_odd = even, odd
    if RULE != SIGN:
        m_even, m_odd = state_pair(m, place, mask)
    v_even, v_odd = m_even, m_odd
    if RULE == ADAM:
        v_even, v_odd = state_pair(v, place, mask)
    even, m_even, v_even = advance(g_even, even, m_even, v_even, scalars, RULE)
    odd, m_odd, v_odd = advance(g_odd, odd, m_odd, v_odd, scalars, RULE)
    if RULE != SIGN:
        store_state(m, place, mask, m_even, m_odd)
    if RULE == ADAM:
        store_state(v, place, mask, v_even, v_odd)
    return write_pair(theta, low, place, mask, even, odd, random, TYPE, ROUNDING, JOIN)


@triton.jit
def update_units(entry, begin, theta, low, m, v, unit, at, units, who, step, draw, draws, coefficients,
    draw_count, scalars, keys, clock, state,
                 DIRECTION: tl.constexpr, RULE: tl.constexpr, ROUNDING: tl.constexpr, SCALED: tl.constexpr,
                 TYPE: tl.constexpr,
                 N: tl.constexpr, W: tl.constexpr):  # fmt: skip
    """One tile over units; the watch's new state."""
    JOIN: tl.constexpr = TYPE == BFLOAT16 and ROUNDING == RESIDUAL
    from_word, place, mask = rows_of(at, units, N, W, DIRECTION)
    theta += from_word
    low += from_word
    m += from_word
    v += from_word
    even, odd = read_pair(theta, low, place, mask, TYPE, JOIN)
    even2, odd2 = even, odd
    if W == 2:
        even2, odd2 = read_pair(theta, low, place + 2, mask, TYPE, JOIN)
    g_even = tl.zeros([N, W], tl.float32)
    g_odd, g_even2, g_odd2 = g_even, g_even, g_even
    f_even, f_odd, f_even2, f_odd2 = g_even, g_even, g_even, g_even
    if SCALED:
        f_even, f_odd = factor_pair(entry, begin, from_word + place, mask, N, W)
        if W == 2:
            f_even2, f_odd2 = factor_pair(entry, begin, from_word + (place + 2), mask, N, W)
    for k in range(draw_count):
        step_k, draw_k = term(k, draws, step, draw, draw_count, clock)
        words = words_of(unit + at, who, step_k, draw_k, keys, N, DIRECTION)
        coefficient = tl.load(coefficients + k)
        g_even, g_odd = add_pair(g_even, g_odd, f_even, f_odd, words, coefficient, 0, W, DIRECTION, SCALED)
        if W == 2:
            g_even2, g_odd2 = add_pair(
                g_even2, g_odd2, f_even2, f_odd2, words, coefficient, 1, W, DIRECTION, SCALED
            )
    random = place
    if TYPE != FLOAT32 and ROUNDING == STOCHASTIC:
        purpose = tl.full([], ROUNDING_DRAW, tl.uint32)
        random = some(philox4x32((unit + at + tl.arange(0, N)).to(tl.uint32), who, step, purpose, keys), 0, W)
    word = advance_pair(
        theta, low, m, v, place, mask, even, odd, g_even, g_odd, random, scalars, RULE, ROUNDING, TYPE, JOIN
    )
    state = watch(state, word, TYPE)
    if W == 2:
        word = advance_pair(theta, low, m, v, place + 2, mask, even2, odd2, g_even2, g_odd2, random, scalars,
            RULE, ROUNDING, TYPE,
                            JOIN)  # fmt: skip
        state = watch(state, word, TYPE)
    return state


@triton.jit
def update_elements(entry, theta, place, low, low_place, m, v, i, number, mask, who, step, draw, draws,
    coefficients, draw_count, scalars,
                    keys, clock, DIRECTION: tl.constexpr, RULE: tl.constexpr, ROUNDING: tl.constexpr,
                    SCALED: tl.constexpr,
                    TYPE: tl.constexpr):  # fmt: skip
    """One tile over elements, i of them in the states; 1 where a new weight is inf or NaN."""
    JOIN: tl.constexpr = TYPE == BFLOAT16 and ROUNDING == RESIDUAL
    value = read(theta, place, low, low_place, mask, TYPE, JOIN)
    first = value
    if RULE != SIGN:
        first = tl.load(m + i, mask=mask, other=0)
    second = first
    scale = value
    if SCALED:
        scale = factor_of(entry, low_place, mask)
    if RULE == ADAM:
        second = tl.load(v + i, mask=mask, other=0)
    g = tl.zeros([number.shape[0]], tl.float32)
    for k in range(draw_count):
        step_k, draw_k = term(k, draws, step, draw, draw_count, clock)
        z = z_of(number, who, step_k, draw_k, keys, DIRECTION)
        if SCALED:
            z = z * scale
        g = tl.fma(tl.load(coefficients + k), z, g)
    value, first, second = advance(g, value, first, second, scalars, RULE)
    if RULE != SIGN:
        tl.store(m + i, first, mask=mask)
    if RULE == ADAM:
        tl.store(v + i, second, mask=mask)
    if TYPE != FLOAT32 and ROUNDING == STOCHASTIC:
        random = random16(number, who, step, keys)
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


@triton.jit(
    do_not_specialize=["entries", "chunks", "draws", "step", "draw", "keys", "clock", "control"],
    do_not_specialize_on_alignment=["draw_count"],
)
def update(entries, chunks, draws, coefficients, scalars, nonfinite, draw_count, step, draw, keys, clock,
           control, DIRECTION: tl.constexpr, RULE: tl.constexpr, ROUNDING: tl.constexpr, SCALED: tl.constexpr,
           KINDS: tl.constexpr, BLOCK: tl.constexpr, TAIL: tl.constexpr, SPLIT: tl.constexpr):  # fmt: skip
    """A rule's step; nonfinite[0] += new weights that are inf or NaN. Names, KINDS and control as for
    elementwise.axpy."""
    N: tl.constexpr = BLOCK // 8
    step = name_of(step, clock)
    draw = draw.to(tl.uint32, bitcast=True)
    entry, begin, size, units, part = chunk_of(entries, chunks, SPLIT)
    if control is not None:
        size, units = unless_stopped(size, control, FINITE), unless_stopped(units, control, FINITE)
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
                m = pairs(tl.load(entry + OUT), begin, FLOAT32)
                v = pairs(tl.load(entry + OUT + 1), begin, FLOAT32)
                state = tl.zeros([N, W], tl.uint32)
                for at in range(start_of(unit, part, N, DIRECTION), units, SPLIT * N):
                    state = update_units(entry, begin, theta, low, m, v, unit, at, units, who, step, draw,
                        draws, coefficients,
                                         draw_count, scalars, keys, clock, state, DIRECTION, RULE, ROUNDING,
                                         SCALED, TYPE, N,
                                         W)  # fmt: skip
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
                m = pointer(tl.load(entry + OUT), begin, FLOAT32)
                v = pointer(tl.load(entry + OUT + 1), begin, FLOAT32)
                for at in range(units * 8 + part * TAIL, size, SPLIT * TAIL):
                    i = at + tl.arange(0, TAIL)
                    number, place, low_place = locate(entry, begin + i, i < size)
                    broken = update_elements(entry, theta, place, low, low_place, m, v, i, number, i < size,
                        who, step, draw,
                                             draws, coefficients, draw_count, scalars, keys, clock, DIRECTION,
                                             RULE, ROUNDING,
                                             SCALED, TYPE)  # fmt: skip
                    tl.atomic_add(
                        nonfinite + tl.zeros([TAIL], tl.int32),
                        broken.to(tl.int64),
                        mask=broken != 0,
                        sem="relaxed",
                    )
