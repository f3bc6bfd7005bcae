"""Does every method learn at its defaults? The demo's model and rows, a constant lr, one seed:
`python -m benchmarks.defaults`.

Every case starts from the same weights and takes the constructor's lr and eps. A block-wise step reads 64
losses: it takes a tenth of the steps. --seconds ends a case early, at the steps that its row names. Two
processes may share a page: on a busy machine two of one thread each (--threads 1) are several times as fast
as one of two, whose threads wait for each other. Rows are printed as they are measured, and written to the
folder of this machine under benchmarks/results: a case that is run again replaces its row. --only NAME ...
runs some of them; --lr tries another one, which is printed and not written.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any
from unittest.mock import patch

import torch

import zokern
from examples import demo
from examples.demo.training import Batches, Task, score
from zokern.estimator import Oracle
from zokern.methods import METHODS
from zokern.training.words import LabelWords

from .report import Report

BATCH, HELD_OUT, STEPS, LEAST = 8, 100, 100, 0.1
NOTE = (
    f"A case learns where the held-out loss falls by {LEAST} nats or more. One seed and one task: this says "
    "that a default is of the right size, not that one method is better than another."
)

# Forms of a method that are no method of their own.
FORMS: dict[str, Callable[..., Any]] = {
    "KerZOO averaged": partial(zokern.KerZOO, averaging=True),
    "MeZO Momentum": lambda m, **o: zokern.MeZO(m, rule=zokern.Momentum(), **o),
    "MeZO SignSgd": lambda m, **o: zokern.MeZO(m, rule=zokern.SignSgd(), **o),
    "LOZO-M": partial(zokern.LOZO, momentum=0.9),
    "TeZO-m": partial(zokern.TeZO, rule="momentum"),
    "TeZO-Adam": partial(zokern.TeZO, rule="adam"),
}
CASES: dict[str, Callable[..., Any]] = {**METHODS, **FORMS}
# share of the steps of those that read most losses
FEWER = {"BlockMeZO": 0.1, "SubZeroPlus": 0.1, "EGGROLL": 0.4}


@contextmanager
def asking() -> Iterator[list[Any]]:
    """Lists the points and draws that steps ask losses of, each once for a question."""
    asked, read, slopes = list[Any](), Oracle._ask, Oracle.slopes

    def ask(self: Oracle, plan: Any, points: Any, *rest: Any) -> Any:
        asked.extend({*points})
        return read(self, plan, points, *rest)

    def slope(self: Oracle, draws: Any, *rest: Any) -> Any:
        asked.extend(draws)
        return slopes(self, draws, *rest)

    with patch.object(Oracle, "_ask", ask), patch.object(Oracle, "slopes", slope):
        yield asked


def measure(
    name: str, model: Any, words: LabelWords, rows: Any, options: argparse.Namespace
) -> dict[str, Any]:
    """Trains one case from the weights as they are.
    Returns its row; the weights are then what it made of them."""
    portion = FEWER.get(name, 1.0)
    optimizer = CASES[name](model, seed=options.seed, **({} if options.lr is None else {"lr": options.lr}))
    batches = Batches(rows.train, BATCH, options.seed)
    seconds: list[float] = []
    with asking() as asked:
        while len(seconds) < max(1, round(portion * options.steps)) and sum(seconds) < options.seconds:
            task = Task(model, words, batches.next())
            asked.clear()
            started = time.perf_counter()
            result = zokern.step(optimizer, task.examples if name == "DPZO" else task)
            seconds.append(time.perf_counter() - started)
            asked += [] if result.first_order_loss is None else [result.first_order_loss]
    optimizer.flush()
    after, group = score(model, words, rows.held_out), optimizer.param_groups[0]
    return {
        "lr": group["lr"], "eps": group["eps"], "losses": len(asked), "steps": len(seconds),
        "loss": after.loss, "accuracy": after.accuracy,
        "seconds": statistics.median(seconds), "threads": torch.get_num_threads(),
    }  # fmt: skip


def line(name: str, row: dict[str, Any]) -> str:
    """Returns a row of the table."""
    learns = "yes" if row["loss_before"] - row["loss"] >= LEAST else "no"
    return (
        f"| {name} | {row['lr']:g} | {row['eps']:g} | {row['steps']} x {row['losses']} | "
        f"{row['loss_before']:.3f} -> {row['loss']:.3f} | {learns} | {row['accuracy_before']:.2f} -> "
        f"{row['accuracy']:.2f} | {row['seconds']:.2f} | {row['threads']} | {row['commit']} |"
    )


HEAD = (
    "| case | lr | eps | steps x losses | held-out loss | learns | accuracy | s a step | threads | commit |\n"
    "|---|---|---|---|---|---|---|---|---|---|"
)


def page(machine: dict[str, str], found: dict[str, dict[str, Any]]) -> str:
    """Returns the Markdown page of all rows."""
    missing = [name for name in CASES if name not in found]
    title = f"# Methods at their defaults: {machine['cpu']}, {machine['isa']}"
    text = [
        title,
        "",
        "`python -m benchmarks.defaults`, with --threads and --seconds where rows say so, "
        f"{machine['date']}: torch {machine['torch']}, Python {machine['python']}, zokern "
        f"{machine['zokern']}, {machine['cores']} cores, load average {machine['load']}.",
        f"SmolLM2-135M, all weights, float32, batch {BATCH}, sentences of {demo.LEAST} to {demo.MOST} "
        f"tokens, constant lr, seed 0, {HELD_OUT} held-out rows. 'steps x losses' is what was run; seconds a "
        "step are those of a shared machine.",
        NOTE,
        *([f"Not measured: {', '.join(missing)}."] if missing else []),
        "",
        HEAD,
        *(line(name, found[name]) for name in CASES if name in found),
    ]
    return "\n".join(text) + "\n"


def main(argv: Sequence[str] | None = None) -> None:
    """Measures the cases and writes the page."""
    parse = argparse.ArgumentParser(
        prog="python -m benchmarks.defaults", description=(__doc__ or "").partition("\n\n")[0]
    )
    parse.add_argument(
        "--only", nargs="+", choices=CASES, default=list(CASES), metavar="NAME", help=", ".join(CASES)
    )
    parse.add_argument("--steps", type=int, default=STEPS)
    parse.add_argument(
        "--seconds",
        type=float,
        default=float("inf"),
        help="of training, after which a case ends (default: no bound)",
    )
    parse.add_argument("--threads", type=int, help="of torch while training")
    parse.add_argument("--seed", type=int, default=0)
    parse.add_argument("--lr", type=float, help="in place of the default; nothing is written")
    options = parse.parse_args(argv)
    report = Report(quick=options.lr is not None or options.steps != STEPS or options.seed != 0)
    if options.threads:
        torch.set_num_threads(options.threads)
    model, words, rows = demo.task(HELD_OUT)
    start = {name: value.clone() for name, value in model.state_dict().items()}
    before = score(model, words, rows.held_out)
    print(HEAD, flush=True)
    for name in options.only:
        model.load_state_dict(start)
        row = measure(name, model, words, rows, options)
        row |= {
            "loss_before": before.loss,
            "accuracy_before": before.accuracy,
            "commit": report.machine["commit"],
        }
        print(line(name, row), flush=True)
        if not report.quick:
            report.keep_row("defaults", name, row, page)


if __name__ == "__main__":
    main()
