"""The loss that a closure returned, or the losses of its examples, checked."""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..shards import is_sharded
from .base import Refused


def loss_tensor(loss: Any, rows: bool = False) -> Tensor:
    """Returns the closure's loss as a 0-d float64 tensor, on its device;
    refused unless it is one real number.

    rows  a vector with the loss of each example is expected, and returned as float64 [examples]

    A 0-d or one-element tensor, a Python number or a NumPy scalar (of integers or booleans too: a count of
    right answers is one). A DTensor is gathered or summed over its ranks. Vectors, complex numbers, None
    and losses that carry an autograd graph are refused: each has meant a bug in a closure.
    """
    expected = "expected a scalar: a 0-d or [1] tensor of real numbers, or a Python number"
    if rows:
        expected = "expected a tensor of shape [examples], the loss of each example of the batch"
        if not isinstance(loss, Tensor) or loss.dim() != 1 or not loss.numel():
            what = (
                f"shape {tuple(loss.shape)}"
                if isinstance(loss, Tensor)
                else f"{type(loss).__name__} {loss!r:.80}"
            )
            raise ValueError(f"the closure returned {what}; {expected}: take reduction='none'")
    if isinstance(loss, Tensor):
        if is_sharded(loss):
            loss = loss.full_tensor()  # type: ignore[attr-defined]
        if not rows and loss.shape not in ((), (1,)):
            raise ValueError(
                f"the closure returned a tensor of shape {tuple(loss.shape)}; {expected} (reduce it with "
                ".mean())"
            )
        if loss.is_complex():
            raise TypeError(f"the closure returned a {loss.dtype} tensor; {expected} (is this the loss?)")
        if loss.requires_grad:
            raise ValueError(
                f"the closure returned a loss with an autograd graph; {expected}: the loss was computed "
                "before the step, or under enable_grad(): call the model inside the closure, without "
                "backward()"
            )
        return loss.reshape([-1] if rows else []).to(torch.float64)
    if hasattr(loss, "dtype") and getattr(loss, "shape", None) == ():
        loss = loss.item()  # NumPy
    if not isinstance(loss, numbers.Real):
        said = f"the closure returned {type(loss).__name__} {loss!r:.80}; {expected}"
        raise TypeError(f"{said}{_way_out(loss)}")
    try:
        value = float(loss)
    except OverflowError:  # an integer or a fraction beyond the floats
        value = math.inf if loss > 0 else -math.inf  # type: ignore[operator]
    return torch.tensor(value, dtype=torch.float64, device="cpu")


def _way_out(output: Any) -> str:
    """Returns what to return in the place of a model's whole output."""
    if hasattr(output, "loss"):
        return ": return its .loss"
    if isinstance(output, dict):
        return ": return its .loss, or ['loss'] of a dict"
    return ": return its .loss, or the loss of a tuple alone" if isinstance(output, (tuple, list)) else ""


def one_number(loss: Any) -> Refused:
    """Says that a number, where one call reads all sides, would be one for all of them.

    Raises TypeError for what is no number (loss_tensor)."""
    loss_tensor(loss)
    return Refused(
        f"the closure returned {type(loss).__name__} {loss!r:.40}, one number for all sides of a step: "
        "return a tensor, or use evaluation='master'"
    )


def mean_of(closure: Callable[[], Any]) -> Callable[[], Any]:
    """Returns the closure of the mean loss, from one that returns the loss of each example."""
    return lambda: loss_tensor(closure(), rows=True).mean()


__all__ = ["loss_tensor", "mean_of", "one_number"]
