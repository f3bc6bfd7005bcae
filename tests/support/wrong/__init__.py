"""Deliberately wrong implementations. The conformance suite must reject each;
tests/backends/test_wrong.py runs them.

One class a mistake, one file a family of mistakes.
``rejected_by`` names the checks that were written against it.
"""

from __future__ import annotations

from . import addressing, arithmetic, factors, memory, rounding
from .patched import Patched

BACKENDS: list[type[Patched]] = [
    kind
    for family in (addressing, arithmetic, factors, memory, rounding)
    for kind in vars(family).values()
    if isinstance(kind, type) and issubclass(kind, Patched) and kind is not Patched
]
