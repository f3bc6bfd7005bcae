"""Lists of tensors and of Spans that cache their columns: sizes, addresses, dtypes.

With hundreds of small tensors these questions cost as much as the kernel, so the checks of a verb and its
table share the answers. Tensors may move between calls: a TensorList lives for one call, unless its caller
keeps it (TensorList.lasting). For kept lists a launch is checked and packed once (prepared).
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from functools import cached_property
from operator import is_
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from .launch import Batch, Span

Made = TypeVar("Made")
MOST = 64  # what is prepared for one list; a list with more is used in ways that change


class TensorList(list):
    """A list of tensors, and the properties of all of them in order.

    kept  launches that were prepared for this list, if its caller keeps it; None: for one call"""

    kept: dict | None = None

    @classmethod
    def lasting(cls, tensors: Iterable[Tensor]) -> TensorList:
        """Returns a list for a caller that hands over the same lists at every step.

        The caller drops it when one of its tensors moves."""
        made = cls(tensors)
        made.kept = {}
        return made

    def stands(self, tensors: Sequence[Tensor]) -> bool:
        """Tells whether these are the very tensors of the list, where they were when it was first asked for
        its pointers."""
        if len(self) != len(tensors) or not all(map(is_, self, tensors)):
            return False
        return self.places == list(map(Tensor.data_ptr, tensors))

    @classmethod
    def of(cls, tensors: Sequence[Tensor]) -> TensorList:
        """The list itself where it is one already."""
        return tensors if isinstance(tensors, cls) else cls(tensors)

    @cached_property
    def places(self) -> list[int]:
        """Returns the address of each."""
        return list(map(Tensor.data_ptr, self))

    @cached_property
    def pointers(self) -> np.ndarray:
        """Returns the same, uint64."""
        return np.array(self.places, np.uint64)

    @cached_property
    def sizes(self) -> np.ndarray:
        """Returns the number of elements of each, int64."""
        return np.fromiter(map(Tensor.numel, self), np.int64, len(self))

    @cached_property
    def dtypes(self) -> list[torch.dtype]:
        return [t.dtype for t in self]

    @cached_property
    def contiguous(self) -> bool:
        """Tells whether all tensors are."""
        return all(map(Tensor.is_contiguous, self))

    @cached_property
    def devices(self) -> set[torch.device]:
        return {t.device for t in self}


class SpanList(tuple[Span, ...]):
    """An unchanging list of Spans, whose columns serve every call."""

    @classmethod
    def of(cls, spans: Sequence[Span]) -> SpanList:
        return spans if isinstance(spans, cls) else cls(spans)

    @cached_property
    def whos(self) -> np.ndarray:
        return np.array([span.who for span in self], np.uint32)

    @cached_property
    def firsts(self) -> np.ndarray:
        return np.array([span.first for span in self], np.uint64)

    @cached_property
    def at_zero(self) -> bool:
        """Tells whether every tensor begins with the first element of its parameter."""
        return {span.first for span in self} <= {0}

    @cached_property
    def plain(self) -> bool:
        """Tells whether no tensor is a slice of columns or a set of looked-up rows."""
        return all([span.rows is None and span.pitch is None for span in self])


def prepared(
    name: Hashable, batch: Batch, beside: Sequence[Sequence[Tensor] | None], make: Callable[[], Made]
) -> Made:
    """Returns what make() returns: made once for lists that the caller keeps, else at every call.

    name    all that make() depends on beside the lists
    beside  the other lists of the launch: results, states, factors

    What is kept holds the lists, so no other list has the id of one of them. Two threads may both make it;
    either result is right, and the dict holds one."""
    thetas, spans, _, residuals, scales = batch
    home = getattr(thetas, "kept", None)
    if home is None or type(spans) is not SpanList:
        return make()
    for other in (residuals, *beside):
        if other is not None and getattr(other, "kept", None) is None:
            return make()
    key = name, id(spans), id(residuals), id(scales), *map(id, beside)
    known = home.get(key)
    if known is None:
        if len(home) >= MOST:
            home.clear()
        known = home[key] = make(), (spans, residuals, scales, *beside)
    return known[0]


__all__ = ["SpanList", "TensorList", "prepared"]
