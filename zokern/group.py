"""The tensors that a launch works on: those of one parameter group, device and kind of direction."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import Tensor

from . import gemm
from .backends import Backend, Batch, Noise, Outer, Span, SpanList, TensorList, Terms, Update
from .device_numbers import cached_upload, on_device
from .directions import LowRank, Matrix, Normal, Source, Stack
from .fingerprint import announce
from .modules import same

Draw = int | tuple[int, int]  # a draw word of the step under way, or (step, draw word) of an earlier one


class Step(Protocol):
    """What a launch needs of the step that it belongs to: see Plan."""

    seed: int
    step: int
    rounding: str
    factored: LowRank | None

    def draws(self) -> list[tuple[int, int]]: ...
    def named(self, draw: Draw) -> tuple[int, int]: ...
    def reaches(self, step: int) -> bool: ...
    def noise(self, draws: Sequence[tuple[int, int]], direction: Any = ...) -> Noise: ...
    def numbers(
        self, make: Callable[[], Sequence[float]], dtype: torch.dtype, device: torch.device
    ) -> Tensor: ...


@dataclass
class Group:
    """Trained tensors of one parameter group on one device, with one eps: one launch per verb.

    tensors  the parameters, which name the optimizer's state
    lengths  by draw word: the length of its z in this group, in units of eps; 1 where it has no entry
    theta    their memory as plain tensors: what is read and written, whatever stands in a parameter while a
             closure runs"""

    names: list[str]
    tensors: list[Tensor]
    spans: SpanList
    # int16 low bits, aligned with tensors; None unless rounding is 'residual'
    residuals: TensorList | None
    eps: float
    options: dict  # the optimizer's param group: lr, weight_decay, ...
    backend: Backend
    matrices: list[Matrix] | None = None  # factored tensors, aligned with tensors; None: z is dense
    # factors of z, aligned with tensors; one list for the life of the group
    scales: list[Tensor | None] | None = None
    theta: TensorList = field(default_factory=TensorList)
    # every tensor object that stands for tensor i, itself first
    objects: list[list[Tensor]] = field(default_factory=list)
    # by step and draw word
    drawn: dict[tuple[int, int], list[Tensor]] = field(default_factory=dict, repr=False)
    lengths: dict[int, float] = field(default_factory=dict, repr=False)
    # the same, even ones in one tensor
    stacks: dict[tuple[int, int], Tensor] = field(default_factory=dict, repr=False)
    # what evaluations prepare once for these tensors
    memo: dict[Any, Any] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        if not self.theta:
            self.theta = TensorList.lasting([t.detach() for t in self.tensors])
        self.objects = self.objects or [[t] for t in self.tensors]

    def only(self, members: Sequence[int]) -> Group:
        """Returns a group of some of the tensors."""

        def some(values: Any) -> Any:
            if values is None:
                return None
            made = TensorList.lasting if isinstance(values, TensorList) else type(values)
            return made([values[i] for i in members])

        return replace(
            self,
            names=some(self.names),
            tensors=some(self.tensors),
            spans=some(self.spans),
            residuals=some(self.residuals),
            matrices=some(self.matrices),
            scales=some(self.scales),
            theta=some(self.theta),
            objects=some(self.objects),
            drawn={},
            stacks={},
            memo={},
        )

    def reach(self, word: Draw) -> float:
        """Returns eps of one draw, in weights: an amount a of it moves theta by a reach z."""
        return self.eps * self.lengths.get(word, 1.0) if isinstance(word, int) else self.eps

    def residual(self, i: int) -> Tensor | None:
        """The low bits of tensor i, where it has any."""
        return (
            self.residuals[i]
            if self.residuals is not None and self.theta[i].dtype == torch.bfloat16
            else None
        )

    def read(self, i: int) -> Tensor:
        """Returns tensor i in float32, with its low bits: a copy, but of float32 weights themselves."""
        if (low := self.residual(i)) is None:
            return self.theta[i].float()
        return ((self.theta[i].view(torch.int16).int() << 16) + low.int()).view(torch.float32)

    def put(self, i: int, values: Tensor) -> None:
        """Writes float32 values to tensor i: exactly where it has low bits, else rounded to nearest."""
        if (low := self.residual(i)) is None:
            self.theta[i].copy_(values)
            return
        bits = values.contiguous().view(torch.int32)
        high = (bits + 0x8000) >> 16  # the nearest bfloat16, ties away from zero, as in the kernels
        self.theta[i].view(torch.int16).copy_(high.short())
        low.copy_((bits - (high << 16)).short())

    @cached_property
    def nbytes(self) -> int:
        """The bytes of the weights."""
        return sum(t.nbytes for t in self.theta)

    def scale(self, i: int) -> Tensor | None:
        """The factors of tensor i's z, where it has any."""
        return None if self.scales is None else self.scales[i]

    def scales_of(self, members: Sequence[int]) -> list[Tensor | None] | None:
        """The factors of some tensors: the same list for the same members, so that a table of a launch is
        found again."""
        if self.scales is None or len(members) == len(self.scales):
            return self.scales
        key = "scales", *members
        if key not in self.memo:
            self.memo[key] = [self.scales[i] for i in members]
        return self.memo[key]

    def axpy_(
        self, noise: Noise, coeffs: Sequence[float] | Tensor, decay: float, rounding: str,
        control: Tensor | None = None
    ) -> Tensor:  # fmt: skip
        """theta <- decay theta + sum_k coeffs[k] z_k, one launch; a control's decay counts (Projected)."""
        if not isinstance(coeffs, Tensor):
            coeffs = cached_upload(tuple(coeffs), torch.float32, self.theta[0].device)
        residuals = self.residuals if rounding == "residual" else None
        batch = Batch(self.theta, self.spans, rounding, residuals, self.scales)
        count = self.backend.axpy_(batch, noise, Terms(coeffs, decay, control=control))
        announce(self.theta)
        return count

    def exchange(self, kept: TensorList, back: bool) -> None:
        """kept <- theta, or theta <- kept where `back`, bit for bit.

        Backend `cpu` has a launch for it. On a GPU torch's foreach is one."""
        if (launch := getattr(self.backend, "copy_", None)) is not None:
            launch(Batch(kept, self.spans), self.theta, not back)
            if back:
                announce(self.theta)
            return
        outs, tensors = (self.theta, kept) if back else (kept, self.theta)
        with torch.no_grad():
            torch._foreach_copy_(list(outs), list(tensors))

    def same(self, key: Hashable, tensors: list[Tensor]) -> TensorList:
        """Returns these tensors in a list that stays from step to step while they do, so that a launch is
        prepared for it once."""
        known = self.memo.get(("same", key))
        if known is None or not known.stands(tensors):
            known = self.memo["same", key] = TensorList.lasting(tensors)
            known.stands(tensors)  # it notes where they are
        return known

    def part(self, members: Sequence[int]) -> tuple[TensorList, SpanList, TensorList | None]:
        """Returns weights, names and low bits of some of the tensors, in lists that stay."""
        if len(members) == len(self.theta):
            return self.theta, self.spans, self.residuals
        key = "part", *members
        if key not in self.memo:
            lists = [None if x is None else [x[i] for i in members] for x in (self.theta, self.residuals)]
            theta, low = (None if x is None else TensorList.lasting(x) for x in lists)
            self.memo[key] = theta, SpanList([self.spans[i] for i in members]), low
        return self.memo[key]

    def update_(
        self, plan: Step, members: Sequence[int], coeffs: Sequence[float], rule: str,
        scalars: Callable[[], Sequence[float]] | Tensor, states: Sequence[list[Tensor]],
        control: Tensor | None = None
    ) -> Tensor:  # fmt: skip
        """A rule with state for some of the tensors, whose states these are; one launch.

        scalars  tells the rule's numbers: now, and before each replay of a captured step; or has them in
                 float32
        control  of coefficients that do not have their own (Projected)"""
        tensors, spans, residuals = self.part(members)
        table, own = on_device(coeffs, tensors[0].device)
        control = own if control is None else control
        numbers = scalars
        if not isinstance(numbers, Tensor):
            numbers = plan.numbers(numbers, torch.float32, tensors[0].device)
        low = residuals if plan.rounding == "residual" else None
        kept = [self.same((rule, k, *members[:1]), state) for k, state in enumerate(states)]
        batch = Batch(tensors, spans, plan.rounding, low, self.scales_of(members))
        update = Update(table, rule, numbers, kept, control)
        count = self.backend.update_(batch, plan.noise(plan.draws()), update)
        announce(tensors)
        return count

    def add_lowrank(self, middles: Sequence[Tensor], rounding: str, plan: Step) -> None:
        """W <- W + the product that a sum of draws stands for, for every matrix, one rounding."""
        lefts, rights = zip(*ends_of(self.matrices or (), middles, self.backend))
        low = self.residuals if rounding == "residual" else None
        ones = [1.0] * len(lefts)
        noise = plan.noise([(plan.step, 0)], None)
        self.backend.lowrank_(Batch(self.theta, self.spans, rounding, low), Outer(lefts, rights, ones), noise)
        announce(self.theta)

    def source(self, seed: int, plan: Step | None = None) -> Source:
        """Returns the stream's numbers for this group's matrices. plan: of a step that may be captured."""
        return _Stream(self, seed, plan)

    def spans_of(self, matrices: Sequence[Matrix]) -> SpanList:
        """Returns the places of matrices' numbers in the stream; made once for all matrices of the group."""
        if matrices is not self.matrices:
            return SpanList([Span(matrix.who) for matrix in matrices])
        if "spans" not in self.memo:
            self.memo["spans"] = SpanList([Span(matrix.who) for matrix in matrices])
        return self.memo["spans"]

    def draws(self, plan: Step, draw: Draw) -> list[Tensor]:
        """Returns a draw for every matrix, in its small space; made once a step, for the readings and the
        update. After forget_draws() its memory serves another draw."""
        assert self.matrices is not None and plan.factored is not None
        key = plan.named(draw)
        if not plan.reaches(key[0]):
            raise ValueError(
                f"draw {draw} is of step {key[0]}, and step {plan.step} has another basis: expected a draw "
                "for which plan.reaches(step) holds"
            )
        if key not in self.drawn:
            source = _Stream(self, plan.seed, plan, lends=True)
            self.drawn[key] = plan.factored.draws(self.matrices, source, *key)
        return self.drawn[key]

    @property
    def is_even(self) -> bool:
        """Whether the matrices have cores of one size, which may be stacked: a few operations for all, not as
        many as there are matrices."""
        matrices = self.matrices or []
        kept = [m.left is not None and m.right is not None and m.rank == matrices[0].rank for m in matrices]
        return all(kept)

    def stacked(self, plan: Step, draw: Draw) -> list[Tensor]:
        """Returns a draw for every matrix; where they are even as one tensor (matrices, r, r), of which
        draws() has the parts."""
        key = plan.named(draw)
        if key not in self.stacks:
            draws = self.draws(plan, draw)
            if not self.is_even:
                return draws
            # one copy of a step's draws is enough
            self.drawn[key] = found = draws if isinstance(draws, Stack) else Stack(torch.stack(draws))
            self.stacks[key] = found.whole
        return [self.stacks[key]]

    def together(self) -> list[Tensor]:
        """Returns the updates that wait, of every matrix; in one tensor where deposit() left them in one."""
        pending = [m.pending for m in self.matrices or () if m.pending is not None]
        kept = self.memo.get("pending")
        if kept is not None and same(pending, kept):
            return [kept.whole]
        return [torch.stack(pending)] if pending and self.is_even else pending

    def forget_draws(self) -> None:
        """Drops the draws of a step, which need not be kept."""
        self.drawn.clear()
        self.stacks.clear()
        self.memo.setdefault("spare", []).extend(self.memo.pop("lent", ()))

    def check_waiting(self) -> None:
        """Raises if weights with deferred updates were written."""
        for tensor, matrix in zip(self.tensors, self.matrices or ()):
            if matrix.pending is not None and tensor._version != matrix.version:
                raise RuntimeError(
                    f"the weights of {matrix.name!r} were written while updates waited for them; call "
                    "optimizer.flush() before "
                    "weights are loaded or edited, or optimizer.discard() to go on from what they are now, "
                    "or build the optimizer "
                    "with defer=False"
                )

    def write(self, noise: Noise, rounding: str) -> Tensor | int:
        """W <- shrink W + L C R^T of `pending` for every matrix with waiting updates, one rounding; they wait
        no longer.

        noise  names the bits of stochastic rounding. Where all updates are 0 nothing is written: the device
        knows, and the host does not wait for it. Within a step, readings write weights and put them back, so
        that version counters say nothing: check_waiting() comes before them"""
        waiting = [(i, m, m.pending) for i, m in enumerate(self.matrices or ()) if m.pending is not None]
        if not waiting:
            return 0
        shrink = {m.shrink for _, m, _ in waiting}
        assert len(shrink) == 1, "matrices of a group decay together"
        decay, control = shrink.pop(), None
        members, pending = [i for i, _, _ in waiting], [p for _, _, p in waiting]
        if decay == 1.0:
            largest = torch.stack(torch._foreach_norm(pending, math.inf))
            one = torch.ones((), dtype=torch.float32, device=largest.device)
            control = torch.stack([one, (largest != 0.0).any().float(), one])
        tensors, spans = [self.theta[i] for i in members], [self.spans[i] for i in members]
        lefts, rights = zip(*ends_of([m for _, m, _ in waiting], pending, self.backend))
        kept = self.residuals is not None and rounding == "residual"
        low = [self.residuals[i] for i in members] if kept and self.residuals is not None else None
        factors = Outer(lefts, rights, [1.0] * len(members), decay, control)
        count = self.backend.lowrank_(Batch(tensors, spans, rounding, low), factors, noise)
        announce(tensors)
        for _, matrix, _ in waiting:
            matrix.pending, matrix.shrink = None, 1.0
        self.memo.pop("pending", None)
        return count


class _Stream:
    """Numbers of the stream for the matrices of a group (directions.Source).

    lends  those of all matrices lie in memory of the group until it forgets its draws, on a CPU"""

    def __init__(self, group: Group, seed: int, plan: Step | None = None, lends: bool = False) -> None:
        self.group, self.seed, self.plan, self.lends = group, seed, plan, lends

    def __call__(
        self, matrices: Sequence[Matrix], shapes: Sequence[tuple[int, ...]], step: int, draw: int
    ) -> list[Tensor]:
        lends = self.lends and matrices is self.group.matrices and matrices[0].device.type == "cpu"
        outs = (self._lent if lends else self._memory)(matrices, shapes)
        batch = Batch(outs, self.group.spans_of(matrices))
        draws = [(step, draw)]
        noise = Noise(Normal(), self.seed, draws) if self.plan is None else self.plan.noise(draws, Normal())
        self.group.backend.draw(batch, noise)
        return outs

    @staticmethod
    def _memory(matrices: Sequence[Matrix], shapes: Sequence[tuple[int, ...]]) -> list[Tensor]:
        if len({(*shape, matrix.device) for shape, matrix in zip(shapes, matrices)}) == 1:
            whole = (len(shapes), *shapes[0])
            return Stack(torch.empty(whole, dtype=torch.float32, device=matrices[0].device))
        pairs = zip(shapes, matrices)
        return TensorList([torch.empty(shape, dtype=torch.float32, device=m.device) for shape, m in pairs])

    def _lent(self, matrices: Sequence[Matrix], shapes: Sequence[tuple[int, ...]]) -> list[Tensor]:
        spare: list[tuple] = self.group.memo.get("spare", [])
        here = [k for k, (known, _) in enumerate(spare) if known == shapes]
        found = spare.pop(here[0]) if here else (shapes, self._memory(matrices, shapes))
        if not here:
            found[1].kept = {}  # so that its launch is prepared once
        self.group.memo.setdefault("lent", []).append(found)
        return found[1]

    def sketch(
        self, matrix: Matrix, draws: Sequence[tuple[int, int]], weights: Sequence[float] | Tensor,
        omega: Tensor, transposed: bool = False
    ) -> Tensor:  # fmt: skip
        # z of the whole matrix, also where this process holds a shard of its weights
        noise, span = Noise(Normal(), self.seed, draws), Span(matrix.who)
        return gemm.sketch_of(self.group.backend, noise, weights, span, matrix.shape, omega, transposed)


def ends_of(
    matrices: Sequence[Matrix], middles: Sequence[Tensor], backend: Backend
) -> list[tuple[Tensor, Tensor]]:
    """Returns (L C, R) of a sum of draws of each matrix, all products in one launch, summed in the order of
    lowrank_."""
    found = [matrix.factors(middle) for matrix, middle in zip(matrices, middles)]
    lefts = [left for left, _, _ in found]
    with_core = [i for i, (_, core, _) in enumerate(found) if core is not None]
    if with_core:
        outs = [
            torch.zeros(len(lefts[i]), middles[i].shape[1], dtype=torch.float32, device=middles[i].device)
            for i in with_core
        ]
        cores = [middles[i].t().contiguous() for i in with_core]
        factors = Outer([lefts[i] for i in with_core], cores, [1.0] * len(outs))
        backend.lowrank_(Batch(outs, [Span(0)] * len(outs)), factors)
        for i, out in zip(with_core, outs):
            lefts[i] = out
    return [(left, right) for left, (_, _, right) in zip(lefts, found)]


__all__ = ["Draw", "Group", "ends_of"]
