"""Orthonormal columns with the same bits on every machine: Gram-Schmidt in float64 with sums in a fixed tree.

LAPACK's QR gives other last bits on another machine, thread count or device, and with them another run. Here
every operation is elementwise, so IEEE alone decides: a sum folds the upper half of the rows onto the lower
half until one is left.
"""

from __future__ import annotations

import torch
from torch import Tensor

BATCH = 1 << 22  # elements of a stack of matrices that are worked on at a time


def tree_sum(x: Tensor) -> Tensor:
    """Sum over dimension -2, in an order that depends on its size alone."""
    count = x.shape[-2]
    while count > 1:
        half = (count + 1) // 2
        upper = x[..., half:count, :]
        lower = x[..., : count - half, :] + upper
        x = lower if count % 2 == 0 else torch.cat((lower, x[..., count - half : half, :]), dim=-2)
        count = half
    return x[..., 0, :]


def _orthonormal(x: Tensor) -> Tensor:
    q = x.double()
    rank = q.shape[-1]
    for _ in range(2):  # once loses orthogonality to rounding, twice is enough (Giraud et al. 2005)
        for k in range(rank):
            column = q[..., k : k + 1]
            norm = tree_sum(column * column).unsqueeze(-2)
            # torch's vector square root is not correctly rounded on every CPU; Newton's step on a float64
            # seed is elementwise IEEE
            root = norm.sqrt()
            root = 0.5 * (root + norm / root)
            column = column / root
            q = torch.cat((q[..., :k], column, q[..., k + 1 :]), dim=-1)
            if k + 1 < rank:
                rest = q[..., k + 1 :]
                q[..., k + 1 :] = rest - column * tree_sum(column * rest).unsqueeze(-2)
    return q.float()


def orthonormal(xs: list[Tensor]) -> list[Tensor]:
    """For each float32 (m, r) with m >= r and independent columns: float32 (m, r), Q of its QR decomposition
    with diag(R) > 0.

    Of a matrix of standard normals this is Haar distributed (Mezzadri 2007).
    Equal bits on every device and thread count.
    """
    results = list(xs)
    by_shape: dict[tuple, list[int]] = {}
    for i, x in enumerate(xs):
        by_shape.setdefault((*x.shape, x.device), []).append(i)
    for (rows, rank, _), members in by_shape.items():
        each = max(1, BATCH // max(1, rows * rank))
        for part in range(0, len(members), each):
            stack = _orthonormal(torch.stack([xs[i] for i in members[part : part + each]]))
            for i, q in zip(members[part : part + each], stack):
                results[i] = q.contiguous()
    return results


__all__ = ["orthonormal", "tree_sum"]
