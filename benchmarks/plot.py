"""One picture: how much faster than eager, what K draws in one pass cost, and where a step's time goes."""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt


def plot(report, path: Path) -> None:
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(16, 5), width_ratios=(2, 1, 1.3))
    rows = [row for group in report.groups for row in group["rows"] if "times_eager" in row]
    left.barh([row["name"] for row in rows], [row["times_eager"] for row in rows], color="#4c78a8")
    left.axvline(1, color="black", linewidth=0.8)
    left.set_xscale("log")
    left.invert_yaxis()
    left.set_xlabel("times as fast as eager PyTorch")
    left.tick_params(axis="y", labelsize=7)

    for key, style in (("in one pass", "-o"), ("passes", "--s")):
        for dtype, color in (("fp32", "#4c78a8"), ("bf16", "#f58518")):
            names = {row["name"]: row for group in report.groups for row in group["rows"]}
            points = [(k, names.get(f"K={k} {dtype} {key}")) for k in range(1, 9)]
            found = [(k, row["ns_per_element"]) for k, row in points if row]
            if found:
                middle.plot(
                    *zip(*found), style, color=color, label=f"{dtype}, {'one pass' if key == 'in one pass' else 'K passes'}"
                )
    middle.set_xlabel("K draws")
    middle.set_ylabel("ns per element")
    middle.set_ylim(bottom=0)
    if middle.get_legend_handles_labels()[0]:
        middle.legend(fontsize=8)

    steps = [group for group in report.groups if group["title"].startswith("step")]
    for i, group in enumerate(steps):
        ms = {row["name"].split(":")[0]: row["ms"] for row in group["rows"]}
        for j, name in enumerate(("zokern.step", "eager step")):
            forwards = ms["two forwards"] / ms["eager step"]
            whole = ms[name] / ms["eager step"]
            right.barh(3 * i + j, forwards, color="#72b7b2", label="two forwards" if i == j == 0 else None)
            right.barh(
                3 * i + j, max(0, whole - forwards), left=forwards, color="#e45756", label="the rest" if i == j == 0 else None
            )
            right.text(whole, 3 * i + j, f" {ms[name]:.0f} ms", va="center", fontsize=7)
    right.set_yticks([3 * i + j for i in range(len(steps)) for j in range(2)],
                     [f"{name} {g['title'].removeprefix('step, ')}" for g in steps for name in ("zokern", "eager")], fontsize=7)  # fmt: skip
    right.invert_yaxis()
    right.set_xlim(0, 1.2)
    right.set_xlabel("time of a MeZO step / eager step")
    if steps:
        right.legend(fontsize=8)
    figure.suptitle(report.where(), fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def plot_steps(report, path: Path) -> None:
    """A step over its two forwards against the tokens of its batch, where inplace, master, scratch, paired and the factored methods cross; shapes of
    which one batch was measured stand side by side."""
    shapes: dict[str, list[dict]] = {}
    for step in sorted(report.steps, key=lambda step: step["tokens"]):
        shapes.setdefault(f"{step['model']} {step['dtype']}", []).append(step)
    if not shapes:
        return
    lines = {title: points for title, points in shapes.items() if len(points) > 1}
    alone = {f"{title}\n{points[0]['tokens']} tokens": points[0] for title, points in shapes.items() if len(points) == 1}
    names = list(
        dict.fromkeys(n for step in report.steps for n in step["ratios"] if not n.startswith("eager") and "refresh" not in n)
    )
    panels = len(lines) + bool(alone)
    figure, axes = plt.subplots(1, panels, figsize=(7 * panels, 5), squeeze=False, sharey=True)
    for axis, (title, points) in zip(axes[0], lines.items()):
        for k, name in enumerate(names):
            some = [p for p in points if name in p["ratios"]]
            style = "-o" if name.startswith("MeZO") else "--s"
            axis.plot(
                [p["tokens"] for p in some], [p["ratios"][name] for p in some], style, color=f"C{k}", label=name, markersize=4
            )
        axis.set_xscale("log", base=2)
        axis.xaxis.set_major_formatter("{x:.0f}")
        axis.set_xlabel("tokens of a batch")
        axis.set_title(title)
    if alone:
        axis = axes[0][-1]
        for k, name in enumerate(names):
            some = [(i, step["ratios"][name]) for i, step in enumerate(alone.values()) if name in step["ratios"]]
            mark = "o" if name.startswith("MeZO") else "s"
            axis.plot([i + 0.07 * (k - len(names) / 2) for i, _ in some], [y for _, y in some], mark, color=f"C{k}", label=name)
        axis.set_xticks(range(len(alone)), list(alone))
        axis.set_xlim(-0.5, len(alone) - 0.5)
        axis.set_title("one batch each")
    for axis in axes[0]:
        axis.axhline(1, color="black", linewidth=0.8)
        axis.set_yscale("log", base=2)
        axis.yaxis.set_major_formatter("{x:g}")
        axis.grid(axis="y", alpha=0.3)
    axes[0][0].set_ylabel("time of a step / two bare forwards")
    axes[0][0].legend(fontsize=7)
    figure.suptitle(report.where(), fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)
