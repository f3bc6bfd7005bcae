"""Deferred updates of low-rank directions, and the bases of their matrices.

While U and V of a basis stay, updates are summed in its small space (Matrix.pending) and W is not written; the last step of an
interval writes it. Meanwhile W lacks them, so other readers flush first: a forward, state_dict or load_state_dict of the module or of a
module in it, state_dict of the optimizer, and a step of another optimizer on the same modules do so by themselves.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch._compile import _disable_dynamo

from . import directions, parameters
from .estimator import Oracle
from .evaluation import THETA, Evaluation, Master
from .fingerprint import memory_of
from .memory import check_state
from .modules import Tree
from .plan import Group, Plan
from .rule import Rule, basis_of, renew


class Deferred:
    """Part of ZerothOrder, which has the attributes below."""

    model: nn.Module | None
    factored: directions.LowRank | None
    rule: Rule
    evaluation: Evaluation
    defer: bool | None
    matrices: dict[int, directions.Matrix]  # by id of the parameter
    state: Any
    seed: int
    steps: int
    rounding: str
    _tree: Tree
    _entries: list[list[parameters.Trained]]  # of every parameter group
    _groups: list[Group]  # of the last plan
    _lock: threading.Lock
    _busy = False  # inside evaluating()
    _parts: tuple[nn.Module, ...] = ()  # the modules of the model
    _hooks: tuple[Any, ...] = ()  # of their forwards, while updates are deferred
    _left: tuple[Group, ...] = ()  # earlier groups, with deferred updates of parameters that are frozen now

    waiting: weakref.WeakSet[Deferred] = weakref.WeakSet()  # optimizers with deferred updates

    def plan(self) -> Plan:
        raise NotImplementedError

    def accept(self, also: Sequence[torch.Tensor] = ()) -> None:
        raise NotImplementedError

    def drop_low_bits(self) -> None:
        raise NotImplementedError

    @property
    def pending(self) -> bool:
        """Whether updates are deferred: the weights lack them until flush(). Then EMA, p.norm() and other code that reads weights
        directly sees old weights; module forwards and state_dict() flush by themselves."""
        return any(matrix.pending is not None for matrix in self.matrices.values())

    def watch(self, model: nn.Module, given: nn.Module) -> None:
        """Flushes before the module, or a part of it, is saved or loaded into."""
        wrapper = [given] if given is not model else []  # torch.compile's, which may have been traced before
        self._parts = (*model.modules(), *wrapper)
        for module in self._parts:
            module.register_state_dict_pre_hook(_Flush(self, saves=True))
            module.register_load_state_dict_pre_hook(_Flush(self))

    def open(self) -> None:
        """Before a step: writes what other optimizers of the same modules have deferred."""
        if self._busy:
            raise RuntimeError("a step inside evaluating(), which shows deferred updates to the model: leave the context first")
        for other in [*Deferred.waiting]:
            if other is not self and (self._tree.is_open or other._tree.is_open or self._shares(other)):
                other.flush()

    def _shares(self, other: Deferred) -> bool:
        return not {*map(id, self._tree.modules)}.isdisjoint(map(id, other._tree.modules))

    def close(self) -> None:
        """After a step: while updates are deferred, a forward of any part of the model outside a step writes them first."""
        if not self.pending:
            self._release()
        elif self not in Deferred.waiting:
            Deferred.waiting.add(self)
            hook = _Flush(self)
            parts = [part for part in self._parts or self._tree.modules if not isinstance(part, torch.jit.ScriptModule)]
            self._hooks = tuple(part.register_forward_pre_hook(hook) for part in parts)

    def _release(self) -> None:
        """Takes the forward hooks off: nothing is deferred any more."""
        Deferred.waiting.discard(self)
        for hook in self._hooks:
            hook.remove()
        self._hooks = ()

    def leave(self, groups: list[Group]) -> None:
        """Remembers groups that a plan replaces: refresh() writes their deferred updates if a parameter is trained no more."""
        if any(m.pending is not None for group in groups for m in group.matrices or ()):
            self._left = (*self._left, *groups)

    def _matrix(self, entry: parameters.Trained) -> directions.Matrix | None:
        """Returns what the factored direction keeps of a parameter; None where z is dense."""
        if self.factored is None or (shape := self._shape(entry)) is None:
            return None
        if id(entry.tensor) not in self.matrices:
            rank = min(self.factored.rank_of(parameters.plain(entry.name)), *shape)
            self.matrices[id(entry.tensor)] = directions.Matrix(entry.name, entry.who, *shape, rank, entry.tensor.device)
        return self.matrices[id(entry.tensor)]

    def _shape(self, entry: parameters.Trained) -> tuple[int, int] | None:
        return self.factored.shape(entry.tensor) if self.factored is not None and entry.tensor.numel() else None

    def _check_matrix(self, entry: parameters.Trained) -> None:
        """Forgets the basis of a parameter that has another shape or device now; raises if it has deferred updates."""
        matrix = self.matrices.get(id(entry.tensor))
        if matrix is not None:
            self._check_waiting(matrix, entry.tensor)
            if (matrix.shape, matrix.device) != (self._shape(entry), entry.tensor.device):
                del self.matrices[id(entry.tensor)]

    def _check_state(self, entry: parameters.Trained, state: Any, way_out: str, loading: bool = False) -> None:
        matrix = self._matrix(entry)
        draw = self.factored.draw_shape(matrix) if self.factored is not None and matrix is not None else None
        check_state(entry, state, self.rule.name, matrix, draw, way_out, loading)

    def _check_waiting(self, matrix: directions.Matrix, tensor: torch.Tensor) -> None:
        if matrix.pending is None:
            return
        for group in self._groups:
            for known, theta in zip(group.tensors, group.theta):
                if known is tensor and memory_of([tensor]) != memory_of([theta]):
                    raise RuntimeError(
                        f"the weights of {matrix.name!r} were replaced while updates of them were deferred; call optimizer.flush() before "
                        "weights are replaced, cast or moved, or optimizer.discard() to go on from what they are now, or build the "
                        "optimizer with defer=False"
                    )

    def refresh(self, plan: Plan, oracle: Oracle) -> None:
        """Draws the bases that this step needs; before, writes deferred updates that belong to other bases or groups."""
        if self.factored is None:
            return
        self.settle(plan)
        if isinstance(self.factored, directions.Measured):
            self.factored.measure(oracle, plan)
        for group in plan.groups:
            if group.matrices is not None:
                renew(self.rule, self.factored, group, self.state, plan.seed, plan.step)
        if isinstance(self.factored, directions.Measured):
            self.factored.forget({basis_of(self.rule, self.state, tensor) for tensor in [*self.state]})

    def settle(self, plan: Plan) -> None:
        """Writes updates of parameters that are trained no more, and updates in an old basis: the step that should have was skipped."""
        assert self.factored is not None
        trained = {id(t) for t in plan.tensors}
        step = max(0, plan.step - 1)
        also = []
        for group in self._left:
            if not {id(t) for t in group.tensors} <= trained:
                also += _waiting(group)
                group.write(plan.seed, step, self.rounding)
        self._left = ()
        born = self.factored.basis_step(plan.step)
        for group in plan.groups:
            waiting = [matrix for matrix in group.matrices or () if matrix.pending is not None]
            thawed = waiting and len(waiting) < len(
                group.matrices or ()
            )  # a matrix that joins has no updates and no decay to wait for
            if thawed or any(matrix.born != born for matrix in waiting):
                group.write(plan.seed, step, self.rounding)
        self.accept(also)

    def defers(self, plan: Plan) -> bool:
        """Whether this step's updates of matrices are deferred: not in the last step of a basis, nor where nothing would flush them."""
        if self.factored is None or not self.rule.defers or not self.evaluation.defers:
            return False
        # peft merges adapters by reading them, which no hook sees, and writing them costs little
        wanted = self.model is not None and not hasattr(self.model, "peft_config") if self.defer is None else self.defer
        return wanted and self.factored.basis_step(plan.step) == self.factored.basis_step(plan.step + 1)

    @torch.no_grad()
    def flush(self) -> None:
        """Writes the deferred updates of factored matrices into the weights: W <- W + U C V^T, one rounding.

        A forward (outside a step), state_dict and load_state_dict of the module and of every module in it do this by themselves; reading a
        parameter directly, a copy or a pickle of the module does not. It adds a rounding of W: a run that was flushed, or saved, within an
        interval is equal to rounding to one that was not, and has the bits of one that resumed from there.
        Raises RuntimeError if the weights were written in between, or inside evaluating()."""
        if self._busy:
            raise RuntimeError("flush() or state_dict() inside evaluating(), which writes nothing: leave the context first")
        self.drop_low_bits()
        also = [tensor for group in self._left for tensor in _waiting(group)]
        for group in (*self._left, *self._groups):
            if group.matrices is not None:
                for matrix, tensor in zip(group.matrices, group.tensors):
                    self._check_waiting(matrix, tensor)
                group.write(self.seed, max(0, self.steps - 1), self.rounding)
        self._left = ()
        self.accept(also)
        self._release()

    def discard(self) -> None:
        """Forgets the deferred updates: the run goes on from the weights as they are now, loaded or edited by hand."""
        for matrix in self.matrices.values():
            matrix.pending, matrix.shrink = None, 1.0
        self._left = ()
        self._release()

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Inside, the weights have the deferred updates; at the end they are put back, so the run goes on to the same bits.

        Unlike flush(), which splits an interval's one rounding in two. Takes a copy of the weights meanwhile."""
        if not self.pending:
            yield
            return
        plan = self.plan()
        self.drop_low_bits()
        try:
            with Master().holding(plan, [THETA]) as move:
                move(0)
                self._busy = True
                yield
        finally:
            self._busy = False
            self.accept()


def _waiting(group: Group) -> list[torch.Tensor]:
    return [tensor for tensor, matrix in zip(group.tensors, group.matrices or ()) if matrix.pending is not None]


class _Flush:
    """Hook of modules: a forward, save or load outside a step finds the weights with all their updates.

    saves  the caller reads the weights themselves: not allowed inside evaluating()"""

    def __init__(self, optimizer: Deferred, saves: bool = False) -> None:
        self.optimizer, self.saves = weakref.ref(optimizer), saves

    def __call__(self, *_: Any) -> None:
        optimizer = self.optimizer()
        if optimizer is not None and not optimizer._lock.locked():  # a step's own readings add deferred updates themselves
            self._write(optimizer)

    @_disable_dynamo  # torch.compile would trace the write into the module's graph; torch.optim keeps itself out the same way
    def _write(self, optimizer: Deferred) -> None:
        if optimizer.pending and (self.saves or not optimizer._busy):
            optimizer.flush()

    def __deepcopy__(self, memo: dict) -> Callable[..., None]:
        """A copied module has no optimizer. Its parts are copied after its hooks: they have the updates that are written here."""
        optimizer = self.optimizer()
        if optimizer is not None and optimizer.pending and not optimizer._lock.locked():
            own = optimizer.model._parameters.values() if optimizer.model is not None else ()
            if any((matrix := optimizer.matrices.get(id(p))) is not None and matrix.pending is not None for p in own):
                raise RuntimeError(
                    "the module is being copied while updates of its own weights are deferred: call optimizer.flush() first"
                )
            optimizer.flush()
        return _ignore

    def __reduce__(self) -> tuple:
        """A pickled module has no optimizer. Raises while updates are deferred, which it would lack; a pickle writes no weights."""
        optimizer = self.optimizer()
        if optimizer is not None and optimizer.pending:
            raise RuntimeError("the module is being pickled while updates are deferred: call optimizer.flush() first")
        return _nothing, ()


def _nothing() -> Callable[..., None]:
    return _ignore


def _ignore(*_: Any) -> None:
    """What is left of the hook in a copy."""
