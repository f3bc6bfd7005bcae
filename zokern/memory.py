"""Memory: kernels take raw pointers, so what they are handed is checked when it is first seen, and again once it is other memory.

Of a parameter that is its address, dtype, shape, strides and device: `p.data = ...`, module.to(...) and module.double() change them
under the same Parameter. Of the optimizer's state it is the tensor objects: they are read by the names in _fits() and KEPT.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from operator import is_
from typing import Any

import torch
from torch import Tensor

from .directions import Matrix
from .parameters import Trained, check_overlap, check_parameter, check_tie, memory_of

KEPT = {"momentum": ("momentum",), "adam": ("first", "second")}  # what a rule keeps of a parameter with a dense z
START_ANEW = "`del optimizer.state[parameter]` starts it anew"


class Memory:
    """What was found sound, until a step finds something else in its place."""

    def __init__(self) -> None:
        self._seen: dict[int, tuple] = {}  # by id of the parameter, which the optimizer keeps alive
        self._order: list[tuple] = []  # of one step: lists compare faster than entries
        self._states: list[Any] = []

    @property
    def settled(self) -> bool:
        """Whether the last entries asked about were accepted, in this order."""
        return bool(self._order)

    def is_other(self, tensor: Tensor) -> bool:
        """Whether a parameter that a step has worked on is other memory than it was then."""
        return [self._seen.get(id(tensor))] != memory_of([tensor])

    def moved(self, entries: Sequence[Trained]) -> list[Trained]:
        """Entries that were not accepted as they are now, with all their aliases; checked each for itself."""
        try:
            now = memory_of(_tensors(entries))
        except RuntimeError:  # a tensor without an address, which the check below names
            now = []
        if now and now == self._order:
            return []
        self._order = []
        for entry in entries:
            check_parameter(entry.name, entry.tensor)
            check_tie(entry)
        return [entry for entry in entries if any(self.is_other(t) for t in (entry.tensor, *(t for _, t in entry.aliases)))]

    def accept(self, entries: Sequence[Trained], everything: Sequence[Trained]) -> None:
        """Remember them, unless two parameters have come to share memory."""
        check_overlap([(entry.name, entry.tensor) for entry in everything])
        tensors = _tensors(entries)
        self._order = memory_of(tensors)
        self._seen.update(zip(map(id, tensors), self._order))

    def states_are_new(self, states: Mapping[Tensor, Mapping[str, Any]]) -> bool:
        """Whether the optimizer's state holds other objects than those accepted; counts of updates change at every step."""
        now = self._objects(states)
        return len(now) != len(self._states) or not all(map(is_, now, self._states))

    def accept_states(self, states: Mapping[Tensor, Mapping[str, Any]]) -> None:
        self._states = self._objects(states)

    @staticmethod
    def _objects(states: Mapping[Tensor, Mapping[str, Any]]) -> list[Any]:
        return [x for tensor, state in states.items() for x in (tensor, *state.values()) if x.__class__ is not int]


def _tensors(entries: Sequence[Trained]) -> list[Tensor]:
    return [entry.tensor for entry in entries] + [tensor for entry in entries if entry.aliases for _, tensor in entry.aliases]


def check_state(
    entry: Trained, state: Mapping[str, Any], rule: str, matrix: Matrix | None, core: bool, way_out: str, loading: bool = False
) -> None:
    """Refuse a state that kernels would read or write past its end, by the parameter's name.

    matrix, core   of a factored parameter, and whether its draws are r x r cores. loading: the device and the strides are still to be
    adapted."""
    tensor = entry.tensor
    for key, (dtype, shape) in _fits(tensor, matrix, core).items():
        if key not in state:
            continue
        kept = state[key]
        sound = isinstance(kept, Tensor) and kept.layout == torch.strided and kept.dtype == dtype and tuple(kept.shape) == shape
        if not sound or not (loading or (kept.device == tensor.device and kept.is_contiguous())):
            raise ValueError(
                f"state {key!r} of parameter {entry.name!r} is {_described(kept)}; the parameter, {_described(tensor)}, needs a "
                f"contiguous {_kind(dtype, shape)} on {tensor.device}: {way_out}"
            )
    kept = [key for key in KEPT.get(rule, ()) if key in state] if matrix is None or rule == "adam" else []
    lacks = [key for key in (*KEPT.get(rule, ()), "updates") if kept and key not in state]
    updates = state.get("updates", 0)
    if lacks or type(updates) is not int or updates < 0:
        raise ValueError(
            f"state of parameter {entry.name!r} has {kept} and updates = {state.get('updates')!r}, and lacks {lacks}; rule {rule!r} "
            f"needs all of {[*KEPT.get(rule, ()), 'updates']}, with updates an integer from 0: {way_out}"
        )


def _fits(tensor: Tensor, matrix: Matrix | None, core: bool) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """dtype and shape of every state that the library itself keeps of a parameter."""
    whole = tuple(tensor.shape)
    low = {"residual": (torch.int16, whole)}
    if matrix is None:
        return low | dict.fromkeys(("momentum", "first", "second"), (torch.float32, whole))
    running = (matrix.rank if core else matrix.rows, matrix.rank)
    return low | {"momentum": (torch.float32, running)} | dict.fromkeys(("first", "second"), (torch.float32, (matrix.rank,)))


def _kind(dtype: torch.dtype, shape: Sequence[int]) -> str:
    return f"{str(dtype).removeprefix('torch.')}{list(shape)}"


def _described(value: Any) -> str:
    if not isinstance(value, Tensor):
        return f"{type(value).__name__} {value!r:.80}"
    how = "" if value.layout == torch.strided else f" {value.layout}"
    if not how and not value.is_contiguous():
        how = f" with strides {value.stride()}"
    return f"{_kind(value.dtype, value.shape)}{how} on {value.device}"


__all__ = ["START_ANEW", "Memory", "check_state"]
