"""The page of a study, made of its rows alone."""

from __future__ import annotations

import math
import statistics
import textwrap
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.report import table

from .claims import CLAIMS, forward_only, harmed, start_with, statement, with_gradients
from .order import MODELS, SEEDS, SETS, Run, order
from .reading import LEAST_FALL, TIME, Group, Mean, crossing, groups
from .train import ASIDE, REACH, SHARES, TRIAL

BUSY = "**The machine was busy** (load average up to {:.1f}): times are longer than on a free one."
ONE_SEED = "**One seed**: nothing is told apart, and another seed may change the order."
HEAD = [
    "method", "seeds", "lr", "eps", "forwards x", "steps", "fall of the loss %, equal forwards", "equal time",
    "loss", "accuracy %", "forwards to target", "s a step", "processor s a step", "processor s", "extra MB",
    "read by",
]  # fmt: skip


def percent(mean: Mean | None) -> str:
    if mean is None:
        return "-"
    known = math.isfinite(mean.low)
    return f"{100 * mean.value:.1f}" + (f" [{100 * mean.low:.1f}, {100 * mean.high:.1f}]" if known else "")


def _mean(rows: Sequence[Mapping[str, Any]], key: str) -> float:
    return statistics.fmean(row[key] for row in rows)


def _each(rows: Sequence[Mapping[str, Any]], key: str, form: str) -> str:
    return " ".join(dict.fromkeys(format(row[key], form) for row in rows))


def _line(group: Group, name: str) -> list[str]:
    rows = group.runs[name]
    ends = [row["points"][-1] for row in rows]
    reached = [] if group.target is None else [crossing(row, "forwards", group.target) for row in rows]
    got = [value for value in reached if value is not None]
    to_target = f"{statistics.fmean(got):.0f}" if got else "-"
    memory = [row["peak_extra_bytes"] for row in rows if row["peak_extra_bytes"] is not None]
    return [
        name, str(len(rows)), _each(rows, "lr", ".1e"), _each(rows, "eps", ".0e"),
        f"{rows[0]['last_step_forwards']}", f"{_mean(ends, 'steps'):.0f}",
        percent(group.forwards[name]), percent(group.time.get(name)),
        f"{_mean(ends, 'loss'):.3f}", percent(group.accuracy[name]),
        to_target + (f" ({len(got)} of {len(rows)})" if reached and len(got) < len(rows) else ""),
        f"{_mean(rows, 'step_seconds'):.2f}", f"{_mean(rows, 'step_processor_seconds'):.2f}",
        f"{_mean(ends, TIME):.1f}", f"{max(memory) / 2**20:.0f}" if memory else "-",
        ", ".join(sorted({row["evaluation"] for row in rows})),
    ]  # fmt: skip


def section(group: Group) -> list[str]:
    """Returns the part of the page on one model and set."""
    start = next(iter(group.runs.values()))[0]["points"][0]
    limit = "MeZO has not run: nothing is read at equal time." if group.limit is None else (
        f"Equal time is {group.limit:.1f} s of the processor, which MeZO takes for its forwards."
    )  # fmt: skip
    target = (
        f"Target: MeZO's final held-out loss, {group.target:.3f}."
        if group.target is not None
        else f"No target: MeZO has not run, or its held-out loss fell by less than {LEAST_FALL:.0%}."
    )
    return [
        f"## {group.name}",
        "",
        f"Before training: accuracy {start['right'] / start['rows']:.1%} of {start['rows']} held-out rows, "
        f"loss {start['loss']:.3f}.",
        f"{limit} {target}",
        "",
        *table(HEAD, [_line(group, name) for name in group.runs]),
        "",
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
    return lines


def how(settings: Mapping[str, Any]) -> list[str]:
    """Returns what was done, in words."""
    budgets = ", ".join(f"{model} {count} forwards" for model, count in settings["forwards"].items())
    setting = (
        "Every method had its defaults, but for eps and lr. `zokern.tune` told these two from 56 forwards "
        f"with a central difference; its `reach` was {REACH:g} for all. Of {len(SHARES)} shares of that lr, "
        f"{', '.join(f'{share:.2g}' for share in SHARES)}, the best was taken: each trained a 1/{TRIAL} of "
        f"the forwards, and was judged by {ASIDE} training rows that train nothing. Further seeds took eps "
        "and lr of the first. The forwards of this tuning do not count below. lr is constant. A batch has "
        f"{settings['batch']} rows with equal shares of the labels. Rows "
        f"are at most {settings['words']} words: sentences of film reviews (2 labels), and the first words "
        "of BBC news (5 labels). MiniLM is an encoder of 22M weights, whose head starts as its own answer to "
        "the labels; SmolLM2-135M is a causal model with label words. LoRA has rank 8 at all linear layers. "
        f"All of float32, on the CPU. Budgets: {budgets}. A derivative along z counts as 2 forwards, and a "
        "back-propagation as 3."
    )
    told = (
        "Methods are compared by the fall of the held-out loss, as a share of the loss before training: all "
        "answer the same rows, so that it tells them apart where accuracies do not. Intervals are of 95 %, "
        "Student's for the seeds; the deviation of seeds is pooled over the methods of a table. Those of an "
        "accuracy are Wilson's for the rows and Student's for the seeds, whose squares add. Two methods are "
        "told apart where their intervals do not overlap. "
        "Values between two checks (every quarter) are linear. Time is the processor's, which other programs "
        "on the machine lengthen less than the clock's; `s a step` is the clock's."
    )
    return [*textwrap.wrap(setting, 110), "", *textwrap.wrap(told, 110)]


def page(
    machine: Mapping[str, str],
    settings: Mapping[str, Any],
    rows: Sequence[Mapping[str, Any]],
    methods: Sequence[str],
) -> str:
    """Returns the page."""
    found = groups(rows, settings["forwards"])
    load = max((row["load"] for row in rows), default=0.0)

    def every(key: str) -> str:
        return ", ".join(dict.fromkeys(str(row[key]) for row in rows)) or "none"

    commands = [f"- `{command}`" for command in dict.fromkeys(row["command"] for row in rows)] or ["- no run"]
    failed = [row for row in rows if "error" in row]
    seeds = max((len(some) for group in found for some in group.runs.values()), default=0)
    text = [
        f"# Which method to use: {machine['cpu']}, {machine['isa']}",
        "",
        f"Measured on {every('date')} by",
        "",
        *commands,
        "",
        f"Rows are of commits {every('commit')}, measured on {every('machine')}, torch {every('torch')}, "
        f"{machine['cores']} cores, threads {every('threads')}.",
        *(["", BUSY.format(load)] if load > int(machine["cores"]) else []),
        *(["", ONE_SEED] if seeds == 1 else []),
        "",
        "![held-out loss over forwards, and its fall at equal cost](study.png)",
        "",
        "## Which method to start with",
        "",
        "Of the methods of forward passes alone:",
        "",
        f"- {start_with(forward_only(found), 'time')}",
        f"- {start_with(forward_only(found), 'forwards')}",
        *([f"- {above}"] if (above := with_gradients(found)) else []),
        *([f"- {below}"] if (below := harmed(found)) else []),
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
    ]  # fmt: skip
    for group in found:
        text += section(group)
    return "\n".join(text)
