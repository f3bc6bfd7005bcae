"""Evaluation ``master``: the parameters themselves hold theta + eps sum_k a_k z_k while a loss is read; a
copy holds theta.

The copy is taken when a reading begins, so weights that others wrote between steps are theta. One launch per
group writes the parameters from the copy. At the end, also after an exception, they are written back bit for
bit. The model runs as it is: compiled graphs, TorchScript, custom kernels, views of weights and caches that
look at versions all see real parameters.

Memory: one copy of what is trained. In 16 bits a perturbation below half an ulp does nothing; the record's
`swallowed` is the share.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor

from ..backends import Batch, Outer, TensorList, Terms
from ..fingerprint import announce
from ..group import Group
from ..part import Part
from ..plan import Plan
from ..underflow import Share, heads, moving
from .base import Point, Record, distinct
from .factors import Factors
from .isolation import Isolation


class Master(Part):
    """Reads the losses with the parameters themselves moved, and puts their bits back from a copy: right
    for any model.

    rounding  of the perturbed 16-bit weights: 'nearest', or 'stochastic', which keeps small perturbations
              in expectation. Both sides of a pair spend the same random bits

    It takes a copy of what is trained, in its dtype, while it reads. The record's `swallowed` is the
    share of sampled 16-bit weights that the perturbation left as they were; a warning names a share above
    10 %.
    Raises ValueError for another rounding."""

    name, defers, exact, stands_in = "master", False, True, False

    def __init__(self, rounding: str = "nearest") -> None:
        if rounding not in ("nearest", "stochastic"):
            raise ValueError(f"Master: rounding is {rounding!r}; expected 'nearest' or 'stochastic'")
        self.rounding = rounding
        self.begin()

    def begin(self) -> None:
        """Forgets what was said and recorded."""
        super().begin()
        self.record, self.said = Record(self.name), False

    def losses(self, plan: Plan, points: Sequence[Point], closure: Callable[[], object]) -> Tensor:
        """Returns the losses at the points, float64 [len(points)]; see Evaluation.losses."""
        found = self.read(plan, points, closure, Isolation(plan))
        if self.record.swallowed is not None and self.rounding == "nearest":
            self.record.swallowed = self.record.swallowed[0], partial(self._said, plan.groups[0].eps)
        return found

    def _said(self, eps: float, share: float) -> str | None:
        """Returns what is said, once, of a perturbation that rounding swallows."""
        if share <= 0.1 or self.said:
            return None
        self.said = True
        return (
            f"evaluation 'master': rounding to 16 bits swallows {share:.0%} of the perturbation "
            f"(eps = {eps}); raise eps, or use zokern.Master(rounding='stochastic')"
        )

    def read(
        self, plan: Plan, points: Sequence[Point], closure: Callable[[], object], isolation: Isolation
    ) -> Tensor:
        """Returns the losses, without a word about rounding."""
        each = distinct(points)
        read: dict[Point, Tensor] = {}
        swallowed: Share | None = None
        with isolation.session(eager=False), self.holding(plan, each) as move:
            for side, point in enumerate(each):
                if move(side):
                    isolation.weights.written()
                if point.terms and swallowed is None:
                    swallowed = _swallowed(plan)
                read[point] = isolation.read(closure)
        size = sum(group.nbytes for group in plan.groups if "masters" in group.memo)
        self.record = Record(self.name, scratch_bytes=size, swallowed=swallowed)
        return torch.stack([read[point] for point in points])

    @contextmanager
    def holding(self, plan: Plan, points: Sequence[Point]) -> Iterator[Callable[[int], bool]]:
        """Yields a function that writes the parameters at one of the points, and returns whether it wrote; at
        the end they hold theta."""
        factors = Factors(plan, points)
        # whether the parameters themselves are theta
        exact = not plan.deferred and plan.rounding != "residual"
        copied, written = not exact or any(point.terms for point in points), False
        if copied:  # before a reading of theta too: it may write where no version counter tells
            for group in plan.groups:
                group.exchange(self._masters(group), back=False)

        def move(side: int) -> bool:
            nonlocal written
            if not (points[side].terms or written or not exact):
                return False
            written = True
            for group in plan.groups:
                self._write(plan, group, self._masters(group), points[side], factors, side)
                announce(group.theta)
            return True

        try:
            yield move
        finally:
            if copied:
                for group in plan.groups:
                    group.exchange(self._masters(group), back=True)
                torch.clear_autocast_cache()

    def _masters(self, group: Group) -> TensorList:
        """Returns memory for the copy, which stays from step to step."""
        if "masters" not in group.memo:
            made = [torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in group.theta]
            group.memo["masters"] = TensorList.lasting(made)
            group.memo["loose"] = [i for i, t in enumerate(group.theta) if not t.is_contiguous()]
        return group.memo["masters"]

    def _write(
        self, plan: Plan, group: Group, kept: TensorList, point: Point, factors: Factors, side: int
    ) -> None:
        """theta <- the copy, moved to a point."""
        low = group.residuals if plan.rounding == "residual" else None
        moved = group.matrices is not None and not factors.untouched(group, 0, side)
        scales = [amount * group.reach(word) for word, amount in point.terms]
        if group.matrices is not None and not moved:
            scales = []
        several = len(scales) > 1 or not point.is_known
        in_place = self.rounding == "stochastic" or (group.matrices is None and several)
        outs = TensorList(group.theta) if group.memo["loose"] else group.theta
        for i in group.memo["loose"]:
            outs[i] = torch.empty_like(kept[i])
        if in_place or not (scales or low or moved):
            group.exchange(kept, back=True)
        if moved:
            assert group.matrices is not None
            members = range(len(kept))
            factors.prepare_ends(group, members, [side])
            lefts, rights, shrinks = zip(*[factors.of(group, i, side) for i in members])
            source, target = (group.theta, None) if in_place else (kept, outs)
            low = None if in_place else low
            rounding = self.rounding if in_place else "nearest" if low is None else "residual"
            group.backend.lowrank_(
                Batch(source, group.spans, rounding, low),
                Outer(lefts, rights, [1.0] * len(lefts), shrinks[0]),
                plan.noise([(plan.step, 0)], None),
                outs=target,
            )
        elif in_place and scales:
            table = plan.table(scales, kept[0].device)
            spent = None if low is None else [bits.clone() for bits in low]
            rounding = "residual" if spent is not None else self.rounding
            draws = [plan.named(draw) for draw, _ in point.terms]
            batch = Batch(group.theta, group.spans, rounding, spent, group.scales)
            noise = plan.noise(draws)
            group.backend.axpy_(batch, noise, Terms(table))
            return
        elif not in_place and (scales or low):
            draw, scale = (point.terms[0][0], scales[0]) if scales else (0, 0.0)
            batch = Batch(kept, group.spans, residuals=low, scales=group.scales)
            group.backend.perturb(batch, plan.noise([plan.named(draw)]), [scale], [outs])  # type: ignore[list-item]
        if not in_place:
            for i in group.memo["loose"]:
                if scales or low or moved:
                    group.theta[i].copy_(outs[i])


def _swallowed(plan: Plan) -> Share | None:
    """Returns the share of sampled 16-bit weights that are where they were; measured in the first steps and
    now and then."""
    if (plan.step >= 10 and plan.step % 100) or plan.tape is not None:
        return None
    still: list[Tensor] = []
    total = 0
    for group in plan.groups:
        for i, (now, before) in enumerate(zip(group.theta, group.memo["masters"])):
            if now.dtype != torch.float32 and now.numel():
                still.append(
                    moving(heads(now) == heads(before), group.scale(i)).double().mean() * now.numel()
                )
                total += now.numel()
    device = still[0].device if still else None
    return (torch.stack([one.to(device) for one in still]).sum() / total, _nothing) if total else None


def _nothing(share: float) -> None:
    """Says nothing."""


__all__ = ["Master"]
