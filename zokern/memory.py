"""The optimizer's state: kernels take raw pointers, so its tensors are checked when a step first finds them.

They are read by the names in _fits() and KEPT.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .directions import Matrix
from .parameters import Trained

KEPT = {"momentum": ("momentum",), "adam": ("first", "second")}  # what a rule keeps of a parameter with a dense z
START_ANEW = "`del optimizer.state[parameter]` starts it anew"


def check_state(
    entry: Trained,
    state: Mapping[str, Any],
    rule: str,
    matrix: Matrix | None,
    draw: tuple[int, int] | None,
    way_out: str,
    loading: bool = False,
) -> None:
    """Refuse a state that kernels would read or write past its end, by the parameter's name.

    matrix, draw   of a factored parameter, and the shape of its draws. loading: the device and the strides are still to be adapted."""
    tensor = entry.tensor
    for key, (dtype, shape) in _fits(tensor, matrix, draw).items():
        if key not in state:
            continue
        kept = state[key]
        sound = isinstance(kept, Tensor) and kept.layout == torch.strided and kept.dtype == dtype and tuple(kept.shape) == shape
        if not sound or not (loading or (kept.device == tensor.device and kept.is_contiguous())):
            raise ValueError(
                f"state {key!r} of parameter {entry.name!r} is {_described(kept)}; the parameter, {_described(tensor)}, needs a "
                f"contiguous {_kind(dtype, shape)} on {tensor.device}: {way_out}"
            )
    basis = state.get("basis", 0)
    if type(basis) is not int or basis < 0:
        raise ValueError(
            f"state of parameter {entry.name!r} has basis = {basis!r}; expected the step of a basis, an integer from 0: {way_out}"
        )
    kept = [key for key in KEPT.get(rule, ()) if key in state] if matrix is None or rule == "adam" else []
    lacks = [key for key in (*KEPT.get(rule, ()), "updates") if kept and key not in state]
    updates = state.get("updates", 0)
    if lacks or type(updates) is not int or updates < 0:
        raise ValueError(
            f"state of parameter {entry.name!r} has {kept} and updates = {state.get('updates')!r}, and lacks {lacks}; rule {rule!r} "
            f"needs all of {[*KEPT.get(rule, ()), 'updates']}, with updates an integer from 0: {way_out}"
        )


def _fits(
    tensor: Tensor, matrix: Matrix | None, draw: tuple[int, int] | None
) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """dtype and shape of every state that the library itself keeps of a parameter."""
    whole = tuple(tensor.shape)
    low = {"residual": (torch.int16, whole)}
    if matrix is None or draw is None:
        return low | dict.fromkeys(("momentum", "first", "second"), (torch.float32, whole))
    return low | {"momentum": (torch.float32, draw)} | dict.fromkeys(("first", "second"), (torch.float32, (matrix.rank,)))


def _kind(dtype: torch.dtype, shape: Sequence[int]) -> str:
    return f"{str(dtype).removeprefix('torch.')}{list(shape)}"


def _described(value: Any) -> str:
    if not isinstance(value, Tensor):
        return f"{type(value).__name__} {value!r:.80}"
    how = "" if value.layout == torch.strided else f" {value.layout}"
    if not how and not value.is_contiguous():
        how = f" with strides {value.stride()}"
    return f"{_kind(value.dtype, value.shape)}{how} on {value.device}"


__all__ = ["START_ANEW", "check_state"]
