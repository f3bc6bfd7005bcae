"""Times what a step costs over its bare forwards if the products themselves cost next to nothing.

A narrow Llama of 28 layers reads 8 tokens on one thread: the times are Python, launches and bookkeeping.
A closure that generates 24 tokens runs the model 24 times for each loss.
"""

from __future__ import annotations

from dataclasses import replace

import pytest

from .bench_step import MEZO
from .steps import Shape, Step, bench

NARROW = Shape("Llama-narrow", "fp32", 1, 8, threads=1)
GENERATION = Shape("OPT-125M", "fp32", 1, 8, generated=24, threads=1)


def bench_host(benchmark, report) -> None:
    pytest.importorskip("transformers")
    bench(benchmark, report, "host time, one thread", NARROW, [*MEZO, Step("SubZero")])


def bench_generate(benchmark, report) -> None:
    pytest.importorskip("transformers")
    shape = replace(GENERATION, model="OPT-tiny") if report.quick else GENERATION
    bench(benchmark, report, "generation in the closure, one thread", shape, [Step("MeZO")])
