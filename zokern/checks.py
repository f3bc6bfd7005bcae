"""Numbers and flags that are given by hand, each refused with its name and its value where it is something else."""

from __future__ import annotations

import numbers
from typing import Any

import torch
from torch import Tensor


def is_number(value: Any) -> bool:
    """Whether it is one real number: Python's, NumPy's, or a tensor without dimensions. True and False are none."""
    if type(value) in (float, int):
        return True
    if isinstance(value, Tensor):
        return value.dim() == 0 and not value.is_complex() and value.dtype != torch.bool
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def within(what: str, value: Any, low: float, high: float, expected: str, least: bool = True) -> float:
    """A number of [low, high) as a float, of (low, high) without `least`; ValueError names the argument, its value and what is expected."""
    number = float(value) if is_number(value) else low - 1.0
    if not low <= number < high or (number == low and not least):
        raise ValueError(f"{what} is {value!r:.80}; expected {expected}")
    return number


def flag(what: str, value: Any) -> bool:
    """True or False, and nothing that only counts as one."""
    if not isinstance(value, bool):
        raise ValueError(f"{what} is {value!r:.80}; expected True or False")
    return value


def whole(what: str, value: Any, expected: str = "an integer, at least 1", least: int = 1) -> int:
    """An integer from `least` on."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral) or value < least:
        raise ValueError(f"{what} is {value!r:.80}; expected {expected}")
    return int(value)


__all__ = ["flag", "is_number", "whole", "within"]
