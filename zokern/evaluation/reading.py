"""Reading theta with updates that still wait, outside a step and without a write."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from .arena import Arena
from .copies import Copies
from .plan import Plan, Point
from .substitution import Substitution

BUDGET = 64 << 20


@contextmanager
def theta(plan: Plan) -> Iterator[None]:
    """While it lasts, every use of a parameter whose updates wait reads shrink W + left pending right^T."""
    copies = Copies(plan, Arena(BUDGET))
    copies.prepare([Point(0, 0.0)])
    with Substitution(copies):
        yield
