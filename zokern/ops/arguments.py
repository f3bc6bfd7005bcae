"""Checks of a verb's plain arguments: numbers, pairs, lists. An error names argument and value."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Set
from typing import Any

import torch
from torch import Tensor

from ..backends import TensorList
from ..checks import fits, is_number
from ..stream import check_word


def tensor(verb: str, what: str, value: Any, way_out: str = "") -> Tensor:
    """Returns the tensor itself; TypeError for anything else."""
    if not isinstance(value, Tensor):
        raise TypeError(
            f"{verb}: {what} is {type(value).__name__} {value!r:.80}; expected a torch.Tensor{way_out}"
        )
    return value


def is_text(value: Any) -> bool:
    """Tells whether a value is a sequence that is no list of numbers: bytes, a mapping, a set."""
    return isinstance(value, (str, bytes, bytearray, memoryview, Mapping, Set))


def finite(verb: str, what: str, given: Any, expected: str = "finite numbers") -> list[float]:
    """Returns a sequence of real numbers, finite in float32, as floats."""
    if (
        not isinstance(given, Iterable)
        or (is_text(given) and not isinstance(given, str))
        or (isinstance(given, Tensor) and given.dim() == 0)
    ):
        raise ValueError(f"{verb}: {what} is {given!r:.80}; expected a sequence of {expected}")
    found = given.tolist() if isinstance(given, Tensor) else list(given)
    if not (all(map(is_number, found)) and fits(found)):
        raise ValueError(f"{verb}: {what} is {found!r:.200}; expected {expected} (in float32)")
    return [float(x) for x in found]


def one_or_each(
    verb: str, what: str, given: Any, count: int, expected: str = "finite numbers"
) -> list[float]:
    """Returns one finite number for all as a list, or a sequence of them, whose length the caller checks."""
    return finite(verb, what, [given] * count if is_number(given) else given, expected)


def draws(verb: str, given: Any) -> list[tuple[int, int]]:
    """Returns pairs (step, draw) as words of the counter."""
    try:
        if is_text(given):
            raise TypeError
        pairs = [(step, draw) for step, draw in given]
    except (TypeError, ValueError):
        raise ValueError(
            f"{verb}: draws is {given!r:.80}; expected pairs (step, draw), such as [(7, 0), (8, 0)]"
        ) from None
    return [(check_word("step", step), check_word("draw", draw)) for step, draw in pairs]


def tensor_list(what: str, given: Any) -> TensorList:
    """Returns one tensor, or a sequence of them, as a list."""
    if not isinstance(given, (Tensor, Iterable)):
        raise TypeError(
            f"{what} is {type(given).__name__} {given!r:.80}; expected a torch.Tensor, or a list of them"
        )
    found = TensorList([given] if isinstance(given, Tensor) else given)
    if set(map(type, found)) <= {Tensor, torch.nn.Parameter}:
        return found
    for i, one in enumerate(found):
        if not isinstance(one, Tensor):
            raise TypeError(f"{what}[{i}] is {type(one).__name__} {one!r:.80}; expected a torch.Tensor")
    return found


__all__ = ["draws", "finite", "is_text", "one_or_each", "tensor", "tensor_list"]
