"""What an optimizer keeps for a factored direction: the bases of its matrices, and the updates that wait for the next write of W.

While U and V of a basis stay, updates are summed in its small space (Matrix.pending) and W is not written; the last step of an
interval writes it. In between, whoever else looks at the module is shown theta: the forward, the state_dict and the load_state_dict of
every module in it flush first, and so do a copy and a pickle of it.
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
from .memory import START_ANEW, Memory, check_state
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
    memory: Memory
    _entries: list[list[parameters.Trained]]  # of every parameter group
    _groups: list[Group]  # of the last plan
    _lock: threading.Lock
    _busy = False  # somebody looks without a write
    _parts: tuple[nn.Module, ...] = ()  # the modules of the model

    waiting: weakref.WeakSet[Factorized] = weakref.WeakSet()  # optimizers whose updates wait

    def plan(self) -> Plan:
        raise NotImplementedError

    def _known(self) -> dict[str, torch.Tensor]:
        raise NotImplementedError

    def watch(self, model: nn.Module, given: nn.Module) -> None:
        """Flush before somebody else runs the module, or a part of it, saves it or loads into it."""
        wrapper = [given] if given is not model else []  # torch.compile's, which may have been traced before
        self._parts = (*model.modules(), *wrapper)
        for module in self._parts:
            module.register_state_dict_pre_hook(_Flush(self, saves=True))
            module.register_load_state_dict_pre_hook(_Flush(self))

    def open(self) -> None:
        """Before a step: its own readings of the model write nothing, and what waits elsewhere for the same modules is written now."""
        if self._busy:
            raise RuntimeError("a step inside evaluating(): what waits is shown to the model there; leave the context first")
        for other in [*Factorized.waiting]:
            mine = {*map(id, self._known().values())}
            if other is not self and not (mine.isdisjoint(other.matrices) and {*self._parts}.isdisjoint(other._parts)):
                other.flush()
        self._release()

    def close(self) -> None:
        """After a step: while updates wait, the forward of any part of the model writes them first."""
        if any(m.pending is not None for m in self.matrices.values()):
            Factorized.waiting.add(self)
            hook = _Flush(self)
            for module in self._parts:
                module._forward_pre_hooks[-id(self)] = hook  # register_forward_pre_hook's own numbers are positive

    def _release(self) -> None:
        """Nothing waits, or a step begins, whose calls of the modules look at what waits by themselves: no hook is in their way."""
        if self in Factorized.waiting:
            Factorized.waiting.discard(self)
            for module in self._parts:
                module._forward_pre_hooks.pop(-id(self), None)

    def _matrix(self, entry: parameters.Trained) -> directions.Matrix | None:
        """What the factored direction keeps of a parameter; None where z is dense."""
        if self.factored is None or (shape := self._shape(entry)) is None:
            return None
        if id(entry.tensor) not in self.matrices:
            rank = min(self.factored.rank_of(parameters.plain(entry.name)), *shape)
            self.matrices[id(entry.tensor)] = directions.Matrix(entry.name, entry.who, *shape, rank, entry.tensor.device)
        return self.matrices[id(entry.tensor)]

    def _shape(self, entry: parameters.Trained) -> tuple[int, int] | None:
        """Rows and columns of a parameter that the direction factors; None where z is dense."""
        return self.factored.shape(entry.tensor) if self.factored is not None and entry.tensor.numel() else None

    def _check_memory(self, active: list[parameters.Trained]) -> bool:
        """Check parameters and state again where they are other memory than at the last step, and whether they are; raises before
        anything is touched."""
        moved = self.memory.moved(active)
        for entry in moved:
            if (matrix := self.matrices.get(id(entry.tensor))) is not None:
                self._check_waiting(matrix, entry.tensor)
                if (matrix.shape, matrix.device) != (self._shape(entry), entry.tensor.device):
                    del self.matrices[id(entry.tensor)]
        settled = self.memory.settled and not moved
        if not settled or self.memory.states_are_new(self.state):
            for entry in active:
                if state := self.state.get(entry.tensor):
                    self._check_state(entry, state, START_ANEW)
            self.memory.accept_states(self.state)
        if not settled:
            self.memory.accept(active, [entry for group in self._entries for entry in group])
        return not settled

    def _check_state(self, entry: parameters.Trained, state: Any, way_out: str, loading: bool = False) -> None:
        core = not isinstance(self.factored, directions.Lazy)
        check_state(entry, state, self.rule.name, self._matrix(entry), core, way_out, loading)

    def _check_waiting(self, matrix: directions.Matrix, tensor: torch.Tensor) -> None:
        if matrix.pending is not None and self.memory.is_other(tensor):
            raise RuntimeError(
                f"the weights of {matrix.name!r} were replaced while updates waited for them; call optimizer.flush() before weights are "
                "replaced, cast or moved, or optimizer.discard() to go on from what they are now, or build the optimizer with defer=False"
            )

    def refresh(self, plan: Plan, closure: Callable[[], Any]) -> None:
        """Draw the bases that this step needs. Nothing is written: the last step of an interval wrote what waited."""
        if self.factored is None:
            return
        self.settle(plan)
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

    def settle(self, plan: Plan) -> None:
        """Before a new basis: write what still waits in the old one, because the step that should have written it was skipped."""
        assert self.factored is not None
        born = self.factored.basis_step(plan.step)
        for group in plan.groups:
            if any(matrix.pending is not None and matrix.born != born for matrix in group.matrices or ()):
                group.write(plan.seed, max(0, plan.step - 1), self.rounding)

    def defers(self, plan: Plan) -> bool:
        """Whether this step's updates of matrices wait: not in the last step of a basis, nor where nobody would see to the write."""
        if self.factored is None or not self.rule.defers or self.evaluation.name == "walk":
            return False
        # peft merges adapters by reading them, which no hook sees, and writing them costs little
        wanted = self.model is not None and not hasattr(self.model, "peft_config") if self.defer is None else self.defer
        return wanted and self.factored.basis_step(plan.step) == self.factored.basis_step(plan.step + 1)

    @torch.no_grad()
    def flush(self) -> None:
        """Write the updates that wait in factored matrices into the weights: W <- W + U C V^T, one rounding.

        The forward (outside a step), state_dict and load_state_dict of the module and of every part of it, a copy and a pickle do this by
        themselves; reading a parameter directly or handing its tensors to other code does not. It adds a rounding of W: a run that was
        flushed, or saved, within an interval is equal to rounding to one that was not, and has the bits of one that resumed from there.
        Raises RuntimeError if the weights were written in between, or inside evaluating()."""
        if self._busy:
            raise RuntimeError("flush() or state_dict() inside evaluating(), which writes nothing: leave the context first")
        for group in self._groups:
            if group.matrices is not None:
                for matrix, tensor in zip(group.matrices, group.tensors):
                    self._check_waiting(matrix, tensor)
                group.write(self.seed, max(0, self.steps - 1), self.rounding)
        self._release()

    def copied(self) -> None:
        """The module is being copied or pickled: the weights of its parts are read after this, its own were read before."""
        if self.model is not None and any(
            (matrix := self.matrices.get(id(p))) is not None and matrix.pending is not None
            for p in self.model._parameters.values()
        ):
            raise RuntimeError(
                "the module is being copied while updates wait for its own parameters: call optimizer.flush() first"
            )
        self.flush()

    def discard(self) -> None:
        """Forget the updates that wait: the run goes on from the weights as they are now, loaded or edited by hand."""
        for matrix in self.matrices.values():
            matrix.pending, matrix.shrink = None, 1.0
        self._release()

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
    """Hook of a module: whoever runs it, saves it or loads into it outside a step sees the weights with all their updates.

    saves  a look at the weights themselves, which evaluating() cannot show: refused there"""

    def __init__(self, optimizer: Factorized, saves: bool = False) -> None:
        self.optimizer, self.saves = weakref.ref(optimizer), saves

    @_disable_dynamo  # torch.compile would trace the write into the module's graph; torch.optim keeps itself out the same way
    def __call__(self, *_: Any) -> None:
        optimizer = self.optimizer()
        if optimizer is not None and not optimizer._lock.locked() and (self.saves or not optimizer._busy):
            optimizer.flush()

    def __reduce__(self) -> tuple:
        """A saved or copied module has no optimizer; its weights, which are copied after its hooks, have every update."""
        optimizer = self.optimizer()
        if optimizer is not None and not optimizer._lock.locked():
            optimizer.copied()
        return _nothing, ()


def _nothing() -> Callable[..., None]:
    return _ignore


def _ignore(*_: Any) -> None:
    """What is left of the hook in a copy."""
