"""Updates that wait in the small space of a factored matrix, and their write. Every rule that defers goes
through here."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..backends import Batch, Outer
from ..device_numbers import on_device
from ..directions import Stack
from ..group import Group
from ..plan import Plan


def total(plan: Plan, group: Group, amounts: Sequence[float] | Tensor) -> list[Tensor]:
    """sum_k amounts[k] draw_k of each matrix, in the small space, float32, in the order of the queries.

    amounts  rounded to float32; a tensor is float32 [draws], on the group's device"""
    sums = summed(plan, group, amounts)
    return list(sums[0].unbind(0)) if is_whole(sums) else sums


def is_whole(updates: Sequence[Tensor]) -> bool:
    """Whether one tensor (matrices, r, r) holds the updates of all matrices."""
    return len(updates) == 1 and updates[0].dim() == 3


def summed(plan: Plan, group: Group, amounts: Sequence[float] | Tensor) -> list[Tensor]:
    """Returns total(), of even matrices in one tensor."""
    assert group.matrices is not None and plan.factored is not None
    if not isinstance(amounts, Tensor):
        amounts, _ = on_device(amounts, group.theta[0].device)
    sums: list[Tensor] = []
    for word, amount in zip(plan.words, amounts.unbind(0)):
        sums = plan.factored.plus(group.matrices, sums, group.stacked(plan, word), amount)
    return sums


def deposit(plan: Plan, group: Group, updates: Sequence[Tensor], decay: float, defer: bool) -> Tensor | int:
    """pending <- decay pending + update, shrink <- decay shrink; written at once unless it may wait.

    updates  of each matrix, or of all in one tensor (summed)

    Returns how many weights that were written are inf or NaN, or how many matrices wait with such
    updates."""
    assert group.matrices is not None
    earlier = [matrix.pending for matrix in group.matrices if matrix.pending is not None]
    assert len(earlier) in (0, len(group.matrices)), "matrices of a group are deferred together"
    sums, whole = list(updates), is_whole(updates)
    if earlier:
        waiting = group.together() if whole else earlier
        sums = list(torch._foreach_add(waiting if decay == 1.0 else torch._foreach_mul(waiting, decay), sums))
    each = Stack(sums[0]) if whole else sums
    group.memo["pending"] = each if whole else None
    for matrix, tensor, update in zip(group.matrices, group.tensors, each):
        if matrix.pending is None:
            matrix.version = tensor._version
        matrix.pending = update
        matrix.shrink *= decay
    if not defer:
        return group.write(plan.noise([(plan.step, 0)], None), plan.rounding)
    if whole:
        largest = sums[0].abs().amax((1, 2))
    else:
        largest = torch.stack(torch._foreach_norm(sums, math.inf))
    return (~torch.isfinite(largest)).sum()


def add_(
    plan: Plan, group: Group, i: int, values: Tensor, scale: float, decay: float, start: int = 0,
    control: Tensor | None = None
) -> Tensor | int:  # fmt: skip
    """theta <- decay theta + scale values for `values.numel()` elements of tensor i from number `start` on,
    one rounding.

    control  in device memory, of which the decay and the flag count where it is given (Projected)

    values is float32 and contiguous; start is a multiple of its size, and of a row's where the tensor is a
    matrix that is not contiguous. The verb is lowrank_ with a row of ones: rank 1, exact."""
    tensor = group.theta[i]
    size = values.numel()
    if size == 0 or is_nothing([scale], decay):
        return 0
    row = start // size
    assert start == row * size, f"start is {start}; expected a multiple of {size}"
    if tensor.is_contiguous():
        part = tensor.view(-1)[start : start + size]
    else:
        matrix = tensor.squeeze()
        columns = matrix.shape[1]
        assert start % columns == size % columns == 0, (
            f"start is {start}, size {size}; expected multiples of {columns}"
        )
        part = matrix[start // columns : (start + size) // columns]
    residual = group.residual(i) if plan.rounding == "residual" else None
    low = None if residual is None else [residual.view(-1)[start : start + size]]
    ones = torch.ones(row + 1, 1, dtype=torch.float32, device=tensor.device)
    span = group.spans[i]._replace(first=group.spans[i].first + start)
    batch, noise = Batch([part], [span], plan.rounding, low), plan.noise([(plan.step, 0)], None)
    factors = Outer([ones], [values.view(-1, 1)], [scale], decay, control)
    count = group.backend.lowrank_(batch, factors, noise)
    torch.autograd.graph.increment_version([tensor])
    return count


def is_nothing(amounts: Sequence[float], decay: float) -> bool:
    """Whether, in float32, theta <- decay theta + sum_k amounts[k] z_k leaves theta as it is: a launch would
    turn -0.0 into +0.0."""
    return torch.tensor([decay, *amounts], dtype=torch.float32, device="cpu").tolist() == [1.0] + [0.0] * len(
        amounts
    )


__all__ = ["add_", "deposit", "is_nothing", "summed", "total"]
