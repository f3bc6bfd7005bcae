"""Is the lr of zokern.tune a good one? The demo's task is trained at it and at lr on both sides of it.

    python -m benchmarks.tuning [--only NAME ...] [--steps 100] [--threads 1]

Every run starts from the same weights and has the same draws and batches; lr is constant. The best lr of a
grid is the one with the least held-out loss after the last step. Writes tuning.md under benchmarks/results.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence

import torch

import zokern
from examples import demo
from examples.demo.training import Batches, Task, score

from .defaults import BATCH, CASES, HELD_OUT, measure
from .report import Report

GRID = (1 / 9, 1 / 3, 1.0, 3.0, 9.0)  # times the lr of tune
NAMES = ("MeZO", "SubZero", "LOZO")
HEAD = (
    "| case | lr of tune | "
    + " | ".join(f"x {factor:.2g}" for factor in GRID)
    + " | best of the grid |\n"
    + "|---" * (len(GRID) + 3)
    + "|"
)


def main(argv: Sequence[str] | None = None) -> None:
    """Prints a row for each case, and writes the page."""
    parse = argparse.ArgumentParser(
        prog="python -m benchmarks.tuning", description=(__doc__ or "").partition("\n\n")[0]
    )
    parse.add_argument("--only", nargs="+", choices=CASES, default=list(NAMES), metavar="NAME")
    parse.add_argument("--steps", type=int, default=100)
    parse.add_argument("--threads", type=int, default=1)
    parse.add_argument("--seed", type=int, default=0)
    options = parse.parse_args(argv)
    options.seconds = math.inf
    report = Report(quick=options.steps != 100)
    torch.set_num_threads(options.threads)
    model, words, rows = demo.task(HELD_OUT)
    start = {name: value.clone() for name, value in model.state_dict().items()}
    before = score(model, words, rows.held_out).loss
    lines = [HEAD]
    print(HEAD, flush=True)
    for name in options.only:
        model.load_state_dict(start)
        batches = Batches(rows.train, BATCH, options.seed + 1)
        closures = [Task(model, words, batches.next()) for _ in range(8)]
        lr = zokern.tune(CASES[name](model, seed=options.seed), closures).lr
        losses = {}
        for factor in GRID:
            model.load_state_dict(start)
            options.lr = lr * factor
            losses[factor] = measure(name, model, words, rows, options)["loss"]
        best = min(losses, key=lambda factor: losses[factor] if math.isfinite(losses[factor]) else math.inf)
        lines.append(
            f"| {name} | {lr:.2g} | " + " | ".join(f"{x:.3f}" for x in losses.values()) + f" | x {best:.2g} |"
        )
        print(lines[-1], flush=True)
    machine = report.machine
    text = [
        f"# The lr of zokern.tune against a grid: {machine['cpu']}, {machine['isa']}",
        "",
        f"`python -m benchmarks.tuning`, {machine['date']}, commit {machine['commit']}: torch "
        f"{machine['torch']}.",
        f"SmolLM2-135M, all weights, float32, batch {BATCH}, {options.steps} steps, constant lr, seed "
        f"{options.seed}.",
        f"Held-out loss of {HELD_OUT} rows after training at each lr; it is {before:.3f} before. One seed "
        "and one task.",
        "",
        *lines,
    ]
    if not report.quick:
        (report.folder() / "tuning.md").write_text("\n".join(text) + "\n")


if __name__ == "__main__":
    main()
