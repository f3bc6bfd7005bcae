"""The record of a run: what all parts said, as data; written anew after every part, so that a run that is cut
off leaves its pages."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

from .. import predicted
from . import ROOT
from .goals import GOALS
from .pool import Outcome

LISTS = {
    "check": "checks",
    "skip": "skips",
    "group": "groups",
    "step": "steps",
    "trace": "traces",
    "memory": "memory",
    "counters": "counters",
}


class Record:
    def __init__(self, quick: bool = False) -> None:
        self.quick = quick
        self.device: dict[str, str] = {}
        self.parts: list[dict[str, Any]] = []
        self.figures: dict[str, float] = {}
        self.checks: list[dict[str, Any]] = []
        self.skips: list[dict[str, Any]] = []
        self.groups: list[dict[str, Any]] = []
        self.steps: list[dict[str, Any]] = []
        self.traces: list[dict[str, Any]] = []
        self.memory: list[dict[str, Any]] = []
        self.counters: list[dict[str, Any]] = []

    def add(self, stage: str, outcome: Outcome) -> None:
        part = outcome.part
        self.parts.append(
            {
                "stage": stage,
                "name": part.name,
                "what": part.what,
                "how": outcome.how,
                "why": outcome.why,
                "seconds": outcome.seconds,
            }
        )
        for kind, fields in outcome.lines:
            if kind == "device":
                self.device |= fields
            elif kind == "figure":
                self.figures[fields["key"]] = fields["value"]
            else:
                getattr(self, LISTS[kind]).append({"stage": stage, "part": part.name, **fields})

    def failures(self) -> list[str]:
        """Checks that failed, parts that crashed, and parts of the correctness stage that were not through:
        nothing was shown there."""
        wrong = [f"{check['name']}: {check['problem']}" for check in self.checks if check["problem"]]
        for part in self.parts:
            if part["how"] == "failed" or (part["stage"] == "correctness" and part["how"] != "done"):
                wrong.append(f"{part['name']}: {part['how']}: {part['why']}")
        return wrong

    def goals(self) -> list[tuple[str, str, str, str]]:
        """What, bound, measured, verdict."""
        rows = []
        for goal in GOALS:
            value = self.figures.get(goal.key)
            verdict = "not measured" if value is None else "reached" if goal.reached(value) else "not reached"
            shown = "-" if value is None else f"{value:.2f} {goal.unit}"
            rows.append(
                (goal.what, f"{'>=' if goal.at_least else '<='} {goal.bound:g} {goal.unit}", shown, verdict)
            )
        return rows

    def predictions(self) -> list[tuple[str, str, str, str]]:
        """What, predicted, measured, the second over the first: every figure that was predicted."""
        rows = []
        for key, bound in predicted.read().items():
            value = self.figures.get(key)
            found = ("-", "not measured") if value is None else (f"{value:.2f}", f"{value / bound:.2f}")
            rows.append((key, f"{bound:.2f}", *found))
        return rows

    def folder(self, whole: bool = True) -> Path:
        """Where it is kept when nobody says where: a quick run, or one of some stages alone, is not for the
        repository."""
        if self.quick or not whole:
            return ROOT / "build" / "gpu"
        name = re.sub(r"[^a-z0-9]+", "-", self.device.get("name", "unknown").lower()).strip("-")
        return ROOT / "benchmarks" / "results" / name

    def write(self, folder: Path) -> None:
        """gpu.json, README.md and the plots; each file is replaced whole."""
        from .page import page
        from .plots import plots

        folder.mkdir(parents=True, exist_ok=True)
        pictures = plots(self, folder)
        for name, text in (
            ("gpu.json", json.dumps(vars(self), indent=1) + "\n"),
            ("README.md", page(self, pictures)),
        ):
            new = folder / f"{name}.new"
            new.write_text(text)
            os.replace(new, folder / name)
