"""Counts the words of sentences in Markdown."""

from __future__ import annotations

import re


def paragraphs(text: str) -> list[str]:
    """The prose of a document: no code, tables, headings, pictures or formulas.
    An item of a list is a paragraph."""
    text = re.sub(r"^```.*?^```[^\n]*$", "", text, flags=re.M | re.S)
    text = re.sub(r"<!--.*?-->", "", text, flags=re.S)
    found = []
    for block in re.split(r"\n\s*\n", text):
        lines = [line for line in block.split("\n") if line.strip() and not re.match(r"\s*(\||#|!\[)", line)]
        if not all(line.startswith("    ") for line in lines):
            found += re.split(r"\n(?=\s*(?:[-*]|\d+\.)\s)", "\n".join(lines))
    return [re.sub(r"^\s*(?:[-*]|\d+\.)\s+", "", item) for item in found]


def sentences(text: str) -> list[str]:
    """A sentence ends with . ! or ?, a space behind it, and its paragraph. Code is one word."""
    found = []
    for paragraph in paragraphs(text):
        plain = re.sub(r"`[^`]*`", "code", paragraph.replace("\n", " "))
        plain = re.sub(r"\b(al|e\.g|i\.e|vs)\.", r"\1", plain)
        found += re.split(r"(?<=[.!?])\s|(?<=[.!?][)\"*])\s", plain)
    return [sentence for sentence in found if re.search(r"\w", sentence)]


def words(sentence: str) -> int:
    return len(re.findall(r"\S*\w\S*", sentence))


def mean_words(text: str) -> float:
    found = sentences(text)
    return sum(map(words, found)) / max(1, len(found))
