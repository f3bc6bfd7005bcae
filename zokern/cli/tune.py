"""`python -m zokern tune`: eps and lr of a method for a model and a text, with a report and a plot.

    python -m zokern tune --model FOLDER --data lines.txt --method SubZero
    python -m zokern tune                     # in a source tree: the demo's model and task

FOLDER holds a causal language model as transformers' save_pretrained writes it; it may be a name on the hub.
The loss is the model's own on the lines of the text, one example a line.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import itertools
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from .. import methods
from ..tuning import tune
from . import find

NAMES = {name.lower(): name for name in methods.METHODS}


def main(argv: Sequence[str] | None = None) -> int:
    """Prints and draws the report; 2 when something is missing or the losses show no slope."""
    options = _parser().parse_args(argv)
    if options.threads:
        torch.set_num_threads(options.threads)
    say = (lambda text: None) if options.quiet else functools.partial(print, flush=True)
    try:
        if (options.model is None) != (options.data is None):
            raise ValueError("--model and --data go together: a model and the text that it shall learn")
        model, closures = _demo(options) if options.model is None else _text(options)
        method: Any = methods.METHODS[options.method]
        found = tune(method(model, seed=options.seed), closures, probes=options.probes, say=say)
    except (OSError, ImportError, ValueError) as error:
        print(f"zokern tune: {error}", file=sys.stderr)
        return 2
    print(f"{options.method}\n{found}")
    if options.json:
        options.json.write_text(
            json.dumps({"method": options.method, **dataclasses.asdict(found)}, indent=1) + "\n"
        )
    if options.plot:
        found.plot(options.plot)
        print(f"plot {options.plot}")
    return 0


def _text(options: argparse.Namespace) -> tuple[Any, list[Callable[[], Any]]]:
    """Returns the model of a folder, and the losses of batches of a text."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(options.model)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=getattr(torch, options.dtype)).eval()
    lines = [line.strip() for line in options.data.read_text(encoding="utf-8").splitlines() if line.strip()]
    if not lines:
        raise ValueError(f"--data is {options.data}, which holds no line of text")
    endless, closures = itertools.cycle(lines), list[Callable[[], Any]]()
    for _ in range(options.batches):
        rows = tokenizer(list(itertools.islice(endless, options.batch)), return_tensors="pt", padding=True)
        labels = rows["input_ids"].masked_fill(rows["attention_mask"] == 0, -100)
        closures.append(functools.partial(_loss, model, {**rows, "labels": labels}))
    return model, closures


def _loss(model: Any, batch: dict[str, Any]) -> Any:
    return model(**batch).loss


def _demo(options: argparse.Namespace) -> tuple[Any, list[Callable[[], Any]]]:
    """Returns the demo's model, and the losses of batches of its training rows."""
    demo = find("examples.demo")
    model, words, rows = demo.task()
    batches = demo.Batches(rows.train, options.batch, options.seed)
    return model.to(getattr(torch, options.dtype)), [
        demo.Task(model, words, batches.next()) for _ in range(options.batches)
    ]


def _parser() -> argparse.ArgumentParser:
    parse = argparse.ArgumentParser(
        prog="zokern tune", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parse.add_argument
    add("--model", help="folder or hub name of a causal language model (default: the demo's)")
    add("--data", type=Path, metavar="FILE", help="text, one example a line (default: the demo's)")
    add("--method", type=_method, default="MeZO", help=f"{', '.join(NAMES.values())} (default %(default)s)")
    add(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        default="float32",
        help="of the weights (default %(default)s)",
    )
    add("--batch", type=int, default=8, help="rows of a batch (default %(default)s)")
    add("--batches", type=int, default=8, help="batches that lr is told from (default %(default)s)")
    add("--probes", type=int, default=8, help="draws that lr is told from (default %(default)s)")
    add("--seed", type=int, default=0, help="of the draws (default %(default)s)")
    add("--threads", type=int, help="threads of torch (default: torch's own choice)")
    add("--json", type=Path, metavar="FILE", help="write the report")
    add("--plot", type=Path, metavar="FILE", help="draw it (needs matplotlib)")
    add("--quiet", action="store_true", help="print the report alone")
    return parse


def _method(text: str) -> str:
    if (name := NAMES.get(text.lower())) is None:
        raise argparse.ArgumentTypeError(f"{text} is no method; expected one of {', '.join(NAMES.values())}")
    return name
