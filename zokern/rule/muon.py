"""Rule ``muon``: the estimate of a matrix, made orthogonal in the space of a draw (ZO-Muon, ZO-MOPI).

    M <- beta M + (1 - beta) sum_k weights[k] draw_k,   O = orthogonal(M)
    W <- decay W + lr times the matrix of O

M starts as the first step's sum, as in rule ``momentum`` and in ZO-MOPI's code.

msign, by Newton and Schulz (Jordan et al. 2024, Muon): X = M / (||M||_F + 1e-7), then five times, with A = X
X^T,

    X <- a X + (b A + c A^2) X,   a, b, c = 3.4445, -4.7750, 2.0315

It keeps the singular vectors of M, and brings singular values to about 1: those above 0.01 ||M||_F to 0.68 to
1.13.

Power iteration, which goes on from step to step (arXiv 2605.09034), finds the leading k directions alone:

    V <- Q of M^T (M V),   U <- the columns of M V over their lengths,   O = U V^T

V is on the side of the factor that is drawn. It is kept from step to step, and drawn anew with a basis.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import autocast
from ..checks import finite_number, flag, is_number, whole_number, within
from ..device_numbers import Weights
from ..directions import Matrix
from ..estimator.base import ONES
from ..gemm.library import one_thread
from ..group import Group
from ..plan import Plan
from ..stream import BASIS, draw_word
from .base import Rule, check_share
from .carry import carried
from .state import Keeps
from .waiting import deposit, total

COEFFICIENTS, ITERATIONS, LEAST = (3.4445, -4.7750, 2.0315), 5, 1e-7
START = draw_word(2**24 - 1, BASIS)  # the start of the power iteration, at the step of the basis


class Muon(Rule):
    """Moves low-rank weights along an orthogonalised estimate, whose singular values are all 1 or 0.

        W <- decay W + lr t L O R,   O = orthogonal(M)
        M the average of the estimates, in the place of the factor that is drawn

    power  None: O = msign(M), by five Newton-Schulz iterations (ZO-Muon). k: the leading k directions of
           M, at most the rank, by power iteration (ZO-MOPI)
    beta   of M, 0 <= beta < 1: M <- beta M + (1 - beta) g, and M = g in a matrix' first update, which
           a skipped step may be. 0 by default: M is the step's estimate
    carry  True: at a new basis M is carried over to it. False: its numbers stay as they are, as in
           ZO-MOPI's code
    share  parameters that are not matrices move by SGD, with an lr of `share` times their group's

    L and R are the factors that are kept for an interval: P O for ZO-Muon, U O V^T for SubZero. t makes
    the step as long as a dense one with norm='matched', so that lr is in weights; it is 1 with
    norm='unit'. Keeps float32 tensors in the optimizer's state: `momentum` in the shape of a draw with
    beta > 0, and `power` (rows of a draw, k) with power=k. `basis` is the step of their basis. Products
    are torch's, in float32 and on one thread: the last bits depend on the machine, as those of a basis of
    zokern.PGAP do.
    Raises ValueError for arguments out of range; an optimizer refuses it with a direction that keeps no
    factor. Lang et al. 2026 (ZO-Muon, arXiv 2602.17155); Chen and Ma 2026 (ZO-MOPI, arXiv 2605.09034)."""

    name, defers, lowrank, gated = "muon", True, True, True
    shards = True
    lr = ONES

    def __init__(
        self, power: int | None = None, beta: float = 0.0, carry: bool = False, share: float | None = 1.0
    ) -> None:
        self.power = None if power is None else whole_number("power", power)
        self.beta = within("beta", beta, 0.0, 1.0, "0 <= beta < 1")
        self.carry = flag("carry", carry)
        self.share = check_share(share)

    def update(
        self, plan: Plan, group: Group, weights: Sequence[float], lr: float, decay: float, states: Any,
        defer: bool
    ) -> Tensor | int:  # fmt: skip
        weights = Weights.of(weights, lr, decay, group.theta[0].device)
        if group.matrices is None:
            share = self.share_of(group)
            if weights.moves_nothing or not share:
                return 0
            reach, (_, go, finite) = plan.lr_of(group, lr, decay), weights.projected.control
            own = 1.0 - reach * float(group.options["weight_decay"])
            rate, kept = reach * share, 1.0 - share * (1.0 - own)
            control = torch.stack((torch.where(finite == 1.0, kept, 1.0).float(), go, finite))
            amounts = (weights.projected.weights * rate).float()
            return group.axpy_(plan.noise(plan.draws()), amounts, decay, plan.rounding, control)
        assert plan.factored is not None
        beta, reach, moves = weights.where(self.beta, 1.0), plan.lr_of(group, lr, decay), []
        with one_thread(), autocast.off(group.theta[0].device.type):
            for tensor, matrix, new in zip(group.tensors, group.matrices, total(plan, group, weights)):
                average = self._average(states[tensor], matrix, new, beta)
                found = (
                    msign(average)
                    if self.power is None
                    else self._leading(plan, group, matrix, states[tensor], average, weights)
                )
                square = matrix.rank if self.power is None else min(self.power, matrix.rank)
                moves.append(found * (reach * plan.factored.stretch(matrix, square)))
        return deposit(plan, group, weights.gate(moves), weights.kept(decay), defer)

    def _average(self, state: Any, matrix: Matrix, new: Tensor, beta: Tensor) -> Tensor:
        if self.beta or self.power:
            state["basis"] = matrix.born
        if not self.beta:
            return new
        old = state.get("momentum")
        state["momentum"] = new if old is None else old * beta + new * (1.0 - self.beta)
        return state["momentum"]

    def _leading(
        self, plan: Plan, group: Group, matrix: Matrix, state: Any, average: Tensor, weights: Weights
    ) -> Tensor:
        assert self.power is not None
        if "power" not in state:
            shape = average.shape[0], min(self.power, matrix.rank)
            (state["power"],) = group.source(plan.seed)([matrix], [shape], matrix.born, START)
        found, power = power_step(average, state["power"])
        state["power"] = torch.where(weights.projected.control[2] == 1.0, power, state["power"])
        return found

    def keeps(self, shape: tuple[int, ...], draw: tuple[int, int] | None) -> Keeps:
        """Returns M and V of a matrix, and nothing of other parameters."""
        kept: dict[str, tuple[int, ...]] = {} if draw is None or not self.beta else {"momentum": draw}
        if draw is not None and self.power is not None:
            kept["power"] = draw[0], min(self.power, draw[1])
        return Keeps(kept, False)

    def basis(self, state: Any) -> int | None:
        """The step of the basis that `momentum` and `power` belong to; None: nothing is kept."""
        return state.get("basis", -1) if "momentum" in state or "power" in state else None

    def rebase(
        self, group: Group, matrix: Matrix, left: Tensor | None, right: Tensor | None, state: Any
    ) -> None:
        state.pop("power", None)
        if "momentum" in state:
            state["basis"] = matrix.born
        if self.carry and "momentum" in state:
            state["momentum"] = carried(group, matrix, left, right, state["momentum"])


def msign(x: Tensor) -> Tensor:
    """Returns about U V^T of the singular value decomposition U S V^T of a matrix, float32; zero of a zero
    matrix."""
    tall = x.shape[0] > x.shape[1]
    y = x.mT if tall else x
    y = y / (y.norm() + LEAST)
    a, b, c = COEFFICIENTS
    for _ in range(ITERATIONS):
        square = y @ y.mT
        y = a * y + (b * square + c * (square @ square)) @ y
    return (y.mT if tall else y).contiguous()


def power_step(x: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Returns (V U^T, V) after one power iteration for M = x^T from v (rows of x, k), float32; of a zero
    matrix (0, v)."""
    largest = x.abs().amax()
    y = x / torch.where(largest > 0.0, largest, 1.0)
    v = torch.where(largest > 0.0, torch.linalg.qr(torch.where(largest > 0.0, y @ (y.mT @ v), v))[0], v)
    u = y.mT @ v
    lengths = u.norm(dim=0)
    return v @ (u / torch.where(lengths > 0.0, lengths, 1.0)).mT, v.contiguous()


def share_of(dense_lr: float, lr: float | None) -> float | None:
    """Returns a rule's `share` for parameters that are not matrices to have an lr of their own.

    lr  of the optimizer; None: the rule's. Where it is 0 there is no share, which is None: a step with
        another lr is refused"""
    dense_lr, lr = finite_number("dense_lr", dense_lr, minimum=0.0), ONES if lr is None else lr
    if not dense_lr:
        return 0.0
    return dense_lr / lr if is_number(lr) and lr > 0.0 else None


__all__ = ["Muon", "msign", "power_step", "share_of"]
