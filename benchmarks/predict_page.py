"""The page of `python -m benchmarks.predict`, and its figures by the keys under which `make gpu` measures
them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from .predict import DRAWS, PRODUCTS, Case, Device, ProductCase, Work
from .predict_step import METHODS, Host, Row, launches
from .predicted import FIGURES, PAGE, RESULTS
from .report import processor

HEAD = """# Predicted, not measured

**No time on this page was measured on a GPU.** `python -m benchmarks.predict` writes it:
`benchmarks/predict.py` has the model of a kernel, `benchmarks/predict_step.py` that of a step, with all that
it assumes. `make gpu` measures the same figures and puts the two beside each other.

Device: {device}. Weights in bfloat16. A step is MeZO with one query. Its time is over the two forwards that
it holds, which are eager in the first columns and one CUDA graph in the last two. Host times were measured on
a CPU ({cpu}, torch {torch}, one thread), with models of as many layers and a width of 64. Those of a
GPU's machine differ. The eager loop is that of Malladi et al. 2023.
"""
COLUMNS = (
    ("master", "eager"),
    ("paired", "eager"),
    ("loop", "eager"),
    ("master", "graph"),
    ("paired", "graph"),
)


def verbs(works: Mapping[str, Work], device: Device) -> dict[str, float]:
    """Returns predictions of single verbs, by the keys of benchmarks/gpu/goals.py."""

    def seconds(case: Case | ProductCase) -> tuple[float, float]:
        floor = case.traffic / device.bandwidth
        return max(works[case.name].milliseconds(device)[0], floor), floor

    def share(case: Case | ProductCase) -> float:
        time, floor = seconds(case)
        return 100 * floor / time

    from .predict import CASES

    by_name = {case.name: case for case in CASES}
    one, many = by_name["axpy_ normal, 16 bits"], by_name[f"axpy_ normal K={DRAWS}, 16 bits"]
    return {
        "axpy_ cuda / copy": share(one),
        "perturb pair cuda / copy": share(by_name["perturb both signs normal, 16 bits"]),
        f"K={DRAWS} cuda, passes / one": DRAWS * seconds(one)[0] / seconds(many)[0],
        "lowrank_ cuda, least / copy": min(share(case) for case in PRODUCTS if case.kind == 1),
    }


def row_figures(row: Row) -> dict[str, float]:
    """Returns what is predicted for one model and batch, by the keys of benchmarks/gpu/steps.py."""
    found = {
        f"two forwards {row.label}, ms": row.forwards["eager"],
        f"two forwards, graph {row.label}, ms": row.forwards["graph"],
    }
    for method in METHODS:
        found[f"MeZO {method} {row.label} / forwards"] = row.ratio(method, "eager")
        found[f"MeZO {method}, graph {row.label} / graph of forwards"] = row.ratio(method, "graph")
    return found | {f"eager MeZO {row.label} / forwards": row.ratio("loop", "eager")}


def figures(rows: Sequence[Row], works: Mapping[str, Work], device: Device) -> dict[str, float]:
    """Returns what is predicted, by the keys that `make gpu` measures."""
    return verbs(works, device) | {key: value for row in rows for key, value in row_figures(row).items()}


def table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *lines)]


def page(rows: Sequence[Row], parts: Mapping[str, Mapping[str, Any]], device: Device) -> str:
    """Returns the page."""
    text = [HEAD.format(device=device.name, cpu=processor()[0], torch=torch.__version__)]
    head = ["model", "batch x length", "two forwards, ms", "of it device", "`master`", "`paired`",
            "the eager loop", "`master`, graph", "`paired`, graph"]  # fmt: skip
    lines = [
        [
            row.model, f"{row.batch} x {row.length}",
            *(f"{row.forwards[name]:.1f}" for name in ("eager", "device")),
            *(f"{row.ratio(*column):.2f}" for column in COLUMNS),
        ]
        for row in rows
    ]  # fmt: skip
    text += [*table(head, lines), "", "## Launches of a step, beside its forwards", ""]
    text += table(
        ["layers and parameters of", *(f"`{method}`" for method in METHODS)],
        [[name, *(launches(part["launched"][method]) for method in METHODS)] for name, part in parts.items()],
    )
    text += ["", "## Host time of this CPU, ms", ""]
    hosts: dict[str, Host] = {name: part["host"] for name, part in parts.items()}
    text += table(
        ["layers of", "two forwards", *(f"`{method}`" for method in METHODS), "the eager loop"],
        [
            [name, *(f"{1e3 * seconds:.1f}" for seconds in (host.forwards, *host.steps.values()))]
            for name, host in hosts.items()
        ],
    )
    return "\n".join(text) + "\n"


def write(rows: Sequence[Row], parts: Mapping[str, Any], works: Mapping[str, Work], device: Device,
          folder: Path = RESULTS) -> None:  # fmt: skip
    """Writes the page and its figures."""
    (folder / PAGE).write_text(page(rows, parts, device))
    found = {"device": device.name, "figures": figures(rows, works, device)}
    (folder / FIGURES).write_text(json.dumps(found, indent=1) + "\n")


__all__ = ["figures", "page", "write"]
