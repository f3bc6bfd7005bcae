"""A function with one expression replaced: what a test of that function has to reject."""

from __future__ import annotations

import inspect
import textwrap
from collections.abc import Callable


def mutant(owner: object, name: str, right: str, instead: str) -> Callable:
    """owner.name with `instead` in the place of `right`, which stands in it once."""
    function = getattr(owner, name)
    source = textwrap.dedent(inspect.getsource(function))
    assert source.count(right) == 1, f"{name} holds {right!r} {source.count(right)} times"
    space: dict = {}
    exec("from __future__ import annotations\n" + source.replace(right, instead), vars(inspect.getmodule(function)), space)
    return space[name]
