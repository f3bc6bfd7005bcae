"""Checks of one parameter, before any weight is touched."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..ops.operands import NO_MEMORY, check_tensor

ADAPTERS = "quantised weights stay frozen, and adapters beside them are trained: peft.get_peft_model"


def storage_of(tensor: Tensor) -> int:
    """Returns what tensors on one piece of memory have in common.

    A wrapper around other tensors has no memory of its own, and gets a negative number."""
    try:
        return tensor.untyped_storage().data_ptr()
    except (RuntimeError, NotImplementedError):
        return -id(tensor)


def view_of(tensor: Tensor) -> tuple:
    """Returns what makes two tensors the same elements: storage, offset, shape, strides, dtype."""
    return (storage_of(tensor), tensor.storage_offset(), tuple(tensor.shape), tensor.stride(), tensor.dtype)


def check_parameter(name: str, tensor: Tensor) -> None:
    """Refuses by name a parameter that cannot be trained exactly, with the way out."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"parameter {name!r} is {type(tensor).__name__}; expected a tensor")
    if nn.parameter.is_lazy(tensor):
        raise ValueError(
            f"parameter {name!r} of a lazy module has no shape yet; run the module once before the optimizer "
            "is built"
        )
    if type(tensor).__name__ == "DTensor" or hasattr(tensor, "full_tensor"):
        raise TypeError(
            f"parameter {name!r} is a DTensor; expected a plain tensor. Sharded parameters (fully_shard, "
            "tensor parallelism) are not supported yet: leave the model unsharded, or freeze this parameter "
            "with requires_grad_(False)"
        )
    if tensor.device.type in NO_MEMORY:
        raise ValueError(
            f"parameter {name!r} is on the meta device; materialise it (model.to_empty, load weights) first"
        )
    if tensor.is_inference():
        raise ValueError(
            f"parameter {name!r} was created under torch.inference_mode; clone it outside to train it"
        )
    way_out = "freeze it with requires_grad_(False)" if tensor.requires_grad else "leave it out"
    if storage_of(tensor) < 0:
        raise TypeError(
            f"parameter {name!r} is {type(tensor).__name__}, a wrapper without memory of its own; train a "
            f"plain tensor, or {way_out}: {ADAPTERS}"
        )
    if getattr(tensor, "quant_state", None) is not None:  # bitsandbytes packs 4 bits in any dtype
        raise TypeError(
            f"parameter {name!r} is {type(tensor).__name__}, packed numbers of 4 bits in {tensor.dtype}; "
            f"expected plain numbers; {way_out}: {ADAPTERS}"
        )
    if tensor.dtype.itemsize == 1 and tensor.dtype != torch.bool:
        way_out += f"; {ADAPTERS}"
    check_tensor("optimizer", f"parameter {name!r}", tensor, hint="cast it, or " + way_out)


def is_set_aside(tensor: Tensor) -> bool:
    """Tells whether a frozen parameter could not be trained either, as quantised weights."""
    if not isinstance(tensor, nn.Parameter) or tensor.requires_grad or nn.parameter.is_lazy(tensor):
        return False
    try:
        check_parameter("", tensor)
    except (TypeError, ValueError):
        return True
    return False
