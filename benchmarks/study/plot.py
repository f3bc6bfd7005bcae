"""The plot of a study: above, the held-out loss over forwards of the main methods; below, its fall by all
methods at equal forwards and time."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot

from .order import MAIN
from .reading import Group, read_at

POINTS = 20  # along a curve


def curves(axis, group: Group) -> None:
    """Draws the mean over seeds of each main method, linear between checks."""
    start = next(iter(group.runs.values()))[0]["points"][0]
    axis.axhline(start["loss"], color="0.7", linewidth=0.8, linestyle=":")
    for number, name in enumerate(MAIN):
        if name in group.runs:
            end = min(row["points"][-1]["forwards"] for row in group.runs[name])
            at = [end * k / POINTS for k in range(POINTS + 1)]
            loss = [
                statistics.fmean(read_at(row, "forwards", x)["loss"] for row in group.runs[name]) for x in at
            ]
            axis.plot(
                at,
                loss,
                color=f"C{number}",
                label=f"{name} ({len(group.runs[name])})",
                linewidth=2 if number == 0 else 1.2,
            )
    axis.set(title=group.name, xlabel="forwards", ylabel="held-out loss")
    axis.legend(fontsize=7, title="mean of (seeds)", title_fontsize=7)


def bars(axis, group: Group) -> None:
    """Draws the fall of the loss by every method with its interval, the largest one on top."""
    names = sorted(group.forwards, key=lambda name: group.forwards[name].value)
    for shift, color, label, found in (
        (0.2, "C0", "equal forwards", group.forwards),
        (-0.2, "C1", "equal time", group.time),
    ):
        here = [(y, found[name]) for y, name in enumerate(names) if name in found]
        if not here:
            continue
        values = [100 * mean.value for _, mean in here]
        sides = [100 * (m.high - m.value) if math.isfinite(m.high) else 0.0 for _, m in here]
        look = {"height": 0.4, "color": color, "label": label, "error_kw": {"linewidth": 0.8}}
        axis.barh([y + shift for y, _ in here], values, xerr=sides, **look)
    axis.set_yticks(range(len(names)), names, fontsize=8)
    axis.set(xlabel="fall of the held-out loss (%), 95 % interval")
    axis.axvline(0.0, color="0.5", linewidth=0.8)
    axis.legend(fontsize=7, loc="lower right")


def plot(groups: Sequence[Group], title: str, path: Path) -> bool:
    """Writes the plot; without a group there is none. Returns whether it was written."""
    if not groups:
        return False
    most = max(len(group.forwards) for group in groups)
    size = (4.6 * len(groups), 4.2 + max(2.0, 0.28 * most))
    ratios = (4.2, max(2.0, 0.28 * most))
    figure, axes = pyplot.subplots(
        2, len(groups), figsize=size, height_ratios=ratios, squeeze=False, layout="constrained"
    )
    figure.suptitle(title, fontsize=9)
    for number, group in enumerate(groups):
        curves(axes[0][number], group)
        bars(axes[1][number], group)
    figure.savefig(path, dpi=100)
    pyplot.close(figure)
    return True
