"""Deferred updates of low-rank directions, and who makes them visible.

While U and V of a basis stay, updates are summed in its small space (Matrix.pending) and W is not written;
the last step of an interval writes it. Meanwhile W lacks them, so other readers flush first: a forward,
state_dict or load_state_dict of the module or of a module in it, state_dict of the optimizer, and a step of
another optimizer on the same modules do so by themselves. So does the end of the optimizer.
"""

from __future__ import annotations

import sys
import threading
import weakref
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import repeat
from typing import Any

import torch
from torch import Tensor, nn
from torch._compile import _disable_dynamo
from torch.utils._python_dispatch import _disable_current_modes

from ..backends import Noise
from ..evaluation import THETA, Evaluation, Master
from ..fingerprint import memory_of
from ..group import Group
from ..modules import Tree
from ..plan import Plan, Run
from ..warning import warn
from .bases import Bases
from .low_bits import LowBits

REPLACED = (
    "the weights of {!r} were replaced while updates of them were deferred; call optimizer.flush() before "
    "weights are replaced, cast or moved, or optimizer.discard() to go on from what they are now, or build "
    "the optimizer with defer=False"
)
CAPTURED = (
    "a CUDA graph is captured, and every replay would write them again; call optimizer.flush() before a "
    "capture, or keep the optimizer until its end"
)


class Deferred:
    """The updates of one optimizer that are not in the weights yet.

    wanted  whether updates may be deferred; None: where a module was given, whose hooks write them
    lock    held while the optimizer steps: its own readings add the updates themselves
    groups  of the last plan;  tree  the modules that they belong to"""

    waiting: weakref.WeakSet[Deferred] = weakref.WeakSet()  # those with updates

    def __init__(
        self, run: Run, bases: Bases, low_bits: LowBits, lock: threading.Lock, wanted: bool | None
    ) -> None:
        self.run, self.bases, self.low_bits, self.lock, self.wanted = run, bases, low_bits, lock, wanted
        if wanted is not None and not isinstance(wanted, bool):
            raise ValueError(f"defer is {wanted!r}; expected True, False or None")
        self.model: nn.Module | None = None
        self._hook = _Flush(self)
        self.groups: list[Group] = []
        self.tree = Tree([])
        self.is_shown = False  # inside shown()
        self._parts: tuple[nn.Module, ...] = ()  # the modules of the model
        # registers of their forwards' hooks, and our number in each, while updates are deferred
        self._registers: tuple[Any, ...] = ()
        self._numbers: tuple[int, ...] = ()
        self._left: tuple[Group, ...] = ()  # earlier groups, with updates of parameters that are frozen now

    def __del__(self) -> None:
        """Writes the deferred updates when the optimizer is gone, because nothing could write them later.

        The modules' hooks have weak references. With strong ones an edit of the weights would have every
        later forward raise, and no optimizer could discard(). An optimizer in a cycle of references is
        collected at any moment, as within a compilation. Warns where the updates cannot be written."""
        if sys.is_finalizing() or not self.pending:
            return
        try:
            if torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():
                raise RuntimeError(CAPTURED)
            with _disable_current_modes():
                self.flush()
        except Exception as problem:
            warn(f"an optimizer is gone, and updates that it had deferred are lost: {problem}")

    @property
    def pending(self) -> bool:
        """Whether updates are deferred."""
        return any(matrix.pending is not None for matrix in self.bases.matrices.values())

    def watch(self, model: nn.Module, given: nn.Module) -> None:
        """Flushes before the module, or a part of it, is saved or loaded into."""
        self.model = model
        wrapper = [given] if given is not model else []  # torch.compile's, which may have been traced before
        self._parts = (*model.modules(), *wrapper)
        for module in self._parts:
            module.register_state_dict_pre_hook(_Flush(self, saves=True))
            module.register_load_state_dict_pre_hook(_Flush(self))

    def open(self, tree: Tree) -> None:
        """Before a step: writes what other optimizers of the same modules have deferred."""
        if self.is_shown:
            raise RuntimeError(
                "a step inside evaluating(), which shows deferred updates to the model: leave the context "
                "first"
            )
        self.tree = tree
        self._unhook()
        for other in [*Deferred.waiting]:
            if other is not self and (tree.is_open or other.tree.is_open or self._shares(other)):
                other.flush()

    def _shares(self, other: Deferred) -> bool:
        return not {*map(id, self.tree.modules)}.isdisjoint(map(id, other.tree.modules))

    def close(self, tree: Tree) -> None:
        """After a step: while updates are deferred,
        a forward of any part of the model outside a step writes them first."""
        self.tree = tree
        if not self.pending:
            self._release()
        elif self not in Deferred.waiting:
            Deferred.waiting.add(self)
            parts = [
                part for part in self._parts or tree.modules if not isinstance(part, torch.jit.ScriptModule)
            ]
            handles = [part.register_forward_pre_hook(self._hook, prepend=True) for part in parts]
            self._registers = tuple(part._forward_pre_hooks for part in parts)
            self._numbers = tuple(handle.id for handle in handles)
        else:
            _each(OrderedDict.__setitem__, self._registers, self._numbers, repeat(self._hook))
            for register, number in zip(self._registers, self._numbers):
                if len(register) > 1:
                    register.move_to_end(number, last=False)  # before hooks that read weights

    def _unhook(self) -> None:
        """Takes the forward hooks off. A step adds deferred updates itself, and modules without hooks are
        called faster."""
        _each(OrderedDict.pop, self._registers, self._numbers, repeat(None))

    def _release(self) -> None:
        """Takes the forward hooks off: nothing is deferred any more."""
        Deferred.waiting.discard(self)
        self._unhook()
        self._registers = self._numbers = ()

    def regroup(self, groups: list[Group]) -> None:
        """Takes new groups; remembers those that they replace: settle() writes the updates of parameters that
        are trained no more."""
        if any(m.pending is not None for group in self.groups for m in group.matrices or ()):
            self._left = (*self._left, *self.groups)
        self.groups = groups

    def check(self, tensor: Tensor) -> None:
        """Raises RuntimeError if weights with deferred updates lie elsewhere now."""
        matrix = self.bases.matrices.get(id(tensor))
        if matrix is None or matrix.pending is None:
            return
        for group in self.groups:
            for known, theta in zip(group.tensors, group.theta):
                if known is tensor and memory_of([tensor]) != memory_of([theta]):
                    raise RuntimeError(REPLACED.format(matrix.name))

    def settle(self, plan: Plan) -> None:
        """Before the bases of a step: writes updates of parameters
        that are trained no more, and updates in an old basis."""
        if self.bases.direction is None:
            return
        step, also, wrote = max(0, plan.step - 1), list[Tensor](), self.low_bits.is_on
        for group in self._left:
            if not {*map(id, group.tensors)} <= {*map(id, plan.tensors)}:
                also += _waiting(group)
                group.check_waiting()
                group.write(Noise(None, plan.seed, [(step, 0)]), plan.rounding)
                wrote = True
        self._left = ()
        born = self.bases.direction.basis_step(plan.step)
        for group in plan.groups:
            waiting = [matrix for matrix in group.matrices or () if matrix.pending is not None]
            # a matrix that joins has no updates and no decay to wait for
            thawed = waiting and len(waiting) < len(group.matrices or ())
            if thawed or {matrix.born for matrix in waiting} - {born}:
                group.write(Noise(None, plan.seed, [(step, 0)]), plan.rounding)
                wrote = True
        if wrote:
            self.accept(also)

    def defers(self, step: int, evaluation: Evaluation) -> bool:
        """Whether a step's updates are deferred:
        not in the last step of a basis, nor where nothing would flush them."""
        if not (self.bases.rule.defers and evaluation.defers and self.bases.lasts(step)):
            return False
        # peft merges adapters by reading them, which no hook sees, and writing them costs little
        return (
            self.model is not None and not hasattr(self.model, "peft_config")
            if self.wanted is None
            else self.wanted
        )

    def accept(self, also: Sequence[Tensor] = ()) -> None:
        """Takes the weights as they are now: deferred updates and low bits belong to them. also: tensors that
        are trained no more."""
        for group in self.groups:
            for tensor, matrix in zip(group.tensors, group.matrices or ()):
                if matrix.pending is not None:
                    matrix.version = tensor._version
            self.low_bits.accept(group.tensors)
        self.low_bits.accept(also)

    @torch.no_grad()
    def flush(self) -> None:
        """Writes the deferred updates. Raises RuntimeError if
        the weights were written in between, or inside shown()."""
        if self.is_shown:
            raise RuntimeError(
                "flush() or state_dict() inside evaluating(), which writes nothing: leave the context first"
            )
        self.low_bits.drop(self.groups)
        also = [tensor for group in self._left for tensor in _waiting(group)]
        for group in (*self._left, *self.groups):
            for tensor in group.tensors if group.matrices is not None else ():
                self.check(tensor)
            if group.matrices is not None:
                group.check_waiting()
                group.write(Noise(None, self.run.seed, [(max(0, self.run.step - 1), 0)]), self.run.rounding)
        self._left = ()
        self.accept(also)
        self._release()

    def discard(self) -> None:
        """Forgets the deferred updates."""
        for matrix in self.bases.matrices.values():
            matrix.pending, matrix.shrink = None, 1.0
        self._left = ()
        self._release()

    @contextmanager
    def shown(self, plan: Plan) -> Iterator[None]:
        """Inside, the weights have the deferred updates; at the end they are put back."""
        self.low_bits.drop(self.groups)
        try:
            with Master().holding(plan, [THETA]) as move:
                move(0)
                self.is_shown = True
                yield
        finally:
            self.is_shown = False
            self.accept()


def _each(function: Callable[..., object], *arguments: Iterable[Any]) -> None:
    """Calls a function with the first of all arguments, then with the second: a model has hundreds of
    modules, and a loop in Python takes longer."""
    deque(map(function, *arguments), maxlen=0)


def _waiting(group: Group) -> list[Tensor]:
    return [
        tensor for tensor, matrix in zip(group.tensors, group.matrices or ()) if matrix.pending is not None
    ]


class _Flush:
    """Hook of modules: a forward, save or load outside a step finds the weights with all their updates.

    saves  the caller reads the weights themselves: not allowed inside evaluating()"""

    def __init__(self, deferred: Deferred, saves: bool = False) -> None:
        self.deferred, self.saves = weakref.ref(deferred), saves

    def __call__(self, *_: Any) -> None:
        deferred = self.deferred()
        # a step's own readings add deferred updates themselves
        if deferred is not None and not deferred.lock.locked():
            self._write(deferred)

    # torch.compile would trace the write into the module's graph; torch.optim keeps itself out the same way
    @_disable_dynamo
    def _write(self, deferred: Deferred) -> None:
        if deferred.pending and (self.saves or not deferred.is_shown):
            deferred.flush()

    def __deepcopy__(self, memo: dict) -> Callable[..., None]:
        """A copied module has no optimizer. Its parts are copied after its hooks: they have the updates that
        are written here."""
        deferred = self.deferred()
        if deferred is not None and deferred.pending and not deferred.lock.locked():
            own = deferred.model._parameters.values() if deferred.model is not None else ()
            matrices = deferred.bases.matrices
            if any((matrix := matrices.get(id(p))) is not None and matrix.pending is not None for p in own):
                raise RuntimeError(
                    "the module is being copied while updates of its own weights are deferred: call "
                    "optimizer.flush() first"
                )
            deferred.flush()
        return _ignore

    def __reduce__(self) -> tuple:
        """A pickled module has no optimizer. Raises while updates are deferred, which it would lack; a pickle
        writes no weights."""
        deferred = self.deferred()
        if deferred is not None and deferred.pending:
            raise RuntimeError(
                "the module is being pickled while updates are deferred: call optimizer.flush() first"
            )
        return _nothing, ()


def _nothing() -> Callable[..., None]:
    return _ignore


def _ignore(*_: Any) -> None:
    """What is left of the hook in a copy."""


__all__ = ["Deferred"]
