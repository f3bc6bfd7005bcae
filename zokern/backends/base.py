"""What every backend provides: the verbs, each for a list of tensors in one launch.

A tensor of a launch is described by a Span, so that a shard, a tile, a slice or a set of looked-up rows reads exactly the
values that it would have read as part of the whole tensor.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

from torch import Tensor

DTYPES = ("float32", "bfloat16", "float16")
ROUNDINGS = ("nearest", "stochastic", "residual")
STATES = {"momentum": ("m",), "adam": ("m", "v")}  # what update_ keeps of each element, by rule
SCALARS = {  # and the numbers that it is told
    "momentum": ("decay", "lr", "beta", "alpha"),
    "adam": ("decay", "lr", "beta1", "alpha1", "beta2", "alpha2", "inside", "correction", "eps"),
}


class Span(NamedTuple):
    """Where the elements of one tensor stand in the stream.

    who    parameter id
    first  number of the tensor's first element in the unsharded parameter (row-major)
    pitch  for a 2-D tensor whose rows do not follow one another in the unsharded parameter (a slice of columns): the
           numbers between two rows; None when element j of the flattened tensor simply is number first + j
    rows   int64 row numbers: the launch works on rows ``theta[rows]`` of a 2-D theta, which keep their own numbers
    """

    who: int
    first: int = 0
    pitch: int | None = None
    rows: Tensor | None = None


def rounded_sums(decay: float | Sequence[float], count: int, each: int) -> tuple[int, list[float]]:
    """For `count` terms of axpy_: how many there are to a rounding, and for each the factor of what stands before it is added."""
    terms = each or count
    factors = [decay] * (count // terms) if isinstance(decay, (int, float)) else decay
    rest = [1.0] * (terms - 1)
    return terms, [number for factor in factors for number in (factor, *rest)]


def step_at(step: int, clock: Tensor | None) -> int:
    """The step number that a call means, for backends that run on the host."""
    return step if clock is None else (step + int(clock)) & 0xFFFFFFFF


class Backend(Protocol):
    """Elementwise verbs are equal bit for bit on every backend (a NaN's payload excepted).

    clock  int64[1] on the tensors' device, or None for 0. Its value when the kernel runs is added (mod 2^32) to every step
           number of the call, so a call that was captured in a CUDA graph finds another z whenever the clock was advanced.
    """

    name: str
    most_rank: int | None = None  # of the factors that lowrank_ takes

    def philox4x32(self, counter: Tensor, key: tuple[int, int], rounds: int) -> Tensor:
        """int64[n, 4] counters to int64[n, 4] words."""

    def draw(
        self,
        outs: Sequence[Tensor],
        spans: Sequence[Span],
        direction,
        seed: int,
        step: int,
        draw: int,
        clock: Tensor | None = None,
    ) -> None:
        """out <- z, rounded to out's dtype (nearest)."""

    def axpy_(
        self,
        thetas: Sequence[Tensor],
        spans: Sequence[Span],
        direction,
        seed: int,
        draws: Sequence[tuple[int, int]],
        coeffs: Tensor,
        decay: float | Sequence[float],
        rounding: str,
        residuals: Sequence[Tensor] | None,
        clock: Tensor | None = None,
        each: int = 0,
    ) -> Tensor:
        """theta <- decay * theta + sum_k coeffs[k] z_k in place; int64[1]: how many results are inf or NaN.

        float32 inside: t = round(decay * theta), then t = fma(coeffs[k], z_k, t) in order, then one rounding to the dtype.
        coeffs is float32[K] on the tensors' device. ``stochastic`` spends the 16 bits of (who, step of the last draw,
        purpose rounding). ``residual`` reads and writes int16 ``residuals`` (bfloat16 tensors; others round to nearest).

        each, a divisor of K: the bits of K / each calls with `each` terms each, in one pass: every group of terms multiplies by its
        decay (one number for all, or a sequence of K / each), adds, and rounds, with the bits of its own last step. 0: one group.
        The count is that of the last results.
        """

    def update_(
        self,
        thetas: Sequence[Tensor],
        spans: Sequence[Span],
        direction,
        seed: int,
        draws: Sequence[tuple[int, int]],
        coeffs: Tensor,
        rule: str,
        scalars: Tensor,
        states: Sequence[Sequence[Tensor]],
        rounding: str,
        residuals: Sequence[Tensor] | None,
        clock: Tensor | None = None,
    ) -> Tensor:
        """A rule with state, in place, in one pass; int64[1]: how many new weights are inf or NaN.

            g = sum_k coeffs[k] z_k                 from 0, by fma in draw order
            momentum  m <- fma(alpha, g, round(beta m))                                          move = m
            adam      m <- fma(alpha1, g, round(beta1 m))   v <- fma(alpha2, round(g g), round(beta2 v))
                      move = m / fma(sqrt(v + inside), correction, eps)                          each operation rounded once
            theta <- round(fma(lr, move, round(decay theta)))

        All float32 but the last rounding, which is that of axpy_ and spends the same bits. states are STATES[rule], each a list of
        contiguous float32 tensors shaped like the thetas. scalars is float32 on the tensors' device, SCALARS[rule] in order: a call
        that was captured in a CUDA graph reads new ones at each replay. Division and square root are correctly rounded. No rows.
        """

    def perturb(
        self,
        thetas: Sequence[Tensor],
        spans: Sequence[Span],
        direction,
        seed: int,
        step: int,
        draw: int,
        scales: Sequence[float],
        outs: Sequence[Sequence[Tensor]],
        residuals: Sequence[Tensor] | None,
        clock: Tensor | None = None,
    ) -> None:
        """outs[j][i] <- round(thetas[i] + scales[j] z) for one or two scales; theta is only read.

        outs are contiguous, of theta's dtype or float32, shaped like theta (or like theta[rows]).
        """

    def lowrank_(
        self,
        thetas: Sequence[Tensor],
        spans: Sequence[Span],
        lefts: Sequence[Tensor],
        rights: Sequence[Tensor],
        scales: Sequence[float],
        decay: float,
        rounding: str,
        residuals: Sequence[Tensor] | None,
        seed: int = 0,
        step: int = 0,
        outs: Sequence[Tensor] | None = None,
    ) -> Tensor:
        """theta <- decay * theta + scales[i] * left right^T in place; int64[1]: how many results are inf or NaN.

        lefts[i] is float32 (m, r) and rights[i] float32 (n, r), contiguous; element number e of the unsharded matrix (spans[i]:
        first + position, or through pitch and rows) is row e div n and column e mod n, whatever theta's own shape: a shard, a
        flattened adapter and a slice of columns read the values that they would have read as part of the whole.

        float32 inside: s = sum over k = 0 .. r-1 in this order of fma(left[e div n, k], right[e mod n, k], s) from s = 0; then
        t = fma(scale, s, round(decay * theta)); then one rounding to the dtype, as in axpy_ (``stochastic`` spends the bits of
        (who, step, purpose rounding)). Equal bit for bit on ``reference`` and ``cpu``; ``cuda`` and ``triton`` sum on the matrix
        units, in another order and with factors rounded as their files say, to a bound.
        outs, where given, take the results instead (contiguous, of theta's dtype or float32, shaped like theta or like theta[rows])
        and theta is only read; its low bits, too, with rounding ``residual``: outs are then rounded to nearest. Rows need outs.
        """


class Multiplies(Backend, Protocol):
    """A backend with products of its own, z and all, for those that zokern/products.py hands it: see Cpu."""

    def linear(
        self,
        xs: Sequence[Tensor],
        weight: Tensor,
        span: Span,
        direction,
        seed: int,
        step: int,
        draws: Sequence[int],
        scales: Sequence[float],
        biases: Sequence[Tensor | None],
        thins: Sequence[tuple[int, Tensor, Tensor, Tensor]] = (),
        room: int | None = None,
        outs: Sequence[Tensor] | None = None,
        transposed: bool = False,
        shrink: float = 1.0,
    ) -> list[Tensor]:
        """y_j = shrink x_j (W + scales[j] z_j)^T + biases[j] + thin products."""

    def linear_bytes(self, counts: Sequence[int], room: int | None = None) -> int:
        """Memory that linear() takes for so many rows of each side, beside its results."""


def check_rows(spans: Sequence[Span], outs: Sequence[Tensor] | None, verb: str = "lowrank_") -> None:
    """A row that is looked up twice would be changed twice: looked-up rows are written to outs only."""
    for i, span in enumerate(spans):
        if span.rows is not None and outs is None:
            raise ValueError(f"{verb}: spans[{i}] has rows and there are no outs; looked-up rows are written to outs only")
