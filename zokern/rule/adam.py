"""Rule ``adam`` with moments in the time factors of z = U diag(tau) V^T: 2 r numbers a matrix (TeZO-Adam).

    M <- beta1 M + (1 - beta1) sum_k weights[k] tau_k        V <- beta2 V + (1 - beta2) (sum_k weights[k] tau_k)^2
    W <- decay W + lr (U diag(M) V^T) / sqrt(U^2 diag(V) (V^2)^T + eps)

The squares are elementwise, and the cross terms of the second moment are dropped, as in the paper (Sun et al. 2025, Eq. 8).
Parameters with a dense z keep dense moments, float32, in the same form. No bias correction unless it is asked for.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..backends import Span
from ..directions import Matrix
from ..evaluation import Group, Plan
from .waiting import add_, total

TILE = 1 << 20  # elements of a quotient that exist at a time


class Adam:
    name, linear, defers = "adam", False, False

    def __init__(self, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8, bias_correction: bool = False) -> None:
        if len(betas) != 2 or not all(0.0 <= beta < 1.0 for beta in betas):
            raise ValueError(f"betas is {betas!r}; expected two numbers, 0 <= beta < 1")
        if not eps > 0.0:
            raise ValueError(f"adam_eps is {eps!r}; expected a number above 0")
        self.betas, self.eps, self.bias_correction = betas, eps, bias_correction

    def update(
        self, plan: Plan, group: Group, weights: Sequence[float], lr: float, decay: float, restore: Sequence[float], states: Any, defer: bool
    ) -> Tensor | int:  # fmt: skip
        count: Tensor | int = 0
        small = total(plan, group, weights) if group.matrices is not None else []
        for i, tensor in enumerate(group.tensors):
            gradient = torch.diagonal(small[i]) if small else self._gradient(plan, group, i, weights)
            first, second = self._moments(states[tensor], gradient)
            if group.matrices is None:
                count = count + add_(plan, group, i, first / _root(second + self.eps), lr, decay)
            else:
                count = count + self._matrix(plan, group, i, first, second, lr, decay)
        return count

    def _gradient(self, plan: Plan, group: Group, i: int, weights: Sequence[float]) -> Tensor:
        tensor = group.tensors[i]
        out = torch.zeros(tensor.shape, device=tensor.device)
        amounts = torch.tensor(list(weights), dtype=torch.float32, device=tensor.device)
        group.backend.axpy_([out], [group.spans[i]], plan.direction, plan.seed, plan.draws(), amounts, 1.0, "nearest", None)
        return out

    def _moments(self, state: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        """Both moments after this step, kept in the state; corrected for their start at zero where that is asked for."""
        if "first" not in state:
            state["first"], state["second"], state["updates"] = torch.zeros_like(gradient), torch.zeros_like(gradient), 0
        (beta1, beta2), state["updates"] = self.betas, state["updates"] + 1
        state["first"] = state["first"] * beta1 + gradient * (1.0 - beta1)
        state["second"] = state["second"] * beta2 + (gradient * gradient) * (1.0 - beta2)
        if not self.bias_correction:
            return state["first"], state["second"]
        return state["first"] / (1.0 - beta1 ** state["updates"]), state["second"] / (1.0 - beta2 ** state["updates"])

    def _matrix(self, plan: Plan, group: Group, i: int, first: Tensor, second: Tensor, lr: float, decay: float) -> Tensor | int:
        assert group.matrices is not None
        matrix = group.matrices[i]
        assert matrix.left is not None and matrix.right is not None
        left, square = matrix.left * first, (matrix.left * matrix.left) * second
        squared = matrix.right * matrix.right
        rows = max(1, TILE // matrix.columns)
        while matrix.rows % rows:  # tiles of equal size: add_ numbers them
            rows -= 1
        count: Tensor | int = 0
        for start in range(0, matrix.rows, rows):
            here = Span(matrix.who, start * matrix.columns)
            quotient = torch.zeros(rows, matrix.columns, device=matrix.device)
            spread = torch.full_like(quotient, self.eps)
            group.backend.lowrank_(
                [quotient, spread], [here, here], [left, square], [matrix.right, squared], [1.0, 1.0], 1.0, "nearest", None
            )  # fmt: skip
            count = count + add_(plan, group, i, quotient / _root(spread), lr, decay, start * matrix.columns)
        return count

    def rebase(self, group: Group, matrix: Matrix, left: Tensor | None, right: Tensor, state: Any) -> None:
        raise NotImplementedError(
            "rule 'adam' keeps moments of one basis; it goes with a direction that keeps its basis ('diagonal')"
        )


def _root(x: Tensor) -> Tensor:
    """sqrt in float64, cut to float32: float32's own is not correctly rounded on every CPU."""
    return x.double().sqrt().float()
