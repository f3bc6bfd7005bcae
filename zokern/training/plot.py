"""Draws a log: the loss of every step and, of held-out rows, loss and accuracy."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .loading import needed
from .run import RECENT


def plot(lines: Sequence[dict[str, Any]], path: Path, title: str) -> None:
    """Writes the picture of a log (run.py) into a file. Raises ModuleNotFoundError without matplotlib."""
    matplotlib = needed("matplotlib")
    matplotlib.use("Agg")  # writes a file: no display is needed
    from matplotlib import pyplot

    steps = [(line["step"], line["loss"]) for line in lines if "loss" in line]
    judged = [(line["step"], line["held_out"]) for line in lines if "held_out" in line]
    right = [(step, 100 * one["accuracy"]) for step, one in judged if one["accuracy"] is not None]
    figure, axes = pyplot.subplots(
        1, 1 + bool(right), figsize=(9 if right else 5.5, 3.5), layout="constrained", squeeze=False
    )
    figure.suptitle(title)
    first = axes[0][0]
    losses = [loss for _, loss in steps]
    means = [
        sum(part) / len(part) for n in range(len(losses)) if (part := losses[max(0, n + 1 - RECENT) : n + 1])
    ]
    first.plot(*zip(*steps), color="0.75", linewidth=0.8, label="batch")
    first.plot([step for step, _ in steps], means, color="C0", label=f"mean of the last {RECENT}")
    if judged:
        first.plot(*zip(*((step, one["loss"]) for step, one in judged)), "o-", color="C1", label="held out")
    first.set(xlabel="step", ylabel="loss (nats)", title="loss")
    first.legend()
    if right:
        axes[0][1].plot(*zip(*right), "o-", color="C1")
        axes[0][1].set(
            xlabel="step", ylabel="accuracy (%)", ylim=(0, 100),
            title=f"accuracy on {judged[0][1]['rows']} held-out rows",
        )  # fmt: skip
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
