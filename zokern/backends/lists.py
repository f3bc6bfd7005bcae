"""Lists of tensors and of Spans that cache their columns: sizes, addresses, dtypes.

With hundreds of small tensors these questions cost as much as the kernel, so the checks of a verb and its
table share the answers. Tensors may move between calls: a TensorList lives for one call.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from .launch import Span


class TensorList(list):
    """A list of tensors, and the properties of all of them in order.

    kept  tables of launches on this list, for a caller that hands over the same lists at every step; None:
          made at every call"""

    kept: dict | None = None

    @classmethod
    def of(cls, tensors: Sequence[Tensor]) -> TensorList:
        """The list itself where it is one already."""
        return tensors if isinstance(tensors, cls) else cls(tensors)

    @cached_property
    def pointers(self) -> np.ndarray:
        return np.fromiter(map(Tensor.data_ptr, self), np.uint64, len(self))

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


__all__ = ["SpanList", "TensorList"]
