"""Writes what was measured: printed lines, and a JSON, a Markdown page and plots for the repository.

A run of some benchmarks keeps the groups of the page that it did not measure. Each says its commit.
"""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import date
from pathlib import Path
from typing import Any

import torch

import zokern

from .goals import GOALS
from .measure import Group
from .steps import Shape, disagreements

ROOT = Path(__file__).resolve().parent.parent
HOW = """Times are medians of rounds in which all cases of a group take turns; a ratio is the
median of the rounds' ratios. A step has a process of its own, where it takes turns with two bare forwards.
The ratio of two steps is the quotient of their ratios to these (`benchmarks/steps.py`)."""


def processor() -> tuple[str, str]:
    """Model name and present clock of the first core, as the system tells them."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor() or platform.machine(), "? MHz"
    found = {key: re.search(rf"^{key}\s*: (.*)$", text, re.M) for key in ("model name", "cpu MHz")}
    name = found["model name"].group(1) if found["model name"] else platform.machine()
    clock = f"{float(found['cpu MHz'].group(1)):.0f} MHz" if found["cpu MHz"] else "? MHz"
    return re.sub(r"\((R|TM)\)", "", name), clock


def commit() -> str:
    def git(*args: str) -> str:
        return subprocess.run(
            ["git", *args], cwd=ROOT, capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--", "zokern", "csrc", "benchmarks/*.py")
        return git("rev-parse", "--short", "HEAD") + ("+changes" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def machine(command: str) -> dict[str, str]:
    from zokern.backends import cpu

    name, clock = processor()
    return {
        "cpu": name,
        "clock": clock,
        "cores": str(os.cpu_count()),
        "threads": str(torch.get_num_threads()),
        "isa": cpu.isa() if cpu.why_off() is None else "off",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "zokern": zokern.__version__,
        "commit": commit(),
        "date": date.today().isoformat(),
        "command": command,
        "how": HOW,
        "load": " ".join(f"{x:.1f}" for x in os.getloadavg()),
    }


# Columns of the tables, by the key of a row: heading and format. A table has those that its rows have.
COLUMNS = {
    "ms": ("median ms [p10 p90]", ""),
    "ns_per_element": ("ns/el", ".3f"),
    "bytes_per_element": ("B/el", "d"),
    "percent_of_copy": ("% of copy", ".0f"),
    "times_eager": ("x eager", ".2f"),
    "most": ("x eager of the forwards alone", ".2f"),
    "forwards": ("forwards", "d"),
    "over_forwards": ("over its two forwards", ".2f"),
    "bound_ms": ("these, ms", ".4g"),
    "eager_ms": ("the eager loop, ms", ".4g"),
    "evaluation": ("read by", "s"),
    "peak_mb": ("peak of a step", ".0f"),
    "forward_mb": ("peak of a forward", ".0f"),
    "extra_mb": ("the step beyond it", ".1f"),
    "scratch_mb": ("scratch_bytes", ".1f"),
    "commit": ("commit", "s"),
}

MADE = (
    "commit",
    "date",
    "command",
    "torch",
)  # of the machine's record: what a group says of its measurement


def cell(row: dict[str, Any], key: str) -> str:
    if key not in row:
        return ""
    return (
        f"{row['ms']:.4g} [{row['p10']:.4g} {row['p90']:.4g}]"
        if key == "ms"
        else format(row[key], COLUMNS[key][1])
    )


def table(head: list[str], rows: list[list[str]]) -> list[str]:
    return [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows)]


Page = Callable[[dict[str, str], dict[str, dict[str, Any]]], str]  # Markdown, of the machine and the rows


def merged(old: list[dict[str, Any]], new: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns rows, new ones in the places of old ones of their name."""
    return [*({row["name"]: row for row in old} | {row["name"]: row for row in new}).values()]


class Report:
    """Collects groups. A group has a title, rows, figures, notes, and the commit of its measurement.

    say  what tells of progress"""

    say: Callable[[str], Any] = staticmethod(lambda line: None)

    def __init__(self, quick: bool, everything: bool = False, command: str = "make bench") -> None:
        self.quick, self.all = quick, everything
        self.machine = machine(command)
        self.groups: list[dict[str, Any]] = []
        self.noted: list[str] = []  # for the next group

    @classmethod
    def load(cls, file: Path) -> Report:
        """Returns the report that `write` has left in a folder."""
        report = cls.__new__(cls)
        report.quick = report.all = False
        report.noted = []
        content = json.loads(file.read_text())
        report.machine, report.groups = content["machine"], content["groups"]
        return report

    def add(self, group: Group, **figures: float) -> None:
        self.rows(group.title, group.rows(), figures, getattr(group, "shape", None))

    def rows(
        self, title: str, rows: list[dict[str, Any]], figures: dict[str, float], shape: Shape | None = None
    ) -> None:
        made = {key: self.machine[key] for key in MADE}
        group: dict[str, Any] = {
            "title": title,
            "rows": rows,
            "figures": dict(figures),
            "notes": self.noted,
            "made": made,
        }
        if shape is not None:
            group["shape"] = {
                "name": str(shape),
                "model": shape.model,
                "dtype": shape.dtype,
                "tokens": shape.tokens,
            }
        self.groups.append(group)
        self.noted = []

    def figure(self, key: str, value: float) -> None:
        """Adds a figure to the group that was added last."""
        self.groups[-1]["figures"][key] = value

    def row(self, title: str, row: dict[str, Any], shape: Shape, least: str) -> None:
        """Adds a row to a group that is measured row by row, in place of one of its name.

        The page keeps the rows that a run does not measure, and each says its commit. `least` is the key of
        the figure that is the least of the rows' times_eager."""
        mine = (g for g in self.groups if g["title"] == title and not self.is_kept(g["made"]))
        if (group := next(mine, None)) is None:
            self.rows(title, [], {}, shape)
            group = self.groups[-1]
        group["least"] = least
        group["rows"] = merged(group["rows"], [row | {"commit": self.machine["commit"]}])

    def note(self, text: str) -> None:
        """Adds a note to the group that is added next."""
        self.noted.append(text)

    def keep(self, earlier: Report) -> None:
        """Takes over the groups of an earlier page that this run did not measure, in their old places,
        and the rows of those that are measured row by row."""
        mine = {group["title"]: group for group in self.groups}
        kept = []
        for group in earlier.groups:
            new = mine.pop(group["title"], group)
            if "least" in new:
                new["rows"] = merged(group["rows"], new["rows"])
            kept.append(new)
        self.groups = kept + list(mine.values())

    def is_kept(self, made: dict[str, str]) -> bool:
        return any(made[key] != self.machine[key] for key in MADE)

    def found(self) -> dict[str, tuple[float, dict[str, str]]]:
        """Returns every figure by its key, and how it was made."""
        found = {}
        for group in self.groups:
            name = group.get("shape", {}).get("name")
            for row in group["rows"] if name else ():
                made = group["made"] | {"commit": row.get("commit", group["made"]["commit"])}
                for key, of in (("over_forwards", "forwards"), ("times_eager", "eager")):
                    if key in row:
                        found[f"{row['name']} {name} / {of}"] = row[key], made
            found |= {key: (value, group["made"]) for key, value in group["figures"].items()}
            if "least" in group:
                found[group["least"]] = min(row["times_eager"] for row in group["rows"]), group["made"]
        return found

    def notes(self) -> list[str]:
        noted = [note for group in self.groups for note in group["notes"]]
        return list(dict.fromkeys(noted + disagreements(self.groups)))

    # Text ------------------------------------------------------------------------------------------------

    def where(self) -> str:
        m = self.machine
        return (
            f"{m['cpu']} {m['clock']} {m['threads']} of {m['cores']} cores {m['isa']}, torch {m['torch']}, "
            f"zokern {m['zokern']}, {m['commit']}"
        )

    def lines(self) -> list[str]:
        lines = [self.where()]
        for group in self.groups:
            lines += ["", group["title"]]
            for row in group["rows"]:
                cells = [f"{heading} {cell(row, key)}" for key, (heading, _) in COLUMNS.items() if key in row]
                lines.append(" | ".join([row["name"], *cells]))
        return lines

    def goals(self) -> list[list[str]]:
        """Returns what must be reached, by how much, what was measured, and a verdict."""
        rows, found = [], self.found()
        for goal in GOALS:
            must = f"{'>=' if goal.at_least else '<='} {goal.bound:g} {goal.unit}"
            if goal.key not in found:
                rows.append([goal.what, must, "-", "not measured"])
                continue
            value, made = found[goal.key]
            verdict = "reached" if goal.reached(value) else "missed"
            since = f" (commit {made['commit']})" if self.is_kept(made) else ""
            rows.append([goal.what, must, f"{value:.2f} {goal.unit}{since}", verdict])
        return rows

    def markdown(self) -> str:
        m = self.machine
        kept = [group for group in self.groups if self.is_kept(group["made"])]
        earlier = (
            f" {len(kept)} of its {len(self.groups)} groups are of other runs, and each says of which."
            if kept
            else ""
        )
        text = [
            f"Measured at commit {m['commit']} on {m['date']}; later changes of the code are not in "
            f"it.{earlier}",
            "",
            f"# {m['cpu']}, {m['threads']} threads, {m['isa']}",
            "",
            f"`{m['command']}`: torch {m['torch']}, Python {m['python']}, zokern {m['zokern']},",
            f"{m['clock']}, {m['cores']} cores,",
            f"load average before the run {m['load']}. {m['how']}",
            "",
            "![kernels, steps and memory](bench.png)",
        ]
        if any("shape" in group for group in self.groups):
            text += ["", "![step cost against tokens](steps.png)"]
        text += ["", *table(["aim", "must reach", "measured", ""], self.goals())]
        for group in self.groups:
            text += ["", f"## {group['title']}", ""]
            if self.is_kept(made := group["made"]):
                text += [
                    f"Of commit {made['commit']}, {made['date']}, torch {made['torch']}, "
                    f"`{made['command']}`.",
                    "",
                ]
            columns = [key for key in COLUMNS if any(key in row for row in group["rows"])]
            head = ["case", *(COLUMNS[key][0] for key in columns)]
            text += table(
                head, [[row["name"], *(cell(row, key) for key in columns)] for row in group["rows"]]
            )
        if self.notes():
            text += ["", "## Notes", "", *(f"- {note}" for note in self.notes())]
        of_goals = {goal.key for goal in GOALS}
        figures = {key: value for group in self.groups for key, value in group["figures"].items()}
        others = [[key, f"{value:.2f}"] for key, value in figures.items() if key not in of_goals]
        if others:
            text += ["", "## Other figures", "", *table(["figure", "value"], others)]
        return "\n".join(text) + "\n"

    # Files -----------------------------------------------------------------------------------------------

    def folder(self) -> Path:
        if self.quick:
            return ROOT / "build" / "bench-quick"  # too few rounds for the record
        m = self.machine
        name = re.sub(r"[^a-z0-9]+", "-", f"{m['cpu']} {m['threads']} threads {m['isa']}".lower()).strip("-")
        return ROOT / "benchmarks" / "results" / name

    def write(self, anew: bool, drawn: bool = True) -> Path:
        """Writes JSON and page, and plots if `drawn`. Unless `anew`, groups of the page that were not
        measured stay. A run may write several times."""
        folder = self.folder()
        folder.mkdir(parents=True, exist_ok=True)
        file = folder / "bench.json"
        if anew:
            self.groups = [group for group in self.groups if not self.is_kept(group["made"])]
        elif file.exists():
            self.keep(Report.load(file))
        content = json.dumps({"machine": self.machine, "groups": self.groups}, indent=1)
        file.write_text(content + "\n")
        self.show(folder, drawn)
        return folder

    def kept(self, stem: str) -> dict[str, dict[str, Any]]:
        """Returns the rows of a page of its own, `stem`.md, by name."""
        file = self.folder() / f"{stem}.json"
        return json.loads(file.read_text())["rows"] if file.exists() else {}

    def keep_row(self, stem: str, name: str, row: dict[str, Any], page: Page) -> None:
        """Writes a row of a page of its own, in place of one of its name, and the page."""
        rows, folder = self.kept(stem) | {name: row}, self.folder()
        folder.mkdir(parents=True, exist_ok=True)
        content = json.dumps({"machine": self.machine, "rows": rows}, indent=1)
        (folder / f"{stem}.json").write_text(content + "\n")
        (folder / f"{stem}.md").write_text(page(self.machine, rows))

    @contextmanager
    def saving(self) -> Iterator[Report]:
        """Writes the page after a benchmark, without plots: a run that is ended leaves what it has."""
        yield self
        if self.groups:
            self.write(False, drawn=False)

    def show(self, folder: Path, drawn: bool = True) -> None:
        """Writes the page, and its plots if `drawn`."""
        (folder / "README.md").write_text(self.markdown())
        if not drawn:
            return
        try:
            from .plot import plot, plot_steps
        except ImportError:
            print("no plots: matplotlib is not installed")
        else:
            plot(self, folder / "bench.png")
            plot_steps(self, folder / "steps.png")
