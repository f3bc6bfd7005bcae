"""Checks of single numbers, integers and flags. A ValueError names the argument and its value."""

from __future__ import annotations

import math
import numbers
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

# halfway from the largest float32 to 2**128: from here on float32 is infinite
_TOO_LARGE = 2.0**128 - 2.0**103


def says(part: Any, name: str) -> bool:
    """Returns whether the class of a part itself promises something. A subclass may do otherwise, and says it
    anew."""
    return name in vars(type(part)) and bool(getattr(part, name))


def is_number(value: Any) -> bool:
    """Tells whether a value is one real number:
    Python's, NumPy's, or a tensor without dimensions, but no bool."""
    if type(value) in (float, int):
        return True
    if isinstance(value, Tensor):
        return value.dim() == 0 and not value.is_complex() and value.dtype != torch.bool
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def fits(found: Iterable[float]) -> bool:
    """Tells whether all numbers are finite as float32, in which the kernels use them."""
    return all([-_TOO_LARGE < number < _TOO_LARGE for number in found])


def finite_number(
    name: str, value: Any, *, minimum: float | None = None, above: float | None = None
) -> float:
    """Returns a finite number within bounds as a float; a tensor of one element is a number too."""
    one = not isinstance(value, Tensor) or value.numel() == 1
    accepted = one and isinstance(value, (numbers.Real, Tensor)) and type(value) is not bool
    number = float(value) if accepted else math.nan
    low = number if minimum is None else minimum
    if not math.isfinite(number) or number < low or (above is not None and number <= above):
        bound = f" > {above}" if above is not None else f" >= {minimum}" if minimum is not None else ""
        raise ValueError(f"{name} is {value!r}; expected a finite number{bound}")
    return number


def within(name: str, value: Any, low: float, high: float, expected: str, least: bool = True) -> float:
    """Returns a number of [low, high) as a float; without `least`, one of (low, high)."""
    number = float(value) if is_number(value) else low - 1.0
    if not low <= number < high or (number == low and not least):
        raise ValueError(f"{name} is {value!r:.80}; expected {expected}")
    return number


def whole_number(name: str, value: Any, least: int = 1, most: int | None = None, expected: str = "") -> int:
    """Returns an integer from `least` to `most`; `expected` replaces these bounds in the message."""
    number = least - 1 if isinstance(value, bool) or not isinstance(value, numbers.Integral) else int(value)
    if number < least or (most is not None and number > most):
        bound = f"at least {least}" if most is None else f"{least} <= {name} <= {most}"
        raise ValueError(f"{name} is {value!r:.80}; expected {expected or f'an integer, {bound}'}")
    return number


def flag(name: str, value: Any) -> bool:
    """Returns True or False; 0, 1 and other values that only count as one are refused."""
    if not isinstance(value, bool):
        raise ValueError(f"{name} is {value!r:.80}; expected True or False")
    return value


__all__ = ["finite_number", "fits", "flag", "is_number", "whole_number", "within"]
