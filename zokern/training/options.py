"""The options of `python -m zokern train`: flags, and a file of them, over which flags win."""

from __future__ import annotations

import argparse
import importlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from .. import methods
from ..evaluation import EVALUATIONS

NAMES = {name.lower(): name for name in methods.METHODS}
LISTS = {"words", "set"}  # options that take several values


def parse(argv: Sequence[str], description: str | None) -> argparse.Namespace:
    """Returns the options. Prints a problem and exits with 2 where one is wrong, by the flag's name."""
    parser = _parser(description)
    only = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    only.add_argument("--config", type=Path)
    config = only.parse_known_args(argv)[0].config
    if config is not None:
        try:
            given = flags(config, {a.dest for a in parser._actions} - {"config", "help"})
        except ValueError as error:
            parser.error(str(error))
        argv = [*given, *argv]
    options = parser.parse_args(argv)
    for flag in ("model", "data", "output"):
        if getattr(options, flag) is None:
            parser.error(f"--{flag} is missing; give it as a flag or in the --config file")
    if options.words and options.template is None:
        parser.error("--words needs a --template, such as '{} This movie is'")
    for flag in ("plot", "json"):
        path = getattr(options, flag)
        if path is not None and not path.absolute().parent.is_dir():
            parser.error(f"--{flag} is {str(path)!r}: the folder {path.absolute().parent} does not exist")
    return options


def flags(path: Path, known: set[str]) -> list[str]:
    """Returns the entries of a TOML or JSON file as flags, so that they are checked as flags are.

    A list gives several values, a table gives NAME=VALUE each, true gives the flag alone; null and false
    give nothing. Raises ValueError for what is no such file, and for an entry that is no option."""
    if not path.is_file():
        raise ValueError(f"--config is {str(path)!r}: there is no such file")
    entries = _entries(path)
    found: list[str] = []
    for name, value in entries.items():
        if name.replace("-", "_") not in known:
            shown = ", ".join(sorted(one.replace("_", "-") for one in known))
            raise ValueError(f"--config: {path.name} has {name!r}; expected some of {shown}")
        flag = f"--{name.replace('_', '-')}"
        if isinstance(value, dict):
            value = [f"{key}={_word(one)}" for key, one in value.items()]
        if value is None or value is False or value == []:
            continue
        if value is True:
            found.append(flag)
        elif isinstance(value, list):
            pairs = ["=".join(map(_word, one)) if isinstance(one, list) else _word(one) for one in value]
            found += [flag, *pairs]
        else:
            found.append(f"{flag}={_word(value)}")
    return found


def _entries(path: Path) -> dict[str, Any]:
    kind = path.suffix.lower()
    if kind not in (".toml", ".json"):
        raise ValueError(f"--config is {str(path)!r}; expected a name that ends with .toml or .json")
    decode: Any = json.loads
    if kind == ".toml":
        try:
            decode = importlib.import_module("tomllib").loads
        except ImportError:
            raise ValueError(
                f"--config is {str(path)!r}, and Python reads TOML from 3.11 on; write it as JSON"
            ) from None
    try:
        entries = decode(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"--config is {str(path)!r}, which cannot be read: {error}") from error
    if not isinstance(entries, dict):
        raise ValueError(f"--config is {str(path)!r}; expected an object of options")
    return entries


def _word(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _parser(description: str | None) -> argparse.ArgumentParser:
    parse = argparse.ArgumentParser(
        prog="zokern train", description=description, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    _data_options(parse.add_argument_group("what is trained").add_argument)
    _method_options(parse.add_argument_group("how").add_argument)
    _run_options(parse.add_argument_group("the run").add_argument)
    return parse


def _data_options(add: Any) -> None:
    add("--model", metavar="FOLDER", help="a transformers model, as save_pretrained writes it")
    add("--data", type=Path, metavar="FILE", help=".csv, .tsv or .jsonl with a text column, or .txt")
    add("--text-column", default="text", metavar="NAME", help="default: %(default)s")
    add("--label-column", metavar="NAME", help="default: label, if the file has it")
    add(
        "--task",
        choices=("words", "head", "text"),
        help="label words, a classification head, or the text alone (default: words with --words, else head "
        "where there are labels)",
    )
    add("--words", nargs="+", default=[], metavar="LABEL=WORD", help="the word that stands for each label")
    add("--template", help="of a row with label words: {} is the text, and the word follows the end")
    add("--max-tokens", type=_count, default=256, metavar="N", help="of a row (default %(default)s)")
    add("--eval-file", type=Path, metavar="FILE", help="rows to judge by")
    add(
        "--held-out",
        type=_share,
        default=0.1,
        metavar="SHARE",
        help="of the rows, to judge by, without an --eval-file (default %(default)s)",
    )


def _method_options(add: Any) -> None:
    add(
        "--method",
        type=_method,
        default="MeZO",
        metavar="NAME",
        help="`zokern methods` (default %(default)s)",
    )
    add("--lr", type=_lr, help="a number, or auto: zokern.tune finds it (default: the method's)")
    add("--eps", type=_positive, help="half-width of the difference, in weights (default: the method's)")
    add(
        "--set",
        nargs="+",
        type=_setting,
        default=[],
        metavar="NAME=VALUE",
        help="further arguments of the method, such as rank=16 weight_decay=0.1",
    )
    add("--evaluation", choices=tuple(EVALUATIONS), help="default: the method's")
    add("--lora", type=_count, metavar="RANK", help="train LoRA adapters of this rank (needs peft)")
    add("--steps", type=_count, default=1000, help="default %(default)s")
    add("--schedule", choices=("constant", "linear"), default="constant", help="of lr; linear falls to 0")
    add("--batch-size", type=_count, default=8, metavar="ROWS", help="default %(default)s")
    add("--seed", type=int, default=0, help="of draws, batches and new weights (default %(default)s)")
    add(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        default="float32",
        help="of the weights (default %(default)s)",
    )
    cuda = torch.cuda.is_available()
    add("--device", type=_device, default="cuda" if cuda else "cpu", help="default here: %(default)s")
    add("--threads", type=_count, help="of torch (default: torch's own choice)")


def _run_options(add: Any) -> None:
    add("--output", metavar="FOLDER", help="of the tuned model, which from_pretrained loads")
    add("--eval-every", type=_number, default=0, metavar="STEPS", help="judge so often (default: the ends)")
    add("--save-every", type=_number, default=0, metavar="STEPS", help="write a checkpoint (default: never)")
    add("--resume", action="store_true", help="go on from the checkpoint in --output, to the same bits")
    add("--config", type=Path, metavar="FILE", help="options as .toml or .json; flags win")
    add("--plot", type=Path, metavar="FILE", help="draw loss and accuracy (needs matplotlib)")
    add("--json", type=Path, metavar="FILE", help="write the report")
    add("--quiet", action="store_true", help="print the last line alone")


def _number(text: str) -> int:
    if (number := int(text)) < 0:
        raise argparse.ArgumentTypeError(f"is {text}; expected a whole number from 0 up")
    return number


def _count(text: str) -> int:
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"is {text}; expected a whole number from 1 up")
    return number


def _share(text: str) -> float:
    if not 0.0 <= (number := float(text)) < 1.0:
        raise argparse.ArgumentTypeError(f"is {text}; expected a share from 0 up, below 1")
    return number


def _positive(text: str) -> float:
    if not 0.0 < (number := float(text)) < float("inf"):
        raise argparse.ArgumentTypeError(f"is {text}; expected a number above 0")
    return number


def _lr(text: str) -> float | str:
    try:
        return text if text == "auto" else _positive(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"is {text!r}; expected auto, or a number above 0") from None


def _method(text: str) -> str:
    if (name := NAMES.get(text.lower())) is None:
        raise argparse.ArgumentTypeError(f"is {text!r}; expected one of {', '.join(NAMES.values())}")
    return name


def _setting(text: str) -> tuple[str, Any]:
    name, found, value = text.partition("=")
    if not (found and name and value):
        raise argparse.ArgumentTypeError(f"has {text!r}; expected NAME=VALUE")
    try:
        return name, json.loads(value)
    except json.JSONDecodeError:
        return name, value


def _device(text: str) -> str:
    try:
        device = torch.device(text)
    except RuntimeError:
        raise argparse.ArgumentTypeError(f"is {text!r}; expected cpu, cuda or cuda:N") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise argparse.ArgumentTypeError(
            f"is {text!r}, and torch finds no GPU here; leave it out, or name cpu"
        )
    return text
