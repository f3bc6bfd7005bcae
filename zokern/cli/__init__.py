"""The command line: `zokern COMMAND`, or `python -m zokern COMMAND`; without a command, what there is.

A command is a module with `main(argv) -> int` and options of its own. It is imported when it is asked for.
The demo is a folder of the source tree, examples/demo, and no part of an installed wheel.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from pathlib import Path
from typing import Any

from .. import __version__

COMMANDS = {
    "info": ("zokern.cli.info", "versions, backends and, for each that is off, why"),
    "methods": (
        "zokern.cli.methods",
        "the table of methods, or one method's formula, paper, arguments and cost",
    ),
    "tune": (
        "zokern.cli.tune",
        "find eps and lr of a method for a model and a text, from a few dozen forwards",
    ),
    "train": (
        "zokern.cli.train",
        "fine-tune a transformers model folder on the rows of a CSV, JSONL or text file",
    ),
    "bench": (
        "zokern.cli.bench",
        "time steps and kernels on this machine, in about a minute",
    ),
    "demo": (
        "examples.demo",
        "fine-tune a small language model on film reviews with a method, before and after",
    ),
}
ROOT = Path(__file__).resolve().parents[2]


def find(module: str) -> Any:
    """Returns a module by name. FileNotFoundError:
    it is in the source tree, and this is an installed wheel."""
    folder, _, rest = module.partition(".")
    if folder != "zokern":
        if not (ROOT / folder / rest.replace(".", "/")).exists():
            raise FileNotFoundError(
                f"it is in {folder}/{rest.partition('.')[0]} of the source tree; there run `make demo`"
            )
        if str(ROOT) not in sys.path:
            sys.path.insert(0, str(ROOT))
    return importlib.import_module(module)


def state() -> str:
    """Returns a line that says which backends run here."""
    from .. import backends  # imports torch, which --version and --help do without

    off = {name: backends.why_off(name) for name in backends.BACKENDS}
    on = [name for name, why in off.items() if why is None]
    rest = [name for name, why in off.items() if why is not None]
    return f"backends: {', '.join(on)}" + (
        f"; off: {', '.join(rest)} (`zokern info` says why)" if rest else ""
    )


def main(argv: list[str] | None = None) -> int:
    """Runs one command; its exit status. Without one, prints the commands and the state of the backends."""
    try:
        status = _run(sys.argv[1:] if argv is None else argv)
        sys.stdout.flush()
        return status
    except BrokenPipeError:  # what reads the lines has ended, as in `zokern methods | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def _run(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="zokern", description="Fine-tuning with forward passes only.")
    parser.add_argument("--version", action="version", version=f"zokern {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    for name, (_, summary) in COMMANDS.items():
        # The options, --help among them, are the command's own to read.
        commands.add_parser(name, help=summary, add_help=False)
    command = parser.parse_args(arguments[:1]).command
    if command is None:
        print(f"{parser.format_help()}\nzokern COMMAND --help lists a command's options.\n{state()}")
        return 0
    try:
        module = find(COMMANDS[command][0])
    except FileNotFoundError as error:
        print(f"zokern {command}: {error}", file=sys.stderr)
        return 2
    return module.main(arguments[1:]) or 0
