"""Low bits: the lower halves of bfloat16 weights under rounding='residual',
which with the weights make exact float32 masters."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import shards
from ..backends import TensorList
from ..fingerprint import versions_of
from ..group import Group


class LowBits:
    """The int16 tensors in an optimizer's state, and the version of the weights that they belong to.

    is_on  whether rounding is 'residual'; otherwise there are none"""

    def __init__(self, is_on: bool, states: Any) -> None:
        self.is_on, self.states = is_on, states
        self.written: dict[int, int] = {}  # by id of a tensor: its version counter after the last update

    def of(self, tensors: Sequence[Tensor]) -> TensorList | None:
        """Returns the low bits of each tensor; None where rounding is another. Raises ValueError for
        float16."""
        return TensorList.lasting([self._of(tensor) for tensor in tensors]) if self.is_on else None

    def _of(self, tensor: Tensor) -> Tensor:
        if tensor.dtype != torch.bfloat16:
            if tensor.dtype == torch.float16:
                raise ValueError(
                    "rounding='residual' needs bfloat16 or float32 parameters; float16: use "
                    "rounding='stochastic'"
                )
            # never read: float32 has no low bits to keep
            return torch.empty(0, dtype=torch.int16, device=tensor.device)
        state = self.states[tensor]
        if "residual" not in state:
            shape = shards.block("of a state", tensor).memory.shape
            state["residual"] = torch.zeros(shape, dtype=torch.int16, device=tensor.device)
        return state["residual"]

    def drop(self, groups: Iterable[Group]) -> None:
        """Clears the low bits of weights that others wrote since the last update:
        those are exact as they are."""
        if not self.is_on:
            return
        for group in groups:
            for tensor, low in zip(group.tensors, group.residuals or ()):
                version = shards.local(tensor)._version
                if self.written.get(id(tensor), version) != version:
                    low.zero_()

    def accept(self, tensors: Sequence[Tensor]) -> None:
        """Takes the weights as they are now: their low bits belong to them."""
        if self.is_on:
            self.written.update(zip(map(id, tensors), versions_of(map(shards.local, tensors))))


__all__ = ["LowBits"]
