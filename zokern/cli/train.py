"""`python -m zokern train`: fine-tune a transformers model folder on the rows of a file, by forward passes.

    python -m zokern train --model FOLDER --data reviews.csv --output tuned \\
        --words negative=terrible positive=great --template "{} This movie is"     # label words
    python -m zokern train --model FOLDER --data reviews.csv --output tuned         # a classification head
    python -m zokern train --model FOLDER --data lines.txt --output tuned           # language modelling
    python -m zokern train --config run.toml --steps 2000                           # flags win
    python -m zokern train --config tuned/train.json --resume                       # goes on after a kill

The output folder is one that from_pretrained loads. It also has train.json, the options; log.jsonl, a line
for every step and every judgement; and checkpoint.pt, with --save-every. A run that is resumed has the bits
of one that was not interrupted, on the same machine with as many threads.
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ..training import data, loading
from ..training.options import parse
from ..training.plot import plot
from ..training.run import LOG, OPTIONS, Run, checkpoint, entries, plain, replace

PROBLEMS = (OSError, ImportError, ValueError, TypeError, RuntimeError)


def main(argv: Sequence[str] | None = None) -> int:
    """Trains; 0 when all steps were taken, 2 when something is missing or refused, 130 when interrupted."""
    options = parse(sys.argv[1:] if argv is None else argv, __doc__)
    if options.threads:
        torch.set_num_threads(options.threads)
    say = (lambda text: None) if options.quiet else functools.partial(print, flush=True)
    try:
        with warnings.catch_warnings():
            warnings.showwarning = functools.partial(_note, say)  # of zokern: they name no line of the user's
            report = train(options, say)
    except PROBLEMS as error:
        print(f"zokern train: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        again = "--resume goes on from the last checkpoint" if options.save_every else "nothing was saved"
        print(f"\nzokern train: interrupted; {again}", file=sys.stderr)
        return 130
    print(f"{report['method']}: {report['steps']} steps; model, log and options in {report['output']}")
    if options.json:
        options.json.write_text(json.dumps(report, indent=1) + "\n")
    return 0


def train(options: argparse.Namespace, say: Any) -> dict[str, Any]:
    """Runs the command; a report as plain data. Raises what PROBLEMS names; its text says the way out."""
    started = time.perf_counter()
    if options.plot:
        loading.needed("matplotlib")  # before minutes are spent
    if Path(options.output).resolve() == Path(options.model).resolve():
        raise ValueError(f"--output is {options.output!r}, the folder of --model; name another one")
    rows, held_out, labels = _rows(options, say)
    kept = checkpoint(options)
    model, tokenizer = loading.load(options, labels)
    task = loading.make_task(options, tokenizer, labels)
    Path(options.output).mkdir(parents=True, exist_ok=True)
    if kept is None:
        (Path(options.output) / LOG).unlink(missing_ok=True)
    run = Run(options, model, task, rows, held_out, say)
    if kept is not None:
        run.resume(kept)
    count = sum(p.numel() for p in run.trained().values())
    say(f"{options.method}: lr {options.lr:.3g}, eps {options.eps:.3g}, {count:,} weights are trained")
    text = json.dumps(plain(options), indent=1) + "\n"
    replace(Path(options.output) / OPTIONS, lambda path: path.write_text(text))
    run.train(functools.partial(_progress, options.quiet, say))
    loading.save(model, tokenizer, Path(options.output))
    lines = list(entries(Path(options.output) / LOG))
    if options.plot:
        plot(lines, options.plot, f"{options.method} on {options.data.name}")
        say(f"plot {options.plot}")
    judged = [{"step": line["step"], **line["held_out"]} for line in lines if "held_out" in line]
    return {
        "method": options.method, "task": options.task, "labels": labels, "steps": run.optimizer.steps,
        "rows": {"train": len(rows), "held_out": len(held_out)}, "held_out": judged,
        "losses": [line["loss"] for line in lines if "loss" in line],
        "seconds": time.perf_counter() - started, "output": options.output, "options": plain(options),
    }  # fmt: skip


def _note(say: Any, message: Any, *place: Any) -> None:
    """Says a warning as a line of the run."""
    say(f"note: {message}")


def _rows(options: argparse.Namespace, say: Any) -> tuple[list[data.Row], list[data.Row], list[str]]:
    """Returns rows to train on, rows held out and the names of the labels. Sets options.task."""
    if options.words and options.task not in (None, "words"):
        raise ValueError(f"--words goes with --task words, and --task is {options.task!r}")
    column = None if options.task == "text" else options.label_column or "label"
    required = options.label_column is not None or options.task in ("words", "head") or bool(options.words)
    raw, labelled = data.read("--data", options.data, options.text_column, column, required)
    options.task = options.task or ("words" if options.words else "head" if labelled else "text")
    if options.task == "words" and not options.words:
        raise ValueError("--task is 'words', which needs --words LABEL=WORD for each label")
    labels = data.names_of(raw, options.data, str(column)) if labelled else []
    rows = _numbered(raw, labels, "--data", options.data)
    if options.eval_file:
        other, _ = data.read(
            "--eval-file", options.eval_file, options.text_column, column if labelled else None, labelled
        )
        held_out = _numbered(other, labels, "--eval-file", options.eval_file)
    else:
        rows, held_out = data.split(rows, options.held_out)
    kind = {"words": "label words", "head": "a classification head", "text": "language modelling"}
    names = f", labels {', '.join(labels)}" if labels else ""
    say(f"{kind[options.task]}: {len(rows)} rows to train on, {len(held_out)} held out{names}")
    return rows, held_out, labels


def _numbered(raw: Sequence[data.Raw], labels: Sequence[str], flag: str, path: Path) -> list[data.Row]:
    return data.numbered(raw, labels, flag, path) if labels else [data.Row(row.text) for row in raw]


class _Lines:
    """Says a line now and then, where tqdm is missing."""

    def __init__(self, steps: range, say: Any) -> None:
        self.steps, self.say = steps, say

    def __iter__(self) -> Any:
        every = max(1, len(self.steps) // 20)
        for number in self.steps:
            self.text = ""
            yield number
            if (number + 1) % every == 0:
                self.say(f"step {number + 1} of {self.steps.stop}: {self.text}")

    def set_postfix_str(self, text: str) -> None:
        self.text = text

    def write(self, text: str) -> None:
        self.say(text)


def _progress(quiet: bool, say: Any, steps: range) -> Any:
    """Returns a bar of tqdm, or where it is missing lines of text."""
    try:
        from tqdm.auto import tqdm
    except ImportError:
        return _Lines(steps, say)
    if quiet:
        return _Lines(steps, say)
    return tqdm(steps, desc="train", unit="step", initial=steps.start, total=steps.stop)
