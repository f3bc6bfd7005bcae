"""One part in a process of its own: `python -m benchmarks.gpu.worker checks:suite '{"backend": "cuda"}'
LINES`.

What the part says is appended to LINES as JSON, line by line, so that a process that is stopped leaves what
it had found.
"""

from __future__ import annotations

import argparse
import importlib
import json
import time
import warnings
from pathlib import Path

from . import use_tree


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.gpu.worker", description=__doc__)
    parser.add_argument("call", help="module of this package and function: checks:suite")
    parser.add_argument("options", type=json.loads, help="the function's arguments, JSON")
    parser.add_argument("lines", type=Path)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--seconds", type=float, default=3600.0)
    given = parser.parse_args(argv)
    until = time.monotonic() + given.seconds
    use_tree()
    from .run import Run

    warnings.simplefilter("ignore")
    module, function = given.call.split(":")
    with open(given.lines, "a", buffering=1) as file:

        def say(kind: str, **fields: object) -> None:
            file.write(json.dumps([kind, fields]) + "\n")

        run = Run(say, given.device, given.quick, until)
        getattr(importlib.import_module(f"{__package__}.{module}"), function)(run, **given.options)
        say("end")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
