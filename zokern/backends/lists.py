"""A list of tensors, or of Spans, by the column: what checks and tables ask of every member is asked once a call.

With hundreds of small tensors the questions cost as much as the kernel, so a verb's checks and its table share the answers.
Tensors may move or be reshaped between calls: a TensorList lives for one call and is never kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from .launch import Span


class TensorList(list):
    """Tensors, and for all of them, in their order, what each says of itself.

    kept  tables of launches on this list, for a caller that hands over the same lists at every step; None: made at every call"""

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
        """Elements of each, int64."""
        return np.fromiter(map(Tensor.numel, self), np.int64, len(self))

    @cached_property
    def dtypes(self) -> list[torch.dtype]:
        return [t.dtype for t in self]

    @cached_property
    def contiguous(self) -> bool:
        """Whether all are."""
        return all(map(Tensor.is_contiguous, self))

    @cached_property
    def devices(self) -> set[torch.device]:
        return {t.device for t in self}


class SpanList(tuple[Span, ...]):
    """Spans that do not change, so that their columns serve every call that is made with them."""

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
        """Whether every tensor begins with the first element of its parameter."""
        return {span.first for span in self} <= {0}

    @cached_property
    def plain(self) -> bool:
        """Whether no tensor is a slice of columns or a set of looked-up rows."""
        return all([span.rows is None and span.pitch is None for span in self])


__all__ = ["SpanList", "TensorList"]
