"""What the parts of a method have in common: an optimizer takes a copy of each, as it is before a run."""

from __future__ import annotations

import copy
from functools import cached_property
from typing import Any, TypeVar

Own = TypeVar("Own", bound="Part")


class Part:
    """Has a state, and copies without one."""

    @cached_property
    def state(self) -> dict[Any, Any]:
        """What a run leaves in this object and a resumed run needs, by name."""
        return {}

    def begin(self) -> None:
        """Sets what runs leave in it to what it is before a run."""
        vars(self).pop("state", None)

    def fresh(self: Own) -> Own:
        """Returns a copy as it is before a run. What it was given, such as closures, is shared."""
        part = copy.copy(self)
        part.begin()
        return part


__all__ = ["Part"]
