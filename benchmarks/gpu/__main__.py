"""`python -m benchmarks.gpu`: check and measure on this machine's GPU. `make gpu` builds first. What is
printed last compares each prediction of benchmarks/results/predicted.md with what was measured.

Exit code 0: everything that was checked is right, or there is no GPU and nothing was done but saying so. 1: a
check failed, a part crashed, or a part of the correctness stage was not through in its time. 2: the arguments
make no sense.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path

from . import use_tree
from .plan import SECONDS, STAGES, Stage

RESERVE = 5.0  # seconds kept for writing


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def why_not() -> str | None:
    """None where there is a device to work on; else what is missing."""
    import torch

    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA"
    if not torch.cuda.is_available():
        return "torch finds no CUDA device; check CUDA_VISIBLE_DEVICES and the NVIDIA driver"
    return None


def tell(stages: tuple[Stage, ...], seconds: float, reason: str) -> None:
    """The dry run: everything that would be done, and why it is not."""
    from zokern import backends

    say(
        f"make gpu would take up to {seconds:.0f} s and do this; nothing is run and nothing is written: "
        f"{reason}"
    )
    left = seconds
    for stage in stages:
        budget = stage.budget(left)
        longest = sum(part.seconds for part in stage.parts) if not stage.together else budget
        left -= min(budget, longest)
        say(
            f"\nstage {stage.name}: {stage.what} (up to {min(budget, longest):.0f} "
            f"s{', parts side by side' if stage.together else ''})"
        )
        for part in stage.parts:
            backend = part.options.get("backend")
            off = backends.why_off(backend) if backend else None
            say(f"  {part.name}: {part.what} (up to {min(part.seconds, budget):.0f} s)")
            say(f"    not run: {f'backend {backend} is off: {off}' if off else reason}")
    say("\nresults would go to benchmarks/results/<device>/: gpu.json, README.md, verbs.png, steps.png")


def run(
    stages: tuple[Stage, ...], seconds: float, out: Path | None, options: list[str], quick: bool, workers: int
) -> int:
    """Every stage, the record written after each part; 1 where something is wrong."""
    from . import pool
    from .page import PREDICTED
    from .record import Record

    begun, record, whole = (
        time.monotonic(),
        Record(quick),
        {stage.name for stage in STAGES} <= {stage.name for stage in stages},
    )
    stop = begun + seconds - RESERVE
    with tempfile.TemporaryDirectory() as scratch:
        for stage in stages:
            budget = stage.budget(stop - time.monotonic())
            say(
                f"[{time.monotonic() - begun:5.0f} s] stage {stage.name}: {len(stage.parts)} parts, up to "
                f"{budget:.0f} s"
            )
            for outcome in pool.run_parts(
                stage.parts, budget, Path(scratch), options, workers if stage.together else 1
            ):
                record.add(stage.name, outcome)
                record.write(out or record.folder(whole))
                checks, wrong = sum(kind == "check" for kind, _ in outcome.lines), outcome.failures
                say(
                    f"[{time.monotonic() - begun:5.0f} s]   {outcome.part.name}: {outcome.how} in "
                    f"{outcome.seconds:.0f} s"
                    + (f", {checks - len(wrong)} of {checks} checks passed" if checks else "")
                    + (f" ({outcome.why})" if outcome.why else "")
                )
                for kind, fields in outcome.lines:
                    if kind == "check" and fields["problem"]:
                        say(f"    FAILED {fields['name']}: {fields['problem'][:300]}")
                    elif kind == "skip":
                        say(f"    not run: {fields['name']}: {fields['why']}")
    print("{:66} {:>9} {:>9}  {}".format(*PREDICTED))
    for row in record.predictions():
        print("{:66} {:>9} {:>9}  {}".format(*row))
    print()
    for row in record.goals():
        print("{:78} {:>10} {:>10}  {}".format(*row))
    wrong = record.failures()
    passed = sum(check["problem"] is None for check in record.checks)
    print(
        f"{passed} of {len(record.checks)} checks passed; {len(wrong)} failures; "
        f"{out or record.folder(whole)}"
    )
    return 1 if wrong else 0


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="make gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--out",
        type=Path,
        help="folder of the results; otherwise benchmarks/results/<device>/, "
        "or build/gpu/ with --quick or --only",
    )
    parser.add_argument(
        "--quick", action="store_true", help="small tensors and few rounds: does it run, not how fast"
    )
    parser.add_argument("--dry-run", action="store_true", help="say what would be done, and do nothing")
    parser.add_argument(
        "--only",
        metavar="STAGE",
        action="append",
        choices=[s.name for s in STAGES],
        help="this stage (may be repeated)",
    )
    parser.add_argument(
        "--seconds", type=float, default=SECONDS, help=f"all stages together (default {SECONDS})"
    )
    parser.add_argument(
        "--since", type=float, help="when the clock started, in seconds since 1970 (make: before the build)"
    )
    parser.add_argument(
        "--workers", type=int, default=max(1, min(8, (os.cpu_count() or 2) // 2)), help="parts side by side"
    )
    given = parser.parse_args(argv)
    chosen = tuple(s for s in STAGES if given.only is None or s.name in given.only or s.name == "device")
    seconds = given.seconds - (max(0.0, time.time() - given.since) if given.since else 0.0)
    use_tree()
    reason = "--dry-run was asked for" if given.dry_run else why_not()
    if reason is not None:
        tell(chosen, seconds, reason)
        return 0
    return run(
        chosen,
        seconds,
        given.out,
        ["--device", "cuda", *(["--quick"] if given.quick else [])],
        given.quick,
        given.workers,
    )


if __name__ == "__main__":
    raise SystemExit(main())
