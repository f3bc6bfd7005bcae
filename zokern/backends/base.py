"""The contract of a backend: a method for each verb, which works on a list of tensors in one launch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from .launch import Batch, Noise, Outer, Projected, Projection, Sides, Span, Terms, Update, Weight

DTYPES = ("float32", "bfloat16", "float16")
DIRECTIONS = {"normal": 0, "rademacher": 1}  # those that the kernels know, and their numbers there
ROUNDINGS = ("nearest", "stochastic", "residual")
# what update_ keeps, by rule
STATES: dict[str, tuple[str, ...]] = {"momentum": ("m",), "adam": ("m", "v"), "sign": ()}
SCALARS = {  # and the numbers that it is told
    "momentum": ("decay", "lr", "beta", "alpha"),
    "adam": ("decay", "lr", "beta1", "alpha1", "beta2", "alpha2", "inside", "correction", "eps"),
    "sign": ("decay", "lr"),
}


class Backend(Protocol):
    """Runs the verbs. Elementwise verbs are equal bit for bit on every backend, but for NaN payloads.

    A nonfinite count is int64[1]: how many results are inf or NaN. Every z below is float32(z * s) of a
    tensor with factors (Batch.scales).
    """

    name: str
    most_rank: int | None = None  # of the factors that lowrank_ takes

    def philox4x32(self, counter: Tensor, key: tuple[int, int], rounds: int) -> Tensor:
        """Returns int64[n, 4] words for int64[n, 4] counters."""

    def draw(self, batch: Batch, noise: Noise) -> None:
        """Writes z of the one draw to contiguous tensors, rounded to their dtype (nearest)."""

    def axpy_(self, batch: Batch, noise: Noise, terms: Terms) -> Tensor:
        """Computes theta <- decay * theta + sum_k coefficients[k] z_k in place. Returns the nonfinite count.

        float32 inside: t = round(decay * theta), then t = fma(coefficients[k], z_k, t) in order, then one
        rounding to the dtype. ``stochastic`` spends the 16 bits of (who, step of the last draw, purpose
        rounding).

        terms.each: the bits of K / each calls with `each` terms each, in one pass. Every group of terms
        multiplies by its decay, adds, and rounds, with the bits of its own last step. The count is that of
        the last results.
        """

    def update_(self, batch: Batch, noise: Noise, update: Update) -> Tensor:
        """Computes a rule in place, in one pass. Returns how many new weights are inf or NaN.

            g = sum_k coefficients[k] z_k          from 0, by fma in draw order
            momentum  m <- fma(alpha, g, round(beta m))
                      move = m
            adam      m <- fma(alpha1, g, round(beta1 m))
                      v <- fma(alpha2, round(g g), round(beta2 v))
                      move = m / fma(sqrt(v + inside), correction, eps)
            sign      move = 1 where g > 0, -1 where g < 0, and g itself where it is 0 or NaN
            theta <- round(fma(lr, move, round(decay theta)))

        Everything is float32, and each operation is rounded once, root and quotient too. The last rounding
        is that of axpy_ and spends the same bits. A call that was captured in a CUDA graph reads new scalars
        at each replay. There are no looked-up rows.
        """

    def project(self, projection: Projection) -> Projected:
        """Turns losses into the coefficients, amounts and control of an update, where the losses lie.

            L_j = (sum_i losses[i, j]) / m
            c_k = float32((sum_j weights[k, j] L_j) / eps), cut to +-clip; without weights c_k = L_k
            w_k = sign c_k / count      a_k = float32(lr w_k)      decay = float32(1 - lr weight_decay)

        Everything is float64, each operation is rounded once, without contraction. Sums go in order from
        their first term; a weight of 0 is no term, and without terms c_k is 0. No value reaches the host, and
        a call can be captured in a CUDA graph. Equal bit for bit on every backend. Projected says what is
        made of numbers that are not finite.
        """

    def perturb(
        self, batch: Batch, noise: Noise, scales: Sequence[float], outs: Sequence[Sequence[Tensor]]
    ) -> None:
        """Computes outs[j][i] <- round(theta_i + scales[j] z) for one or two scales and one draw.

        theta and its low bits are only read. outs are contiguous, of theta's dtype or float32, and shaped
        like theta (or like theta[rows]).
        """

    def lowrank_(
        self, batch: Batch, factors: Outer, noise: Noise | None = None, outs: Sequence[Tensor] | None = None
    ) -> Tensor:
        """Computes theta <- decay * theta + scales[i] * left right^T in place. Returns the nonfinite count.

        Element number e of the unsharded matrix (spans[i]: first + position, or through pitch and rows) is
        row e div n and column e mod n, whatever theta's own shape. A shard, a flattened adapter and a slice
        of columns read the values that they would read as part of the whole.

        float32 inside: s = fma(left[e div n, k], right[e mod n, k], s) for k = 0 .. r-1 from s = 0; then
        t = fma(scale, s, round(decay * theta)); then one rounding to the dtype, as in axpy_. ``stochastic``
        spends the bits of (who, step of the noise, purpose rounding). Equal bit for bit on ``reference`` and
        ``cpu``. ``cuda`` and ``triton`` sum on the matrix units, in another order and with factors rounded
        as their files say, to a bound.

        outs   take the results instead: contiguous, of theta's dtype or float32, shaped like theta or like
               theta[rows]. theta is only read; with rounding ``residual`` its low bits are read too, and
               outs are rounded to nearest. Looked-up rows need outs.
        """


class Multiplies(Backend, Protocol):
    """A backend with products of its own, which zokern/gemm/fused.py uses: see Cpu and Triton.

    ``thin_rank``, if it is there, bounds the ranks of the thin products of a side together."""

    def linear(
        self,
        weight: Weight,
        sides: Sides,
        noise: Noise | None = None,
        room: int | None = None,
        outs: Sequence[Tensor] | None = None,
    ) -> list[Tensor]:
        """Returns y_j = shrink x_j (W + scales[j] z_j)^T + biases[j] + thin products, with z_j of draws[j].

        All draws have one step. A side of scale 0 reads W itself, and so do all sides without noise.
        """

    def linear_bytes(self, counts: Sequence[int], room: int | None = None) -> int:
        """Returns the memory that linear() takes for so many rows of each side, beside its results."""


__all__ = ["DIRECTIONS", "DTYPES", "ROUNDINGS", "SCALARS", "STATES", "Backend", "Multiplies", "Span"]
