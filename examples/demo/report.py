"""What the demo says: the meaning of every number, a few lines of text, and a plot."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .training import RECENT

LEVEL = 0.001  # of the paired test, for each seed

FIELDS = {
    "method": "class of zokern that was trained with; options holds the lr and the eps that it had",
    "accuracy_before": "share of held-out rows whose right label word has the larger logit, before training",
    "accuracy_after": "the same after training with the first seed",
    "accuracy_before_interval": "Wilson 95 % interval of accuracy_before",
    "accuracy_after_interval": "Wilson 95 % interval of accuracy_after",
    "rise_interval": "95 % interval of accuracy_after - accuracy_before, same rows (Agresti and Min 2005)",
    "p_value": "exact McNemar test, one side: chance of so many rows put right if training did nothing",
    "auc_before": "share of (positive, negative) held-out pairs in the right order; blind to the threshold",
    "auc_after": "the same after training with the first seed",
    "loss_before": "mean cross-entropy over the label words on the held-out rows, nats, before training",
    "loss_after": "the same after training with the first seed",
    "forwards": "losses that a step of the method reads",
    "step_seconds": "one step of the method (its losses and the update), median of the rounds",
    "forward_seconds": "one forward of the same batch outside a step, median of the rounds",
    "rest_seconds": "step_seconds - forwards forward_seconds: perturbing, updating and bookkeeping",
    "eager_step_seconds": "one eager MeZO step on the same batch, median of the rounds",
    "adamw_step_seconds": "one step of back-propagation with AdamW; null: its memory was not free",
    "peak_extra_bytes": "resident memory: peak of zokern steps less peak of a forward of that batch; or null",
    "later_peak_extra_bytes": "the same after the first two steps, which are compared with 'master'",
    "eager_peak_extra_bytes": "the same for eager MeZO steps",
    "adamw_peak_extra_bytes": "the same for steps of back-propagation with AdamW",
    "scratch_bytes": "memory for perturbed copies that the zokern steps record",
    "training_step_seconds": "median over all training steps of the first seed, batches of different lengths",
    "training_seconds": "training with the first seed",
    "training_losses": "loss of every training step of the first seed (mean of its two sides)",
    "seed": "first seed: names every z and the order of the batches",
    "second_seed": "the check: seed, accuracy, loss, interval, p_value of a run from the same start",
    "significant": f"true when p_value < {LEVEL} for both seeds",
    "rows": "number of training and of held-out rows",
    "seconds": "everything, loading included",
    "options": "what was asked for",
    "versions": "of what ran; backend, threads and processor",
}


def share(value: float, interval: Sequence[float]) -> str:
    return f"{value:.1%} [{interval[0]:.1%}, {interval[1]:.1%}]"


def summary(report: dict[str, Any]) -> str:
    """The report as a few lines of text."""
    low, high = report["rise_interval"]
    second = report["second_seed"]
    before = report["accuracy_before"], report["accuracy_before_interval"]
    after = report["accuracy_after"], report["accuracy_after_interval"]
    check = second["accuracy"], second["interval"]
    rows, order = report["rows"]["held_out"], f"{report['auc_before']:.3f} -> {report['auc_after']:.3f}"
    forwards, ours, eager = report["forwards"], report["step_seconds"], report["eager_step_seconds"]
    bare, pair = forwards * report["forward_seconds"], 2 * report["forward_seconds"]

    def memory(name: str) -> str:
        size = report[f"{name}peak_extra_bytes"]
        return "unknown here" if size is None else f"{size / 2**20:.0f} MB"

    adamw = report["adamw_step_seconds"]

    lines = {
        "method": f"{report['method']}, lr {report['options']['lr']:g}, eps {report['options']['eps']:g}",
        "accuracy": f"{share(*before)} -> {share(*after)}",
        "": f"{rows} held-out rows; rise {low:.1%} to {high:.1%} (95 %), p = {report['p_value']:.1e}",
        "order": f"{order} of (positive, negative) pairs in the right order",
        "loss": f"{report['loss_before']:.3f} -> {report['loss_after']:.3f} nats",
        f"seed {second['seed']}": f"{share(*check)}, loss {second['loss']:.3f}, p = {second['p_value']:.1e}",
        "step": f"{ours:.3f} s: {forwards} forwards {bare:.3f}, the rest {ours - bare:.3f}; "
        f"{ours / bare:.2f} times its forwards",
        "eager": f"MeZO, {eager:.3f} s: the rest {eager - pair:.3f}; {eager / pair:.2f} times its 2 forwards",
        "adamw": "not measured: its memory is not free here"
        if adamw is None
        else f"back-propagation, {adamw:.3f} s: {adamw / pair:.2f} times 2 forwards",
        "memory": f"over weights and one forward {memory('later_')}, {memory('')} in the first two steps; "
        f"eager {memory('eager_')}; AdamW {memory('adamw_')}",
    }
    return "\n".join(f"{name:10} {line}" for name, line in lines.items())


def plot(report: dict[str, Any], path: Path) -> None:
    """Draws the loss; accuracy before and after, with intervals;
    time and memory of a step of zokern, of the eager loop, and of back-propagation with AdamW."""
    import matplotlib

    matplotlib.use("Agg")  # writes a file: no display is needed
    from matplotlib import pyplot

    figure, (loss, accuracy, time, memory) = pyplot.subplots(
        1, 4, figsize=(15, 4), width_ratios=(1.7, 1.1, 1.3, 1.3), layout="constrained"
    )
    figure.suptitle(
        f"zokern demo: SmolLM2-135M on film-review sentences, {report['method']}, all weights, forward "
        "passes only"
    )
    losses = report["training_losses"]
    means = [statistics.fmean(losses[max(n - RECENT, 0) : n]) for n in range(1, len(losses) + 1)]
    loss.plot(range(1, len(losses) + 1), losses, color="0.75", linewidth=0.8, label="batch")
    loss.plot(range(1, len(losses) + 1), means, color="C0", label=f"mean of the last {RECENT}")
    loss.set(xlabel="step", ylabel="training loss (nats)", title=f"loss, seed {report['seed']}")
    loss.legend()
    _accuracies(accuracy, report)
    _times(time, report)
    _memory(memory, report)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _accuracies(axes: Any, report: dict[str, Any]) -> None:
    second = report["second_seed"]
    names = ["before", f"after\nseed {report['seed']}", f"after\nseed {second['seed']}"]
    values = [report["accuracy_before"], report["accuracy_after"], second["accuracy"]]
    intervals = [report["accuracy_before_interval"], report["accuracy_after_interval"], second["interval"]]
    below = [100 * (value - low) for value, (low, _) in zip(values, intervals)]
    above = [100 * (high - value) for value, (_, high) in zip(values, intervals)]
    axes.bar(names, [100 * v for v in values], yerr=[below, above], capsize=5, color=["0.6", "C0", "C0"])
    for x, (value, (_, high)) in enumerate(zip(values, intervals)):
        axes.text(x, 100 * high + 1, f"{value:.1%}", ha="center")
    axes.axhline(50, color="0.3", linestyle=":", linewidth=1)
    axes.set(
        ylabel="accuracy (%), 95 % interval",
        ylim=(0, 100),
        title=f"{report['rows']['held_out']} held-out rows",
    )


def _names(report: dict[str, Any]) -> list[str]:
    return [f"zokern.{report['method']}", "eager MeZO", *(["AdamW"] if report["adamw_step_seconds"] else [])]


def _times(axes: Any, report: dict[str, Any]) -> None:
    """A step may take less than its forwards alone: the bars are steps, and lines mark the bare forwards."""
    names = _names(report)
    bare = [n * report["forward_seconds"] for n in (report["forwards"], 2)]
    steps = [report[f"{kind}step_seconds"] for kind in ("", "eager_", "adamw_")][: len(names)]
    axes.bar(names, steps, color=["C0", "C1", "0.6"][: len(names)])
    axes.hlines(bare, [-0.4, 0.6], [0.4, 1.4], color="0.2", linestyle=":", linewidth=1.5)
    for x, (seconds, marked) in enumerate(zip(steps, [*bare, 0.0])):
        axes.text(x, max(seconds, marked), f"{seconds:.2f} s", ha="center", va="bottom")
    axes.set(
        ylabel="seconds (dots: its forwards alone)",
        ylim=(0, 1.15 * max(*steps, *bare)),
        title=f"time of a step, {report['versions']['threads']} threads",
    )


def _memory(axes: Any, report: dict[str, Any]) -> None:
    """What is not known is drawn as nothing."""
    names = _names(report)
    kinds = ["later_", "eager_", "adamw_"][: len(names)]
    sizes = [(report[f"{kind}peak_extra_bytes"] or 0) / 1e6 for kind in kinds]
    first = (report["peak_extra_bytes"] or 0) / 1e6
    axes.bar(names, [first, 0, 0][: len(names)], color="none", edgecolor="C0", linestyle=":")
    axes.bar(names, sizes, color=["C0", "C1", "0.6"][: len(names)])
    for x, size in enumerate(sizes):
        axes.text(x, size, f"{size:.0f}", ha="center", va="bottom")
    axes.text(0, first, "first two steps", ha="center", va="bottom", fontsize=8)
    axes.set(
        ylabel="MB over weights and one forward",
        ylim=(0, 1.15 * max(*sizes, first, 1)),
        title="peak memory of a step",
    )
