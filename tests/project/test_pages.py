"""The pages of docs/ agree with the package and with one another: names that they use exist, messages that
they quote are those of the sources, and no sentence stands in two pages."""

from __future__ import annotations

import ast
import pkgutil
import re
from collections import defaultdict
from pathlib import Path

import pytest
import torch
from prose import sentences, words

import zokern

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted((ROOT / "docs").glob("*.md"))
DOCUMENTS = [ROOT / "README.md", *PAGES]
LONG = 8  # words of a sentence that no other page may have


def code(text: str) -> list[str]:
    """What a document sets in typewriter: fences, indented blocks and `spans`."""
    fence, indented = re.compile(r"^```.*?\n(.*?)^```", re.M | re.S), re.compile(r"^ {4}\S.*$", re.M)
    spans = re.findall(r"`([^`\n]+)`", fence.sub("", text))
    return [*fence.findall(text), *indented.findall(text), *spans]


def objects() -> dict[str, list]:
    """What documents call `opt` and `result`: of methods with attributes of their own."""
    model = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Linear(3, 1))
    made = [zokern.MeZO(model), zokern.Hybrid(model, first_order=[model[1]])]
    result = zokern.step(made[0], lambda: model(torch.ones(2, 3)).square().mean())
    return {"opt": made, "result": [result]}


def missing_names(text: str, known: dict[str, list]) -> list[str]:
    """Names such as zokern.X, opt.x and result.x that do not exist."""
    found = set()
    for block in code(text):
        for path in re.findall(r"(?<![\w./])zokern((?:\.[A-Za-z]\w*)+)(?![\w/]*\.py)", block):
            try:
                pkgutil.resolve_name(f"zokern{path}")
            except (AttributeError, ImportError):
                found.add(f"zokern{path}")
        for name, attribute in re.findall(r"(?<![\w.])(opt|result)\.(\w+)", block):
            if not any(hasattr(one, attribute) for one in known[name]):
                found.add(f"{name}.{attribute}")
    return sorted(found)


def messages(sources: list[str]) -> list[str]:
    """The texts of programs; what they fill in is `...`."""
    found = []
    for source in sources:
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.JoinedStr):
                parts = [part.value if isinstance(part, ast.Constant) else "..." for part in node.values]
                found.append("".join(map(str, parts)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return found


def quoted(text: str) -> list[str]:
    """The messages of the table in docs/troubleshooting.md."""
    table = text.split("| message |")[1]
    return re.findall(r"^\| `([^`]+)` \|", table, re.M)


def unknown_messages(text: str, known: list[str]) -> list[str]:
    return [message for message in quoted(text) if not any(message in one for one in known)]


def repeated(pages: dict[str, str]) -> list[str]:
    """Sentences that stand in two pages."""
    where = defaultdict(set)
    for name, text in pages.items():
        for sentence in sentences(text):
            if words(sentence) >= LONG:
                where[re.sub(r"\W+", " ", sentence).lower().strip()].add(name)
    return sorted(f"{' and '.join(sorted(names))}: {text}" for text, names in where.items() if len(names) > 1)


def sources() -> list[str]:
    return [path.read_text() for path in sorted((ROOT / "zokern").rglob("*.py"))]


@pytest.fixture(scope="module")
def known():
    return objects()


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_the_names_of_a_document_exist(document, known):
    assert missing_names(document.read_text(), known) == []


@pytest.mark.parametrize("wrong", ["zokern.Mezo", "zokern.rule.cone.cooling", "opt.flash()", "result.losss"])
def test_a_wrong_name_is_rejected(wrong, known):
    name = wrong.removesuffix("()")
    for text in (f"see `{wrong}`.", f"text\n\n    x = {wrong}\n", f"```python\nprint({wrong})\n```\n"):
        assert missing_names(text, known) == [name]
    assert (
        missing_names("`zokern.MeZO`, `zokern/step.py`, `opt.flush()`, `result.loss`, opt.flash", known) == []
    )


def test_the_messages_of_the_page_are_those_of_the_sources():
    page = (ROOT / "docs" / "troubleshooting.md").read_text()
    assert len(quoted(page)) > 20
    assert unknown_messages(page, messages(sources())) == []


def test_a_message_that_no_source_has_is_rejected():
    known = messages(['raise ValueError(f"eps is {eps!r}; expected " "a number")'])
    page = "| message | cause |\n|---|---|\n| `eps is ...; expected a number` | x |\n| `eps was` | x |\n"
    assert unknown_messages(page, known) == ["eps was"]


def test_no_sentence_stands_in_two_pages():
    assert repeated({page.name: page.read_text() for page in PAGES}) == []


def test_a_repeated_sentence_is_found():
    sentence = "One rounding to the weights' dtype\nis all that a step costs here."
    pages = {
        "a.md": f"First. {sentence}",
        "b.md": f"## Title\n\n{sentence.upper()}",
        "c.md": "First. Short one.",
    }
    assert repeated(pages) == [
        "a.md and b.md: one rounding to the weights dtype is all that a step costs here"
    ]
