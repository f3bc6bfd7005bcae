"""terms: sums of terms a_k z_k on one tile, of units or of single elements, in Triton

A sum has a decay and one rounding. A replay has a decay and a rounding every `each` terms. elementwise.py has
the kernel, and csrc/elementwise.h says what it computes.
"""

import triton
import triton.language as tl

from .elements import (
    BFLOAT16,
    FLOAT16,
    FLOAT32,
    NEAREST,
    RESIDUAL,
    ROUNDING_DRAW,
    STOCHASTIC,
    factor_of,
    name_of,
    nearest,
    nonfinite_of,
    random16,
    read,
    z_of,
)
from .philox import philox4x32
from .rounding import (
    bf16_stochastic,
    bf16_to_float,
    fp16_pair_to_float,
    fp16_stochastic,
    fp16_to_float,
    residual_split,
    to_float,
)
from .units import both, factor_pair, nearest_pair, read_pair, rows_of, some, watch, words_of, z_pair


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
