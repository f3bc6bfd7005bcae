"""Rule ``adam``: two moments of the estimate, as in torch.optim.Adam (Kingma and Ba 2015), or in TeZO's form
(Sun et al. 2025).

    M <- beta1 M + (1 - beta1) g,   V <- beta2 V + (1 - beta2) g^2,   g = sum_k weights[k] z_k
    theta <- decay theta + lr (M / c1) / (sqrt(V / c2) + eps)         c1 = 1 - beta1^t, c2 = 1 - beta2^t, or 1
    without correction theta <- decay theta + lr (M / c1) / sqrt(V / c2 + eps)           inside=True

Parameters with a dense z keep float32 moments, 8 bytes a weight, and a group of them is one launch of the
verb update_: with the defaults this is ZO-Bench's ZO-Adam (Zhang et al. 2024). A matrix with z = U diag(tau)
V^T keeps them of its time factors, 2 r numbers (TeZO-Adam, whose form is inside=True, bias_correction=False):

    M <- beta1 M + (1 - beta1) sum_k weights[k] tau_k        V <- beta2 V + (1 - beta2) (sum_k weights[k]
    tau_k)^2 W <- decay W + lr (U diag(M) V^T) / sqrt(U^2 diag(V) (V^2)^T + eps)

The squares are elementwise, and the cross terms of the second moment are dropped, as in the paper (Eq. 8).

With core=True it is Adam for X in W = W_0 + s U X V^T (SubZero+, Yu et al. 2026, arXiv 2608.15665). Moments
and quotient have the shape of a draw X_k, where z_k = s U X_k V^T:

    M, V the averages of sum_k weights[k] X_k and its square
    W <- decay W + lr s U ((M / c1) / (sqrt(V / c2) + eps)) V^T
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..backends import Batch, Outer, Span
from ..checks import flag, is_number, within
from ..device_numbers import Weights
from ..directions import Matrix
from ..estimator.base import ONES
from ..group import Group
from ..plan import Plan
from .base import Rule, check_share
from .carry import carried
from .dense import advance
from .state import Keeps
from .waiting import add_, deposit, total

TILE = 1 << 20  # elements of a quotient that exist at a time
SMALLEST, LARGEST = 2.0**-149, 2.0**128  # above 0 and finite in float32


def pair(betas: Any) -> tuple[float, float]:
    """Returns two numbers of [0, 1)."""
    two = isinstance(betas, (tuple, list)) and len(betas) == 2
    if not two or not all(is_number(beta) and 0.0 <= beta < 1.0 for beta in betas):
        raise ValueError(f"betas is {betas!r:.80}; expected two numbers, 0 <= beta < 1")
    return float(betas[0]), float(betas[1])


class Adam(Rule):
    """Moves every weight by the mean of its estimates over the root of their mean square.

        theta <- decay theta + lr (M / c1) / (sqrt(V / c2) + eps)
        M, V: averages of g and g^2,   g = sum_k weights[k] z_k

    betas            of M and V: (0.9, 0.999) by default, each 0 <= beta < 1
    eps              1e-8, in units of g, loss per weight; with inside=True of g^2
    bias_correction  True: c1 = 1 - beta1^t and c2 = 1 - beta2^t in a parameter's update number t, skipped
                     steps counted. False: both are 1, TeZO's form
    inside           True: eps stands under the root, sqrt(V / c2 + eps), TeZO's form
    core             True: moments and quotient of a low-rank z have the shape of the factor that is drawn
                     (SubZero+). It goes with any basis
    carry            True, with core: at a new basis the moments are carried over to it, V by squared
                     overlaps. False: their numbers stay as they are, the plain reading of SubZero+
    share            parameters that are not matrices have an lr of `share` times their group's

    Keeps `first` and `second` in the optimizer's state, float32, and the count `updates`. For a dense z
    they are two moments of the parameter's shape, 8 bytes a weight. For zokern.TeZO they are 2 r numbers
    a matrix, and with core=True two of the drawn factor's shape. `basis`, with carry=True, is the step of
    their basis. Updates are deferred with core=True alone.
    Raises ValueError for betas or eps out of range, and for carry without core. Without core, an
    optimizer refuses it with a direction whose basis changes (SubZero, P-GAP, LOZO).
    Kingma and Ba 2015; Zhang et al. 2024 (ZO-Bench's ZO-Adam); Sun et al. 2025 (TeZO-Adam)."""

    name, gated = "adam", True
    shards = True
    lr = ONES  # of an optimizer that is given none: steps have one length, whatever the slope

    def __init__(
        self,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        bias_correction: bool = True,
        inside: bool = False,
        core: bool = False,
        carry: bool = False,
        share: float | None = 1.0,
    ) -> None:
        self.share = check_share(share)
        self.betas = pair(betas)
        self.eps = within("adam_eps", eps, SMALLEST, LARGEST, "a number above 0, finite in float32")
        self.bias_correction, self.inside = flag("bias_correction", bias_correction), flag("inside", inside)
        self.core, self.carry = flag("core", core), flag("carry", carry)
        if self.carry and not self.core:
            raise ValueError(
                "carry is True and core is False; expected core=True: other moments have no basis that "
                "changes"
            )

    @property
    def defers(self) -> bool:
        """Whether updates are sums in a small space."""
        return self.core

    @property
    def diagonal(self) -> bool:  # type: ignore[override]
        """Whether a low-rank direction needs diagonal draws and a basis that lasts: the quotient is formed
        for the weights."""
        return not self.core

    def scalars(self, lr: float, decay: float = 1.0, updates: int = 1) -> tuple[float, ...]:
        """The numbers of zokern.update_ for a parameter's update number `updates`, counted from 1."""
        if updates < 1:
            raise ValueError(f"updates is {updates!r}; expected the number of the update, counted from 1")
        c1, c2 = self._corrections(updates)
        beta1, beta2 = self.betas
        # sqrt(V / c2 + eps) = sqrt(V + eps c2) / sqrt(c2)
        inside, outside = (self.eps * c2, 0.0) if self.inside else (0.0, self.eps)
        return decay, lr / c1, beta1, 1.0 - beta1, beta2, 1.0 - beta2, inside, 1.0 / math.sqrt(c2), outside

    def _scalars_of(self, group: Group) -> Callable[[float, float, int], tuple[float, ...]]:
        share = self.share_of(group)
        if share == 1.0:
            return self.scalars
        return lambda lr, decay, updates: self.scalars(share * lr, 1.0 - share * (1.0 - decay), updates)

    def _corrections(self, updates: int) -> tuple[float, float]:
        c1, c2 = (1.0 - beta**updates if self.bias_correction else 1.0 for beta in self.betas)
        return c1, c2

    def update(
        self, plan: Plan, group: Group, weights: Sequence[float], lr: float, decay: float, states: Any,
        defer: bool
    ) -> Tensor | int:  # fmt: skip
        if group.matrices is None:
            return advance(self, plan, group, weights, self._scalars_of(group), states, lr, decay)
        if self.core:
            return self._in_core(plan, group, weights, lr, decay, states, defer)
        weights = Weights.of(weights, lr, decay, group.theta[0].device)
        count: Tensor | int = 0
        betas = self._betas(weights)
        for i, (tensor, tau) in enumerate(zip(group.tensors, total(plan, group, weights))):
            first, second = self._moments(plan, states[tensor], torch.diagonal(tau), betas)
            count = count + self._matrix(plan, group, i, first, second, lr, decay, weights.moves)
        return count

    def _betas(self, weights: Weights) -> tuple[Tensor, Tensor]:
        """Returns what the old moments are multiplied by: 1 in a step that is not finite."""
        return weights.where(self.betas[0], 1.0), weights.where(self.betas[1], 1.0)

    def _in_core(
        self, plan: Plan, group: Group, weights: Sequence[float], lr: float, decay: float, states: Any,
        defer: bool
    ) -> Tensor | int:  # fmt: skip
        assert group.matrices is not None and plan.factored is not None
        weights = Weights.of(weights, lr, decay, group.theta[0].device)
        scales, betas = [plan.factored.scale(matrix) for matrix in group.matrices], self._betas(weights)
        reach = plan.lr_of(group, lr, decay)
        moves = []
        for tensor, matrix, along, s in zip(
            group.tensors, group.matrices, total(plan, group, weights), scales
        ):
            state = states[tensor]
            first, second = self._moments(plan, state, along / s, betas)
            if self.carry:
                state["basis"] = matrix.born
            root = _root(second + self.eps) if self.inside else _root(second) + self.eps
            moves.append(first / root * (reach * s))
        return deposit(plan, group, weights.gate(moves), weights.kept(decay), defer)

    def _moments(
        self, plan: Plan, state: Any, gradient: Tensor, betas: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Both moments after this step, kept in the state; corrected for their start at zero where that is
        asked for."""
        if "first" not in state:
            state["first"], state["second"], state["updates"] = (
                torch.zeros_like(gradient),
                torch.zeros_like(gradient),
                0,
            )
        (beta1, beta2) = self.betas
        plan.act(lambda: state.update(updates=state["updates"] + 1))
        state["first"] = state["first"] * betas[0] + gradient * (1.0 - beta1)
        state["second"] = state["second"] * betas[1] + (gradient * gradient) * (1.0 - beta2)
        if not self.bias_correction:
            return state["first"], state["second"]
        told = plan.numbers(lambda: self._corrections(state["updates"]), torch.float64, gradient.device)
        return state["first"] / told[0], state["second"] / told[1]

    def _matrix(
        self, plan: Plan, group: Group, i: int, first: Tensor, second: Tensor, lr: float, decay: float,
        control: Tensor
    ) -> Tensor | int:  # fmt: skip
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
            quotient = torch.zeros(rows, matrix.columns, dtype=torch.float32, device=matrix.device)
            spread = torch.full_like(quotient, self.eps if self.inside else 0.0)
            factors = Outer([left, square], [matrix.right, squared], [1.0, 1.0])
            group.backend.lowrank_(Batch([quotient, spread], [here, here]), factors)
            root = _root(spread) if self.inside else _root(spread) + self.eps
            move, at = quotient / root, start * matrix.columns
            count = count + add_(plan, group, i, move, lr, decay, at, control)
        return count

    def keeps(self, shape: tuple[int, ...], draw: tuple[int, int] | None) -> Keeps:
        """Returns M and V: r numbers each of a matrix with a diagonal draw, or as many as a draw has."""
        own = shape if draw is None else draw if self.core else draw[-1:]
        return Keeps(dict.fromkeys(("first", "second"), own), True)

    def basis(self, state: Any) -> int | None:
        """The step of the basis that the moments belong to, with carry=True; None: they belong to none."""
        return state.get("basis", -1) if self.carry and "first" in state else None

    def rebase(
        self, group: Group, matrix: Matrix, left: Tensor | None, right: Tensor | None, state: Any
    ) -> None:
        if self.carry and "first" in state:
            state["basis"] = matrix.born
            for key in ("first", "second"):
                state[key] = carried(group, matrix, left, right, state[key], squares=key == "second")


def _root(x: Tensor) -> Tensor:
    """sqrt in float64, cut to float32: float32's own is not correctly rounded on every CPU."""
    return x.double().sqrt().float()
