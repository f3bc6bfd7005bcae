"""Sphinx extension: reads the docstrings of zokern, and links the names in its pages.

A docstring is plain text. `name  meaning` begins an argument, and indented lines below go on with it. Other
indented lines are formulas. A paragraph begins at an empty line, and at a line with one of STARTS.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import zokern

ARGUMENT = re.compile(r"(?P<names>\*{0,2}\w+(?:, \*{0,2}\w+)*) {2,}(?P<text>\S.*)")
SECOND = re.compile(r";\s{2,}(?=\w+(?:, \w+)*\s{2,}\S)")  # of two arguments in one line
STARTS = re.compile(r"(Arithmetic|Equal|Keeps|Raises|Reads|Returns|Writes)\b")
TOKEN = re.compile(
    r"``(?P<double>[^`]+)``|`(?P<single>[^`]+)`|(?P<bold>\*\*\w[^*]*\*\*)"
    r"|docs/(?P<page>[\w-]+)\.md|\bzokern\.(?P<name>[A-Za-z]\w*)\b(?!\.?\w)"
)


class Block(NamedTuple):
    """A piece of a docstring.

    kind   'text', 'formula' or 'argument';  names  of an argument;  lines  as they stand, without indent"""

    kind: str
    names: tuple[str, ...]
    lines: list[str]


def blocks(lines: Sequence[str]) -> list[Block]:
    """Returns the pieces of a docstring, whose common indent has been taken off."""
    found: list[Block] = []
    fresh = True  # whether a line begins a paragraph
    for line in lines:
        last = found[-1] if found else None
        if not line.strip():
            fresh = True
        elif line.startswith(" "):
            if last is not None and last.kind == "argument" and not fresh:
                last.lines.append(line.strip())
            elif last is not None and last.kind == "formula" and not fresh:
                last.lines.append(line)
            else:
                found.append(Block("formula", (), [line]))
            fresh = False
        elif match := ARGUMENT.match(line):
            found.append(Block("argument", _names(match), [match["text"]]))
            fresh = False
        else:
            if fresh or last is None or last.kind != "text" or STARTS.match(line):
                found.append(Block("text", (), []))
            found[-1].lines.append(line)
            fresh = False
    return [part for block in found for part in _apart(block)]


def _names(match: re.Match[str]) -> tuple[str, ...]:
    return tuple(name.lstrip("*") for name in match["names"].split(", "))


def _apart(block: Block) -> list[Block]:
    """Returns an argument's line as several, where it holds several."""
    if block.kind != "argument":
        return [block]
    first, *rest = SECOND.split("\n".join(block.lines))
    found = [Block("argument", block.names, first.split("\n"))]
    for text in rest:
        match = ARGUMENT.match(re.sub(r"\n", " ", text))
        assert match is not None
        found.append(Block("argument", _names(match), [match["text"]]))
    return found


def marked(text: str) -> str:
    """Returns plain text as reStructuredText, with links to pages and public names."""
    found, end = [], 0
    for match in TOKEN.finditer(text):
        found += [_escaped(text[end : match.start()]), _token(match), "\\ "]  # markup ends at a space
        end = match.end()
    return "".join([*found, _escaped(text[end:])])


def _escaped(text: str) -> str:
    return re.sub(r"([\\*|`_])", r"\\\1", text)


def _token(match: re.Match[str]) -> str:
    name = match["name"]
    if match["double"] or match["single"]:
        return f"``{match['double'] or match['single']}``"
    if match["bold"]:
        return match["bold"]
    if match["page"]:
        return f":doc:`{match['page']}`"
    if name in zokern.METHODS:
        return f"`zokern.{name} <methods.html#{name.lower()}>`__"
    return f":py:obj:`zokern.{name}`" if name in zokern.__all__ else f"``zokern.{name}``"


def restructured(lines: Sequence[str], parameters: Sequence[str]) -> list[str]:
    """Returns a docstring as reStructuredText.

    parameters  the names in the signature; other names with a meaning are attributes"""
    out: list[str] = []
    before = ""
    for block in blocks(lines):
        if block.kind == "formula":
            out += ["", "::", "", *(f"    {line}" for line in block.lines), ""]
        elif block.kind == "text":
            out += ["", marked(" ".join(block.lines)), ""]
        else:
            out += [] if before == "argument" else [""]
            for name in block.names:
                field = "param" if name in parameters or not parameters else "ivar"
                out.append(f":{field} {name}: {marked(' '.join(block.lines))}")
        before = block.kind
    return [*out, ""]


def _process(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    try:
        parameters = list(inspect.signature(obj).parameters)
    except (TypeError, ValueError):
        parameters = []
    lines[:] = restructured(lines, parameters)


def _link_pages(app: Any, name: str, source: list[str]) -> None:
    """Links a page that is named as `docs/page.md`; a link to a file outside of docs/ becomes its name."""
    text = re.sub(r"(?<!\]\()(?<![\w/`])`?docs/([\w-]+)\.md`?", r"[`docs/\1.md`](\1.md)", source[0])
    source[0] = re.sub(r"\[([^]]+)\]\(\.\./([^)]+)\)", r"\1 (`\2`)", text)


def setup(app: Any) -> dict[str, bool]:
    """Registers both with Sphinx."""
    app.connect("autodoc-process-docstring", _process)
    app.connect("source-read", _link_pages)
    return {"parallel_read_safe": True}
