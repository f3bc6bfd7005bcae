"""The arguments of a launch as tuples: its tensors, its random numbers, and the terms that it adds.

Every backend takes the same tuples (base.py). They are made for one call and hold no checks: validation.py
has those.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Span(NamedTuple):
    """The place of one tensor's elements in the random stream.

    A shard, a tile, a slice or a set of looked-up rows reads the values that it would read as part of the
    whole parameter.

    who    parameter id
    first  number of the tensor's first element in the unsharded parameter (row-major)
    pitch  for a slice of columns of a matrix: the distance of two rows in the unsharded parameter, in
           elements; None: element j of the flattened tensor has number first + j
    rows   int64 row numbers: the launch works on rows ``theta[rows]`` of a 2-D theta, which keep their own
           numbers
    """

    who: int
    first: int = 0
    pitch: int | None = None
    rows: Tensor | None = None


class Batch(NamedTuple):
    """The tensors of a launch.

    tensors    float32, bfloat16 or float16, on one device
    spans      one for each tensor
    rounding   'nearest'; 'stochastic', with 16 random bits of the stream; or 'residual', with the low bits
               of a float32
    residuals  int16, one for each tensor: the low bits of bfloat16 tensors. They are written if the tensors
               are. Those of other dtypes are ignored. None: there are none
    scales     for each tensor the factors s of its elements, or None. Wherever a verb makes z, it takes
               z' = float32(z * s). float32, bfloat16 or bool (a mask, 1 byte an element), contiguous, shaped
               like the tensor (like the whole matrix, where rows are looked up). lowrank_ makes no z and
               refuses them

    A scale is a tensor, and no rule that a kernel evaluates, because of what it costs beside z: 1 byte an
    element is read for a mask. A threshold on frozen weights would read 2, and a mask from the stream would
    compute another Philox block for 8 elements. So both are made once, when they change, by operations of
    torch, and cost 1 byte of memory an element (directions/scaled.py).
    """

    tensors: Sequence[Tensor]
    spans: Sequence[Span]
    rounding: str = "nearest"
    residuals: Sequence[Tensor] | None = None
    scales: Sequence[Tensor | None] | None = None

    def scale(self, i: int) -> Tensor | None:
        """Returns the factors of tensor i."""
        return None if self.scales is None else self.scales[i]

    @property
    def is_scaled(self) -> bool:
        """Whether some tensor has factors."""
        return self.scales is not None and any([scale is not None for scale in self.scales])

    def low_bits(self, i: int) -> Tensor | None:
        """Returns the residual that the rounding of tensor i reads and writes."""
        if self.residuals is None or self.rounding != "residual" or self.tensors[i].dtype != torch.bfloat16:
            return None
        return self.residuals[i]


class Noise(NamedTuple):
    """The random numbers of a launch: z_k(seed, who, *draws[k]) with the `who` of each tensor's span.

    direction  the distribution of z. None: the launch makes no z, but rounds at random
    draws      pairs (step, draw). Stochastic rounding spends the bits of the last one's step
    clock      int64[1] on the tensors' device, or None for 0. Its value when the kernel runs is added to
               every step (mod 2^32). A call that was captured in a CUDA graph finds another z after the
               clock was advanced
    """

    direction: Any
    seed: int
    draws: Sequence[tuple[int, int]]
    clock: Tensor | None = None


class Terms(NamedTuple):
    """A sum of draws, for axpy_: decay * theta + sum_k coefficients[k] z_k.

    coefficients  float32[K] on the tensors' device, one for each draw
    decay         factor of the old weights; a sequence with `each`
    each          a divisor of K: K / each sums one after the other, each with its decay and rounding. 0: one
                  sum
    control       float32 [3], see Projected: its decay stands in the place of `decay`, and each is 0. None:
                  the decay is known to the host
    """

    coefficients: Tensor
    decay: float | Sequence[float] = 1.0
    each: int = 0
    control: Tensor | None = None

    def rounded(self) -> tuple[int, list[float]]:
        """Returns the terms of a sum, and for every term the factor of the value before it is added."""
        count = self.coefficients.shape[0]
        if count == 1:  # the common call
            return 1, [self.decay if isinstance(self.decay, (int, float)) else self.decay[0]]
        terms = self.each or count
        decays = [self.decay] * (count // terms) if isinstance(self.decay, (int, float)) else self.decay
        rest = [1.0] * (terms - 1)
        return terms, [number for decay in decays for number in (decay, *rest)]


class Update(NamedTuple):
    """A rule, for update_, on g = sum_k coefficients[k] z_k.

    rule     a key of STATES
    scalars  float32 on the tensors' device, SCALARS[rule] in order
    states   a list of float32 tensors for each of STATES[rule], contiguous, shaped like the tensors of the
             launch
    control  float32 [3], see Projected: only whether the step is finite counts, and the decay is that of the
             scalars
    """

    coefficients: Tensor
    rule: str
    scalars: Tensor
    states: Sequence[Sequence[Tensor]]
    control: Tensor | None = None


class Outer(NamedTuple):
    """Low-rank products, for lowrank_: decay * theta + scales[i] * lefts[i] rights[i]^T.

    lefts, rights  float32 (m, r) and (n, r) for each tensor, contiguous
    control        float32 [3], see Projected: its decay stands in the place of `decay`
    """

    lefts: Sequence[Tensor]
    rights: Sequence[Tensor]
    scales: Sequence[float]
    decay: float = 1.0
    control: Tensor | None = None


class Projection(NamedTuple):
    """What turns the losses of a step into the numbers of an update, for project().

    losses   float64 [m, n]: n points, read for each of m micro-batches, whose mean counts
    weights  float64 [K, n]: c_k = (sum_j weights[k, j] losses[j]) / eps. A weight of 0 reads no loss. None:
             the losses are the coefficients c_k themselves, K = n, and eps and clip play no part
    scalars  float64 [6], PROJECTED in order:
             eps     > 0, in weights
             lr      >= 0, of the parameter group;  weight_decay  >= 0
             clip    bound on |c_k|; inf: none
             sign    -1 to descend, 1 to ascend
             count   what the sum over draws is divided by
    """

    losses: Tensor
    weights: Tensor | None
    scalars: Tensor


PROJECTED = ("eps", "lr", "weight_decay", "clip", "sign", "count")


class Projected(NamedTuple):
    """What project() makes, on the device of the losses.

    coefficients  float64 [K]: c_k, rounded to float32 and clipped where there are weights
    weights       float64 [K]: w_k = sign c_k / count, what a rule is told
    amounts       float32 [K]: lr w_k, what axpy_ adds
    control       float32 [3], {decay, go, finite}, which verbs read when their kernels run
                  decay   1 - lr weight_decay
                  go      0: decay is 1 and every amount is 0, or the step is not finite; else 1
                  finite  0: a c_k, w_k, lr w_k, lr or the decay is inf or NaN in float32; else 1

    In a step that is not finite the decay is 1, and weights and amounts are 0; the coefficients stay as they
    were computed. Where go is 0, axpy_ and lowrank_ change no bit of theta and its low bits, and count 0;
    where finite is 0, update_ changes no bit of theta, its low bits and its states, and counts 0. lowrank_
    with a control has no outs.
    """

    coefficients: Tensor
    weights: Tensor
    amounts: Tensor
    control: Tensor


def projected(losses: Tensor, weights: Tensor | None) -> tuple[Tensor, Projected]:
    """Returns memory for project() in one piece, and its parts as csrc/project.h writes them.

    Behind the parts there is room for the means of several micro-batches."""
    reads, points = losses.shape
    count = points if weights is None else weights.shape[0]
    means = points if reads > 1 and weights is not None else 0
    rest = (count + 4) // 2 + means  # float64s that hold count + 3 float32, and the means
    out = torch.empty(2 * count + rest, dtype=torch.float64, device=losses.device)
    coefficients, told, single = out.split_with_sizes((count, count, rest))
    parts = single.view(torch.float32).split_with_sizes((count, 3, 2 * rest - count - 3))
    return out, Projected(coefficients, told, *parts[:2])


class Weight(NamedTuple):
    """The matrix of a product, shrink * W, (m, n).

    transposed  W is (n, m), and the product is x W instead of x W^T
    """

    tensor: Tensor
    span: Span
    transposed: bool = False
    shrink: float = 1.0


class Thin(NamedTuple):
    """Thin products beside x W^T: for sides[j], y += (x first^T) middles[j] last^T, float32."""

    sides: Sequence[int]
    # (r, columns of x), contiguous: products from rows are several times faster than from 8 columns
    first: Tensor
    middles: Tensor  # (len(sides), r, q)
    last: Tensor  # (columns of y, q)


class Sides(NamedTuple):
    """The operands beside W of y_j = x_j (W + scales[j] z_j)^T + biases[j], one of each for a side.

    thins  thin products that are added to y
    """

    xs: Sequence[Tensor]
    biases: Sequence[Tensor | None]
    scales: Sequence[float] = ()
    thins: Sequence[Thin] = ()


def step_at(step: int, clock: Tensor | None) -> int:
    """Returns the step that a call means, for backends that run on the host."""
    return step if clock is None else (step + int(clock)) & 0xFFFFFFFF


def rounding_bits(noise: Noise | None) -> tuple[int, int]:
    """Returns the seed and the step of the bits that stochastic rounding of lowrank_ spends; the clock is
    added to the step."""
    return (0, 0) if noise is None else (noise.seed, noise.draws[-1][0])


__all__ = [
    "PROJECTED", "Batch", "Noise", "Outer", "Projected", "Projection", "Sides", "Span", "Terms", "Thin",
    "Update", "Weight", "projected", "rounding_bits", "step_at",
]  # fmt: skip
