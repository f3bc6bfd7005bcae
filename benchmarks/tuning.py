"""Is the lr of zokern.tune a good one? The demo's task is trained at it and at lr on both sides of it.

    python -m benchmarks.tuning [--only NAME ...] [--seconds 240]

Every run starts from the same weights and has the same draws and batches; lr is constant. The best lr of a
grid is the one with the least held-out loss after the last step. The run at the lr of tune ends after 100
steps or a fifth of --seconds, and the other runs of its method take as many steps. Writes tuning.md under
benchmarks/results run by run: a command that was ended goes on where it was, at the same commit.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Sequence
from typing import Any

import torch

import zokern
from examples import demo
from examples.demo.training import Batches, Task, score

from .defaults import BATCH, CASES, HELD_OUT, measure
from .report import Report

GRID = (1.0, 1 / 3, 3.0, 1 / 9, 9.0)  # times the lr of tune, in the order of the runs
NEAR = 3.0  # a good lr is within this factor of the best one
NAMES = ("MeZO", "SubZero", "ZOSignSGD")
STEPS, SECONDS = 100, 240.0
HEAD = (
    "| case | lr of tune | "
    + " | ".join(f"x {factor:.2g}" for factor in sorted(GRID))
    + f" | best of the grid | within {NEAR:g}x | steps | commit |\n"
    + "|---" * (len(GRID) + 6)
    + "|"
)


def best(losses: dict[str, float]) -> float:
    """Returns the factor of the least loss; an infinite loss or NaN is the greatest."""
    return float(min(losses, key=lambda one: losses[one] if math.isfinite(losses[one]) else math.inf))


def line(name: str, row: dict[str, Any]) -> str:
    """Returns a row of the table; the verdict waits for all runs."""
    losses, verdict = row["losses"], ["", ""]
    if len(losses) == len(GRID):
        factor = best(losses)
        verdict = [f"x {factor:.2g}", "yes" if 1 / NEAR <= factor <= NEAR else "no"]
    cells = [f"{losses[str(x)]:.3f}" if str(x) in losses else "" for x in sorted(GRID)]
    words = [name, f"{row['lr']:.2g}", *cells, *verdict, str(row["steps"]), row["commit"]]
    return f"| {' | '.join(words)} |"


def page(machine: dict[str, str], found: dict[str, dict[str, Any]]) -> str:
    """Returns the Markdown page of all rows."""
    text = [
        f"# The lr of zokern.tune against a grid: {machine['cpu']}, {machine['isa']}",
        "",
        f"`python -m benchmarks.tuning`, {machine['date']}: torch {machine['torch']}.",
        f"SmolLM2-135M, all weights, float32, batch {BATCH}, constant lr, seed 0.",
        f"Held-out loss of {HELD_OUT} rows after training at multiples of the lr; it is "
        f"{next(iter(found.values()))['before']:.3f} before. One seed and one task.",
        "",
        HEAD,
        *(line(name, found[name]) for name in CASES if name in found),
    ]
    return "\n".join(text) + "\n"


def main(argv: Sequence[str] | None = None) -> None:
    """Prints a row for each run, and writes the page after it."""
    parse = argparse.ArgumentParser(
        prog="python -m benchmarks.tuning", description=(__doc__ or "").partition("\n\n")[0]
    )
    parse.add_argument("--only", nargs="+", choices=CASES, default=list(NAMES), metavar="NAME")
    parse.add_argument("--steps", type=int, default=STEPS, help="at most; another number is not recorded")
    parse.add_argument("--seconds", type=float, default=SECONDS, help="of training, for a method")
    parse.add_argument("--threads", type=int, help="of torch (default: torch's own choice)")
    options = parse.parse_args(argv)
    options.seed = 0
    report = Report(quick=options.steps != STEPS)
    if options.threads:
        torch.set_num_threads(options.threads)
    model, words, rows = demo.task(HELD_OUT)
    start = {name: value.clone() for name, value in model.state_dict().items()}
    before = score(model, words, rows.held_out).loss
    print(HEAD, flush=True)
    for name in options.only:
        row = report.kept("tuning").get(name, {})
        if row.get("commit") != report.machine["commit"]:
            model.load_state_dict(start)
            batches = Batches(rows.train, BATCH, options.seed + 1)
            closures = [Task(model, words, batches.next()) for _ in range(8)]
            lr = zokern.tune(CASES[name](model, seed=options.seed), closures).lr
            row = {"lr": lr, "losses": {}, "steps": options.steps, "before": before}
            row["commit"] = report.machine["commit"]
        for factor in GRID:
            if str(factor) in row["losses"]:
                continue
            model.load_state_dict(start)
            first, began = not row["losses"], time.perf_counter()
            run = argparse.Namespace(
                seed=options.seed, lr=row["lr"] * factor, steps=row["steps"],
                seconds=options.seconds / len(GRID) if first else math.inf,
            )  # fmt: skip
            found = measure(name, model, words, rows, run)
            row["losses"][str(factor)], row["steps"] = found["loss"], found["steps"]
            report.keep_row("tuning", name, row, page)
            print(f"{line(name, row)}  {time.perf_counter() - began:.0f} s", flush=True)


if __name__ == "__main__":
    main()
