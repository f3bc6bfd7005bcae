"""A CUDA graph, simulated on the CPU: what a step launched is recorded, and done again at each replay.

A replay does the operations on the tensors that they were recorded with, and writes results to where they lay
then. Numbers that the host gave to an operation stay as they were, as in a graph. A read of a value is
refused, as in a capture."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from zokern import backends

READS = ("aten._local_scalar_dense", "aten.equal", "aten.is_nonzero", "aten.item")
RECORDING: list[Graph] = []  # the graph that is being recorded


def storages(values: Any) -> set[int]:
    return {t.untyped_storage().data_ptr() for t in tree_leaves(values) if isinstance(t, Tensor)}


class Graph:
    """The operations of a step.

    memory  tensors that a capture leaves as they are: it runs nothing"""

    def __init__(self, memory: Callable[[], list[Tensor]]) -> None:
        self.memory = memory
        self.done: list[tuple[Callable[..., Any], tuple, dict, Any]] = []

    def note(self, function: Callable[..., Any], args: tuple, kwargs: dict) -> Any:
        out = function(*args, **kwargs)
        self.done.append((function, args, kwargs, out))
        return out

    @torch.no_grad()
    def replay(self) -> None:
        for function, args, kwargs, out in self.done:
            made, given = function(*args, **kwargs), storages((args, kwargs))
            for old, new in zip(tree_leaves(out), tree_leaves(made)):
                if isinstance(old, Tensor) and not storages(old) & given:
                    old.copy_(new)


class _Mode(TorchDispatchMode):
    def __init__(self, graph: Graph) -> None:
        super().__init__()
        self.graph = graph

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if str(function).startswith(READS):
            raise RuntimeError(f"{function} reads a value in a capture")
        return self.graph.note(function, args, kwargs or {})


class Noted:
    """A backend whose launches are recorded while a graph is."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner

    def __getattr__(self, name: str) -> Any:
        found = getattr(self.inner, name)
        if not callable(found) or not RECORDING:
            return found

        def launch(*args: Any, **kwargs: Any) -> Any:
            with _disable_current_modes():
                return RECORDING[0].note(found, args, kwargs)

        return launch


@contextmanager
def recording(graph: Graph) -> Iterator[None]:
    """Records a step; the memory is then as before."""
    kept = [(t, t.detach().clone()) for t in graph.memory()]
    RECORDING.append(graph)
    try:
        with _Mode(graph):
            yield
    finally:
        RECORDING.clear()
        for tensor, before in kept:
            tensor.detach().copy_(before)


@contextmanager
def graphs_on_cpu(optimizer: Any) -> Iterator[None]:
    """Inside, zokern.graph makes simulated graphs."""

    def memory() -> list[Tensor]:
        state = [v for s in optimizer.state.values() for v in s.values() if isinstance(v, Tensor)]
        return [*(t for group in optimizer.param_groups for t in group["params"]), *state]

    room = "zokern.graph"
    module = __import__("importlib").import_module(room)
    with (
        patch.object(module, "_new_graph", lambda device: Graph(memory)),
        patch.object(module, "_recording", recording),
    ):
        yield


def noted() -> Noted:
    """Returns the CPU's backend, with notes."""
    return Noted(backends.get("cpu"))


__all__ = ["Graph", "graphs_on_cpu", "noted"]
