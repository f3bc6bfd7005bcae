"""Draws the plots of a page: bench.png has kernels, steps, memory and draws;
steps.png has steps by tokens."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

BLUE, ORANGE, GREY, GREEN = "#4c78a8", "#f58518", "#9d9d9d", "#54a24b"
COLORS = ["#1b7837", *plt.get_cmap("tab10").colors]
PLAIN = {"facecolor": "white", "edgecolor": "none", "pad": 0.5}  # behind a value, over the line at 1
BARS = 12  # at most, in a panel
KERNELS = {  # the label of two bars, and the row of each dtype
    "axpy_, normal,\none large tensor": r"axpy_ normal K=1 {} n=\d+",
    "axpy_, signs,\none large tensor": r"axpy_ rademacher K=1 {} n=\d+",
    "axpy_, normal,\n500 small tensors": r"axpy_ normal K=1 {} \d+ x \d+",
    "lowrank_, rank 8,\n3072 x 768": r"lowrank_ r=8 {} 3072x768",
    "update_, momentum": r"update_ momentum normal {} n=\d+",
    "update_, Adam": r"update_ adam normal {} n=\d+",
}
PEAKS = {  # by the end of a row's name
    "bare forward": GREY,
    "MeZO": BLUE,
    "MeZO first steps": "#9ecae9",
    "eager MeZO": ORANGE,
    "backward + AdamW": GREEN,
}


def bars(axis, title: str, unit: str, rows: list[tuple[str, float, str]], form: str) -> None:
    """Draws a bar for each label, value and colour. Equal labels that follow each other are one group."""
    place, places, ticks = 0.0, [], {}
    for i, (label, _, _) in enumerate(rows):
        place += 1.0 if i and rows[i - 1][0] == label else 1.6
        places.append(place)
        ticks.setdefault(label, []).append(place)
    axis.barh(places, [value for _, value, _ in rows], height=0.9, color=[color for *_, color in rows])
    for y, (_, value, _) in zip(places, rows):
        axis.text(value, y, f" {value:{form}}", va="center", fontsize=10, bbox=PLAIN)
    axis.set_yticks([sum(at) / len(at) for at in ticks.values()], list(ticks), fontsize=10)
    axis.invert_yaxis()
    axis.margins(x=0.18)
    frame(axis, title, unit)


def frame(axis, title: str, unit: str) -> None:
    axis.set_title(title, loc="left", fontweight="bold", pad=26)
    axis.set_xlabel(unit)
    axis.spines[["top", "right"]].set_visible(False)


def logarithmic(axis) -> None:
    axis.set_xscale("log")
    axis.xaxis.set_major_formatter("{x:g}")
    axis.xaxis.set_minor_formatter("")
    axis.axvline(1, color="black", linewidth=0.8)


def legend(axis, colors: dict[str, str]) -> None:
    """Names the colours between the title and the panel, which no bar reaches."""
    patches = [plt.Rectangle((0, 0), 1, 1, color=color) for color in colors.values()]
    look = {"loc": "lower left", "bbox_to_anchor": (0.0, 1.0), "ncols": len(colors), "frameon": False}
    made = axis.legend(
        patches, list(colors), fontsize=9, handlelength=1, columnspacing=0.8, borderpad=0, **look
    )
    made.set_in_layout(False)


def kernels(axis, groups: list[dict[str, Any]]) -> None:
    speed = {
        row["name"]: row["times_eager"] for group in groups for row in group["rows"] if "times_eager" in row
    }
    rows = []
    for label, pattern in KERNELS.items():
        for dtype, color in (("fp32", BLUE), ("bf16", ORANGE)):
            found = [name for name in speed if re.fullmatch(pattern.format(dtype), name)]
            rows += [(label, speed[name], color) for name in found[:1]]
    bars(axis, "Kernels", "times as fast as eager PyTorch (log)", rows, ".3g")
    logarithmic(axis)
    legend(axis, {"fp32": BLUE, "bf16": ORANGE})


def ratios(groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns each shape once, with time over two forwards by the name of the step."""
    shapes: dict[str, dict[str, Any]] = {}
    for group in groups:
        if (
            (shape := group.get("shape"))
            and "generated" not in shape["name"]
            and "narrow" not in shape["model"]
        ):
            found = {row["name"]: row["over_forwards"] for row in group["rows"] if "over_forwards" in row}
            shapes.setdefault(shape["name"], shape | {"ratios": {}})["ratios"].update(found)
    return sorted(
        shapes.values(), key=lambda shape: (shape["model"], shape["dtype"] != "fp32", shape["tokens"])
    )


def steps(axis, groups: list[dict[str, Any]]) -> None:
    kinds = {"MeZO": BLUE, "eager MeZO": ORANGE}
    shapes = [shape for shape in ratios(groups) if kinds.keys() <= shape["ratios"].keys()][
        : BARS // len(kinds)
    ]
    rows = [
        (shape["name"].replace(" ", "\n", 1), shape["ratios"][kind], color)
        for shape in shapes
        for kind, color in kinds.items()
    ]
    bars(axis, "A step", "time over its two bare forwards (log)", rows, ".2f")
    logarithmic(axis)
    legend(axis, {"zokern.MeZO": BLUE, "eager loop": ORANGE})


def memory(axis, groups: list[dict[str, Any]]) -> None:
    rows, seen = [], {}
    for group in groups:
        for row in group["rows"] if group["title"].startswith("peak memory") else ():
            shape, kind = row["name"].split(", ", 1)
            if kind in PEAKS:
                rows.append((shape.replace(" ", "\n", 1), row["peak_mb"] / 1024, PEAKS[kind]))
                seen[kind] = PEAKS[kind]
    bars(axis, "Peak memory of a process", "GB, libraries and weights included", rows[:BARS], ".2f")
    if seen:
        legend(axis, seen)


def draws(axis, groups: list[dict[str, Any]]) -> None:
    names = {row["name"]: row for group in groups for row in group["rows"]}
    for key, style, said in (("in one pass", "-o", "one pass"), ("passes", "--s", "K passes")):
        for dtype, color in (("fp32", BLUE), ("bf16", ORANGE)):
            found = [
                (k, row["ns_per_element"]) for k in range(1, 9) if (row := names.get(f"K={k} {dtype} {key}"))
            ]
            if found:
                axis.plot(*zip(*found), style, color=color, label=f"{dtype}, {said}")
    frame(axis, "axpy_ with K draws", "K")
    axis.set_ylabel("ns per element")
    axis.set_ylim(bottom=0)
    if axis.get_legend_handles_labels()[0]:
        axis.legend(fontsize=10)


def plot(report, path: Path) -> None:
    """Draws a panel for each subject that was measured, two in a row. Without one there is no file."""
    figure = plt.figure(layout="constrained")
    panels = [kernels, steps, memory, draws]
    for panel in list(panels):
        axis = figure.add_subplot()
        panel(axis, report.groups)
        if not axis.patches and not axis.get_legend_handles_labels()[0]:
            panels.remove(panel)  # its benchmarks did not run
        axis.remove()
    if not panels:
        plt.close(figure)
        return
    columns, rows = min(2, len(panels)), (len(panels) + 1) // 2
    figure.set_size_inches(7.5 * columns, 5.5 * rows)
    for place, panel in enumerate(panels, start=1):
        panel(figure.add_subplot(rows, columns, place), report.groups)
    save(figure, report, path)


def save(figure, report, path: Path) -> None:
    figure.suptitle(report.where(), fontsize=9)
    figure.savefig(path, dpi=90)
    plt.close(figure)


def plot_steps(report, path: Path) -> None:
    """Draws steps over two forwards against the tokens of a batch.
    Shapes with one batch stand side by side."""
    models: dict[str, list[dict[str, Any]]] = {}
    for shape in ratios(report.groups):
        models.setdefault(f"{shape['model']} {shape['dtype']}", []).append(shape)
    lines = {title: shapes for title, shapes in models.items() if len(shapes) > 1}
    single = [shapes[0] for shapes in models.values() if len(shapes) == 1]
    if not models:
        return
    # The tables have the rest: new bases, options, and the loops of the other methods.
    names = list(
        dict.fromkeys(name for shapes in models.values() for shape in shapes for name in shape["ratios"])
    )
    names = [n for n in names if not re.search(r"basis|=|MeZO paired|^eager (?!MeZO)", n)]
    names.sort(key=lambda name: (not name.startswith("eager"), "MeZO" not in name))
    looks = {
        name: {"color": COLORS[k % len(COLORS)], "marker": "o" if "MeZO" in name else "s"}
        for k, name in enumerate(names, start=1)
    }
    looks |= {"eager MeZO": {"color": "black", "marker": "D"}}
    panels = len(lines) + bool(single)
    figure, axes = plt.subplots(
        1, panels, figsize=(6 * panels + 2, 6), squeeze=False, sharey=True, layout="constrained"
    )
    for axis, (title, shapes) in zip(axes[0], lines.items()):
        for name in names:
            points = [(shape["tokens"], shape["ratios"][name]) for shape in shapes if name in shape["ratios"]]
            style = "-" if "MeZO" in name else "--"
            axis.plot([x for x, _ in points], [y for _, y in points], style, label=name, **looks[name])
        axis.set_xscale("log", base=2)
        axis.xaxis.set_major_formatter("{x:.0f}")
        axis.set_xlabel("tokens of a batch")
        axis.set_title(title)
    if single:
        axis = axes[0][-1]
        for k, name in enumerate(names):
            points = [(i, shape["ratios"][name]) for i, shape in enumerate(single) if name in shape["ratios"]]
            places = [i + 0.6 * ((k + 0.5) / len(names) - 0.5) for i, _ in points]
            axis.plot(places, [y for _, y in points], linestyle="", label=name, **looks[name])
        axis.set_xticks(
            range(len(single)), [f"{s['model']} {s['dtype']}\n{s['tokens']} tokens" for s in single]
        )
        axis.set_xlim(-0.5, len(single) - 0.5)
        axis.set_title("one batch each")
    for axis in axes[0]:
        axis.axhline(1, color="black", linewidth=0.8)
        axis.set_yscale("log", base=2)
        axis.yaxis.set_major_formatter("{x:g}")
        axis.grid(axis="y", alpha=0.3)
    axes[0][0].set_ylabel("time of a step over two bare forwards (log)")
    axes[0][-1].legend(fontsize=10, loc="center left", bbox_to_anchor=(1.01, 0.5))
    save(figure, report, path)
