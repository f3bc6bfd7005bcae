"""Numbers of a small space, carried over when the basis of a matrix changes. Sums have an order that depends
on sizes alone."""

from __future__ import annotations

import torch
from torch import Tensor

from ..backends import Batch, Outer, Span
from ..directions import Matrix
from ..directions.orthonormal import tree_sum
from ..group import Group


def carried(
    group: Group, matrix: Matrix, left: Tensor | None, right: Tensor | None, middle: Tensor,
    squares: bool = False
) -> Tensor:  # fmt: skip
    """Returns numbers of the present basis for those of the basis (left, right), float32.

    They stand for the part of L_old C R_old^T that the present basis holds:

        C drawn  (U_new^T U_old) M (V_old^T V_new)        U drawn  M (V_old^T V_new)        V drawn  M
                 (U_old^T U_new)

    An overlap is divided by the mean square of a column: n for a normal V (Chen et al. 2025, LOZO-M), 1 for
    an orthonormal one. squares: M holds mean squares of independent numbers, and overlaps are squared
    elementwise."""
    turns = []
    for old, new, length in zip((left, right), (matrix.left, matrix.right), matrix.lengths):
        turn = None if old is None or new is None else _gram(old, new) / length
        turns.append(turn * turn if squares and turn is not None else turn)
    before, after = turns
    if before is None or after is None:
        turn = after if before is None else before
        return middle if turn is None else _times(group, middle, turn)
    return _times(group, _times(group, before.mT, middle), after)


def _gram(a: Tensor, b: Tensor) -> Tensor:
    """a^T b of two tall matrices, float32, with sums whose order depends on the sizes alone."""
    return torch.stack(
        [tree_sum(a.double() * b[:, j : j + 1].double()) for j in range(b.shape[1])], dim=1
    ).float()


def _times(group: Group, a: Tensor, b: Tensor) -> Tensor:
    """a b by the lowrank_ verb."""
    out = torch.zeros(a.shape[0], b.shape[1], dtype=torch.float32, device=a.device)
    group.backend.lowrank_(Batch([out], [Span(0)]), Outer([a.contiguous()], [b.t().contiguous()], [1.0]))
    return out


__all__ = ["carried"]
