"""Rule ``momentum``: a running sum of the draws, in their own space: r x r or m x r numbers for a factored
matrix.

    M <- beta M + (1 - dampening) sum_k weights[k] draw_k,   theta <- decay theta + lr M

M starts as the first step's sum, as in torch.optim.SGD. With dampening = beta, the default, M is an
exponential average; with 0 it is Polyak's heavy ball, torch.optim.SGD's momentum and ZO-Bench's ZO-SGD-MMT
(Zhang et al. 2024). When the basis of a matrix changes, M is carried over: M (V_old^T V_new) / n for normal V
(Chen et al. 2025, LOZO-M), (U_new^T U_old) M (V_old^T V_new) for orthonormal ones. Parameters with a dense z
keep a float32 M, 4 bytes a weight, and a group of them is one launch of the verb update_.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from ..checks import within
from ..device_numbers import Weights
from ..directions import Matrix
from ..group import Group
from ..plan import Plan
from .base import Rule
from .carry import carried
from .dense import advance
from .state import Keeps
from .waiting import deposit, total


class Momentum(Rule):
    """Moves the weights along an average of the estimates.

        M <- beta M + (1 - dampening) g,   theta <- decay theta + lr M,   g = sum_k weights[k] z_k
        M = g in a parameter's first update, which a skipped step may be

    beta       0.9 by default, 0 <= beta < 1
    dampening  None: beta, so that M is an exponential average and lr keeps its meaning. 0: Polyak's heavy
               ball, torch.optim.SGD's momentum and ZO-Bench's ZO-SGD-MMT; its steps are up to 1 / (1 -
               beta) times as long

    Keeps `momentum` in the optimizer's state, float32. For a dense z it has the parameter's shape (4
    bytes a weight). For a low-rank z it has the shape of the factor that is drawn (r x r, or m x r), and
    is carried over when the basis changes; `basis` is the step of its basis. `updates` counts the steps
    of a dense parameter, skipped ones too: the host does not know of a skip in time. After a skipped
    first step M stays 0, and the next step has M = (1 - dampening) g.
    Raises ValueError for a beta or dampening outside [0, 1).
    Polyak 1964; Zhang et al. 2024 (ZO-Bench); Chen et al. 2025 (LOZO-M); Sun et al. 2025 (TeZO-m)."""

    name, defers, gated = "momentum", True, True
    shards = True

    def __init__(self, beta: float = 0.9, dampening: float | None = None) -> None:
        self.beta = self.dampening = within("beta", beta, 0.0, 1.0, "0 <= beta < 1")
        if dampening is not None:
            self.dampening = within("dampening", dampening, 0.0, 1.0, "0 <= dampening < 1, or None for beta")

    @property
    def gain(self) -> float:  # type: ignore[override]
        """(1 - dampening) / (1 - beta)."""
        return (1.0 - self.dampening) / (1.0 - self.beta)

    def scalars(self, lr: float, decay: float = 1.0, updates: int = 1) -> tuple[float, ...]:
        """The numbers of zokern.update_ for a parameter's update number `updates`, counted from 1."""
        if updates < 1:
            raise ValueError(f"updates is {updates!r}; expected the number of the update, counted from 1")
        beta, alpha = (0.0, 1.0) if updates == 1 else (self.beta, 1.0 - self.dampening)
        return decay, lr, beta, alpha

    def update(
        self, plan: Plan, group: Group, weights: Sequence[float], lr: float, decay: float, states: Any,
        defer: bool
    ) -> Tensor | int:  # fmt: skip
        if group.matrices is not None:
            weights = Weights.of(weights, lr, decay, group.theta[0].device)
            beta, reach, averages = weights.where(self.beta, 1.0), plan.lr_of(group, lr, decay), []
            for tensor, matrix, new in zip(group.tensors, group.matrices, total(plan, group, weights)):
                state = states[tensor]
                old = state.get("momentum")
                state["momentum"] = average = (
                    new if old is None else old * beta + new * (1.0 - self.dampening)
                )
                state["basis"] = matrix.born
                averages.append(average)
            moves = weights.gate([average * reach for average in averages])
            return deposit(plan, group, moves, weights.kept(decay), defer)
        return advance(self, plan, group, weights, self.scalars, states, lr, decay)

    def keeps(self, shape: tuple[int, ...], draw: tuple[int, int] | None) -> Keeps:
        """Returns M, in the space of a draw."""
        return Keeps({"momentum": draw or shape}, draw is None)

    def basis(self, state: Any) -> int | None:
        """The step of the basis that `momentum` belongs to; -1 where a state of an older version does not
        say."""
        return state.get("basis", -1) if "momentum" in state else None

    def rebase(
        self, group: Group, matrix: Matrix, left: Tensor | None, right: Tensor | None, state: Any
    ) -> None:
        if "momentum" not in state:
            return
        state["basis"] = matrix.born
        state["momentum"] = carried(group, matrix, left, right, state["momentum"])
