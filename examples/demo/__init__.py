"""The demo: SmolLM2-135M learns to judge film-review sentences from forward passes alone.
`python -m examples.demo --help`.

    before    held-out rows: loss, accuracy
    training  a method on all weights, one seed; then, from the same start, a second seed
    after     held-out rows again; a paired test says whether the rise is beyond chance
    cost      rounds of one bare forward, one zokern step and one eager MeZO step, on the same batch: time and
              peak memory

Exit status: 0 when the rise is significant with both seeds, 1 when it is not, 2 when something is missing.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import json
import platform
import statistics
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import nn

from zokern import __version__, methods
from zokern.stream import check_seed
from zokern.training.words import LabelWords

from . import data
from .cost import cost
from .data import Split, load_model, read_reviews, split
from .report import FIELDS, LEVEL, plot, share, summary
from .training import Batches, Task, build, score, train

# Label words of Malladi et al. 2023 for film-review sentences, in the order of the labels.
TEMPLATE, WORDS = "{} This movie is", (" terrible", " great")
# tokens of a row, template included: sentences long enough to judge, short enough for two cores
LEAST, MOST = 8, 20
STEPS, BATCH, HELD_OUT, ROUNDS = 100, 8, 300, 3
__all__ = ["Batches", "Task", "main", "run", "task"]
METHODS = {name.lower(): name for name in methods.METHODS}


def run(model: nn.Module, words: LabelWords, rows: Split, options: argparse.Namespace) -> dict[str, Any]:
    """Before, train, after, again with the second seed, cost:
    the report as plain data (FIELDS says what is what)."""
    say = (lambda text: None) if options.quiet else functools.partial(print, flush=True)
    given = build(model, options.seed, options).param_groups[0]
    options.lr, options.eps = given["lr"], given["eps"]
    say(f"{options.method}: lr {options.lr:g}, eps {options.eps:g}")
    start = [p.detach().clone() for p in model.parameters()]
    before = score(model, words, rows.held_out)
    say(f"before  accuracy {share(before.accuracy, before.interval)}  loss {before.loss:.3f}")
    outcomes = []
    for seed in (options.seed, options.second_seed):
        with torch.no_grad():
            for parameter, value in zip(model.parameters(), start):
                parameter.copy_(value)
        started = time.perf_counter()
        losses, seconds = train(model, words, rows.train, seed, options)
        elapsed = time.perf_counter() - started
        after = score(model, words, rows.held_out).against(before)
        outcome = {
            "seed": seed,
            **after,
            "losses": losses,
            "step_seconds": statistics.median(seconds),
            "seconds": elapsed,
        }
        outcomes.append(outcome)
        accuracy = share(after["accuracy"], after["interval"])
        say(f"after   accuracy {accuracy}  loss {after['loss']:.3f}  p = {after['p_value']:.1e}")
    first, second = outcomes
    del start
    measured = cost(model, words, rows.train, options)
    backend = measured.pop("backend")
    return {
        "method": options.method,
        "accuracy_before": before.accuracy,
        "accuracy_after": first["accuracy"],
        "accuracy_before_interval": before.interval,
        "accuracy_after_interval": first["interval"],
        "rise_interval": first["rise_interval"],
        "p_value": first["p_value"],
        "auc_before": before.auc,
        "auc_after": first["auc"],
        "loss_before": before.loss,
        "loss_after": first["loss"],
        **measured,
        "training_step_seconds": first["step_seconds"],
        "training_seconds": first["seconds"],
        "training_losses": first["losses"],
        "seed": options.seed,
        "second_seed": {key: value for key, value in second.items() if key != "losses"},
        "significant": all(outcome["p_value"] < LEVEL for outcome in outcomes),
        "rows": {"train": len(rows.train), "held_out": len(rows.held_out)},
        "options": {key: value for key, value in vars(options).items() if key not in ("json", "plot")},
        "versions": {
            "zokern": __version__,
            "torch": torch.__version__,
            "transformers": getattr(sys.modules.get("transformers"), "__version__", None),
            "python": platform.python_version(),
            "backend": backend,
            "threads": torch.get_num_threads(),
            "processor": _processor(),
        },
    }


def _processor() -> str:
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def parser() -> argparse.ArgumentParser:
    parse = argparse.ArgumentParser(prog="zokern demo", description=(__doc__ or "").partition("\n\n")[0])
    add = parse.add_argument
    add(
        "--json",
        type=Path,
        metavar="FILE",
        help="write the report; its entry 'fields' says what each number means",
    )
    add(
        "--plot",
        type=Path,
        metavar="FILE",
        default=Path("zokern-demo.png"),
        help="write the plot (default %(default)s)",
    )
    add("--steps", type=_count, default=STEPS, help="training steps per seed (default %(default)s)")
    add("--seed", type=int, default=0, help="of the draws and the batches (default %(default)s)")
    add("--second-seed", type=int, help="of the check (default: seed + 1)")
    add(
        "--method",
        type=_method,
        default="MeZO",
        metavar="NAME",
        help=f"{', '.join(METHODS.values())} (default %(default)s)",
    )
    add("--lr", type=float, help="at the first step, falling linearly to 0 (default: the method's)")
    add("--eps", type=float, help="half-width of the difference, in weights (default: the method's)")
    add("--queries", type=_count, help="draws per step (default: the method's)")
    add("--batch", type=_count, default=BATCH, help="rows per step, half of each label (default %(default)s)")
    add(
        "--held-out",
        type=_count,
        default=HELD_OUT,
        help="rows to judge by, half of each label (default %(default)s)",
    )
    add("--rounds", type=_count, default=ROUNDS, help="rounds of the cost comparison (default %(default)s)")
    add("--threads", type=_count, help="threads of torch (default: torch's own choice)")
    add("--quiet", action="store_true", help="print nothing but the summary")
    return parse


def _count(text: str) -> int:
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a number from 1 up")
    return number


def _method(text: str) -> str:
    if (name := METHODS.get(text.lower())) is None:
        raise argparse.ArgumentTypeError(
            f"{text} is no method; expected one of {', '.join(METHODS.values())}"
        )
    return name


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the demo; 0 when the rise is significant with both seeds."""
    options = parser().parse_args(argv)
    if options.second_seed is None:
        options.second_seed = options.seed + 1
    if options.threads:
        torch.set_num_threads(options.threads)
    started = time.perf_counter()
    try:
        _check(options)
        model, words, parts = task(options.held_out)
        Batches(parts.train, options.batch, options.seed)
    except (FileNotFoundError, ModuleNotFoundError, ValueError) as error:
        print(f"zokern demo: {error}", file=sys.stderr)
        return 2
    if not options.quiet:
        print(
            f"read SmolLM2-135M and its labelled sentences in {time.perf_counter() - started:.0f} s; of "
            f"{LEAST} to {MOST} tokens: {len(parts.train)} to train on, {len(parts.held_out)} held out",
            flush=True,
        )
    report = run(model, words, parts, options) | {"seconds": time.perf_counter() - started}
    print(summary(report))
    if options.json:
        options.json.write_text(json.dumps({**report, "fields": FIELDS}, indent=1) + "\n")
    plot(report, options.plot)
    print(f"plot       {options.plot}; {report['seconds']:.0f} s in all")
    if not report["significant"]:
        print(
            f"zokern demo: the rise is not beyond chance (p {report['p_value']:.2g} and "
            f"{report['second_seed']['p_value']:.2g}; needed: below {LEVEL} with both seeds); train for more "
            "--steps",
            file=sys.stderr,
        )
    return 0 if report["significant"] else 1


def task(held_out: int = HELD_OUT) -> tuple[nn.Module, LabelWords, Split]:
    """Returns the model, its label words, and the rows of LEAST to MOST tokens."""
    rows = read_reviews()
    model, tokenizer = load_model()
    words = LabelWords(tokenizer, TEMPLATE, WORDS)
    kept = [row for row, length in zip(rows, words.lengths(rows)) if LEAST <= length <= MOST]
    return model, words, split(kept, held_out)


def _check(options: argparse.Namespace) -> None:
    """What can be refused before minutes are spent is refused here."""
    if check_seed(options.seed) == check_seed(options.second_seed):
        raise ValueError(
            f"--second-seed is {options.second_seed}, as --seed; expected another one, or it checks nothing"
        )
    for path in (options.json, options.plot):
        if path and not path.absolute().parent.is_dir():
            raise FileNotFoundError(
                f"the folder {path.absolute().parent} does not exist; make it, or name another file"
            )
    modules = ("transformers", "gguf", "tqdm", "matplotlib")
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    for package in (data.MODEL_PACKAGE, data.REVIEWS_PACKAGE):
        try:
            metadata.version(package)
        except metadata.PackageNotFoundError:
            missing.append(package)
    if missing:
        raise ModuleNotFoundError(f"not installed: {', '.join(missing)}; {data.way_out()}")
