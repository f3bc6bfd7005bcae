"""What a rule keeps of a parameter, and the check of it: kernels take raw pointers, so state is checked when
a step first finds it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import shards
from ..parameters import Trained

START_ANEW = "`del optimizer.state[parameter]` starts it anew"


class Keeps(NamedTuple):
    """The state of a rule for one parameter.

    tensors  name -> shape, float32
    counted  whether `updates` counts the parameter's updates, an integer"""

    tensors: dict[str, tuple[int, ...]]
    counted: bool


def check_state(
    entry: Trained, state: Mapping[str, Any], rule: str, keeps: Keeps, way_out: str, loading: bool = False
) -> None:
    """Raises ValueError, by the parameter's name, for state that kernels would read or write past its end.

    loading  the device and the strides are still to be adapted"""
    tensor = shards.block(entry.name, entry.tensor).memory
    own = {
        "residual": torch.int16,
        "mask": torch.bool,
        "scale": torch.float32,
    }  # of the rounding, and of directions with factors
    kinds = {key: (dtype, tuple(tensor.shape)) for key, dtype in own.items()}
    kinds |= {key: (torch.float32, shape) for key, shape in keeps.tensors.items()}
    for key, (dtype, shape) in kinds.items():
        if key not in state:
            continue
        kept = state[key]
        sound = (
            isinstance(kept, Tensor)
            and kept.layout == torch.strided
            and kept.dtype == dtype
            and tuple(kept.shape) == shape
        )
        if not sound or not (loading or (kept.device == tensor.device and kept.is_contiguous())):
            raise ValueError(
                f"state {key!r} of parameter {entry.name!r} is {_described(kept)}; the parameter, "
                f"{_described(tensor)}, needs a "
                f"contiguous {_kind(dtype, shape)} on {tensor.device}: {way_out}"
            )
    basis = state.get("basis", 0)
    if type(basis) is not int or basis < 0:
        raise ValueError(
            f"state of parameter {entry.name!r} has basis = {basis!r}; expected the step of a basis, an "
            f"integer from 0: {way_out}"
        )
    needed = [*keeps.tensors, "updates"] if keeps.counted else []
    kept = [key for key in needed[:-1] if key in state]
    lacks = [key for key in needed if kept and key not in state]
    updates = state.get("updates", 0)
    if lacks or type(updates) is not int or updates < 0:
        raise ValueError(
            f"state of parameter {entry.name!r} has {kept} and updates = {state.get('updates')!r}, and lacks "
            f"{lacks}; rule {rule!r} "
            f"needs all of {needed}, with updates an integer from 0: {way_out}"
        )


def _kind(dtype: torch.dtype, shape: Sequence[int]) -> str:
    return f"{str(dtype).removeprefix('torch.')}{list(shape)}"


def _described(value: Any) -> str:
    if not isinstance(value, Tensor):
        return f"{type(value).__name__} {value!r:.80}"
    how = "" if value.layout == torch.strided else f" {value.layout}"
    if not how and not value.is_contiguous():
        how = f" with strides {value.stride()}"
    return f"{_kind(value.dtype, value.shape)}{how} on {value.device}"


__all__ = ["START_ANEW", "Keeps", "check_state"]
