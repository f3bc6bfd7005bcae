"""What an optimizer keeps for a factored direction: the bases of its matrices, and the updates that wait for the next write of W.

While U and V of a basis stay, updates are summed in its small space (Matrix.pending) and W is not written; the last step of an
interval writes it. In between, whoever else looks at the module is shown theta: its forward and its state_dict flush first.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch._compile import _disable_dynamo

from . import directions, parameters
from .evaluation import Evaluation, Group, Plan
from .evaluation.reading import theta
from .rule import Rule


class Factorized:
    """Part of ZerothOrder, which has the attributes below."""

    model: nn.Module | None
    factored: directions.Factored | None
    rule: Rule
    evaluation: Evaluation
    defer: bool | None
    matrices: dict[int, directions.Matrix]  # by id of the parameter
    state: Any
    seed: int
    steps: int
    rounding: str
    _groups: list[Group]  # of the last plan
    _lock: threading.Lock
    _busy = False  # somebody looks without a write

    def plan(self) -> Plan:
        raise NotImplementedError

    def watch(self, model: nn.Module) -> None:
        """Flush before somebody else runs the module or saves it."""
        hook = _Flush(self)
        model.register_forward_pre_hook(hook)
        model.register_state_dict_pre_hook(hook)

    def _matrix(self, entry: parameters.Trained) -> directions.Matrix | None:
        """What the factored direction keeps of a parameter; None where z is dense."""
        if self.factored is None or (shape := self.factored.shape(entry.tensor)) is None or not entry.tensor.numel():
            return None
        if id(entry.tensor) not in self.matrices:
            rank = min(self.factored.rank_of(entry.name), *shape)
            self.matrices[id(entry.tensor)] = directions.Matrix(entry.name, entry.who, *shape, rank, entry.tensor.device)
        return self.matrices[id(entry.tensor)]

    def refresh(self, plan: Plan, closure: Callable[[], Any]) -> None:
        """Draw the bases that this step needs. Nothing is written: the last step of an interval wrote what waited."""
        if self.factored is None:
            return
        for group in plan.groups:
            for step in (plan.step - 1, plan.step):  # after loading a state, the basis that its momentum belongs to comes first
                if group.matrices is None or step < 0:
                    continue
                born = self.factored.basis_step(step)
                stale = [(matrix, tensor) for matrix, tensor in zip(group.matrices, group.tensors) if matrix.born != born]
                if not stale or (step < plan.step and any(matrix.born >= 0 for matrix, _ in stale)):
                    continue
                old = [(matrix.left, matrix.right) for matrix, _ in stale]
                self.factored.refresh([matrix for matrix, _ in stale], group.source(plan.seed), born)
                for (matrix, tensor), (left, right) in zip(stale, old):
                    if right is not None:
                        self.rule.rebase(group, matrix, left, right, self.state[tensor])

    def defers(self, plan: Plan) -> bool:
        """Whether this step's updates of matrices wait: not in the last step of a basis, nor where nobody would see to the write."""
        if self.factored is None or not self.rule.defers or self.evaluation.name == "walk":
            return False
        wanted = self.model is not None if self.defer is None else self.defer
        return wanted and self.factored.basis_step(plan.step) == self.factored.basis_step(plan.step + 1)

    @torch.no_grad()
    def flush(self) -> None:
        """Write the updates that wait in factored matrices into the weights: W <- W + U C V^T, one rounding.

        The module's own forward (outside a step) and its state_dict do this by themselves; reading a parameter directly, copying the
        module or handing its tensors to other code does not. It adds a rounding of W: a run that was flushed, or saved, within an
        interval is equal to rounding to one that was not, and has the bits of one that resumed from there. Raises RuntimeError if the
        weights were written in between."""
        for group in self._groups:
            if group.matrices is not None:
                group.write(self.seed, max(0, self.steps - 1), self.rounding)

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Inside, the module reads theta with its waiting updates, while nothing is written: the run goes on to the same bits.

        Unlike flush(), which splits an interval's one rounding in two."""
        waiting = [group for group in self._groups if any(m.pending is not None for m in group.matrices or ())]
        if not waiting:
            yield
            return
        self._busy = True
        try:
            with theta(self.plan()):
                yield
        finally:
            self._busy = False


class _Flush:
    """Hook of the module: whoever runs it or saves it outside a step sees the weights with all their updates."""

    def __init__(self, optimizer: Factorized) -> None:
        self.optimizer = weakref.ref(optimizer)

    @_disable_dynamo  # torch.compile would trace the write into the module's graph; torch.optim keeps itself out the same way
    def __call__(self, *_: Any) -> None:
        optimizer = self.optimizer()
        if optimizer is not None and not optimizer._busy and not optimizer._lock.locked():
            optimizer.flush()

    def __reduce__(self) -> tuple:
        return _nothing, ()  # a saved or copied module has no optimizer


def _nothing() -> Callable[..., None]:
    return _ignore


def _ignore(*_: Any) -> None:
    """What is left of the hook in a copy."""
