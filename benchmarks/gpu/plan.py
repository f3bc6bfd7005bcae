"""What `make gpu` does, as data: stages in order, each with its parts and its share of the time that is left
when it starts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

SECONDS = 570  # from the start of the build; one command of ten minutes holds it
BACKENDS = ("triton", "cuda")  # Triton first: it also compiles
# processes that share the conformance suite of a backend: Triton compiles some hundred kernels for it
SUITES = 8


@dataclass(frozen=True)
class Part:
    """A function of this package in a process of its own.

    what      says what it does, in the dry run and on the page
    call      module:function(run, **options)
    seconds   it is stopped after these, or with its stage
    """

    name: str
    what: str
    call: str
    options: Mapping[str, Any] = field(default_factory=dict)
    seconds: float = 120


@dataclass(frozen=True)
class Stage:
    """share: of the time left; together: parts run side by side (nothing is timed)."""

    name: str
    what: str
    share: float
    parts: tuple[Part, ...]
    together: bool = False


def correctness(backend: str) -> tuple[Part, ...]:
    of = {"backend": backend}
    return (
        *(
            Part(f"{backend} verbs {dtype}",
                "every verb and rounding on lists of millions of elements with tails, offsets, slices and "
                "numbers "
                 "beyond 32 bits, three launches each, bit for bit against the CPU backend", "checks:verbs",
                 {**of, "dtype": dtype}, 180)
            for dtype in ("bfloat16", "float32", "float16")
        ),
        *(
            Part(f"{backend} suite {share + 1} of {SUITES}",
                "the conformance suite of the tests, bit for bit against the reference; low-rank "
                 "products with factors whose sums are exact", "checks:suite",
                 {**of, "share": share, "of": SUITES}, 180)
            for share in range(SUITES)
        ),
        Part(f"{backend} bounds", "lowrank_ with random factors within its error bound", "checks:bounds", of),
        Part(f"{backend} vectors", "2^26 values with the digests of tests/vectors", "checks:vectors", of),
        Part(f"{backend} large", "one tensor of more than 2^31 elements: draw, axpy_, perturb, lowrank_; windows against the CPU backend",
             "large:large", of),
        Part(f"{backend} replay", "20 MeZO steps of a transformer, replayed on the CPU from (seed, step, coefficients) to the same bits",
             "replay:replay", of),
        Part(f"{backend} graphs", "axpy_, perturb and linear captured in a CUDA graph; each replay has the z of its own step", "graphs:graphs", of),
        Part(f"{backend} memcheck", "every verb, small, under compute-sanitizer, where it is installed",
            "memcheck:memcheck", of, 150),
    )  # fmt: skip


STAGES = (
    Stage("device", "what is measured on", 0.2,
        (Part("facts", "names, clocks under load, driver, versions", "device:facts", {}, 60),)),
    Stage("correctness", "every verb on both backends against the CPU, and what depends on it", 0.45,
          tuple(part for pair in zip(*map(correctness, BACKENDS)) for part in pair), together=True),
    Stage("verbs", "GB/s and share of a copy, beside eager PyTorch, torch.compile, tl.randn and addmm_", 0.45,
        (
        Part("dense", "axpy_, perturb, draw: one large tensor, both signs, K draws, dtypes and roundings, a list, sizes", "dense:dense", {}, 100),
        Part("factored", "lowrank_ at ranks 8 to 128, 4096 x 4096 and 4096 x 14336, bfloat16",
            "factors:factored", {}, 80),
        Part("compiled", "axpy_ beside torch.compile of the eager perturb", "dense:compiled", {}, 75),
        Part("counters", "hardware counters of one launch of each kernel, by ncu, where it is installed",
            "counters:counters", {}, 60),
        Part("rules", "update_ beside torch.optim on an eager gradient; a replay of 8 steps in one pass, beside 8 passes", "rules:rules", {}, 30),
        Part("products", "linear at both signs on one and two streams, against two products; sketch",
            "linear:products", {}, 30),
    )),
    Stage("steps", "a step over its two forwards: scratch, in place, paired, master, SubZero, the eager loop; memory and kernels", 1.0, tuple(
        Part(model, f"{model} shapes, random bfloat16 weights, 16x256, 1x16, 4x128 and 16x512 tokens",
            "steps:steps", {"model": model}, 150)
        for model in ("OPT-1.3B", "Llama-7B", "OPT-13B")
    )),
)  # fmt: skip
