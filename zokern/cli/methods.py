"""`python -m zokern methods`: the table of methods, or with a name one method's page; both come from
docstrings and runs.

    python -m zokern methods               # the table
    python -m zokern methods SubZero       # formula, paper, arguments with units, what it keeps
    python -m zokern methods --markdown    # docs/methods.md
    python -m zokern methods --json        # the table, or the page, for a program

The file of a method opens with its name, what it does, and its paper. The class's docstring holds, in
paragraphs: the formula, then text, of which one paragraph begins with "Use it" and says when, then a line for
every argument. Losses a step and bytes a weight are measured here, on two matrices of SIZE x SIZE. Where the
steps of an interval read different numbers of losses, their mean is told.
"""

from __future__ import annotations

import argparse
import inspect
import json
import re
import sys
import textwrap
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cache
from typing import Any, NamedTuple

import torch

from .. import methods
from ..evaluation import Jvp
from ..step import step

SIZE, COLUMNS = 512, 108
ARGUMENT = re.compile(r"(?P<names>\*{0,2}\w+(?:, \w+)*) {2,}(?P<text>\S.*)")
HEAD = ("method", "what it is", "losses a step", "bytes a weight", "default lr", "paper")
LEFT_OUT = {
    "LOREN": "LOREN (arXiv 2511.07971, 2025) is not here. Its z is a dense draw less a rank-one part, and "
    "that part is the draw's product with a learned vector. So every reading would make z twice, and no "
    "evaluation adds a dense and a low-rank z. RLOO has its coefficients. HiZOO learns a scale for each "
    "weight."
}


class Cost(NamedTuple):
    """What a step of a method takes, measured.

    losses    that a step reads, the mean over an interval
    state     bytes that it keeps for each weight of the matrix
    lr, eps   its defaults
    usual     losses that a step within an interval reads
    first     losses that the first step of an interval reads
    interval  steps of an interval; 1 where a method has none"""

    losses: float
    state: float
    lr: float
    eps: float
    usual: int
    first: int
    interval: int

    @property
    def told(self) -> str:
        """Returns the losses a step; where they differ, the mean and both numbers."""
        if self.first == self.usual:
            return str(self.usual)
        return f"{self.losses:.3g} ({self.first} in one step of {self.interval}, else {self.usual})"


@dataclass(frozen=True)
class Page:
    """A method's docstring, taken apart.

    title, paper  of its file;  formula  lines;  text  paragraphs;  arguments  (names, meaning)"""

    name: str
    title: str
    paper: str
    formula: list[str]
    text: list[str]
    arguments: list[tuple[str, str]]

    @property
    def use(self) -> str:
        """Returns the paragraph that says when to use it; empty where there is none."""
        return next((text for text in self.text if text.startswith("Use it")), "")


class _Counted(Jvp):
    """Evaluation master, with derivatives, which counts the losses that it reads."""

    asked = 0

    def losses(self, plan: Any, points: Any, closure: Any) -> torch.Tensor:
        self.asked += len(set(points))
        return super().losses(plan, points, closure)

    def slopes(self, plan: Any, words: Any, closure: Any) -> tuple[torch.Tensor, torch.Tensor]:
        self.asked += len(words)
        return super().slopes(plan, words, closure)


@cache
def cost(name: str) -> Cost:
    """Measures a method at its defaults on two matrices.

    Counts the second step. A method with an interval gets one of 2 steps, and the third and fourth steps are
    counted: the first of an interval, and another."""
    model = torch.nn.Sequential(*[torch.nn.Linear(SIZE, SIZE, bias=False, device="cpu") for _ in range(2)])
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=0.02, generator=torch.Generator("cpu").manual_seed(0))
    x = torch.ones(1, SIZE, dtype=torch.float32, device="cpu")
    make: Any = methods.METHODS[name]
    given = inspect.signature(make).parameters.get("interval")
    interval, short = (1, {}) if given is None else (int(given.default), {"interval": 2})
    optimizer, counts = make(model, evaluation=_Counted(), paired_check=0, **short), list[int]()
    evaluation = optimizer.evaluation
    group = optimizer.param_groups[0]
    lr, eps = float(group["lr"]), float(group["eps"])  # before a step, which may have a schedule of its own
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(4 if short else 2):
            evaluation.asked = 0
            # one example: a scalar, and a vector of losses
            result = step(optimizer, lambda: model(x).square().mean(1))
            counts.append(evaluation.asked + (result.first_order_loss is not None))
    both = [optimizer, getattr(optimizer, "first_order", optimizer)]  # Hybrid has a torch optimizer
    states = [state for one in both for state in one.state.values()]
    kept = {
        id(value): value for state in states for value in state.values() if isinstance(value, torch.Tensor)
    }
    for matrix in optimizer.matrices.values():
        kept |= {id(value): value for value in (matrix.left, matrix.right) if value is not None}
    size = sum(value.numel() * value.element_size() for value in kept.values())
    usual, first = counts[-1], counts[-2] if short else counts[-1]
    losses = usual + (first - usual) / interval
    return Cost(losses, size / (2 * SIZE**2), lr, eps, usual, first, interval)


def page(name: str) -> Page:
    """Takes the docstrings of a method apart. Raises ValueError where a part is missing."""
    method = methods.METHODS[name]
    file = " ".join((inspect.getdoc(inspect.getmodule(method)) or "").split("\n\n")[0].split())
    title, _, paper = file.partition(". ")
    title = title.partition(":")[2].strip() or title
    blocks = (inspect.getdoc(method) or "").split("\n\n")
    formula, text, arguments = blocks[0].split("\n"), list[str](), list[tuple[str, str]]()
    for block in blocks[1:]:
        if ARGUMENT.match(block):
            arguments += _arguments(block)
        elif block.startswith(" "):
            formula += block.split("\n")
        else:
            text.append(" ".join(block.split()))
    found = Page(name, title, paper.rstrip("."), formula, text, arguments)
    for what, value in (
        ("paper", found.paper),
        ("paragraph 'Use it ...'", found.use),
        ("arguments", found.arguments),
    ):
        if not value:
            raise ValueError(
                f"the docstring of zokern.{name} has no {what}; {__name__} says how one is written"
            )
    return found


def _arguments(block: str) -> list[tuple[str, str]]:
    found: list[tuple[str, str]] = []
    for line in block.split("\n"):
        if match := ARGUMENT.match(line):
            found.append((match["names"], match["text"]))
        elif line.startswith(" ") and found:
            found[-1] = found[-1][0], f"{found[-1][1]} {line.strip()}"
    return found


def table() -> list[tuple[str, ...]]:
    """Returns a row for each method, as HEAD says."""
    rows = list[tuple[str, ...]]()
    for name in methods.METHODS:
        one, what = cost(name), page(name)
        state = "0" if not one.state else f"{one.state:.2g}"
        paper = re.split(r", (?=\"|arXiv)", what.paper)[0]
        rows.append((f"`{name}`", what.title, one.told, state, f"{one.lr:.0e}".replace("e-0", "e-"), paper))
    return rows


def markdown_table() -> str:
    """Returns the table in Markdown."""
    rows = [HEAD, ("---",) * len(HEAD), *table()]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def _wrapped(text: str, indent: str = "") -> str:
    return textwrap.fill(
        text,
        COLUMNS,
        initial_indent=indent,
        subsequent_indent=indent,
        break_long_words=False,
        break_on_hyphens=False,
    )


def markdown_page(name: str) -> str:
    """Returns one method's section in Markdown."""
    what, one = page(name), cost(name)
    parts = [
        f"## {name}",
        _wrapped(f"{what.title[0].upper()}{what.title[1:]}. {what.paper}."),
        "```\n" + "\n".join(what.formula) + "\n```",
    ]
    size, losses = f"{one.state:.2g}", "1 loss" if one.told == "1" else f"{one.usual} losses"
    if one.first != one.usual:
        losses = f"{one.losses:.3g} losses in the mean: {one.first} in one of {one.interval}, "
        losses += f"else {one.usual}"
    unit = "byte" if size == "1" else "bytes"
    state = "nothing" if not one.state else f"{size} {unit} a weight ({SIZE} x {SIZE} matrices)"
    parts += [_wrapped(text) for text in [what.use, *(text for text in what.text if text != what.use)]]
    told = f"A step reads {losses}. It keeps {state}. Defaults: lr {one.lr:g}, eps {one.eps:g}."
    parts.append(_wrapped(told))
    parts.append(
        "| argument | |\n|---|---|\n"
        + "\n".join(f"| `{names}` | {_cell(text)} |" for names, text in what.arguments)
    )
    return "\n\n".join(parts)


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def markdown() -> str:
    """Returns docs/methods.md."""
    head = (
        "`python -m zokern methods --markdown` wrote this page from the docstrings of `zokern/methods/`. "
        f"Losses a step and bytes a weight are measured on two {SIZE} x {SIZE} matrices at a method's "
        "defaults. Losses are the mean over an interval. The weights' own bytes do not count."
    )
    pages = (markdown_page(name) + "\n" for name in methods.METHODS)
    without = [line for text in LEFT_OUT.values() for line in (*textwrap.wrap(text, 110), "")]
    return "\n".join(["# Methods", "", *textwrap.wrap(head, 110), "", markdown_table(), "", *without, *pages])


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the table, a page, or the whole document."""
    parse = argparse.ArgumentParser(
        prog="zokern methods", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parse.add_argument("name", nargs="?", help="a method")
    parse.add_argument("--markdown", action="store_true", help="all of docs/methods.md")
    parse.add_argument("--json", action="store_true", help="the same as JSON")
    options = parse.parse_args(argv)
    names = {name.lower(): name for name in methods.METHODS}
    if options.name and options.name.lower() not in names:
        unknown = f"{options.name} is no method; expected one of {', '.join(methods.METHODS)}"
        print(f"zokern methods: {LEFT_OUT.get(options.name.upper(), unknown)}", file=sys.stderr)
        return 2
    if options.json:
        chosen = [names[options.name.lower()]] if options.name else methods.METHODS
        pages = [{**asdict(page(name)), **cost(name)._asdict()} for name in chosen]
        print(json.dumps(pages, indent=1))
    elif options.markdown:
        print(markdown(), end="")
    elif options.name:
        print(markdown_page(names[options.name.lower()]))
    else:
        rows = [HEAD, *table()]
        widths = [max(len(row[i]) for row in rows) for i in range(len(HEAD) - 1)]
        for row in rows:
            print("  ".join([*(cell.ljust(width) for cell, width in zip(row, widths)), row[-1]]))
    return 0
