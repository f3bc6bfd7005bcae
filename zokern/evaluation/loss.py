"""The loss that a closure returned, checked."""

from __future__ import annotations

import math
import numbers
from typing import Any

import torch
from torch import Tensor


def loss_tensor(loss: Any) -> Tensor:
    """Returns the closure's loss as a 0-d float64 tensor, on its device; refused unless it is one real number.

    A 0-d or one-element tensor (of integers or booleans too: a count of right answers is one), a Python number or a NumPy scalar.
    Vectors, complex numbers, None and losses that carry an autograd graph are refused: each has meant a bug in a closure.
    """
    expected = "expected a scalar: a 0-d or [1] tensor of real numbers, or a Python number"
    if isinstance(loss, Tensor):
        if loss.shape not in ((), (1,)):
            raise ValueError(f"the closure returned a tensor of shape {tuple(loss.shape)}; {expected} (reduce it with .mean())")
        if loss.is_complex():
            raise TypeError(f"the closure returned a {loss.dtype} tensor; {expected} (is this the loss?)")
        if loss.requires_grad:
            raise ValueError(
                f"the closure returned a loss with an autograd graph; {expected}: the loss was computed before the step, or under "
                "enable_grad(): call the model inside the closure, without backward()"
            )
        return loss.reshape(()).to(torch.float64)
    if hasattr(loss, "dtype") and getattr(loss, "shape", None) == ():
        loss = loss.item()  # NumPy
    if isinstance(loss, bool) or not isinstance(loss, numbers.Real):
        raise TypeError(f"the closure returned {type(loss).__name__} {loss!r:.80}; {expected}")
    try:
        value = float(loss)
    except OverflowError:  # an integer or a fraction beyond the floats
        value = math.inf if loss > 0 else -math.inf  # type: ignore[operator]
    return torch.tensor(value, dtype=torch.float64, device="cpu")


__all__ = ["loss_tensor"]
