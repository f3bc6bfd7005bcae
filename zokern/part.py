"""What the parts of a method have in common: an optimizer takes a copy of each, as it is before a run."""

from __future__ import annotations

import copy
from typing import Any, TypeVar

Own = TypeVar("Own", bound="Part")


class Part:
    """Has a state, and copies without one.

    state  what a run leaves in it and a resumed run needs, by name"""

    state: dict[Any, Any]

    def __new__(cls, *_: Any, **__: Any) -> Any:
        part = super().__new__(cls)
        vars(part)["state"] = {}  # a subclass may have a property of that name
        return part

    def begin(self) -> None:
        """Sets what runs leave in it to what it is before a run."""
        vars(self)["state"] = {}

    def fresh(self: Own) -> Own:
        """Returns a copy as it is before a run. What it was given, such as closures, is shared."""
        part = copy.copy(self)
        part.begin()
        return part


__all__ = ["Part"]
