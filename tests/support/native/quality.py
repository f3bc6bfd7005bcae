"""Enumerates the map from words to normals and holds it to its bounds: `python
tests/support/native/quality.py [sector_step]`.

With sector_step 1 (the default) all 2^32 words are counted, about 40 s on two cores; with a larger one, every
sector_step-th of the 4096 sectors, each with all 2^20 radii. Prints the table of docs/stream.md, where the KS
distance is that at every value, and fails where a figure leaves its bound.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

from header import compile_tool

TAILS = ("3.0", "4.0", "4.5", "5.0")

# figure -> the bound on its absolute value over all 2^32 words, at least what is measured
BOUNDS = {
    "moment_1": 1e-6, "moment_2": 1e-5, "moment_3": 2e-5, "moment_4": 1e-4, "moment_5": 5e-4,
    "moment_6": 3e-4, "ks": 1e-4,
    "tail_3.0": 1e-3, "tail_4.0": 5e-3, "tail_4.5": 2e-2, "tail_5.0": 1e-1,
}  # fmt: skip
JOINT = {"product": 1e-8, "squares": 1e-4}


def measure(sector_step: int = 1, threads: int | None = None) -> dict[str, float]:
    """Every figure that quality.cpp prints, by name."""
    with tempfile.TemporaryDirectory() as folder:
        tool = compile_tool("quality.cpp", Path(folder) / "quality", "-O3", "-march=native", "-pthread")
        arguments = [str(tool), str(threads or os.cpu_count() or 1), str(sector_step)]
        lines = subprocess.run(arguments, check=True, capture_output=True, text=True).stdout.splitlines()
    return {name: float(value) for name, value in (line.split() for line in lines)}


def problems(figures: dict[str, float], slack: float = 1.0) -> list[str]:
    """The figures outside their bounds, each as a sentence;
    ``slack`` widens the bounds for a subset of the words."""
    bounds = {f"{side}_{name}": bound for side in ("sin", "cos") for name, bound in BOUNDS.items()} | JOINT
    found = [
        f"{name} is {figures[name]:.3g}, expected within {bound * slack:.3g}"
        for name, bound in bounds.items()
        if not abs(figures[name]) <= bound * slack
    ]
    if figures["broken_radii"]:
        found.append(f"{figures['broken_radii']:.0f} of 2^20 radii are not positive numbers, expected 0")
    if not 5.395 < figures["largest_value"] < 5.3956:
        found.append(f"the largest |z| is {figures['largest_value']:.6f}, expected 5.3955")
    return found


def main() -> int:
    figures = measure(int(sys.argv[1]) if len(sys.argv) > 1 else 1)
    rows = [
        ("mean", "moment_1"),
        ("variance / 1 - 1", "moment_2"),
        ("third moment", "moment_3"),
        ("fourth / 3 - 1", "moment_4"),
    ]
    rows += [("fifth moment", "moment_5"), ("sixth / 15 - 1", "moment_6")]
    rows += [("KS distance at multiples of 2^-10", "ks")]
    rows += [(f"mass beyond {tail} / normal - 1", f"tail_{tail}") for tail in TAILS]
    print(
        f"| over {figures['words']:.0f} words | r sin phi (even elements) | r cos phi (odd elements) |\n"
        "|---|---|---|"
    )
    for label, name in rows:
        print(f"| {label} | {figures['sin_' + name]:.1e} | {figures['cos_' + name]:.1e} |")
    print(f"\nE[z w] {figures['product']:.1e}, E[z^2 w^2] - 1 {figures['squares']:.1e}")
    print(
        f"radius from {figures['smallest_radius']:.6g} to {figures['largest_radius']:.6f}, max |z| "
        f"{figures['largest_value']:.6f}"
    )
    print(f"radius indices without a positive root: {figures['broken_radii']:.0f} of 1048576")
    found = problems(figures)
    for problem in found:
        print(f"quality: {problem}", file=sys.stderr)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
