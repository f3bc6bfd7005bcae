"""Isolation: a reading of the loss leaves no trace.

Random streams, train/eval flags, buffers, plain attributes and the tree of the modules are as before after
every reading. What a closure computed from theta + eps z and kept in a module would be stale in the next
reading, so it is put back. Within a step every reading starts from the same random state. The weights are
watched through their addresses and versions.

Quantised weights are often packed in a forward: in the first one, or in the next after a checkpoint. The
weights, their attributes and their modules change together then. All of this stays, as after a forward of
the user's own, and the loss is read again.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor, nn

from .. import shards
from ..fingerprint import Fingerprint, memory_of
from ..modules import STANDARD, Tree, flat, inside_of, items, refill, same
from ..plan import Plan
from . import rng
from .loss import loss_tensor

BUDGET = 4 << 20  # bytes of buffers that are copied to be put back; larger ones are only watched
BACKWARD = (
    "does not require grad and does not have a grad_fn",
    "backward() called inside a functorch transform",
)


class Isolation:
    """What is put back after every reading of one call of an evaluation, and checked.

    root   a module that was found during a reading; None: the modules of the plan, and the weights
    rows   of the largest input that a root module got: tokens, or vectors along the last dimension
    calls  of root modules in the last reading
    compiled  whether torch.compile's graphs called one: dynamo traces the hook, and runs what it writes"""

    def __init__(self, plan: Plan, root: nn.Module | None = None) -> None:
        self.plan, self.tree = plan, plan.tree if root is None else Tree([root])
        self.trained = set(map(id, plan.tensors))
        self.rows, self.calls, self.compiled = 0, 0, False
        self.found: list[Isolation] = []  # of roots that were found in this call
        if root is None:
            self.seed = rng.seed_of(plan.seed, plan.step, plan.part)
            self.weights = Fingerprint(plan.memory(), plan.places)
        self._remember(is_new=root is not None)

    def _remember(self, is_new: bool = False) -> None:
        """Takes the present state as that to which everything is put back."""
        self.state = self.tree.state(is_new)
        self.contents = [(held, held.copy()) for held in self.state.containers]
        self.inside = self.state.inside()
        self._watch_frozen()
        # a tensor, its version (-1: compare), and its copy
        self.buffers: list[tuple[Tensor, int, Tensor | None]] = []
        self._copy(self.state.tensors)

    def _watch_frozen(self) -> None:
        """Remembers where frozen weights lie, and what those of a class of their own hold.

        Until a forward has run these are all frozen weights. After it they are those of a class of their
        own. Tied names of trained weights hold copies while a closure runs, and are left out."""
        slots = self.state.classed if self.tree.is_warm else self.tree.slots
        groups = self.plan.groups if slots else []  # most models have none after the first forward
        trained = {id(t) for group in groups for objects in group.objects for t in objects}
        frozen = [t for t in slots if isinstance(t, Tensor) and id(t) not in trained]
        classed = set(map(id, self.state.classed))
        self.held = [(vars(t), vars(t).copy()) for t in frozen if id(t) in classed]
        self.frozen = Fingerprint([part for t in frozen for part in inside_of(t)]).watch()

    def _settle(self) -> bool:
        """Whether a forward packed frozen weights: then the modules keep what they hold now."""
        packed = [
            isolation
            for isolation in (self, *self.found)
            if isolation.frozen.changes()
            or not all(same(items(held), items(before)) for held, before in isolation.held)
        ]
        for isolation in packed:
            isolation._put_back_tensors()
            isolation._remember()
        return bool(packed)

    def _copy(self, tensors: list[tuple[Tensor, bool]]) -> None:
        """Copies buffers, smallest first, to the budget."""
        for group in self.plan.groups if tensors else ():
            if "storages" not in group.memo:
                group.memo["storages"] = {t.untyped_storage().data_ptr() for t in group.theta}
        left = BUDGET
        for buffer, norm in tensors:
            here = buffer.untyped_storage().data_ptr()
            if id(buffer) in self.trained or any(
                here in group.memo["storages"] for group in self.plan.groups
            ):
                continue  # a view of a weight, which is watched itself
            left -= buffer.numel() * buffer.element_size()
            # norms write their statistics below the version counters: theirs are compared, and copied
            # whatever their size
            version = -1 if norm or buffer.is_inference() else buffer._version
            known = self.tree.copies.get(id(buffer))
            if known is None or version == -1 or known[0] is not buffer or known[1] != version:
                known = (buffer, version, buffer.detach().clone()) if norm or left >= 0 else None
                if known is not None:
                    self.tree.copies[id(buffer)] = known
            if known is not None or version != -1:
                self.buffers.append((buffer, version, known and known[2]))

    @contextmanager
    def session(self, eager: bool) -> Iterator[None]:
        """Surrounds the readings of one call: streams are put back,
        and inputs of the root modules are measured.

        eager  run torch.compile'd modules as the Python that they were compiled from"""

        def measure(module: nn.Module, args: tuple, kwargs: dict) -> None:
            """Looks at the inputs. A copy of the module has the same function, and no copy of the plan."""
            self._measure(module, args, kwargs)

        hooks = [
            root.register_forward_pre_hook(measure, with_kwargs=True)
            for root in self.tree.roots
            if _takes_hooks(root)
        ]
        if self.tree.is_open:
            hooks.append(nn.modules.module.register_module_forward_pre_hook(self._discover))
        compiled = eager and "torch._dynamo" in sys.modules
        try:
            with rng.preserved(), torch.compiler.set_stance("force_eager") if compiled else nullcontext():
                yield
        finally:
            torch.clear_autocast_cache()
            self.plan.tree.is_compiled = self.compiled or self.plan.tree.is_compiled
            for hook in hooks:
                hook.remove()

    def _discover(self, module: nn.Module, args: tuple) -> None:
        """Isolates a module that holds trained parameters, before its first forward;
        its parts are isolated with it."""
        if any(id(module) in isolation.tree.members for isolation in self.found):
            return
        if self.plan.sharded:  # an earlier forward may have left gathered weights in its parts
            shards.reshard(module.modules())
        if any(id(p) in self.trained for p in module.parameters()) and _takes_hooks(module):
            parts = set(module.modules())
            self.tree.found = [root for root in self.tree.found if root not in parts] + [module]
            self.found.append(Isolation(self.plan, module))
        self._measure(module, args, {})

    def _measure(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        self.calls += 1
        self.compiled = self.compiled or torch.compiler.is_compiling()
        for value in (*args, *kwargs.values()):
            if isinstance(value, Tensor) and value.dim():
                width = value.shape[-1] if value.is_floating_point() else 1
                self.rows = max(self.rows, value.numel() // max(1, width))

    def read(self, closure: Callable[[], object], inside: AbstractContextManager | None = None) -> Tensor:
        """Returns the loss of one reading, a 0-d float64 tensor; everything is put back and checked."""
        return self.run(lambda: loss_tensor(closure(), self.plan.rows), inside)

    def run(self, body: Callable[[], Tensor], inside: AbstractContextManager | None = None) -> Tensor:
        """Runs a body under no_grad and a context, from the step's random state."""
        self.calls = 0
        self.plan.readings += 1
        self.weights.watch()
        rng.seed(self.seed)
        torch.clear_autocast_cache()  # an autocast region around the step would reuse casts of other weights
        try:
            with torch.no_grad(), inside or nullcontext():
                loss = body()
                if self._settle():
                    self.calls = 0
                    rng.seed(self.seed)
                    loss = body()
        except Exception as problem:
            self._settle()
            _explain(problem, self.plan.readings)
            raise
        finally:
            # weights are packed once: a second change is no packing
            converted = [
                isolation.frozen.changes() for isolation in (self, *self.found) if not isolation.tree.is_warm
            ]
            for isolation in (self, *self.found) if not any(converted) else ():
                isolation._put_back()
            if self.plan.sharded:
                for isolation in (self, *self.found):
                    shards.reshard(isolation.tree.modules)
            changed = self.weights.changes()
            # a parameter that the closure gave other memory, or another shape, gets its own back
            for i in changed:
                theta = [t for group in self.plan.groups for t in group.theta][i]
                if not self.plan.sharded and memory_of([self.plan.tensors[i]]) != memory_of([theta]):
                    self.plan.tensors[i].data = theta
        if changed:
            name = self.plan.names[changed[0]]
            raise RuntimeError(
                f"the closure changed the weights of {name!r}: the loss of a step must only read them"
            )
        if any(converted):
            raise RuntimeError(
                "the closure changes frozen weights in every forward, and not in its first one alone, as "
                "where quantised weights are packed: the loss of a step must only read them"
            )
        for isolation in (self, *self.found):
            isolation._check()
            isolation.tree.is_warm = True
        return loss

    def _put_back(self) -> None:
        self.moved = not self.state.is_present()
        sizes, members = self.state.inside()
        if self.moved or sizes != self.inside[0] or not same(members, self.inside[1]):
            for held, before in (*self.contents, *self.state.registers):
                if not same(items(held), items(before)):
                    refill(held, before)
        if self.moved:
            self._put_back_attributes()
        self._put_back_tensors()

    def _put_back_tensors(self) -> None:
        """Writes the copies of buffers that were written to; names one that has no copy."""
        self.lost = ""
        for i, (buffer, version, copy) in enumerate(self.buffers):
            if buffer._version == version if version >= 0 else _equal(buffer, copy):
                continue
            if copy is None:
                self.lost = f"of shape {list(buffer.shape)}"
                continue
            with torch.inference_mode(buffer.is_inference()):
                buffer.copy_(copy)
            if version >= 0:
                self.buffers[i] = self.tree.copies[id(buffer)] = buffer, buffer._version, copy

    def _put_back_attributes(self) -> None:
        tree = self.tree
        if sum(map(len, tree.buffers)) != self.state.registered:  # by modules that had none
            known = {id(held) for held, _ in self.state.registers}
            for d in tree.dicts:
                if id(d["_buffers"]) not in known:
                    d["_buffers"].clear()
                    d["_non_persistent_buffers_set"].clear()
        for d, key, value, before in zip(tree.owners, tree.keys, tree.values(), self.state.values):
            if value is not before or key not in d:
                d[key] = before
        if tree.count() != tree.size:
            known_keys = {(id(d), key) for d, key in zip(tree.owners, tree.keys)}
            for d in tree.dicts:
                for key in [key for key in d if key not in STANDARD and (id(d), key) not in known_keys]:
                    del d[key]

    def _check(self) -> None:
        """Raises if the closure replaced a weight or a module that holds one,
        or changed a buffer that cannot be put back."""
        if self.moved:
            self._check_modules()
        if self.lost:
            raise RuntimeError(
                f"the closure changed a buffer or attribute {self.lost}, too large for the {BUDGET >> 20} MB "
                "that a step copies: put its module in eval mode"
            )

    def _check_modules(self) -> None:
        tree = self.tree
        if (
            not same(slots := flat(tree.parameters), tree.slots)
            and ({*map(id, tree.slots)} - {*map(id, slots)}) & self.trained
        ):
            raise RuntimeError(
                "the closure replaced a trained parameter of the model: build the optimizer after the model "
                "has its final parameters"
            )
        if not same(links := flat(tree.children), tree.links):
            gone = {*map(id, tree.links)} - {*map(id, links)}
            for module in tree.modules:
                if id(module) in gone and any(id(p) in self.trained for p in module.parameters()):
                    raise RuntimeError(
                        f"the closure took {type(module).__name__} out of the model: the loss of a step must "
                        "only read it"
                    )


def _equal(buffer: Tensor, copy: Tensor | None) -> bool:
    """Whether a buffer is known to hold its copy: on a GPU it is written back rather than waited for."""
    return buffer.is_cpu and copy is not None and torch.equal(buffer, copy)


def _explain(problem: Exception, reading: int) -> None:
    """Adds what a step knows to an exception of the closure."""
    if isinstance(problem, RuntimeError) and any(words in str(problem) for words in BACKWARD):
        raise RuntimeError(
            "the closure called backward(), or torch.autograd.grad by trained parameters: a zeroth-order "
            "step needs none; return the loss"
        ) from problem
    if isinstance(problem, StopIteration):  # which would end a generator on its way up
        ended = RuntimeError(f"the closure raised {problem!r}, as an iterator at its end does")
        _explain(ended, reading)
        raise ended from problem
    if reading > 1 and hasattr(problem, "add_note"):
        problem.add_note(
            f"This was reading {reading} of the step, and reading 1 went well: did the closure change its "
            "batch?"
        )


def _takes_hooks(module: nn.Module) -> bool:
    return not isinstance(module, torch.jit.ScriptModule) and type(module).__name__ != "OptimizedModule"


__all__ = ["Isolation"]
