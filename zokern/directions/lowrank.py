"""Low-rank directions: z = s U C V^T for matrices, so that z is r (m + n) numbers and never m n.

Each factor is named, and is either kept for an interval or drawn at every step. The published methods are
choices of the three:

    Subspace   U, V kept, orthonormal    C drawn, normal      SubZero; zokern.methods.pgap adds measured U, V
    Lazy       V kept, U drawn, normal   no C                 LOZO
    Diagonal   U, V kept for the run     C drawn, diagonal    TeZO
    LowRank    U kept, V drawn           no C                 ZO-Muon
    LowRank    U, V drawn                no C                 EGGROLL

Parameters that are not matrices take a dense direction.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Protocol

import torch
from torch import Tensor

from ..checks import whole_number
from ..part import Part
from ..stream import BASIS, draw_word
from .normal import Normal
from .orthonormal import orthonormal


@dataclass
class Matrix:
    """One factored parameter: its basis, and the updates that wait for the next write.

    rows, columns  of the matrix that is factored: the parameter's own, or the near-square view of a flattened
                   adapter
    left, right    the basis, float32 (rows, rank) and (columns, rank), contiguous; None where a draw is U or
                   V itself
    lengths        mean square of a column of left and right: its number of rows where it is normal, 1 where
                   it is orthonormal
    born           step at which the basis was drawn, -1 before the first
    pending        sum of updates since the weights were written: theta = shrink W + L C R^T, (L, C, R) =
                   factors(pending)
    shrink         product of the weight decays since then
    extra          what a direction or a rule keeps beside the basis (a spectrum, factor momentum)
    """

    name: str
    who: int
    rows: int
    columns: int
    rank: int
    device: torch.device
    left: Tensor | None = None
    right: Tensor | None = None
    lengths: tuple[float, float] = (1.0, 1.0)
    born: int = -1
    pending: Tensor | None = None
    shrink: float = 1.0
    version: int = -1  # of the weights when updates began to wait
    extra: dict[str, Any] = field(default_factory=dict)

    def thin(self, side: str) -> Tensor:
        """The transpose of the basis' left or right side, contiguous: what x is multiplied with."""
        factor = getattr(self, side)
        kept = self.extra.get(side)
        if kept is None or kept[0] is not factor:
            self.extra[side] = kept = (factor, factor.t().contiguous())
        return kept[1]

    @property
    def shape(self) -> tuple[int, int]:
        return self.rows, self.columns

    def factors(self, middle: Tensor) -> tuple[Tensor, Tensor | None, Tensor]:
        """Returns (L, C, R) of a sum of draws, which stands for L C R^T; C is None where a draw is a factor,
        and (L, R) where it is both."""
        left = middle[: self.rows] if self.left is None else self.left
        right = middle[-self.columns :] if self.right is None else self.right
        return left, None if self.left is None or self.right is None else middle, right


class Stack(list[Tensor]):
    """Tensors of one shape as a list; `whole` holds all of them, so that one operation does for all.

    kept  see backends.TensorList"""

    kept: dict | None = None

    def __init__(self, whole: Tensor) -> None:
        super().__init__(whole.unbind(0))
        self.whole = whole


class Source(Protocol):
    """Numbers of the stream for some matrices; the optimizer provides it."""

    def __call__(
        self, matrices: Sequence[Matrix], shapes: Sequence[tuple[int, ...]], step: int, draw: int
    ) -> list[Tensor]:
        """Returns standard normals of (seed, each matrix's name, step, draw word), float32, in one launch; a
        Stack where they have one shape."""

    def sketch(
        self, matrix: Matrix, draws: Sequence[tuple[int, int]], weights: Sequence[float] | Tensor,
        omega: Tensor, transposed: bool = False
    ) -> Tensor:  # fmt: skip
        """Returns G omega, or G^T omega, of G = sum_k weights[k]
        z_k with dense normal z_k of (step, draw word), float32."""


@dataclass(frozen=True)
class Kept:
    """A factor that stays.

    values  'normal', or 'orthonormal' columns
    every   steps between two draws; None: one draw for the run"""

    values: str = "normal"
    every: int | None = None


@dataclass(frozen=True)
class Drawn:
    """A factor of normals that is drawn for every step and query.
    diagonal: of the core, its diagonal alone."""

    diagonal: bool = False


def matrix_shape(tensor: Tensor) -> tuple[int, int] | None:
    """(m, n) of a parameter that is a matrix once dimensions of size 1 are dropped;
    None for vectors and stacks."""
    shape = [size for size in tensor.shape if size != 1]
    return (shape[0], shape[1]) if len(shape) == 2 else None


def near_square(count: int) -> tuple[int, int]:
    """The factors (a, b) of a number of elements, a <= b, with the least b - a."""
    a = int(count**0.5)
    while count % a:
        a -= 1
    return a, count // a


LEFT, RIGHT = draw_word(0, BASIS), draw_word(1, BASIS)
# side of a matrix above which it is no factor of an adapter, whatever r is: full weights such as the keys of
# grouped attention are not narrower
ADAPTER = 64
RESHAPES, NORMS = ("adapters", "all", "none"), ("matched", "unit")


class LowRank(Part):
    """z = s U C V^T of a matrix (m, n), with U (m, r), C (r, r) and V (n, r), float32.

    u, v     Kept or Drawn; both Kept as often;  c  Drawn, or None: the identity, where U or V is drawn
    rank     r of every matrix, at most min(m, n)
    norm     'matched': s makes E||z||_F^2 = m n, as for a dense z, so that one eps and one lr fit all
             directions; 'unit': s = 1
    reshape  'adapters': a matrix with a side of at most 4 r and at most 64 (a LoRA factor) is factored as
             the near-square view (a, b), a b = m n, of its flattened elements; 'all'; 'none'
    dense    the direction of everything else; None: normal

    Every kept factor is a function of (seed, name, step of its draw), every drawn one of (seed, name, step,
    query). Where U and V are drawn, a draw is (m + n, r) numbers: those of U, then those of V. A sum of such
    draws has the columns of all of them. Raises ValueError for factors that do not fit together, and for
    numbers out of range."""

    name = "lowrank"

    def __init__(
        self,
        u: Kept | Drawn,
        c: Drawn | None,
        v: Kept | Drawn,
        *,
        rank: int,
        norm: str = "matched",
        reshape: str = "none",
        dense: Any = None,
    ) -> None:
        every = {factor.every for factor in (u, v) if isinstance(factor, Kept)}
        if (c is not None) != (isinstance(u, Kept) and isinstance(v, Kept)) or len(every) > 1:
            raise ValueError(
                f"u is {u!r}, c is {c!r} and v is {v!r}; expected c Drawn with u and v Kept for as many "
                "steps, or c None with u or v Drawn"
            )
        if reshape not in RESHAPES:
            raise ValueError(f"reshape is {reshape!r}; expected one of {list(RESHAPES)}")
        if norm not in NORMS:
            raise ValueError(f"norm is {norm!r}; expected one of {list(NORMS)}")
        kept = every.pop() if every else 1  # nothing is kept: every step has a basis of its own
        self.interval = None if kept is None else whole_number("interval", kept)
        self.rank = whole_number("rank", rank)
        self.u, self.c, self.v, self.norm, self.reshape = u, c, v, norm, reshape
        self.dense = Normal() if dense is None else dense

    @property
    def is_diagonal(self) -> bool:
        """Whether a draw is r numbers along a basis that lasts the whole run."""
        return self.c is not None and self.c.diagonal and self.interval is None

    @property
    def joins(self) -> bool:
        """Whether U and V are drawn, so that a sum of draws is no draw: it has the columns of all of them."""
        return isinstance(self.u, Drawn) and isinstance(self.v, Drawn)

    def shape(self, tensor: Tensor) -> tuple[int, int] | None:
        """Returns rows and columns of the matrix that a parameter is; None: it takes a dense z."""
        shape = matrix_shape(tensor)
        if shape is not None and (
            self.reshape == "all"
            or (self.reshape == "adapters" and min(shape) <= min(4 * self.rank, ADAPTER))
        ):
            return near_square(tensor.numel())
        return shape

    def rank_of(self, name: str) -> int:
        """Returns the rank asked for a parameter."""
        return self.rank

    def draw_shape(self, matrix: Matrix) -> tuple[int, int]:
        """Returns the shape of a draw: of C, of U or V where one is drawn, of U above V where both are."""
        sides = ((self.u, matrix.rows), (self.v, matrix.columns))
        return sum(size for factor, size in sides if isinstance(factor, Drawn)) or matrix.rank, matrix.rank

    def basis_step(self, step: int) -> int:
        """Returns the step at which the basis in use at `step` was drawn."""
        return 0 if self.interval is None else step - step % self.interval

    def refresh(self, matrices: Sequence[Matrix], source: Source, step: int) -> None:
        """Draws the kept factors of a basis step."""
        for side, factor, word in (("left", self.u, LEFT), ("right", self.v, RIGHT)):
            if not isinstance(factor, Kept):
                continue
            found = source(
                matrices, [(m.rows if side == "left" else m.columns, m.rank) for m in matrices], step, word
            )
            for matrix, values in zip(
                matrices, orthonormal(found) if factor.values == "orthonormal" else found
            ):
                setattr(matrix, side, values)
        for matrix in matrices:
            matrix.lengths = self._length(self.u, matrix.rows), self._length(self.v, matrix.columns)
            matrix.born = step

    @staticmethod
    def _length(factor: Kept | Drawn, size: int) -> float:
        return float(size) if isinstance(factor, Kept) and factor.values == "normal" else 1.0

    def spread(self, matrix: Matrix) -> float:
        """Returns the root mean square of an element of z, which says whether rounding swallows it."""
        return self.scale(matrix) / self._matching(matrix)

    def scale(self, matrix: Matrix) -> float:
        """Returns s."""
        return self._matching(matrix) if self.norm == "matched" else 1.0

    def stretch(self, matrix: Matrix, square: float) -> float:
        """Returns s of numbers X in the place of a draw whose squares sum to `square`: s U X V^T is as long
        as a dense z; 1 with norm 'unit'."""
        numbers = (
            matrix.rank if self.c is not None and self.c.diagonal else math.prod(self.draw_shape(matrix))
        )
        return self.scale(matrix) * math.sqrt(numbers / square) if self.norm == "matched" else 1.0

    def _matching(self, matrix: Matrix) -> float:
        """Returns the s with which z has the length of a dense one.

        An element of U C V^T is a sum of r terms, or r^2. A term's mean square is 1 over the rows of each
        orthonormal factor."""
        terms = matrix.rank**2 if self.c is not None and not self.c.diagonal else matrix.rank
        sides = ((self.u, matrix.rows), (self.v, matrix.columns))
        sizes = [
            size for factor, size in sides if isinstance(factor, Kept) and factor.values == "orthonormal"
        ]
        return math.sqrt(math.prod(sizes)) / math.sqrt(terms)

    def draws(self, matrices: Sequence[Matrix], source: Source, step: int, draw: int) -> list[Tensor]:
        """Returns, for each matrix, what is drawn of s U C
        V^T with s in it (in U where U and V are), float32."""
        sizes = [m.extra.get("sizes") or self._sizes(m) for m in matrices]
        if self.c is not None and self.c.diagonal:
            found = [torch.diag(tau) for tau in source(matrices, [(m.rank,) for m in matrices], step, draw)]
        else:
            found = source(matrices, [shape for shape, _ in sizes], step, draw)
        scales = [scale for _, scale in sizes] if self.norm == "matched" else []
        if scales and isinstance(found, Stack) and found.whole.is_cpu and not self.joins:
            found.whole.mul_(_column(tuple(scales)))  # where torch's foreach is a loop
        elif scales:  # s U V^T where both are drawn
            moved = [x[: m.rows] for x, m in zip(found, matrices)] if self.joins else found
            torch._foreach_mul_(moved, scales)
        return found

    def _sizes(self, matrix: Matrix) -> tuple[tuple[int, int], float]:
        """Returns the shape of a draw of a matrix, and s, which the matrix keeps."""
        matrix.extra["sizes"] = found = self.draw_shape(matrix), self.scale(matrix)
        return found

    def plus(
        self, matrices: Sequence[Matrix], sums: list[Tensor], draws: list[Tensor], amount: float | Tensor
    ) -> list[Tensor]:
        """Returns sums + amount draws in the small space, float32; sums: those of earlier draws, or empty.

        amount  a number, or float32 [] on the draws' device"""
        if self.joins:
            terms = [torch.cat((draw[: m.rows] * amount, draw[m.rows :])) for m, draw in zip(matrices, draws)]
            return [torch.cat(both, 1) for both in zip(sums, terms)] if sums else terms
        terms = list(torch._foreach_mul(draws, amount))
        return list(torch._foreach_add(sums, terms)) if sums else terms


@lru_cache(maxsize=64)
def _column(numbers: tuple[float, ...]) -> Tensor:
    return torch.tensor(numbers, dtype=torch.float32, device="cpu").view(-1, 1, 1)


class Measured(LowRank):
    """A low-rank direction whose kept factors come from losses, as P-GAP's.
    `state` is what a resumed run needs of them."""

    def measure(self, oracle: Any, plan: Any) -> None:
        """Reads what the basis of this step needs; called before the bases of a step are drawn."""
        raise NotImplementedError

    def forget(self, needed: set[int | None]) -> None:
        """Drops what belongs to other bases than those of the steps `needed` and the one in use."""
        raise NotImplementedError


class Subspace(LowRank):
    """z = s U Z V^T: orthonormal U and V kept for an interval, Z drawn (Yu et al. 2025, SubZero).

    interval  steps between two bases
    norm      'matched': s = sqrt(m n) / r, the reference's code; 'unit': s = 1, the paper's formula"""

    name = "subspace"

    def __init__(
        self,
        rank: int = 8,
        interval: int = 2000,
        norm: str = "matched",
        reshape: str = "adapters",
        dense: Any = None,
    ) -> None:
        kept = Kept("orthonormal", whole_number("interval", interval))
        super().__init__(kept, Drawn(), kept, rank=rank, norm=norm, reshape=reshape, dense=dense)


class Lazy(LowRank):
    """z = s U V^T: U drawn, V kept for an interval, both normal (Chen et al. 2025, LOZO).

    interval  steps between two V (the paper's nu)
    norm      'matched': s = 1 / sqrt(r); 'unit': s = 1, the reference's code, E||z||_F^2 = m n r (the paper:
              s = 1 / r)"""

    name = "lazy"

    def __init__(self, rank: int = 2, interval: int = 50, norm: str = "matched", dense: Any = None) -> None:
        super().__init__(
            Drawn(), None, Kept(every=whole_number("interval", interval)), rank=rank, norm=norm, dense=dense
        )


class Diagonal(LowRank):
    """z = s U diag(tau) V^T: normal U and V that last the run, tau drawn (Sun et al. 2025, TeZO).

    norm   'matched': s = 1 / sqrt(r); 'unit': s = 1, the paper's formula, E||z||_F^2 = m n r
    ranks  r by parameter name, where it differs from `rank` (zokern.methods.tezo.spectral_ranks makes one)"""

    name = "diagonal"

    def __init__(
        self, rank: int = 32, ranks: Mapping[str, int] | None = None, norm: str = "matched", dense: Any = None
    ) -> None:
        super().__init__(Kept(), Drawn(diagonal=True), Kept(), rank=rank, norm=norm, dense=dense)
        self.ranks = {name: whole_number(f"ranks[{name!r}]", r) for name, r in (ranks or {}).items()}

    def rank_of(self, name: str) -> int:
        return self.ranks.get(name, self.rank)


__all__ = [
    "LEFT", "RIGHT", "Diagonal", "Drawn", "Kept", "Lazy", "LowRank", "Matrix", "Measured", "Source",
    "Stack", "Subspace", "matrix_shape", "near_square",
]  # fmt: skip
