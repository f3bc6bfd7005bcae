"""Modules: the tree below some roots, and what a step must leave in it."""

from __future__ import annotations

from collections.abc import Collection
from itertools import chain
from operator import is_
from types import FunctionType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from .backends.cpu_module import same_values

CONTAINERS = (list, dict, set)
# kept by nn.Module itself, and no place for a model's own state
STANDARD = frozenset(vars(nn.Module())) - {"training"}


def same(now: Collection, before: Collection) -> bool:
    """Whether two collections hold the same objects in the same order."""
    return len(now) == len(before) and all(map(is_, now, before))


def flat(dicts: list[dict]) -> list[Any]:
    return list(chain.from_iterable(map(dict.values, dicts)))


class State:
    """What the modules of a tree hold at one moment.

    held        every attribute, parameter, part and buffer of every module
    values      the modules' own attributes, train/eval flags among them
    stands      whether parameters and parts are those that the tree was built with
    registers   pairs of a module's register of buffers, and its contents
    containers  lists, dicts and sets that are attributes, and the attributes of plain objects
    classed     parameters of a class of their own, as quantised ones are
    tensors     pairs of a buffer, or of a tensor that is an attribute, and whether a norm writes it; the
                smallest first"""

    def __init__(self, tree: Tree, is_new: bool = False) -> None:
        self.watched = tree.watched
        self.held = flat(tree.watched)
        self.values = tree.values()
        # dynamo, which may trace the first forward of a module, cannot compare wrappers with themselves
        self.stands = is_new or (
            tree.count() == tree.size
            and same(flat(tree.children), tree.links)
            and same(flat(tree.parameters), tree.slots)
        )
        found = [value if type(value) in CONTAINERS else _attributes(value) for value in self.values]
        self.containers = list({id(held): held for held in found if held is not None}.values())
        self._views = [
            view for c in self.containers for view in ((c, c.values()) if isinstance(c, dict) else (c,))
        ]
        registers = [
            d[key] for d in tree.dicts if d["_buffers"] for key in ("_buffers", "_non_persistent_buffers_set")
        ]
        self.registers = [(held, held.copy()) for held in registers]
        self.classed = [
            p for p in flat(tree.parameters) if p is not None and type(p) not in (Tensor, nn.Parameter)
        ]
        buffers = flat(tree.buffers)
        self.registered = len(buffers)
        norms = {id(b) for held in tree.norms for b in held.values()}
        tensors = {id(v): v for v in (*self.values, *buffers) if isinstance(v, Tensor)}.values()
        plain = [t for t in tensors if not t.is_meta and t.layout == torch.strided and has_memory(t)]
        self.tensors = sorted([(t, id(t) in norms) for t in plain], key=lambda item: item[0].numel())

    def inside(self) -> tuple[list[int], list[Any]]:
        """Returns the sizes and the members of all containers, one after another."""
        return list(map(len, self._views)), list(chain.from_iterable(self._views))

    def is_present(self) -> bool:
        """Whether the modules hold the very objects of this state."""
        return same_values(self.watched, self.held)


class Tree:
    """The modules below some roots. Built once, and again when the tree has changed.

    is_open   the roots are not known yet: the optimizer was given parameters without their module. The first
              readings find them
    is_plain  no module is TorchScript's or torch.compile's: a State has the flags of all
    seen      the state at the last look"""

    def __init__(self, roots: list[nn.Module], is_open: bool = False) -> None:
        self.roots, self.is_open = roots, is_open
        self.found: list[nn.Module] = []  # roots that the first readings called, where is_open
        self.modules = list(dict.fromkeys(module for root in roots for module in root.modules()))
        self.members = set(map(id, self.modules))  # dynamo, which may trace a hook, tracks no number
        # TorchScript makes new Python objects at every look, and torch.compile's wrapper keeps its own state
        plain = [
            m
            for m in self.modules
            if not isinstance(m, torch.jit.ScriptModule) and type(m).__name__ != "OptimizedModule"
        ]
        self.is_plain = len(plain) == len(self.modules)
        self.dicts = [vars(m) for m in plain]
        self.parameters = [d["_parameters"] for d in self.dicts]
        self.children = [d["_modules"] for d in self.dicts]
        self.buffers = [d["_buffers"] for d in self.dicts]
        self.watched = [*self.dicts, *self.parameters, *self.children, *self.buffers]
        self.norms = [
            d["_buffers"] for m, d in zip(plain, self.dicts) if isinstance(m, nn.modules.batchnorm._NormBase)
        ]
        owned = [(d, key) for d in self.dicts for key in d if key not in STANDARD]
        self.owners, self.keys = [d for d, _ in owned], [key for _, key in owned]
        self.size, self.slots, self.links = self.count(), flat(self.parameters), flat(self.children)
        self.is_warm = False  # whether a step has run a forward of the modules
        self.is_compiled: bool | None = None  # whether torch.compile made one, or called one; None: not asked
        self.seen: State | None = None
        # by id of a buffer: it, its version then, and its copy
        self.copies: dict[int, tuple[Tensor, int, Tensor]] = {}

    def count(self) -> int:
        """Returns the number of attributes of all modules."""
        return sum(map(len, self.dicts))

    def values(self) -> list:
        """Returns the values of the modules' own attributes."""
        return list(map(dict.get, self.owners, self.keys))

    def state(self, is_new: bool = False) -> State:
        """Returns the present state: the same object until a module has changed.

        is_new  the tree was built just now, so it stands"""
        if self.seen is None or not self.seen.is_present():
            self.seen = State(self, is_new)
        return self.seen


def items(held: list | dict | set) -> list:
    """Returns keys and values of a container."""
    return [*held, *held.values()] if isinstance(held, dict) else list(held)


def refill(held: list | dict | set, before: Any) -> None:
    """Gives a container the contents of its copy."""
    held.clear()
    held.extend(before) if isinstance(held, list) else held.update(before)


def _attributes(value: Any) -> dict | None:
    """Returns the attributes of an object of a class written in Python; modules, tensors, functions and
    classes are left alone."""
    if isinstance(value, (nn.Module, Tensor, type, ModuleType, FunctionType)) or not hasattr(
        value, "__dict__"
    ):
        return None
    return vars(value)


def inside_of(tensor: Tensor) -> list[Tensor]:
    """Returns the tensors with memory, a version counter and values that a tensor consists of.

    A wrapper around others names them by torch's protocol, `__tensor_flatten__`. Another tensor consists of
    itself. Tensors without an address or a version counter are left out: those of the meta device, sparse
    ones, those made under torch.inference_mode."""
    if (flatten := getattr(type(tensor), "__tensor_flatten__", None)) is not None:
        named = [getattr(tensor, name) for name in flatten(tensor)[0]]  # a DTensor names its mesh too
        return [part for value in named if isinstance(value, Tensor) for part in inside_of(value)]
    with torch._C.DisableTorchFunctionSubclass():
        return [tensor] if not (tensor.is_meta or tensor.is_inference()) and has_memory(tensor) else []


def has_memory(tensor: Tensor) -> bool:
    """Whether a tensor has memory of its own:
    wrappers around others, as quantisation libraries make, have none."""
    try:
        return tensor.untyped_storage().data_ptr() != 0
    except (RuntimeError, NotImplementedError):
        return False


__all__ = ["STANDARD", "State", "Tree", "flat", "has_memory", "inside_of", "items", "refill", "same"]
