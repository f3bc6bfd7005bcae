"""Two pictures of a record: the verbs against a copy, and steps over their forwards. Without matplotlib there
are none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .record import Record


def plots(record: Record, folder: Path) -> list[str]:
    """Draws what there is something to draw of; names of the files."""
    try:
        import matplotlib
    except ImportError:
        return []
    matplotlib.use("Agg")
    made = []
    for name, draw in (("verbs.png", verbs), ("steps.png", steps)):
        if draw(record, folder / name):
            made.append(name)
    return made


def finish(figure: Any, record: Record, path: Path) -> bool:
    import matplotlib.pyplot as plt

    d = record.device
    figure.suptitle(
        f"{d.get('name', 'no device')}, {d.get('date', '')}, commit {d.get('commit', '')}", fontsize=9
    )
    figure.tight_layout()
    figure.savefig(path, dpi=100)
    plt.close(figure)
    return True


def verbs(record: Record, path: Path) -> bool:
    """A bar for each case that has a share of the copy, by group; the copy is the line at 100 %."""
    import matplotlib.pyplot as plt

    rows = [
        (row["name"], row["percent_of_copy"])
        for group in record.groups
        for row in group["rows"]
        if "percent_of_copy" in row
    ]
    if not rows:
        return False
    figure, axis = plt.subplots(figsize=(11, 1.5 + 0.19 * len(rows)))
    ours = [
        any(name.endswith(f" {b}") or f" {b} " in name for b in ("cuda", "triton", "cpu")) for name, _ in rows
    ]
    places = range(len(rows))  # by place: names may come twice
    axis.barh(places, [share for _, share in rows], color=["#4c78a8" if mine else "#bab0ac" for mine in ours])
    axis.set_yticks(places, [name for name, _ in rows])
    axis.axvline(100, color="black", linewidth=0.8)
    axis.set_xlim(0, 125)
    axis.invert_yaxis()
    axis.tick_params(axis="y", labelsize=6)
    axis.set_xlabel("share of the bandwidth of a copy, %")
    return finish(figure, record, path)


def steps(record: Record, path: Path) -> bool:
    """A step over its two forwards against the tokens of its batch."""
    import matplotlib.pyplot as plt

    models = list(dict.fromkeys(step["model"] for step in record.steps))
    if not models:
        return False
    figure, axes = plt.subplots(1, len(models), figsize=(5.5 * len(models), 4.5), squeeze=False)
    for axis, model in zip(axes[0], models):
        points = sorted(
            (step for step in record.steps if step["model"] == model), key=lambda step: step["tokens"]
        )
        for name in dict.fromkeys(n for point in points for n in point["ratios"]):
            seen = [(point["tokens"], point["ratios"][name]) for point in points if name in point["ratios"]]
            axis.plot(*zip(*seen), "--s" if name.startswith("eager") else "-o", label=name, markersize=4)
        axis.axhline(1, color="black", linewidth=0.8)
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        axis.set_xlabel("tokens of a batch")
        axis.set_ylabel("time of a step / two bare forwards")
        axis.set_title(model)
        axis.legend(fontsize=7)
    return finish(figure, record, path)
