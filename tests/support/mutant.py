"""Wrong versions, which a test has to reject:
a function with a mistake around it, or with one expression replaced."""

from __future__ import annotations

import inspect
import textwrap
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch


def mutant(owner: object, name: str, right: str, instead: str) -> Callable:
    """owner.name with `instead` in the place of `right`, which stands in it once."""
    function = getattr(owner, name)
    source = textwrap.dedent(inspect.getsource(function))
    assert source.count(right) == 1, f"{name} holds {right!r} {source.count(right)} times"
    space: dict = {}
    exec(
        "from __future__ import annotations\n" + source.replace(right, instead),
        vars(inspect.getmodule(function)),
        space,
    )
    return space[name]


def replaced(owner: Any, name: str, change: Callable) -> Any:
    """owner.name with a mistake: change(right, *arguments)."""
    right = getattr(owner, name)
    return patch.object(owner, name, lambda *arguments, **keywords: change(right, *arguments, **keywords))


@contextmanager
def together(patches: Iterable) -> Iterator[None]:
    """Several mistakes at once."""
    with ExitStack() as stack:
        for one in patches:
            stack.enter_context(one)
        yield


def misread(kind: type, change: Callable):
    """A rule that updates with other numbers than it says it has."""

    def update(right, self, *rest, **more):
        before, wrong = dict(vars(self)), change(self)
        vars(self).update(wrong)
        try:
            return right(self, *rest, **more)
        finally:
            vars(self).update(before)

    return replaced(kind, "update", update)
