"""Rewrites what names every method: docs/methods.md, README.md's list, and that of type checkers: `make
methods`."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterable
from pathlib import Path

from zokern import methods
from zokern.cli import methods as cli_methods

ROOT = Path(__file__).resolve().parents[1]


def listed(readme: str, names: Iterable[str]) -> str:
    """Returns the text with all methods in the list below the table that the table does not show."""
    table, below = readme.split("\nAlso ", 1)
    others = [f"`{name}`" for name in sorted(names) if f"\n| `{name}` |" not in table]
    _, rest = below.split(". [docs/methods.md]", 1)
    paragraph, end = rest.split("\n\n", 1)
    text = f"Also {', '.join(others[:-1])} and {others[-1]}. [docs/methods.md]{paragraph}"
    words = re.sub(r"\s+", " ", text)
    lines = textwrap.wrap(words, 110, break_long_words=False, break_on_hyphens=False)
    return "\n".join([table, *lines, "", end])


def exported(text: str, found: dict[str, type]) -> str:
    """Returns the source of zokern/methods/__init__.py with all methods for type checkers."""
    imports = sorted(f"    from .{found[name].__module__.rsplit('.', 1)[1]} import {name}" for name in found)
    names = textwrap.wrap(", ".join(f'"{name}"' for name in sorted(found)) + ",", 106)
    text = re.sub(r"(?m)^(    from \.\w+ import \w+\n)+", "\n".join([*imports, ""]), text, count=1)
    rows = "".join(f"    {row}\n" for row in names)
    return re.sub(r"(?s)__all__ = \[\n.*?\]", lambda _: f"__all__ = [\n{rows}]", text, count=1)


if __name__ == "__main__":
    room, readme = Path(methods.__file__), ROOT / "README.md"
    room.write_text(exported(room.read_text(), methods.METHODS))
    readme.write_text(listed(readme.read_text(), methods.METHODS))
    (ROOT / "docs" / "methods.md").write_text(cli_methods.markdown())
