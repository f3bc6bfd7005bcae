"""What one step works on: the active parameters by group, and the names of its draws."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..backends import Backend, Span
from ..directions import Direction, Factored, Matrix, Normal, Source
from ..estimator import Stencil


class Point(NamedTuple):
    """Where a loss is read: theta + offset eps z_query."""

    query: int
    offset: float


@dataclass
class Group:
    """Trained tensors of one parameter group on one device, with one eps: one launch per verb."""

    names: list[str]
    tensors: list[Tensor]
    spans: list[Span]
    residuals: list[Tensor] | None  # int16 low bits, aligned with tensors; None unless rounding is 'residual'
    eps: float
    options: dict  # the optimizer's param group: lr, weight_decay, ...
    backend: Backend
    matrices: list[Matrix] | None = None  # factored tensors, aligned with tensors; None: z is dense
    drawn: dict[int, list[Tensor]] = field(
        default_factory=dict, repr=False
    )  # draw word -> a draw for each matrix, of this step

    def residual(self, i: int) -> Tensor | None:
        """The low bits of tensor i, where it has any."""
        return self.residuals[i] if self.residuals is not None and self.tensors[i].dtype == torch.bfloat16 else None

    def axpy_(self, direction, seed: int, draws, coeffs: Sequence[float], decay: float, rounding: str) -> Tensor:
        table = torch.tensor(coeffs, dtype=torch.float32, device=self.tensors[0].device)
        residuals = self.residuals if rounding == "residual" else None
        count = self.backend.axpy_(self.tensors, self.spans, direction, seed, draws, table, decay, rounding, residuals)
        torch.autograd.graph.increment_version(self.tensors)  # the kernels write through raw pointers
        return count

    def update_(
        self, plan: Plan, members: Sequence[int], coeffs: Sequence[float], rule: str, scalars: Sequence[float], states: Sequence[list[Tensor]]
    ) -> Tensor:  # fmt: skip
        """A rule with state for some of the tensors, whose states these are; one launch."""
        tensors, spans = [self.tensors[i] for i in members], [self.spans[i] for i in members]
        both = [torch.tensor(x, dtype=torch.float32, device=tensors[0].device) for x in (coeffs, scalars)]
        low = [self.residuals[i] for i in members] if self.residuals is not None and plan.rounding == "residual" else None
        count = self.backend.update_(
            tensors, spans, plan.direction, plan.seed, plan.draws(), both[0], rule, both[1], states, plan.rounding, low
        )
        torch.autograd.graph.increment_version(tensors)
        return count

    def source(self, seed: int) -> Source:
        """Normals for this group's factors."""

        def normals(matrices: Sequence[Matrix], shapes: Sequence[tuple[int, ...]], step: int, draw: int) -> list[Tensor]:
            outs = [torch.empty(shape, device=matrix.device) for shape, matrix in zip(shapes, matrices)]
            self.backend.draw(outs, [Span(matrix.who) for matrix in matrices], Normal(), seed, step, draw)
            return outs

        return normals

    def draws(self, plan: Plan, query: int) -> list[Tensor]:
        """The draw of a query for every matrix, in its small space; made once a step, for the reading and the update."""
        assert self.matrices is not None and plan.factored is not None
        word = plan.draw(query)
        if word not in self.drawn:
            self.drawn[word] = plan.factored.draws(self.matrices, self.source(plan.seed), plan.step, word)
        return self.drawn[word]

    def check_waiting(self) -> None:
        """Raise if somebody wrote weights that updates wait for."""
        for tensor, matrix in zip(self.tensors, self.matrices or ()):
            if matrix.pending is not None and tensor._version != matrix.version:
                raise RuntimeError(
                    f"the weights of {matrix.name!r} were written while updates waited for them; call optimizer.flush() before "
                    "weights are loaded or edited, or optimizer.discard() to go on from what they are now, or build the optimizer "
                    "with defer=False"
                )

    def write(self, seed: int, step: int, rounding: str) -> Tensor | int:
        """W <- shrink W + left pending right^T for every matrix with waiting updates, one rounding; they wait no longer."""
        self.check_waiting()
        waiting = [(i, m, m.pending) for i, m in enumerate(self.matrices or ()) if m.pending is not None]
        members = [(i, m, p) for i, m, p in waiting if m.shrink != 1.0 or bool(p.any())]
        count: Tensor | int = 0
        if members:
            tensors, spans = [self.tensors[i] for i, _, _ in members], [self.spans[i] for i, _, _ in members]
            lefts = [left_of(m, pending, self.backend) for _, m, pending in members]
            rights = [m.right for _, m, _ in members if m.right is not None]
            low = [self.residuals[i] for i, _, _ in members] if self.residuals is not None and rounding == "residual" else None
            shrink = {m.shrink for _, m, _ in members}
            assert len(shrink) == 1, "matrices of a group decay together"
            scales = [1.0] * len(members)
            count = self.backend.lowrank_(tensors, spans, lefts, rights, scales, shrink.pop(), rounding, low, seed, step)
            torch.autograd.graph.increment_version(tensors)
        for _, matrix, _ in waiting:
            matrix.pending, matrix.shrink = None, 1.0
        return count


def left_of(matrix: Matrix, middle: Tensor, backend: Backend) -> Tensor:
    """U middle, or the middle itself where a draw is the left factor; summed in the lowrank_ verb's order."""
    if matrix.left is None:
        return middle
    out = torch.zeros(matrix.rows, middle.shape[1], device=middle.device)
    backend.lowrank_([out], [Span(0)], [matrix.left], [middle.t().contiguous()], [1.0], 1.0, "nearest", None)
    return out


@dataclass
class Plan:
    groups: list[Group]
    direction: Direction
    stencil: Stencil
    queries: int
    seed: int
    step: int
    rounding: str
    roots: list[nn.Module]  # the modules that a step leaves as they are: the model, or those that hold the trained tensors
    aliases: dict[int, tuple[int, int]]  # id of every tensor object that stands for a trained tensor -> (group, position)
    factored: Factored | None = None  # the direction of groups with matrices
    first_draw: int = 0  # draw word of query 0
    probe: bool = False  # readings for a basis (P-GAP) and not of a step
    stale: dict[int, str] = field(
        default_factory=dict
    )  # id of tensor objects that show a trained tensor's elements otherwise: what they are

    def draw(self, query: int) -> int:
        return self.first_draw + query

    def draws(self) -> list[tuple[int, int]]:
        return [(self.step, self.draw(query)) for query in range(self.queries)]

    @property
    def deferred(self) -> bool:
        """Whether updates wait in some matrix, so that the weights alone are not theta."""
        return any(matrix.pending is not None for group in self.groups for matrix in group.matrices or ())


@dataclass
class Reading:
    """What an evaluation found: losses[query][offset], what still has to be undone, and how it went."""

    losses: list[tuple[float, ...]]
    restore: list[float]  # per query, in units of eps: weights now lack restore[k] * eps * z_k (0 where nothing was written)
    scratch_bytes: int = 0
    unseen: tuple[str, ...] = ()  # trained parameters that the loss never read
    whole: tuple[str, ...] = ()  # parameters that were perturbed in one piece because their use cannot be tiled
    unpaired: tuple[str, ...] = ()  # paired: parameters that some side read alone
    rows: int = 0  # most rows of a product of one side
    coarse: bool = False  # a product was in 16 bits
    evaluation: str = ""  # what ran, where an evaluation chooses


def unrepeatable(first: float, again: float) -> RuntimeError:
    return RuntimeError(
        f"the closure returned {first!r} and then {again!r} for the same weights: it advances a data iterator, a cache or a "
        "random stream of its own, so the two sides of a pair do not measure the same loss; take the batch outside the closure"
    )
