"""project: the losses of a step to the numbers of its update, in Triton (csrc/project.h defines them)

operands losses float64[m, n], weights float64[K, n] or None, scalars float64[6]; out is the memory of the
         results, as csrc/project.h lays it out, once as float64 and once as float32
launch   one program. A lane has a draw of BLOCK at a time. enable_fp_fusion=False is part of the definition:
         contraction would change bits.
equal    bit for bit to zokern/backends/reference.py
source   Malladi et al. 2023, Algorithm 1
"""

import triton
import triton.language as tl

SIGN_BIT: tl.constexpr = tl.constexpr(-(2**63))


@triton.jit
def mean_of(losses, m, n, inside):
    """(sum_i losses[i, j]) / m, in order, of points that lie n apart in each read."""
    total = tl.load(losses, mask=inside, other=0.0)
    if m > 1:
        for _ in range(1, m):
            losses += n
            total += tl.load(losses, mask=inside, other=0.0)
        total = total / (tl.zeros([], tl.float64) + m)
    return total


@triton.jit
def coefficient_of(losses, weights, scalars, m, n, k, inside, BLOCK: tl.constexpr):
    """c_k of BLOCK draws, in float64."""
    if weights is None:
        return mean_of(losses + k, m, n, inside)
    else:
        # adding to -0.0 changes nothing; tl.full would make 0.0 of a number that equals it
        total = tl.full([BLOCK], SIGN_BIT, tl.int64).to(tl.float64, bitcast=True)
        found = tl.zeros([BLOCK], tl.int32)
        for j in range(n):
            weight = tl.load(weights + k * n + j, mask=inside, other=0.0)
            term = weight * mean_of(losses + j, m, n, True)
            total = tl.where(weight != 0.0, total + term, total)
            found = tl.where(weight != 0.0, 1, found)
        total = tl.where(found != 0, total, 0.0)
        c = (total / tl.load(scalars)).to(tl.float32).to(tl.float64)
        clip = tl.load(scalars + 3)
        cut = tl.where(c < -clip, -clip, c)
        cut = tl.where(clip < cut, clip, cut)
        cut = tl.where(clip != clip, clip, cut)
        return tl.where(c != c, c, cut)


@triton.jit
def is_broken(x):
    """1 where x is inf or NaN in float32."""
    return ((x.to(tl.float32).to(tl.int32, bitcast=True) & 0x7F800000) == 0x7F800000).to(tl.int32)


@triton.jit(do_not_specialize=["draws"])
def project(losses, weights, scalars, wide, single, m, n, draws, BLOCK: tl.constexpr):
    """Writes coefficients and weights to `wide`, amounts and control to `single`."""
    lr = tl.load(scalars + 1)
    sign = tl.load(scalars + 4)
    count = tl.load(scalars + 5)
    decay = 1.0 - lr * tl.load(scalars + 2)
    broken = tl.zeros([BLOCK], tl.int32) + (is_broken(lr) | is_broken(decay))
    moves = tl.zeros([BLOCK], tl.int32)
    for start in range(0, draws, BLOCK):
        k = start + tl.arange(0, BLOCK).to(tl.int64)
        inside = k < draws
        c = coefficient_of(losses, weights, scalars, m, n, k, inside, BLOCK)
        told = sign * c / count
        moved = lr * told
        amount = moved.to(tl.float32)
        tl.store(wide + k, c, mask=inside)
        tl.store(wide + draws + k, told, mask=inside)
        tl.store(single + k, amount, mask=inside)
        broken |= tl.where(inside, is_broken(c) | is_broken(told) | is_broken(moved), 0)
        moves |= tl.where(inside & (amount != 0.0), 1, 0)
    finite = tl.max(broken) == 0
    if not finite:
        for start in range(0, draws, BLOCK):
            k = start + tl.arange(0, BLOCK).to(tl.int64)
            tl.store(wide + draws + k, tl.zeros([BLOCK], tl.float64), mask=k < draws)
            tl.store(single + k, tl.zeros([BLOCK], tl.float32), mask=k < draws)
    factor = tl.where(finite, decay.to(tl.float32), 1.0)
    go = finite & ((factor != 1.0) | (tl.max(moves) != 0))
    tl.store(single + draws, factor)
    tl.store(single + draws + 1, go.to(tl.float32))
    tl.store(single + draws + 2, finite.to(tl.float32))
