"""The command line: `zokern COMMAND`, or `python -m zokern COMMAND`.

A command is a module with `main(argv) -> int` and options of its own. It is imported when it is asked for. The demo is a
folder of the source tree, examples/demo, and no part of an installed wheel.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from pathlib import Path

from . import __version__

COMMANDS = {
    "info": "versions, backends and, for each that is off, why",
    "demo": "fine-tune a small language model on film reviews with a method, before and after",
}

ROOT = Path(__file__).resolve().parents[1]


def main(argv: list[str] | None = None) -> int:
    """Runs one command; its exit status."""
    parser = argparse.ArgumentParser(prog="zokern", description="Zeroth-order fine-tuning kernels.")
    parser.add_argument("--version", action="version", version=f"zokern {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, summary in COMMANDS.items():
        # The options, --help among them, are the command's own to read.
        commands.add_parser(name, help=summary, add_help=False)
    arguments = sys.argv[1:] if argv is None else argv
    command = parser.parse_args(arguments[:1]).command
    if command != "demo":
        return importlib.import_module(f".{command}", __package__).main(arguments[1:]) or 0
    if not (ROOT / "examples" / "demo").is_dir():
        print("zokern demo: it is in examples/demo of the source tree; there run `make demo`", file=sys.stderr)
        return 2
    sys.path.insert(0, str(ROOT))
    return importlib.import_module("examples.demo").main(arguments[1:])
