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
    "peak_extra_bytes": "resident memory: peak of zokern steps less peak of a forward of that batch; or null",
    "eager_peak_extra_bytes": "the same for eager MeZO steps",
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

    def memory(size: float | None) -> str:
        return "unknown here" if size is None else f"{size / 2**20:.0f} MB"

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
        "memory": f"over weights and one forward {memory(report['peak_extra_bytes'])}; "
        f"eager {memory(report['eager_peak_extra_bytes'])}",
    }
    return "\n".join(f"{name:10} {line}" for name, line in lines.items())


def plot(report: dict[str, Any], path: Path) -> None:
    """Loss curve; accuracy before and after with intervals;
    time of a step, ours and eager, in forwards and the rest."""
    import matplotlib

    matplotlib.use("Agg")  # writes a file: no display is needed
    from matplotlib import pyplot

    figure, (left, middle, right) = pyplot.subplots(
        1, 3, figsize=(13, 4), width_ratios=(2, 1.2, 1.2), layout="constrained"
    )
    figure.suptitle(
        f"zokern demo: SmolLM2-135M on film-review sentences, {report['method']}, all weights, forward "
        "passes only"
    )
    losses = report["training_losses"]
    means = [statistics.fmean(losses[max(n - RECENT, 0) : n]) for n in range(1, len(losses) + 1)]
    left.plot(range(1, len(losses) + 1), losses, color="0.75", linewidth=0.8, label="batch")
    left.plot(range(1, len(losses) + 1), means, color="C0", label=f"mean of the last {RECENT}")
    left.set(xlabel="step", ylabel="training loss (nats)", title=f"loss, seed {report['seed']}")
    left.legend()

    second = report["second_seed"]
    names = ["before", f"after\nseed {report['seed']}", f"after\nseed {second['seed']}"]
    values = [report["accuracy_before"], report["accuracy_after"], second["accuracy"]]
    intervals = [report["accuracy_before_interval"], report["accuracy_after_interval"], second["interval"]]
    below = [100 * (value - low) for value, (low, _) in zip(values, intervals)]
    above = [100 * (high - value) for value, (_, high) in zip(values, intervals)]
    middle.bar(names, [100 * v for v in values], yerr=[below, above], capsize=5, color=["0.6", "C0", "C0"])
    for x, (value, (_, high)) in enumerate(zip(values, intervals)):
        middle.text(x, 100 * high + 1, f"{value:.1%}", ha="center")
    middle.axhline(50, color="0.3", linestyle=":", linewidth=1)
    middle.set(
        ylabel="accuracy (%), 95 % interval",
        ylim=(0, 100),
        title=f"{report['rows']['held_out']} held-out rows",
    )

    bare = [n * report["forward_seconds"] for n in (report["forwards"], 2)]
    steps = [report["step_seconds"], report["eager_step_seconds"]]
    names = [f"zokern.{report['method']}\n{report['forwards']} forwards", "eager MeZO\n2 forwards"]
    # a step may take less than its forwards alone: the bars are the step, and a line marks the bare forwards
    within = [min(pair) for pair in zip(steps, bare)]
    right.bar(names, within, color="0.6", label="forwards")
    right.bar(names, [s - w for s, w in zip(steps, within)], bottom=within, color="C1", label="the rest")
    ends = [-0.4, 0.6], [0.4, 1.4]
    right.hlines(bare, *ends, color="0.2", linestyle=":", linewidth=1.5, label="the forwards alone")
    for x, seconds in enumerate(steps):
        right.text(x, max(seconds, bare[x]), f"{seconds:.2f} s", ha="center", va="bottom")
    right.set(
        ylabel="time per step (s)",
        ylim=(0, 1.15 * max(*steps, *bare)),
        title=f"{report['versions']['threads']} threads",
    )
    right.legend(loc="upper left", fontsize=8)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
