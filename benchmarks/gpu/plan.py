"""What `make gpu` does, as data: stages in order, each with its parts and its share of the time that is left
when it starts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

SECONDS = 560  # from the start of the build; one command of ten minutes holds it, and copies the results
BACKENDS = ("triton", "cuda")  # Triton first: it also compiles
# processes that share the conformance suite of a backend: Triton compiles some hundred kernels for it
SUITES = 8


@dataclass(frozen=True)
class Part:
    """A function of this package in a process of its own.

    what      says what it does, in the dry run and on the page
    call      module:function(run, **options)
    seconds   it is stopped after these, or with its stage
    quick     small tensors, whatever the run has
    """

    name: str
    what: str
    call: str
    options: Mapping[str, Any] = field(default_factory=dict)
    seconds: float = 120
    quick: bool = False


@dataclass(frozen=True)
class Stage:
    """share: of the time left; most: seconds that it may take; together: parts run side by side (nothing is
    timed)."""

    name: str
    what: str
    share: float
    parts: tuple[Part, ...]
    together: bool = False
    most: float = 600.0

    def budget(self, left: float) -> float:
        """Returns its seconds, of those that are left."""
        return max(0.0, min(self.share * left, self.most))


VERB = (
    "every verb and rounding on lists with tails, offsets, slices and numbers beyond 32 bits, "
    "three launches each, bit for bit against the CPU backend"
)
SUITE = (
    "the conformance suite of the tests, bit for bit against the reference; "
    "low-rank products with factors whose sums are exact"
)
BOUNDS = "lowrank_ with random factors within its error bound"
REPLAY = (
    "20 MeZO steps of a transformer, replayed on the CPU from (seed, step, coefficients) to the same bits"
)
GRAPHS = "axpy_, perturb and linear captured in a CUDA graph; each replay has the z of its own step"
LARGE = (
    "one tensor of more than 2^31 elements: draw, axpy_, perturb, lowrank_; windows against the CPU backend"
)
MEMCHECK = "every verb, small, under compute-sanitizer, where it is installed"


def first(backend: str) -> tuple[Part, ...]:
    """What has to be right before a time means something. Triton compiles for each type and size, so its
    lists are short."""
    of, small = {"backend": backend}, backend == "triton"
    return (
        *(
            Part(f"{backend} verbs {dtype}", VERB, "checks:verbs", {**of, "dtype": dtype}, 80, small)
            for dtype in ("bfloat16", "float32", "float16")
        ),
        Part(f"{backend} bounds", BOUNDS, "checks:bounds", of, 60),
        Part(f"{backend} replay", REPLAY, "replay:replay", of, 80),
        Part(f"{backend} graphs", GRAPHS, "graphs:graphs", of, 60),
    )


def thorough(backend: str) -> tuple[Part, ...]:
    """What is left to be checked when the times are there."""
    of, small = {"backend": backend}, backend == "triton"
    suites = [(share + 1, {**of, "share": share, "of": SUITES}) for share in range(SUITES)]
    return (
        *(
            Part(f"{backend} suite {i} of {SUITES}", SUITE, "checks:suite", own, 180, small)
            for i, own in suites
        ),
        Part(f"{backend} vectors", "2^26 values with the digests of tests/vectors", "checks:vectors", of),
        Part(f"{backend} large", LARGE, "large:large", of),
        Part(f"{backend} memcheck", MEMCHECK, "memcheck:memcheck", of, 150),
    )


def in_turns(parts: Callable[[str], tuple[Part, ...]]) -> tuple[Part, ...]:
    """Returns the parts of both backends, side by side."""
    return tuple(part for pair in zip(*map(parts, BACKENDS)) for part in pair)


def steps(*models: str, seconds: float) -> tuple[Part, ...]:
    what = "shapes, random bfloat16 weights, 16x256, 1x16 and 4x128 tokens"
    return tuple(Part(model, f"{model} {what}", "steps:steps", {"model": model}, seconds) for model in models)


FACTS = Part("facts", "names, clocks under load, driver, versions", "device:facts", {}, 30)
COMPILED = Part(
    "compiled",
    "Llama-1B: the eager loop under torch.compile, and master on the compiled model",
    "steps:compiled",
    {"model": "Llama-1B"},
    50,
)
VERBS = (
    Part(
        "products",
        "tiles of 501 and 512 rows, 2^23 elements and whole; "
        "linear at both signs against two products; sketch",
        "linear:products",
        seconds=30,
    ),
    Part(
        "dense",
        "axpy_, perturb, draw: one large tensor, both signs, K draws, dtypes and roundings, a list, sizes",
        "dense:dense",
        seconds=45,
    ),
    Part(
        "factored",
        "lowrank_ at ranks 8 to 128, 4096 x 4096 and 4096 x 14336, bfloat16",
        "factors:factored",
        seconds=25,
    ),
    Part(
        "rules",
        "update_ beside torch.optim on an eager gradient; a replay of 8 steps in one pass, beside 8 passes",
        "rules:rules",
        seconds=15,
    ),
    Part("compiled perturb", "axpy_ beside torch.compile of the eager perturb", "dense:compiled", seconds=20),
)
SEVERAL = Part(
    "several",
    "ranks under NCCL with a batch each, copies and shards of a model, against one process; with one GPU "
    "it says that this was not measured",
    "several:several",
    seconds=60,
)
COUNTERS = Part(
    "counters",
    "hardware counters of one launch of each kernel, by ncu, where it is installed",
    "counters:counters",
    seconds=60,
)
STAGES = (
    Stage("device", "what is measured on", 0.2, (FACTS,)),
    Stage(
        "correctness",
        "verbs on both backends against the CPU, graphs, and runs replayed",
        0.3,
        in_turns(first),
        together=True,
        most=90,
    ),
    Stage(
        "steps",
        "a step over its two forwards: master, paired, scratch, in place, in a graph, SubZero, LOZO, "
        "the eager loop, eager and compiled; host time, busy share, waits, memory",
        0.58,
        (*steps("Llama-1B", "OPT-1.3B", seconds=75), COMPILED),
        most=200,
    ),
    Stage(
        "verbs",
        "GB/s and share of a copy, beside eager PyTorch, torch.compile, tl.randn and addmm_",
        0.75,
        VERBS,
    ),
    Stage(
        "thorough",
        "the conformance suite, 2^31 elements, digests, compute-sanitizer",
        0.5,
        (*in_turns(thorough), SEVERAL),
        together=True,
        most=80,
    ),
    Stage(
        "more",
        "larger models, then hardware counters",
        1.0,
        (*steps("Llama-7B", "OPT-13B", seconds=60), COUNTERS),
    ),
)
