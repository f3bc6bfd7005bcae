"""What a step asks of a rule."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from ..checks import within
from ..directions import LowRank, Matrix, Scaled
from ..group import Group
from ..plan import Plan
from .state import Keeps


class Rule:
    """Moves the weights along an estimate: the base class of rules.

        theta <- rule(theta, g),   g = sum_k weights[k] z_k,   weights[k] = -c_k / q (+c_k / q to maximize)

    A rule of your own has `update`, and of the rest what it needs. It keeps nothing, unless `keeps` says so.
    Robbins and Monro 1951, for the form.

        name      how records and messages call it
        defers    whether updates of factored matrices stay in their small space, and may wait there
        lr        of an optimizer that is given none, for a rule whose steps have one length; None: the
                  estimator's
        gain      length of its steps over that of SGD's at the same lr, where estimates agree and its state
                  has settled: 1 for an average, 1 / (1 - beta) for a heavy ball. zokern.tune divides lr by it
        dense     True: an optimizer refuses it with a low-rank direction
        lowrank   True: it refuses it with a dense one
        linear    True: theta moves along the sum of the draws itself, and needs no space to add them in
        diagonal  True: of low-rank directions it takes those with a diagonal draw and one basis
        plain     True: it makes z of its own, and is refused with a direction that has factors
        gated     True: it writes what `weights.projected` says in device memory, and nothing in a step that
                  is not finite, so that no value is read. A subclass says it anew
        share     lr of parameters that are not matrices, over that of their group. With a low-rank direction
                  a group of these alone that has an lr of its own moves by that. None: not known, and their
                  lr has to be 0
        shards    True: it takes the block of a parameter that this process holds, as it is in group.theta. A
                  subclass says it anew; sharded parameters are refused without it
        captures  whether a graph can hold its step. None: it can, without `base` and `prepare`
        base      base(point) returns (base, point): losses are read there, around other weights (Base)
        prepare   prepare(plan, oracle, states), before the losses of a step are read; it may read others
        descend   writes one parameter along its draws and a gradient, as Sgd.descend; None: the rule takes
                  no gradients (zokern/first_order.py)"""

    name = ""
    lr: float | None = None
    share: float | None = 1.0
    gain: float = 1.0
    dense = lowrank = linear = diagonal = plain = shards = False
    captures: bool | None = None
    base: Callable[[Any], Any] | None = None
    prepare: Callable[[Plan, Any, Any], None] | None = None
    descend: Callable[..., Any] | None = None

    @property
    def defers(self) -> bool:
        return False

    @property
    def gated(self) -> bool:
        return False

    def update(
        self, plan: Plan, group: Group, weights: Sequence[float], lr: float, decay: float, states: Any,
        defer: bool
    ) -> Tensor | int:  # fmt: skip
        """Writes the group's parameters. Returns how many results are inf or NaN.

        states[tensor] is the optimizer's state of a parameter. defer: the updates of factored matrices are
        kept in `pending` instead."""
        raise NotImplementedError(f"rule {type(self).__name__} has no update()")

    def share_of(self, group: Group) -> float:
        """Returns the lr of a group's dense parameters, over that of the group.

        Raises ValueError where the share is not known, and lr is not 0."""
        share = group.options.get("share", self.share)
        if share is None and (lr := group.options["lr"]):
            raise ValueError(
                f"lr is {lr!r} in the group of {group.names[0]!r}, and was 0 when the optimizer was made: "
                "dense_lr has no ratio to that. Expected an optimizer made with the lr of the run; "
                "param_groups may have lr 0 afterwards"
            )
        return 0.0 if share is None else float(share)

    def keeps(self, shape: tuple[int, ...], draw: tuple[int, int] | None) -> Keeps:
        """Returns what the rule keeps of a parameter of this shape: nothing, unless a rule says so. draw: the
        shape of a draw of a low-rank one; None: its z is dense."""
        return Keeps({}, False)

    def basis(self, state: Any) -> int | None:
        """Returns the step of the basis that a factored matrix' state belongs to; -1 where it does not say,
        None where it belongs to none."""
        return None

    def rebase(
        self, group: Group, matrix: Matrix, left: Tensor | None, right: Tensor | None, state: Any
    ) -> None:
        """Carries the state over from the basis (left, right) of a matrix to its present one."""


def check_share(share: float | None) -> float | None:
    """Returns a rule's `share`. Raises ValueError for a number out of range."""
    return None if share is None else within("share", share, 0.0, 2.0**128, "None or a number, at least 0")


def renew(rule: Rule, factored: LowRank, group: Group, states: Any, seed: int, step: int) -> None:
    """Gives the matrices of a group the basis of `step`, and carries over what the rule keeps. Nothing is
    written to the weights.

    A matrix that has no basis yet, because its state was loaded, first gets the one that this state belongs
    to, however long it was frozen since: bases are functions of (seed, names, step)."""
    assert group.matrices is not None
    born, source = factored.basis_step(step), group.source(seed)
    lost: dict[int, list[Matrix]] = {}
    for matrix, tensor in zip(group.matrices, group.tensors):
        if matrix.born < 0 and (kept := basis_of(rule, states, tensor)) is not None:
            # states of older versions do not say: the last step's
            kept = factored.basis_step(max(0, step - 1)) if kept < 0 else kept
            if kept != born:
                lost.setdefault(kept, []).append(matrix)
    for kept, members in sorted(lost.items()):
        factored.refresh(members, source, kept)
    stale = [(matrix, tensor) for matrix, tensor in zip(group.matrices, group.tensors) if matrix.born != born]
    if not stale:
        return
    old = [(matrix.left, matrix.right) for matrix, _ in stale]
    factored.refresh([matrix for matrix, _ in stale], source, born)
    for (matrix, tensor), (left, right) in zip(stale, old):
        if left is not None or right is not None:
            rule.rebase(group, matrix, left, right, states[tensor])


def basis_of(rule: Rule, states: Any, tensor: Tensor) -> int | None:
    """Returns the step of the basis that a parameter's state belongs to; -1 where it does not say."""
    return rule.basis(states[tensor]) if tensor in states else None


def check_basis(rule: Rule, direction: LowRank | None) -> None:
    """Refuse a rule that needs another space than a direction has: one basis, or any basis at all."""
    if direction is None:
        if rule.lowrank:
            raise ValueError(
                f"rule is {rule.name!r} with a dense direction, which has no small matrices to "
                "orthogonalise: expected a low-rank one, "
                "such as zokern.directions.Lazy(), or take zokern.ZOMuon"
            )
        return
    if rule.dense:
        raise ValueError(
            f"rule is {rule.name!r} with direction {direction.name!r}; expected a dense z, 'normal' or "
            "'rademacher', or rule zokern.Sgd() or "
            "zokern.Momentum(), whose moments are small where z is low-rank"
        )
    if rule.diagonal and not direction.is_diagonal:
        raise ValueError(
            f"rule is {rule.name!r} with direction {direction.name!r}, whose basis changes or is no "
            "diagonal; its moments belong to "
            "one basis, as that of 'diagonal': expected zokern.Adam(core=True), zokern.Sgd() or "
            "zokern.Momentum(), or take zokern.TeZO, "
            "or zokern.MeZO (dense z)"
        )
    if direction.joins and not rule.linear:
        raise ValueError(
            f"rule is {rule.name!r} with direction {direction.name!r}, which draws U and V in every step and "
            "so has no space to keep "
            "numbers in: expected zokern.Sgd(), or u or v Kept"
        )


def check_scaled(rule: Rule, direction: Scaled | None) -> None:
    """Refuses a rule that makes z of its own, of past steps or of a momentum, with a direction that has
    factors."""
    if direction is not None and rule.plain:
        raise ValueError(
            f"rule is {rule.name!r} with direction {direction.name!r}, whose factors may differ from step to "
            "step; expected a direction "
            "without factors, 'normal' or 'rademacher', or rule zokern.Sgd(), zokern.Momentum() or "
            "zokern.Adam()"
        )


__all__ = ["Rule", "basis_of", "check_basis", "check_scaled", "check_share", "renew"]
