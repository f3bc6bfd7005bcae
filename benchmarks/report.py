"""What was measured: printed lines, a JSON and a Markdown page for the repository, and a plot."""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
from datetime import date
from pathlib import Path
from typing import Any

import torch

import zokern

from .goals import GOALS
from .measure import Group

ROOT = Path(__file__).resolve().parent.parent


def _cpu() -> tuple[str, str]:
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
        return subprocess.run(["git", *args], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--", "zokern", "csrc", "benchmarks/*.py")
        return git("rev-parse", "--short", "HEAD") + ("+changes" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def machine() -> dict[str, str]:
    from zokern.backends import cpu

    name, clock = _cpu()
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
        "load": " ".join(f"{x:.1f}" for x in os.getloadavg()),
    }


class Report:
    def __init__(self, quick: bool, everything: bool = False) -> None:
        self.quick, self.all = quick, everything
        self.machine = machine()
        self.groups: list[dict[str, Any]] = []
        self.figures: dict[str, float] = {}
        self.notes: list[str] = []
        self.steps: list[dict[str, Any]] = []  # model, dtype, tokens; ratios: case -> step over two forwards
        self.memory: list[
            tuple[str, float, float, float]
        ] = []  # case; MB: peak of a forward, extra of a step, record's scratch

    def add(self, group: Group, **figures: float) -> None:
        self.groups.append({"title": group.title, "rows": group.rows()})
        self.figures.update(figures)

    def figure(self, key: str, value: float) -> None:
        self.figures[key] = value

    # Text ---------------------------------------------------------------------------------------------------------------

    def where(self) -> str:
        m = self.machine
        return (
            f"{m['cpu']} {m['clock']} {m['threads']} of {m['cores']} cores {m['isa']}, torch {m['torch']}, "
            f"zokern {m['zokern']}, {m['commit']}"
        )

    def lines(self) -> list[str]:
        lines = []
        for group in self.groups:
            lines += ["", group["title"]]
            for row in group["rows"]:
                parts = [row["name"], f"{row['ms']:.4g} ms [{row['p10']:.4g} {row['p90']:.4g}]"]
                parts.append(f"{row['bytes_per_element']} B/el" if "bytes_per_element" in row else "-")
                parts.append(f"{row['percent_of_copy']:.0f}% of copy" if "percent_of_copy" in row else "-")
                parts.append(f"{row['times_eager']:.2f}x eager" if "times_eager" in row else "-")
                lines.append(" | ".join([*parts, self.where()]))
        if self.memory:
            lines += ["", "memory, each in a fresh process"]
        for name, forward, extra, scratch in self.memory:
            lines.append(
                f"{name} | forward peak {forward:.0f} MB | step +{extra:.1f} MB | scratch_bytes {scratch:.1f} MB | {self.where()}"
            )
        return lines

    def goals(self) -> list[tuple[str, str, str, str]]:
        rows = []
        for goal in GOALS:
            sign = ">=" if goal.at_least else "<="
            value = self.figures.get(goal.key)
            verdict = "not measured" if value is None else "reached" if goal.reached(value) else "not reached"
            shown = "-" if value is None else f"{value:.2f} {goal.unit}"
            rows.append((goal.what, f"{sign} {goal.bound:g} {goal.unit}", shown, verdict))
        return rows

    def markdown(self) -> str:
        m = self.machine
        text = [
            f"# {m['cpu']}, {m['threads']} threads, {m['isa']}",
            "",
            f"`make bench`, {m['date']}: torch {m['torch']}, Python {m['python']}, zokern {m['zokern']}, commit {m['commit']}, "
            f"{m['clock']}, {m['cores']} cores, load average before the run {m['load']}.",
            "Medians of rounds in which all cases of a group take turns; a ratio is the median of the rounds' ratios.",
            "",
            "![plot](bench.png)",
            *(["", "![step cost against tokens](steps.png)"] if self.steps else []),
            "",
            "| goal | must reach | measured | |",
            "|---|---|---|---|",
            *(f"| {' | '.join(row)} |" for row in self.goals()),
        ]
        for group in self.groups:
            text += ["", f"## {group['title']}", "", "| case | median ms [p10 p90] | ns/el | B/el | % of copy | x eager |",
                     "|---|---|---|---|---|---|"]  # fmt: skip
            for row in group["rows"]:
                cells = [row["name"], f"{row['ms']:.4g} [{row['p10']:.4g} {row['p90']:.4g}]"]
                for key, form in (
                    ("ns_per_element", ".3f"),
                    ("bytes_per_element", "d"),
                    ("percent_of_copy", ".0f"),
                    ("times_eager", ".2f"),
                ):
                    cells.append(format(row[key], form) if key in row else "")
                text.append(f"| {' | '.join(cells)} |")
        if self.memory:
            text += ["", "## memory, each in a fresh process (MB, VmHWM)", "", "| case | peak of a forward | extra of a step | scratch_bytes |",
                     "|---|---|---|---|"]  # fmt: skip
            text += [
                f"| {name} | {forward:.0f} | {extra:.1f} | {scratch:.1f} |" for name, forward, extra, scratch in self.memory
            ]
        if self.notes:
            text += ["", "## Notes", "", *(f"- {note}" for note in self.notes)]
        others = {k: v for k, v in self.figures.items() if k not in {g.key for g in GOALS}}
        if others:
            text += [
                "",
                "## Other figures",
                "",
                "| figure | value |",
                "|---|---|",
                *(f"| {k} | {v:.2f} |" for k, v in others.items()),
            ]
        return "\n".join(text) + "\n"

    # Files --------------------------------------------------------------------------------------------------------------

    def folder(self) -> Path:
        if self.quick:
            return ROOT / "build" / "bench-quick"  # too few rounds for the record
        m = self.machine
        return (
            ROOT
            / "benchmarks"
            / "results"
            / re.sub(r"[^a-z0-9]+", "-", f"{m['cpu']} {m['threads']} threads {m['isa']}".lower()).strip("-")
        )

    def measured(self) -> dict[str, Any]:
        """All that was measured, as JSON holds it."""
        return {
            "groups": self.groups,
            "memory_mb": self.memory,
            "figures": self.figures,
            "steps": self.steps,
            "notes": self.notes,
        }

    def write_part(self, file: str) -> None:
        """For the process that shares its report out; merge() is the other end."""
        Path(file).write_text(json.dumps(self.measured()))

    def merge(self, part: dict[str, Any]) -> None:
        self.groups += part["groups"]
        self.memory += [tuple(row) for row in part["memory_mb"]]
        self.figures |= part["figures"]
        self.steps += part["steps"]
        self.notes += part["notes"]

    def write(self) -> Path:
        folder = self.folder()
        folder.mkdir(parents=True, exist_ok=True)
        content = {"machine": self.machine, **self.measured()}
        (folder / "bench.json").write_text(json.dumps(content, indent=1) + "\n")
        (folder / "README.md").write_text(self.markdown())
        try:
            from .plot import plot, plot_steps
        except ImportError as error:
            self.notes.append(f"no plot: {error}")
        else:
            plot(self, folder / "bench.png")
            plot_steps(self, folder / "steps.png")
        return folder
