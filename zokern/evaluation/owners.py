"""Owners: the modules that hold parameters which the optimizer was given without their module.

One look at everything that Python's garbage collector knows finds the modules with a trained tensor among their parameters; from them
the way goes up to the roots, whose modes, buffers and tree a step then guards as it does those of a model that it was given. The look
costs as much as the process has objects, so its answer is kept, weakly, until other tensors are trained.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterable
from typing import NamedTuple

from torch import Tensor, nn


class _Link(NamedTuple):
    """A module in another, and the ids of the trained tensors that it holds."""

    parent: weakref.ref[nn.Module]
    name: str
    child: weakref.ref[nn.Module]
    held: set[int]


class Owners:
    """What was found, and that it still stands."""

    def __init__(self) -> None:
        self.key: tuple[int, ...] | None = None  # ids of the trained tensors that were looked for
        self.slots: list[tuple[weakref.ref[nn.Module], str, Tensor]] = []  # where they lie
        self.links: list[_Link] = []  # the way from there to the roots
        self.reached: list[weakref.ref[nn.Module]] = []  # all modules of slots and links
        self.tops: list[weakref.ref[nn.Module]] = []  # those of them that no link leads to

    def roots(self, tensors: Iterable[Tensor]) -> list[nn.Module]:
        """The outermost modules that hold one of the tensors somewhere. Raises RuntimeError if, since they were found, a tensor was
        replaced in its module or that module in its parent."""
        trained = {id(tensor): tensor for tensor in tensors}
        if self.key != tuple(trained):
            self._look(trained)
        self._check_slots()
        self._check_links()
        found = [top() for top in self.tops]
        if None in found:  # a wrapper that is gone; what it wrapped is on top now
            self._settle()
            found = [top() for top in self.tops]
        return [module for module in found if module is not None]

    def _look(self, trained: dict[int, Tensor]) -> None:
        # type() and not isinstance(), which would run the code of lazy proxies; TorchScript keeps its parameters elsewhere
        modules = [
            x for x in gc.get_objects() if issubclass(type(x), nn.Module) and isinstance(vars(x).get("_parameters"), dict)
        ]
        above: dict[int, list[tuple[nn.Module, str]]] = {}
        for parent in modules:
            for name, child in parent._modules.items():
                above.setdefault(id(child), []).append((parent, name))
        held = [
            (module, name, trained[id(p)]) for module in modules for name, p in module._parameters.items() if id(p) in trained
        ]
        reached = {id(module): module for module, _, _ in held}
        queue, links = list(reached.values()), []
        for module in queue:
            for parent, name in above.get(id(module), ()):
                links.append(_Link(weakref.ref(parent), name, weakref.ref(module), ids_below(module) & trained.keys()))
                if id(parent) not in reached:
                    reached[id(parent)] = parent
                    queue.append(parent)
        self.slots = [(weakref.ref(module), name, tensor) for module, name, tensor in held]
        self.links, self.reached = links, [weakref.ref(module) for module in queue]
        self._settle()
        self.key = tuple(trained)

    def _check_slots(self) -> None:
        for holder, name, tensor in self.slots:
            module = holder()
            if module is not None and (now := module._parameters.get(name)) is not tensor:
                raise _gone(module, f"parameter {name!r}", "removed" if now is None else "replaced")

    def _check_links(self) -> None:
        """A module that another stands in for is an error, unless that one holds the same; one that was only taken out is a root now."""
        moved = False
        for i, (above, name, below, held) in enumerate(self.links):
            parent, child = above(), below()
            if parent is None or ((now := parent._modules.get(name)) is child and child is not None):
                continue
            moved = True
            if now is not None:
                if held - ids_below(now):
                    raise _gone(parent, f"module {name!r}", "replaced")
                self.links[i] = _Link(above, name, weakref.ref(now), held)
        if moved:
            self._settle()

    def _settle(self) -> None:
        """Forget links that no longer hold; the modules without one above them are the roots."""
        live = [(link.parent(), link.name, link.child()) for link in self.links]
        stands = [p is not None and c is not None and p._modules.get(name) is c for p, name, c in live]
        self.links = [link for link, stand in zip(self.links, stands) if stand]
        below = {id(child) for (_, _, child), stand in zip(live, stands) if stand}
        self.reached = [module for module in self.reached if module() is not None]
        self.tops = [module for module in self.reached if id(module()) not in below]


def ids_below(module: nn.Module) -> set[int]:
    """Of all parameters of a module and of those in it."""
    return {id(p) for p in module.parameters()}


def _gone(module: nn.Module, what: str, how: str) -> RuntimeError:
    return RuntimeError(
        f"{what} of {type(module).__name__}, which the optimizer trains, was {how} after it was first seen; build a new optimizer for "
        "the new model"
    )


__all__ = ["Owners"]
