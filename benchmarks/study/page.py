"""The page of a study, made of its rows alone."""

from __future__ import annotations

import math
import statistics
import textwrap
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.report import table

from .claims import (
    CLAIMS,
    compared,
    forward_only,
    overall,
    percents,
    start_with,
    statement,
    with_gradients,
)
from .order import BASE, MODELS, SEEDS, SETS, Run, order
from .reading import LEAST_FALL, TIME, Group, crossing, groups
from .train import ASIDE, MOST, REACH, SHARES, TRIAL, WIDER, at_edge

RESULT = [
    "method", "fall of the loss %", "of each seed", "against MeZO, points", "within MeZO's time %", "loss",
    "accuracy %", "forwards to target",
]  # fmt: skip
COST = [
    "method",
    "forwards a step",
    "steps",
    "s a step",
    "processor s a step",
    "processor s",
    "extra MB",
    "read by",
]
TUNING = [
    "method", "lr", "eps", "of zokern.tune's lr", *(f"loss at {share:.2g}" for share in SHARES),
    "over all forwards", "forwards",
]  # fmt: skip
Rows = Sequence[Mapping[str, Any]]


def _mean(rows: Rows, key: str) -> float:
    return statistics.fmean(row[key] for row in rows)


def _each(rows: Rows, key: str, form: str) -> str:
    return " ".join(dict.fromkeys(format(row[key], form) for row in rows))


def to_target(group: Group, rows: Rows) -> str:
    """Returns the median of the forwards to the target, one that does not get there being the longest; how
    many do, where some do not."""
    if group.target is None:
        return "-"
    reached = [crossing(row, "forwards", group.target) for row in rows]
    middle = statistics.median(math.inf if value is None else value for value in reached)
    got = len(reached) - reached.count(None)
    text = f"{middle:.0f}" if math.isfinite(middle) else f"> {group.budget}"
    return text + (f" ({got} of {len(rows)})" if got < len(rows) else "")


def result(group: Group, name: str) -> list[str]:
    """Returns a line of the table of results."""
    rows, fall = group.runs[name], group.forwards[name]
    ends = [row["points"][-1] for row in rows]
    return [
        name, percents(fall, unit=""), " ".join(f"{100 * seed:.1f}" for seed in fall.seeds),
        percents(group.against[name], "+", "") if name in group.against else "-",
        percents(group.time[name], unit="") if name in group.time else "-",
        f"{_mean(ends, 'loss'):.3f}", percents(group.accuracy[name], unit=""), to_target(group, rows),
    ]  # fmt: skip


def cost(group: Group, name: str) -> list[str]:
    """Returns a line of the table of costs."""
    rows = group.runs[name]
    ends = [row["points"][-1] for row in rows]
    memory = [row["peak_extra_bytes"] for row in rows if row["peak_extra_bytes"] is not None]
    return [
        name, f"{_mean(ends, 'forwards') / _mean(ends, 'steps'):.3g}", f"{_mean(ends, 'steps'):.0f}",
        f"{_mean(rows, 'step_seconds'):.2f}", f"{_mean(ends, TIME) / _mean(ends, 'steps'):.2f}",
        f"{_mean(ends, TIME):.1f}", f"{max(memory) / 2**20:.0f}" if memory else "-",
        ", ".join(sorted({row["evaluation"] for row in rows})),
    ]  # fmt: skip


def _told(trial: Mapping[str, Any]) -> str:
    return "diverges" if trial["loss"] is None else f"{trial['loss']:.4f}"


def tuning(group: Group, name: str) -> list[str]:
    """Returns a line of the table of tuning."""
    rows = group.runs[name]
    row, whole = rows[0], rows[0].get("whole", ())
    over_all = ", ".join(f"{_told(trial)} at {trial['lr'] / row['tune_lr']:.2g}" for trial in whole)
    return [
        name, _each(rows, "lr", ".1e"), _each(rows, "eps", ".0e"), f"{row['lr'] / row['tune_lr']:.2g}",
        *map(_told, row["trials"]), over_all or "-", str(row["tune_forwards"]),
    ]  # fmt: skip


def of_lr(group: Group) -> str:
    """Returns what lr changes beside what the method changes, by trials; '' for few methods."""
    tried = [[t["loss"] for t in rows[0]["trials"] if t["loss"] is not None] for rows in group.runs.values()]
    if len(tried) < 4:
        return ""
    within = statistics.median(max(losses) - min(losses) for losses in tried)
    low, _, high = statistics.quantiles(min(losses) for losses in tried)
    return (
        f"The losses of a method's trials differ by {within:.3f} (median over methods); their best ones, "
        f"from method to method, by {high - low:.3f} (the middle half)."
    )


def base_machine(group: Group) -> str:
    """Returns the machine that MeZO ran on; methods of another one are not read at its time."""
    return str(group.runs[BASE][0]["machine"])


def section(group: Group) -> list[str]:
    """Returns the part of the page on one model and set."""
    start = next(iter(group.runs.values()))[0]["points"][0]
    rows = [row for some in group.runs.values() for row in some]
    commits, loads = sorted({row["commit"] for row in rows}), [row["load"] for row in rows]
    limit = (
        "Nothing is read at MeZO's time: it has not run, or on several machines."
        if group.limit is None
        else f"MeZO takes {group.limit:.1f} s of the processor for its forwards, on {base_machine(group)}."
    )
    target = (
        f"Target: MeZO's final held-out loss, {group.target:.3f}."
        if group.target is not None
        else f"No target: MeZO has not run, or its held-out loss fell by less than {LEAST_FALL:.0%}."
    )
    return [
        f"## {group.name}",
        "",
        f"Measured on {', '.join(group.machines)}, of commits {', '.join(commits)}; load average when a run "
        f"began {statistics.median(loads):.1f}, up to {max(loads):.1f}.",
        f"Before training: accuracy {start['right'] / start['rows']:.1%} of {start['rows']} held-out rows, "
        f"loss {start['loss']:.3f}. {limit} {target}",
        "",
        *table(RESULT, [result(group, name) for name in group.runs]),
        "",
        *table(COST, [cost(group, name) for name in group.runs]),
        "",
        *table(TUNING, [tuning(group, name) for name in group.runs]),
        "",
        *([said, ""] if (said := of_lr(group)) else []),
    ]


def lacking(rows: Sequence[Mapping[str, Any]], methods: Sequence[str]) -> list[str]:
    """Returns lines on what a full study has and these rows have not."""
    done = {Run.of(row) for row in rows}
    absent = [run for run in order(methods) if run not in done]
    lines = [f"{len(done & set(order(methods)))} of {len(order(methods))} runs of a full study are done."]
    for model in MODELS:
        for data in SETS:
            here = [run for run in absent if (run.model, run.data) == (model, data)]
            if len(here) == sum((run.model, run.data) == (model, data) for run in order(methods)):
                lines += [f"- {model}, {data}: nothing was run."] if here else []
                continue
            left = Counter(run.method for run in here)
            never = [name for name, count in left.items() if count == len(SEEDS)]
            fewer = [name for name, count in left.items() if count < len(SEEDS)]
            if never:
                lines.append(f"- {model}, {data}: not run: {', '.join(never)}.")
            if fewer:
                lines.append(f"- {model}, {data}: fewer than {len(SEEDS)} seeds: {', '.join(fewer)}.")
    for model in MODELS:
        for data in SETS:
            here = [r for r in rows if (r["model"], r["data"]) == (model, data) and "error" not in r]
            if largest := [*dict.fromkeys(row["method"] for row in here if at_edge(row))]:
                lines.append(
                    f"- {model}, {data}: lr is the largest that was tried, and a larger one may suit: "
                    f"{', '.join(largest)}."
                )
    return lines


def how(settings: Mapping[str, Any]) -> list[str]:
    """Returns what was done, in words."""
    budgets = ", ".join(f"{model} {count} forwards" for model, count in settings["forwards"].items())
    setting = (
        "Every method had its defaults, but for eps and lr. `zokern.tune` told these two from 56 forwards "
        f"with a central difference; its `reach` was {REACH:g} for all. Of {len(SHARES)} shares of that lr, "
        f"{', '.join(f'{share:.2g}' for share in SHARES)}, the best was taken: each trained a 1/{TRIAL} of "
        f"the forwards, and was judged by {ASIDE} training rows that train nothing. Where the largest was "
        f"the best, larger ones were tried over all of the forwards, each {WIDER:g} times the one before, as "
        f"long as that was better and up to {MOST:g}. Further seeds took eps "
        "and lr of the first. The forwards of this tuning do not count below; the table of tuning has them, "
        "and the losses of the rows aside at each share. Two that are closer than about 0.01 differ by "
        "chance. Of Hybrid and Addax the optimizer of the gradients keeps its own lr. lr is constant. A "
        "batch has "
        f"{settings['batch']} rows with equal shares of the labels. Rows "
        f"are at most {settings['words']} words: sentences of film reviews (2 labels), and the first words "
        "of BBC news (5 labels). MiniLM is an encoder of 22M weights, whose head starts as its own answer to "
        "the labels; SmolLM2-135M is a causal model with label words. LoRA has rank 8 at all linear layers. "
        f"All of float32, on the CPU. Budgets: {budgets}. A derivative along z counts as 2 forwards, and a "
        "back-propagation as 3."
    )
    told = (
        "Methods are compared by the fall of the held-out loss, as a share of the loss before training, at "
        "equal forwards: all answer the same rows, so that it tells them apart where accuracies do not. "
        "`against MeZO` is the difference to MeZO's fall with the same seed, and so the same batches. "
        "Intervals are of 95 %, Student's for the seeds, with variances moderated over the methods of a "
        "table (Smyth 2004). A method is told apart where the chance of naming any of the table wrongly is "
        "about 5 % (Holm 1979); it is up to 10 % where MeZO's seeds, which all differences share, scatter "
        "most. Intervals hold for these held-out rows and for the one lr that was found; "
        "those of an accuracy have Wilson's for the rows too. Values between two checks (every quarter) are "
        "linear. Time is the processor's, at the rate of a method's quickest seed; `s a step` is the "
        "clock's, the median of a run's steps. `within MeZO's time` reads a method at the time that MeZO "
        "takes, or at its own end where that is sooner; one that ran on another machine is not read there. "
        "`forwards to target` is the median over seeds."
    )
    return [*textwrap.wrap(setting, 110), "", *textwrap.wrap(told, 110)]


def page(settings: Mapping[str, Any], rows: Rows, methods: Sequence[str]) -> str:
    """Returns the page."""
    found = groups(rows, settings["forwards"])
    forward = forward_only(found)

    def every(key: str) -> str:
        return ", ".join(dict.fromkeys(str(row[key]) for row in rows)) or "none"

    commands = [f"- `{command}`" for command in dict.fromkeys(row["command"] for row in rows)] or ["- no run"]
    failed = [row for row in rows if "error" in row]
    means = ", ".join(f"{name} {percents(mean, '+', ' points')}" for name, mean in overall(forward).items())
    text = [
        "# Which method to use",
        "",
        start_with(forward),
        "",
        "![held-out loss over forwards, and its fall at equal cost](study.png)",
        "",
        "Of the methods of forward passes alone:",
        "",
        *(f"- {compared(group)}" for group in forward),
        *([f"- Fall minus MeZO's, mean over models and sets: {means}."] if means else []),
        *([f"- {above}"] if (above := with_gradients(found)) else []),
        "",
        "## What was reproduced of the papers",
        "",
        "The papers' models are 10 to 100 times as large and train for thousands of steps: this is a small "
        "repetition.",
        "",
        *(f"- {statement(found, claim)}" for claim in CLAIMS),
        "",
        "## What is missing",
        "",
        *lacking(rows, methods),
        *(f"- {Run.of(row)} failed: {row['error']}" for row in failed),
        "",
        "## How",
        "",
        *how(settings),
        "",
        f"Measured on {every('date')}, torch {every('torch')}, threads {every('threads')}, by",
        "",
        *commands,
        "",
        *(["A commit with +changes is of a tree with changes that were not committed.", ""]
          if any(row["commit"].endswith("+changes") for row in rows) else []),
    ]  # fmt: skip
    for group in found:
        text += section(group)
    return "\n".join(text)
