"""Isolation: a reading of the loss leaves no trace.

Random streams, train/eval flags, buffers, plain attributes and the tree of the modules are as before after every reading. What a
closure computed from theta + eps z and kept in a module would be stale in the next reading, so it is put back. Within a step every
reading starts from the same random state. The weights are watched through their fingerprints.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from operator import is_
from types import FunctionType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from ..estimator import loss_tensor
from ..fingerprint import Fingerprint, memory_of
from ..plan import Plan
from . import rng

BUDGET = 4 << 20  # bytes of buffers that are copied to be put back; larger ones are only watched
CONTAINERS = (list, dict, set)
BACKWARD = ("does not require grad and does not have a grad_fn", "backward() called inside a functorch transform")
STANDARD = frozenset(vars(nn.Module())) - {"training"}  # kept by nn.Module itself, and no place for a model's own state


class Tree:
    """The modules below some roots, with what a reading must leave in them. Built once, and again when the tree has changed.

    is_open  the roots are not known yet: the optimizer was given parameters without their module. The first readings find them"""

    def __init__(self, roots: list[nn.Module], is_open: bool = False) -> None:
        self.roots, self.is_open = roots, is_open
        self.found: list[nn.Module] = []  # roots that the first readings called, where is_open
        self.modules = list(dict.fromkeys(module for root in roots for module in root.modules()))
        self.members = set(self.modules)
        self.scripted = [m for m in self.modules if isinstance(m, torch.jit.ScriptModule)]
        # TorchScript makes new Python objects at every look, and torch.compile's wrapper keeps its own state
        plain = [m for m in self.modules if not isinstance(m, torch.jit.ScriptModule)]
        self.dicts = [vars(m) for m in plain if type(m).__name__ != "OptimizedModule"]
        self.parameters = [d["_parameters"] for d in self.dicts]
        self.children = [d["_modules"] for d in self.dicts]
        self.holders = [(d["_buffers"], isinstance(m, nn.modules.batchnorm._NormBase)) for m, d in zip(plain, self.dicts)]
        self.hidden = [d["_non_persistent_buffers_set"] for d in self.dicts]
        self.owned = [(d, key) for d in self.dicts for key in d if key not in STANDARD]
        self.size = self._size()
        self.slots, self.links = self._slots(), self._links()
        self._known: list = []  # values that containers() has looked at
        self._containers: list = []
        self.copies: dict[int, tuple[Tensor, int, Tensor]] = {}  # by id of a buffer: it, its version then, and its copy

    def _size(self) -> int:
        return sum(map(len, self.dicts))

    def _slots(self) -> list[int]:
        return [id(p) for held in self.parameters for p in held.values()]

    def _links(self) -> list[int]:
        return [id(child) for held in self.children for child in held.values()]

    def stands(self) -> bool:
        """Whether the same modules hold the same parameters and have as many attributes as when the tree was built."""
        return self._size() == self.size and self._links() == self.links and self._slots() == self.slots

    def containers(self, values: list) -> list:
        """Lists, dicts and sets among the values, and the attributes of plain objects there; found once for the same values."""
        if len(values) != len(self._known) or not all(map(is_, values, self._known)):
            found: dict[int, Any] = {}
            for value in values:
                inside = value if type(value) in CONTAINERS else _attributes(value)
                if inside is not None:
                    found[id(inside)] = inside
            self._known, self._containers = values, list(found.values())
        return self._containers

    def values(self) -> list:
        """The values of the modules' own attributes, train/eval flags among them."""
        return [d.get(key, STANDARD) for d, key in self.owned]


class Isolation:
    """What is put back after every reading of one call of an evaluation, and checked.

    root  a module that was found during a reading; None: the modules of the plan, and the weights"""

    def __init__(self, plan: Plan, root: nn.Module | None = None) -> None:
        self.plan, self.tree = plan, plan.tree if root is None else Tree([root])
        self.trained = {id(t) for t in plan.tensors}
        if root is None:
            self.seed = rng.seed_of(plan.seed, plan.step)
            self.weights = Fingerprint(plan.tensors)
        self.rows = 0  # of the largest input that a root module got: tokens, or vectors along the last dimension
        self.calls = 0  # of root modules in the last reading
        self.inside: list[Isolation] = []  # of roots that were found in this call
        tree = self.tree
        self.values = tree.values()
        self.contents = [(v, v.copy()) for v in tree.containers(self.values)]
        self.buffers = [(held, held.copy()) for held, _ in tree.holders if held]
        self.bare = [held for held, _ in tree.holders if not held]
        self.hidden = [(kept, kept.copy()) for kept in tree.hidden if kept]
        self._copy_buffers()

    def _copy_buffers(self) -> None:
        """Copies buffers, and tensors that are plain attributes, smallest first, to the budget."""
        found = [(b, norm) for held, norm in self.tree.holders for b in held.values() if b is not None]
        found += [(v, False) for v in self.values if isinstance(v, Tensor)]
        weights = {t.untyped_storage().data_ptr() for group in self.plan.groups for t in group.theta} if found else set()
        self.watched: list[tuple[Tensor, int, Tensor | None]] = []
        left = BUDGET
        for buffer, norm in sorted(found, key=lambda item: item[0].numel()):
            if buffer.is_meta or buffer.layout != torch.strided or id(buffer) in self.trained:
                continue
            if not _has_memory(buffer) or buffer.untyped_storage().data_ptr() in weights:
                continue  # it is a view of a weight, which is watched itself
            left -= buffer.numel() * buffer.element_size()
            version = 0 if buffer.is_inference() else buffer._version
            known = self.tree.copies.get(id(buffer))
            # norms write their statistics below the version counters: theirs are copied anew, whatever their size
            if norm or buffer.is_inference() or known is None or known[0] is not buffer or known[1] != version:
                known = (buffer, version, buffer.detach().clone()) if norm or left >= 0 else None
                if known is not None:
                    self.tree.copies[id(buffer)] = known
            always = norm or buffer.is_inference()
            self.watched.append((buffer, -1 if always and known is not None else version, known and known[2]))

    @contextmanager
    def session(self, eager: bool) -> Iterator[None]:
        """Surrounds the readings of one call: streams are put back, and inputs of the root modules are measured.

        eager  run torch.compile'd modules as the Python that they were compiled from"""
        hooks = [
            root.register_forward_pre_hook(self._measure, with_kwargs=True) for root in self.tree.roots if _takes_hooks(root)
        ]
        if self.tree.is_open:
            hooks.append(nn.modules.module.register_module_forward_pre_hook(self._discover))
        try:
            with rng.preserved(), _eager_compile(eager):
                yield
        finally:
            torch.clear_autocast_cache()
            for hook in hooks:
                hook.remove()

    def _discover(self, module: nn.Module, args: tuple) -> None:
        """Isolates a module that holds trained parameters, before its first forward; those of its parts are isolated with it."""
        if any(module in inside.tree.members for inside in self.inside):
            return
        if any(id(p) in self.trained for p in module.parameters()) and _takes_hooks(module):
            self.tree.found = [root for root in self.tree.found if root not in set(module.modules())] + [module]
            self.inside.append(Isolation(self.plan, module))
        self._measure(module, args, {})

    def _measure(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        self.calls += 1
        for value in (*args, *kwargs.values()):
            if isinstance(value, Tensor) and value.dim():
                width = value.shape[-1] if value.is_floating_point() else 1
                self.rows = max(self.rows, value.numel() // max(1, width))

    def read(self, closure: Callable[[], object], inside: AbstractContextManager | None = None) -> Tensor:
        """Returns the loss of one reading, a 0-d float64 tensor; everything is put back and checked."""
        return self.run(lambda: loss_tensor(closure()), inside)

    def run(self, body: Callable[[], Tensor], inside: AbstractContextManager | None = None) -> Tensor:
        """Runs a body under no_grad and a context, from the step's random state."""
        self.calls = 0
        self.plan.readings += 1
        rng.seed(self.seed)
        torch.clear_autocast_cache()  # an autocast region around the step would reuse casts of other weights
        try:
            with torch.no_grad(), inside or nullcontext():
                loss = body()
        except Exception as problem:
            _explain(problem, self.plan.readings)
            raise
        finally:
            for isolation in (self, *self.inside):
                isolation._put_back()
            changed = self.weights.changes()
            for i in changed:  # a parameter that the closure gave other memory, or another shape, gets its own back
                if memory_of([self.plan.tensors[i]]) != [self.weights.memory[i]]:
                    self.plan.tensors[i].data = [t for group in self.plan.groups for t in group.theta][i]
        if changed:
            names = [self.plan.names[i] for i in changed]
            raise RuntimeError(f"the closure changed the weights of {names[0]!r}: the loss of a step must only read them")
        for isolation in (self, *self.inside):
            isolation._check()
        return loss

    def _put_back(self) -> None:
        tree = self.tree
        for held, before in self.buffers:
            if len(held) != len(before) or not all(map(is_, held.values(), before.values())):
                held.clear()
                held.update(before)
        for held in self.bare:
            if held:
                held.clear()  # registered by this reading
        for kept, before in self.hidden:
            if kept != before:
                kept.clear()
                kept |= before
        now = tree.values()
        if tree._size() != tree.size or not all(map(is_, now, self.values)):
            self._put_back_attributes(now)
        for held, before in self.contents:
            if len(held) != len(before) or not all(map(is_, _items(held), _items(before))):
                held.clear()
                held.extend(before) if isinstance(held, list) else held.update(before)
        self.lost = ""
        for buffer, version, copy in self.watched:
            if version == -1:
                assert copy is not None
                if not torch.equal(buffer, copy):
                    _write(buffer, copy)
            elif buffer._version != version:
                if copy is None:
                    self.lost = f"a buffer or attribute of shape {list(buffer.shape)}"
                else:
                    _write(buffer, copy)
        if any(copy is not None and version >= 0 and b._version != version for b, version, copy in self.watched):
            self._accept_buffers()

    def _accept_buffers(self) -> None:
        """Takes the versions that the copies left behind as those of the next reading."""
        renewed = []
        for buffer, version, copy in self.watched:
            if version >= 0 and copy is not None:
                version = buffer._version
                self.tree.copies[id(buffer)] = (buffer, version, copy)
            renewed.append((buffer, version, copy))
        self.watched = renewed

    def _put_back_attributes(self, now: list) -> None:
        for (d, key), value, before in zip(self.tree.owned, now, self.values):
            if value is not before:
                d[key] = before
        if self.tree._size() != self.tree.size:
            known = {(id(d), key) for d, key in self.tree.owned}
            for d in self.tree.dicts:
                for key in [key for key in d if key not in STANDARD and (id(d), key) not in known]:
                    del d[key]

    def _check(self) -> None:
        """Raises if the closure replaced a weight or a module that holds one, or changed a buffer that cannot be put back."""
        tree = self.tree
        if tree._slots() != tree.slots and any(before in self.trained for before in set(tree.slots) - set(tree._slots())):
            raise RuntimeError(
                "the closure replaced a trained parameter of the model: build the optimizer after the model has its final parameters"
            )
        if tree._links() != tree.links:
            gone = set(tree.links) - set(tree._links())
            for module in tree.modules:
                if id(module) in gone and any(id(p) in self.trained for p in module.parameters()):
                    raise RuntimeError(
                        f"the closure took {type(module).__name__} out of the model: the loss of a step must only read it"
                    )
        if self.lost:
            raise RuntimeError(
                f"the closure changed {self.lost}, too large for the {BUDGET >> 20} MB that a step copies: put its module in eval mode"
            )


def _explain(problem: Exception, reading: int) -> None:
    """Adds what a step knows to an exception of the closure."""
    if isinstance(problem, RuntimeError) and any(words in str(problem) for words in BACKWARD):
        raise RuntimeError(
            "the closure called backward(), or torch.autograd.grad by trained parameters: a zeroth-order step needs none; return the loss"
        ) from problem
    if reading > 1 and hasattr(problem, "add_note"):
        problem.add_note(f"This was reading {reading} of the step, and reading 1 went well: did the closure change its batch?")


def _attributes(value: Any) -> dict | None:
    """The attributes of an object of a class written in Python; modules, tensors, functions and classes have places of their own."""
    if isinstance(value, (nn.Module, Tensor, type, ModuleType, FunctionType)) or not hasattr(value, "__dict__"):
        return None
    return vars(value)


def _items(held: list | dict | set) -> list:
    return [x for pair in held.items() for x in pair] if isinstance(held, dict) else list(held)


def _has_memory(tensor: Tensor) -> bool:
    """Whether a tensor has memory of its own: wrappers around others, as quantisation libraries make, have none."""
    try:
        return tensor.untyped_storage().data_ptr() != 0
    except (RuntimeError, NotImplementedError):
        return False


def _write(buffer: Tensor, copy: Tensor) -> None:
    with torch.inference_mode(buffer.is_inference()), torch.no_grad():
        buffer.copy_(copy)


def _takes_hooks(module: nn.Module) -> bool:
    return not isinstance(module, torch.jit.ScriptModule) and type(module).__name__ != "OptimizedModule"


@contextmanager
def _eager_compile(active: bool) -> Iterator[None]:
    if not active or "torch._dynamo" not in sys.modules:
        yield
        return
    with torch.compiler.set_stance("force_eager"):
        yield


__all__ = ["Isolation", "Tree"]
