"""Optimizers of parameters on the meta device, without memory: a step on them reads no value, or fails."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

import torch
from torch import Tensor

from zokern.ops import operands
from zokern.parameters import checks

NUMBERS: dict[int, int] = {}  # of storages


def _address(tensor: Tensor) -> int:
    """Returns what stands for the address of a tensor without memory: one number for each storage."""
    number = NUMBERS.setdefault(tensor.untyped_storage()._cdata, len(NUMBERS) + 1)
    return (number << 40) + tensor.storage_offset() * tensor.element_size()


@contextmanager
def on_meta() -> Iterator[None]:
    """Inside, an optimizer takes parameters on the meta device."""
    right = torch.Tensor.data_ptr
    kinds = [patch.object(room, "NO_MEMORY", set()) for room in (operands, checks)]

    def data_ptr(tensor: Tensor) -> int:
        return _address(tensor) if tensor.is_meta else right(tensor)

    with kinds[0], kinds[1], patch.object(torch.Tensor, "data_ptr", data_ptr):
        with patch.object(checks, "storage_of", lambda t: _address(t) >> 40):
            yield


__all__ = ["on_meta"]
