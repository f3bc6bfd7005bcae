"""What does a step cost whose closure generates text? `python -m benchmarks.generate`

A closure generates 24 tokens after a prompt of 8 and rates them, as examples/reward_generate.py does. Each
evaluation has a process of its own, in which a step and two bare generations take turns. Times are those of
the processor, of one thread, so that other programs on the machine count little.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

from zokern.evaluation import EVALUATIONS

from .steps import SECONDS, Shape, Step, times


def processor(call: Callable[[], Any]) -> float:
    """Returns the seconds of the processor that a call takes."""
    start = time.process_time()
    call()
    return time.process_time() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", default="Llama-narrow", help="a name of benchmarks/models.py")
    parser.add_argument("--tokens", type=int, default=24, help="generated after a prompt of 8")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="of each evaluation's rounds")
    options = parser.parse_args()
    shape = Shape(options.model, "fp32", 1, 8, generated=options.tokens, threads=1)
    print(f"{shape}: step over two generations")
    for way in (name for name in EVALUATIONS if name != "jvp"):
        try:
            found = times(shape, Step("MeZO", way), options.seconds, processor)
        except RuntimeError as problem:
            print(f"{way}: {str(problem).splitlines()[0]:.90}")
            continue
        print(f"{way}: {found.ratio:.2f}, read by {found.evaluation}, {len(found.step)} rounds", flush=True)


if __name__ == "__main__":
    main()
