"""Rows of a file: read, held out, and drawn in batches, which are a function of the seed and the step."""

from __future__ import annotations

import csv
import hashlib
import json
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

TABLES = {".csv": ",", ".tsv": "\t"}
LINES = (".jsonl", ".ndjson")
PLAIN = (".txt",)
FEWEST = 2  # rows of a label on average: below, the column holds no labels


class Row(NamedTuple):
    """text, and the number of its label; -1: it has none."""

    text: str
    label: int = -1


class Raw(NamedTuple):
    """text, and its label as the file has it; None: there is no label column.  line: where it stands."""

    text: str
    label: str | None
    line: int


def read(flag: str, path: Path, text: str, label: str | None, required: bool) -> tuple[list[Raw], bool]:
    """Returns the rows of a file that have text, and whether they have labels.

    flag      the option that named the file, for errors
    text      column of the text, of .csv, .tsv and .jsonl; a .txt file has a text on each line
    label     column of the label; None: labels are not read
    required  whether a file without that column is an error

    Raises ValueError for a file that is missing, empty or not of these kinds, for a column that it lacks,
    for a row without a label, and for a line that is no JSON object."""
    if not path.is_file():
        raise ValueError(f"{flag} is {str(path)!r}: there is no such file")
    suffix = path.suffix.lower()
    if suffix not in (*TABLES, *LINES, *PLAIN):
        kinds = ", ".join((*TABLES, *LINES, *PLAIN))
        raise ValueError(f"{flag} is {str(path)!r}; expected a file whose name ends with one of {kinds}")
    if suffix in PLAIN:
        if required:
            raise ValueError(
                f"{flag} is {str(path)!r}, which has no columns, and labels are asked for; give them in a "
                ".csv or .jsonl file"
            )
        lines = path.read_text(encoding="utf-8-sig").splitlines()
        rows = [Raw(line.strip(), None, n) for n, line in enumerate(lines, 1)]
        return _filled(flag, path, rows), False
    records = list(_records(flag, path, suffix))
    columns = list(dict.fromkeys(name for _, record in records for name in record))
    if records and text not in columns:
        raise ValueError(_missing("--text-column", text, path, columns))
    labelled = label is not None and label in columns
    if records and required and not labelled:
        raise ValueError(_missing("--label-column", label, path, columns))
    rows = [
        Raw(_string(record.get(text)), _string(record.get(str(label))) if labelled else None, line)
        for line, record in records
    ]
    rows = _filled(flag, path, rows)
    for row in rows:
        if row.label == "":
            raise ValueError(
                f"{flag} is {str(path)!r}: line {row.line} has no {label!r}; fill it in, or take the row out"
            )
    return rows, labelled


def _filled(flag: str, path: Path, rows: list[Raw]) -> list[Raw]:
    """Returns the rows that have text."""
    if not (kept := [row for row in rows if row.text]):
        raise ValueError(f"{flag} is {str(path)!r}, which holds no row with text")
    return kept


def _missing(flag: str, name: str | None, path: Path, columns: Sequence[str]) -> str:
    return f"{flag} is {name!r}; {path.name} has the columns {', '.join(columns)}"


def _string(value: Any) -> str:
    """Returns a value of a table as text: nothing is empty, and true, 1 and "1" stay what they are."""
    return "" if value is None else " ".join(str(value).split())


def _records(flag: str, path: Path, suffix: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yields (line, columns) of each record."""
    with open(path, encoding="utf-8-sig", newline="" if suffix in TABLES else None) as file:
        if suffix in TABLES:
            reader = csv.DictReader(file, delimiter=TABLES[suffix])
            for record in reader:
                if None in record:
                    raise ValueError(
                        f"{flag} is {str(path)!r}: line {reader.line_num} has more columns than the first "
                        "line names; put text with a separator in quotes"
                    )
                yield reader.line_num, record
            return
        for number, line in enumerate(file, 1):
            if line.strip():
                try:
                    parsed: Any = json.loads(line)
                except json.JSONDecodeError:
                    parsed = None
                if not isinstance(parsed, dict):
                    raise ValueError(
                        f"{flag} is {str(path)!r}: line {number} is {line.strip()!r:.60}; expected a JSON "
                        'object, such as {"text": "...", "label": "..."}'
                    )
                yield number, parsed


def names_of(rows: Sequence[Raw], path: Path, column: str) -> list[str]:
    """Returns the labels that occur, numbers in their order and other words in theirs.

    Raises ValueError for one label alone, and for nearly as many labels as rows."""
    names = sorted({str(row.label) for row in rows}, key=lambda n: (not n.isdigit(), n.zfill(20)))
    if len(names) < 2 or len(rows) < FEWEST * len(names):
        raise ValueError(
            f"--label-column is {column!r}, which has {len(names)} different values in the {len(rows)} rows "
            f"of {path.name}; expected 2 labels or more, with {FEWEST} rows or more of each on average. "
            "--task text trains on the text alone"
        )
    return names


def numbered(rows: Sequence[Raw], names: Sequence[str], flag: str, path: Path) -> list[Row]:
    """Returns rows with the number of their label. Raises ValueError for a label that is not among names."""
    number = {name: n for n, name in enumerate(names)}
    for row in rows:
        if str(row.label) not in number:
            raise ValueError(
                f"{flag} is {str(path)!r}: line {row.line} has the label {row.label!r}; expected one of "
                f"{', '.join(names)}"
            )
    return [Row(row.text, number[str(row.label)]) for row in rows]


def split(rows: Sequence[Row], share: float) -> tuple[list[Row], list[Row]]:
    """Returns (rows to train on, rows held out): about `share` of the texts, the same ones on any machine.

    A text is held out by its SHA-256, so that equal texts stay together. Raises ValueError where a side is
    empty."""
    if not share:
        return list(rows), []
    sides: tuple[list[Row], list[Row]] = ([], [])
    for row in rows:
        digest = hashlib.sha256(row.text.lower().encode()).digest()
        sides[int.from_bytes(digest[:8], "big") < share * 2**64].append(row)
    if not all(sides):
        raise ValueError(
            f"--held-out is {share:g}, which holds out {len(sides[1])} of {len(rows)} rows; expected some "
            "on both sides. Name another share, --held-out 0, or an --eval-file"
        )
    return sides


class Batches:
    """Draws batches without replacement within an epoch. A batch is a function of the seed and the step."""

    def __init__(self, rows: Sequence[Row], size: int, seed: int) -> None:
        self.rows, self.size, self.seed = rows, size, seed
        self._order: dict[int, list[int]] = {}  # by epoch

    def at(self, step: int) -> list[Row]:
        """Returns the batch of a step; one that begins in an epoch's end goes on in the next one."""
        count, first = len(self.rows), step * self.size
        return [self.rows[self._epoch(n // count)[n % count]] for n in range(first, first + self.size)]

    def _epoch(self, number: int) -> list[int]:
        if number not in self._order:
            order = list(range(len(self.rows)))
            random.Random(f"{self.seed} {number}").shuffle(order)
            if len(self._order) > 4 + self.size // max(1, len(self.rows)):
                self._order.clear()
            self._order[number] = order
        return self._order[number]
