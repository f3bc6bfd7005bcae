"""The file of a study: a line of settings, then a line of JSON for each run that is done."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from .order import Run


class Store:
    """Rows of a JSON-lines file. The settings of its first line are those of all rows.

    rows      of the runs that are done, in the order of the file
    settings  what changes the numbers; a file with other settings is refused

    A line without its end is of a run that was killed while it was written: it is cut off.
    Raises ValueError for other settings and for lines that are no rows."""

    def __init__(self, path: Path, settings: dict[str, Any], anew: bool = False) -> None:
        self.path, self.settings = path, settings
        self.rows: list[dict[str, Any]] = []
        if anew or not path.exists() or not (found := self._lines()):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("")
            self._write({"settings": settings})
            return
        known = found[0].get("settings")
        if known != settings:
            other = {k: (known or {}).get(k) for k in settings if (known or {}).get(k) != settings[k]}
            raise ValueError(
                f"{path} is of a study with other settings, {other} where "
                f"{ ({k: settings[k] for k in other}) } is asked for; give its settings, another --file, or "
                "--anew to start again"
            )
        self.rows = found[1:]

    @classmethod
    def read(cls, path: Path) -> Store:
        """Returns the store of a file with the settings that it has.
        Raises ValueError where there are none."""
        lines = path.read_text().splitlines() if path.exists() else []
        if not lines or "settings" not in (first := json.loads(lines[0])):
            raise ValueError(f"{path} holds no study; run one first")
        return cls(path, first["settings"])

    def _lines(self) -> list[dict[str, Any]]:
        text = self.path.read_text()
        whole, end, rest = text.rpartition("\n")
        if rest:
            self.path.write_text(whole + end)
        found = []
        for number, line in enumerate(whole.splitlines(), start=1):
            try:
                found.append(json.loads(line))
            except json.JSONDecodeError:
                raise ValueError(
                    f"{self.path}, line {number} is no JSON; remove it, and its run is run again"
                ) from None
        return found

    def _write(self, record: dict[str, Any]) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps(record) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def append(self, row: dict[str, Any]) -> None:
        """Adds the row of a run that is done; when this returns it is on the disk."""
        self._write(row)
        self.rows.append(row)

    def latest(self) -> list[dict[str, Any]]:
        """Returns a row for each run: the last one, where a run that failed was run again."""
        return list({Run.of(row): row for row in self.rows}.values())

    def done(self, retry: bool = False) -> set[Run]:
        """Returns the runs that need not be run again. retry: those that failed need."""
        return {Run.of(row) for row in self.latest() if not (retry and "error" in row)}
