"""benchmarks/gpu without a GPU: its checks run on the CPU and reject wrong backends, its clockwork runs with
made-up times and parts.

The device is "cpu" and the backend the CPU's own, one with a mistake, or Triton's interpreter; the judge is
the CPU backend as it is there. A made-up record is written to a temporary folder and nowhere else.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import conformance
import pytest
import torch

import zokern
from zokern import backends

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
from wrong import Patched  # noqa: E402
from wrong.addressing import ClockOnce  # noqa: E402

import benchmarks.gpu  # noqa: E402
from benchmarks import eager, predict_page, predict_step, predicted  # noqa: E402
from benchmarks.gpu import __main__ as command  # noqa: E402
from benchmarks.gpu import (  # noqa: E402
    checks,
    counters,
    dense,
    device,
    factors,
    graphs,
    large,
    linear,
    memcheck,
    page,
    pool,
    replay,
    rules,
    several,
    steps,
    timing,
    trace,
)
from benchmarks.gpu.goals import GOALS  # noqa: E402
from benchmarks.gpu.plan import SECONDS, STAGES, Part, Stage  # noqa: E402
from benchmarks.gpu.pool import Outcome  # noqa: E402
from benchmarks.gpu.record import Record  # noqa: E402
from benchmarks.gpu.run import Run, judge  # noqa: E402
from benchmarks.gpu.verbs import VERBS  # noqa: E402
from benchmarks.measure import Case, Group  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results"
RIGHT = judge()


@pytest.fixture(autouse=True)
def one_thread():
    """Small tensors: a second thread would only be waited for."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Said:
    """A Run's ear."""

    def __init__(self) -> None:
        self.lines: list[tuple[str, dict]] = []

    def __call__(self, kind: str, **fields) -> None:
        json.dumps(fields)  # what cannot be written is no line
        self.lines.append((kind, fields))

    def of(self, kind: str) -> list[dict]:
        return [fields for one, fields in self.lines if one == kind]

    @property
    def figures(self) -> dict[str, float]:
        return {fields["key"]: fields["value"] for fields in self.of("figure")}

    def problems(self) -> dict[str, str | None]:
        return {fields["name"]: fields["problem"] for fields in self.of("check")}


@pytest.fixture
def said() -> Said:
    return Said()


@pytest.fixture
def quick(said) -> Run:
    return Run(said, "cpu", quick=True)


# Backends with a mistake, around the right one --------------------------------------------------------------


class Around:
    """The CPU backend, whose calls can be spoilt."""

    name = "cpu"

    def __init__(self) -> None:
        self.calls = 0

    def spoil(self, written: list[torch.Tensor]) -> None:
        """Changes what a call wrote."""

    def draw(self, batch, noise):
        RIGHT.draw(batch, noise)
        self.after(batch.tensors)

    def axpy_(self, batch, *rest):
        count = RIGHT.axpy_(batch, *rest)
        self.after(batch.tensors)
        return count

    def update_(self, batch, *rest):
        count = RIGHT.update_(batch, *rest)
        self.after(batch.tensors)
        return count

    def perturb(self, batch, noise, scales, outs):
        RIGHT.perturb(batch, noise, scales, outs)
        self.after(outs[-1])

    def lowrank_(self, batch, *rest):
        count = RIGHT.lowrank_(batch, *rest)
        self.after(batch.tensors)
        return count

    def project(self, projection):
        found = RIGHT.project(projection)
        self.after([found.amounts])
        return found

    def linear(self, *given):
        found = RIGHT.linear(*given)
        self.after(found)
        return found

    def after(self, written) -> None:
        self.calls += 1
        self.spoil([t for t in written if t.numel()])


class LastBit(Around):
    """The last element of the last tensor is off by its last bit: the least that can be wrong."""

    def spoil(self, written) -> None:
        last = written[-1][(-1,) * written[-1].dim()]
        bits = torch.int32 if last.dtype == torch.float32 else torch.int16
        last.view(bits).bitwise_xor_(1)


class Race(LastBit):
    """Right at first: only the later launches differ."""

    def spoil(self, written) -> None:
        if self.calls > 1:
            super().spoil(written)


class Beside(Around):
    """One element after the end of a tensor is written."""

    def spoil(self, written) -> None:
        first = written[0]
        if first.storage_offset() + first.numel() < first.untyped_storage().nbytes() // first.element_size():
            first.as_strided((1,), (1,), first.storage_offset() + first.numel()).zero_()


class Wraps(Around):
    """Element numbers start again behind a border, as an index of too few bits does."""

    def __init__(self, border: int) -> None:
        super().__init__()
        self.border = border

    def parts(self, tensor, span):
        flat = tensor.view(-1)
        cut = max(0, min(flat.numel(), self.border - span.first))
        return [(flat[:cut], span), (flat[cut:], span._replace(first=max(0, span.first - self.border)))]

    def batches(self, batch):
        (tensor,), (span,) = batch.tensors, batch.spans
        return [batch._replace(tensors=[part], spans=[span]) for part, span in self.parts(tensor, span)]

    def draw(self, batch, noise):
        for part in self.batches(batch):
            RIGHT.draw(part, noise)

    def axpy_(self, batch, *rest):
        return sum(RIGHT.axpy_(part, *rest) for part in self.batches(batch))

    def perturb(self, batch, noise, scales, outs):
        sides = [[part for part, _ in self.parts(out, batch.spans[0])] for (out,) in outs]
        for i, part in enumerate(self.batches(batch)):
            RIGHT.perturb(part, noise, scales, [[side[i]] for side in sides])

    def lowrank_(self, batch, *rest):
        return sum(RIGHT.lowrank_(part, *rest) for part in self.batches(batch))


# Correctness: the checks ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", VERBS)
def test_verb_passes_and_a_bit_is_noticed(by_tiles, name) -> None:
    """Every line of VERBS, in turns over the dtypes: the right backend passes, the last bit of the last
    element that it wrote does not."""
    dtype = list(checks.DTYPES.values())[list(VERBS).index(name) % 3]
    if name == "linear, factored":  # float32 takes torch's own product, and no verb
        dtype = torch.bfloat16
    checks.check_verb(name, RIGHT, "cpu", dtype, True, repeats=1)
    with pytest.raises(AssertionError, match=r"launch 1: \d+ of \d+ differ, the first at"):
        checks.check_verb(name, LastBit(), "cpu", dtype, True)


def test_a_race_is_seen_in_a_later_launch() -> None:
    with pytest.raises(AssertionError, match="launch 2: 1 of"):
        checks.check_verb("draw normal", Race(), "cpu", torch.float32, True)


def test_a_write_beside_a_tensor_is_noticed() -> None:
    with pytest.raises(AssertionError, match="differ"):
        checks.check_verb("axpy_ normal K=1", Beside(), "cpu", torch.bfloat16, True, repeats=1)


def test_every_verb_of_a_backend_has_a_line() -> None:
    """A verb that is added to the contract has to be added here too."""
    contract = [
        name
        for name, what in vars(backends.Backend).items()
        if callable(what) and name[0] != "_" and name != "philox4x32"
    ]
    assert contract and all(any(line.startswith(verb) for line in VERBS) for verb in contract), (
        contract,
        list(VERBS),
    )


def test_a_part_tells_every_verdict(quick, said, monkeypatch) -> None:
    monkeypatch.setattr(backends, "get", lambda name: LastBit() if name == "wrong" else RIGHT)
    monkeypatch.setattr(backends, "why_off", lambda name: None)
    checks.verbs(quick, "wrong", "float32", ["draw normal", "sketch"])
    assert len(said.problems()) == 2 and all("differ" in problem for problem in said.problems().values())


def test_a_backend_that_is_off_is_no_pass(quick, said, monkeypatch) -> None:
    monkeypatch.setattr(backends, "why_off", lambda name: "it is off.")
    checks.verbs(quick, "cuda", "float32")
    assert said.problems() == {"cuda: is on": "it is off."}


def test_an_exception_is_no_pass(quick, said) -> None:
    quick.check("boom", lambda: 1 / 0)
    assert said.problems() == {"boom": "ZeroDivisionError: division by zero"}


def test_suite_has_every_check_once(quick, said, monkeypatch) -> None:
    seen: list[str] = []
    monkeypatch.setattr(checks, "SUITE", {name: lambda *_, n=name: seen.append(n) for name in checks.SUITE})
    suites = [part.options for stage in STAGES for part in stage.parts if part.call == "checks:suite"]
    for options in suites:
        if options["backend"] == "cuda":
            checks.suite(quick, **{**options, "backend": "reference"})
    assert (
        sorted(seen) == sorted(checks.SUITE)
        and set(conformance.EVERY) <= set(seen)
        and not any(said.problems().values())
    )


def test_suite_on_the_cpu(quick, said) -> None:
    names = list(checks.SUITE)
    for name in ("axpy_special", "lowrank_ranks", "clock"):
        checks.suite(quick, "cpu", names.index(name), len(names))
    assert list(said.problems()) == ["cpu: axpy_special", "cpu: lowrank_ranks", "cpu: clock"]
    assert not any(said.problems().values())


def test_bounds(quick, said, monkeypatch) -> None:
    checks.bounds(quick, "cpu")
    assert len(said.problems()) == 18 and not any(said.problems().values())
    said.lines.clear()

    class Coarse(Around):
        def spoil(self, written) -> None:
            written[0].mul_(1.02)

    monkeypatch.setattr(backends, "get", lambda name: Coarse())
    checks.bounds(quick, "cpu")
    assert all("of its bound" in problem for problem in said.problems().values())


def test_vectors(said, monkeypatch) -> None:
    monkeypatch.setattr(conformance, "DIRECTIONS", ("rademacher",))
    checks.vectors(Run(said, "cpu"), "cpu")
    assert said.problems() == {"cpu: 2^26 values, rademacher": None}
    monkeypatch.setattr(backends, "get", lambda name: LastBit())
    checks.vectors(Run(said, "cpu"), "cpu")
    assert "have other digests" in said.of("check")[1]["problem"]


@pytest.mark.parametrize("name", large.GIANTS)
def test_large(name) -> None:
    """At 2^15, and numbers that wrap there."""
    border = 2**15
    checks_of = dict(name=name, device="cpu", count=border + 4101, borders=(border,), part=border // 3 + 1)
    large.check_giant(backend=RIGHT, **checks_of)
    for wrong in (Wraps(border), LastBit()):
        with pytest.raises(AssertionError, match=r"from element \d+: \d+ of \d+ differ"):
            large.check_giant(backend=wrong, **checks_of)


def test_large_matrix() -> None:
    large.check_matrix(RIGHT, "cpu", 129, 256)
    for wrong in (Wraps(2**15 - 512), LastBit()):
        with pytest.raises(AssertionError, match="from row"):
            large.check_matrix(wrong, "cpu", 129, 256)


def test_large_windows_hold_ends_and_borders() -> None:
    found = large.windows(2**31 + 2**20 + 5, large.BORDERS)
    assert [place.start for place in found] == [0, 2**31 - 4096, 2**31 + 2**20 + 5 - 4099] and found[
        -1
    ].stop == 2**31 + 2**20 + 5
    assert found[1].stop > 2**31


def test_large_says_what_memory_is_missing(quick, said, monkeypatch) -> None:
    monkeypatch.setattr(large, "free_bytes", lambda device: 1000)
    large.large(quick, "cpu")
    assert (
        len(said.of("skip")) == 4
        and not said.of("check")
        and all("needs" in skip["why"] for skip in said.of("skip"))
    )


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("course", replay.COURSES, ids=lambda course: course.name)
def test_replay(course) -> None:
    replay.check_course(course, "cpu", "cpu", 3, 8, 1)
    with pytest.raises(AssertionError, match="after 3 steps: 1 of"):
        replay.check_course(course, LastBitOnce(), "cpu", 3, 8, 1)


class LastBitOnce(LastBit):
    """The update of the last step alone is wrong, in one weight."""

    def axpy_(self, batch, noise, terms):
        count = RIGHT.axpy_(batch, noise, terms)
        if noise.draws[0][0] == 2:
            LastBit.spoil(self, [t.detach() for t in batch.tensors])
        return count

    def after(self, written) -> None:
        pass


class FactorsOnce(Patched):
    """Every call of lowrank_ takes the factors as they were at the first, as a table of copies would."""

    left = None

    def lowrank_(self, batch, factors, *rest):
        self.left = self.left or [left.clone() for left in factors.lefts]
        return super().lowrank_(batch, factors._replace(lefts=self.left), *rest)


class ProductOnce(Around):
    """As ClockOnce, of the product."""

    def linear(self, weight, sides, noise):
        self.step = getattr(self, "step", noise.draws[0][0] + int(noise.clock))
        late = [(self.step, draw) for _, draw in noise.draws]
        return RIGHT.linear(weight, sides, noise._replace(draws=late, clock=None))


@pytest.mark.parametrize("verb", graphs.VERBS)
def test_graphs(verb) -> None:
    """On a CPU the call stands for the graph: a clock, or factors, read once is the mistake that a graph can
    make."""
    graphs.VERBS[verb](RIGHT, "cpu", torch.bfloat16, 301)
    with pytest.raises(AssertionError, match="replay"):
        wrong = {"lowrank_": FactorsOnce, "linear, fused": ProductOnce}.get(verb, ClockOnce)
        graphs.VERBS[verb](wrong(), "cpu", torch.bfloat16, 37)


def test_several() -> None:
    """Ranks that are left apart have losses of their own."""
    said: list[dict] = []
    run = Run(lambda kind, **fields: said.append({"kind": kind, **fields}), "cpu")
    several.several(run)
    assert [each["problem"] for each in said] == [None, None]
    said.clear()
    several.several(run, group=None)
    assert "other losses" in said[0]["problem"] and said[1]["problem"]


CLEAN = "========= COMPUTE-SANITIZER\n========= ERROR SUMMARY: 0 errors\n"
FOUND = (
    "========= COMPUTE-SANITIZER\n========= Invalid __global__ write of size 2 bytes\n"
    "========= ERROR SUMMARY: 3 errors\n"
)
ALL = '["check", {}]\n' * (2 * len(VERBS))


@pytest.mark.parametrize(
    "code, output, lines, how, why",
    [
        (0, CLEAN, ALL, "pass", ""),
        (9, FOUND, ALL, "fail", "Invalid __global__ write"),
        (0, CLEAN, "", "fail", "ended early"),
        (1, CLEAN, ALL, "fail", "ended early"),
        (1, "========= Error: Device not supported", "", "skip", "cannot work here"),
        (139, "Segmentation fault", "", "skip", "without a summary"),
    ],
)
def test_memcheck_verdicts(code, output, lines, how, why) -> None:
    found = memcheck.verdict(code, output, lines)
    assert found[0] == how and why in found[1]


def test_memcheck_runs_what_is_there(quick, said, monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(
        memcheck.shutil,
        "which",
        lambda name, which=memcheck.shutil.which: which(name) if "/" not in name else None,
    )
    memcheck.memcheck(quick, "cpu")
    assert said.of("skip") == [
        {"name": "cpu: compute-sanitizer memcheck", "why": "compute-sanitizer is not installed here"}
    ]
    tool = tmp_path / "compute-sanitizer"
    tool.write_text(f"#!/bin/sh\necho \"$@\" > {tmp_path}/asked\necho '{FOUND}'\nexit 9\n")
    tool.chmod(0o755)
    memcheck.memcheck(quick, "cpu")
    assert "3 errors" in said.problems()["cpu: compute-sanitizer memcheck"]
    asked = (tmp_path / "asked").read_text()
    assert asked.startswith("--tool memcheck --error-exitcode 9") and "memcheck:smoke" in asked


NCU = """==PROF== Connected to process 7
"ID","Process ID","Kernel Name","Section Name","Metric Name","Metric Unit","Metric Value","Rule Name"
"0","7","void at::native::fill<long>","LaunchStats","Duration","us","1.5",""
"1","7","void axpy<0>(Job)","SpeedOfLight","Duration","us","310.2",""
"1","7","void axpy<0>(Job)","SpeedOfLight","","","","SOLBottleneck"
"10","7","perturb","SpeedOfLight","Duration","us","400",""
"""


def test_counters(quick, said, monkeypatch, tmp_path) -> None:
    both = counters.parse(NCU, ["one", "two"])
    assert (
        both[0] == {"name": "one: void axpy<0>(Job)", "metrics": {"Duration": "310.2 us"}}
        and both[1]["name"] == "two: perturb"
    )
    assert (
        counters.parse(NCU, ["one"])[0]["name"] == "void axpy<0>(Job)"
        and counters.parse("==ERROR== no", []) == []
    )
    counters.probe(quick, "cpu")
    assert len(said.of("probe")) == 8
    counters.probe(quick, "cuda")
    assert len(said.of("probe")) == 8, "of one backend"
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(
        counters.shutil, "which", lambda name, which=shutil.which: which(name) if "/" not in name else None
    )
    counters.counters(quick)
    tool = tmp_path / "ncu"
    write = 'while [ "$1" != --log-file ]; do shift; done\n'
    write += f"echo '{NCU}' > $2\n"
    tool.write_text(f'#!/bin/sh\necho "$@" > {tmp_path}/asked\n{write}')
    tool.chmod(0o755)
    counters.counters(quick)
    assert (
        "ncu (Nsight Compute) is not installed here" in said.of("skip")[0]["why"]
        and len(said.of("counters")) == 2
    )
    assert "--clock-control none --profile-from-start off" in (tmp_path / "asked").read_text()
    tool.write_text("#!/bin/sh\necho 'Failed to initialize the profiler: LibraryNotLoaded'\nexit 1\n")
    counters.counters(quick)
    assert "LibraryNotLoaded" in said.of("skip")[1]["why"]
    said.lines.clear()
    tool.write_text(f"#!/bin/sh\n{write}while :; do :; done\n")
    begun = time.monotonic()
    counters.counters(Run(said, "cpu", True, until=begun + 3.5))
    assert time.monotonic() - begun < 20 and len(said.of("counters")) == 2, "what was written is kept"
    assert "2 kernels are kept" in said.of("skip")[0]["why"]


# Times: the arithmetic --------------------------------------------------------------------------------------


class Ticks:
    """A timer that takes a call's word for its seconds."""

    def __init__(self, seconds: dict[str, float]) -> None:
        self.seconds, self.host = seconds, {}

    def __call__(self, call) -> float:
        call()
        self.host[call] = 1e-4
        return self.seconds.get(getattr(call, "__name__", ""), 1e-3)


def test_measure_counts_rounds_and_time(quick, said) -> None:
    def copy() -> None: ...

    def half() -> None: ...

    def group() -> Group:
        cases = [Case("copy", copy, 1000, 4), Case("half", half, 1000, 4, yardstick="copy")]
        return Group("g", cases, Ticks({"copy": 1e-3, "half": 2e-3}))

    assert timing.measure(quick, group(), 7, 60).rounds == 7
    assert timing.measure(quick, group(), 7, 0).rounds == 3  # too few to be cut further
    rows = said.of("group")[0]["rows"]
    assert rows[1]["percent_of_copy"] == pytest.approx(50) and rows[0]["gb_per_s"] == pytest.approx(4e-3)
    assert rows[1]["ms"] == rows[1]["p10"] == rows[1]["p90"] == pytest.approx(2) and rows[0][
        "host_ms"
    ] == pytest.approx(0.1)


def test_a_case_that_cannot_run_leaves_the_others(quick, said) -> None:
    """It is a failure, the lines that were compared with it lose that comparison, and a figure of it is not
    said."""

    def broken() -> None:
        raise RuntimeError("no kernel image")

    def hungry() -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB. More words.")

    cases = [
        Case("copy", broken, 9, 4),
        Case("large", hungry, 9, 4),
        Case("ours", lambda: None, 9, 4, "copy", "large"),
    ]
    group = timing.measure(quick, Group("g", cases, Ticks({})), 3, 1)
    (row,) = said.of("group")[0]["rows"]
    assert row["name"] == "ours" and not {"percent_of_copy", "times_eager"} & set(row)
    assert said.problems() == {"g: copy: runs": "RuntimeError: no kernel image"}
    assert said.of("skip") == [{"name": "g: large", "why": "CUDA out of memory"}]
    assert timing.figure(quick, group, "ours / copy", "copy", "ours") is None and not said.figures


@pytest.mark.filterwarnings("ignore")
def test_a_method_that_cannot_run_leaves_the_others(said, small_model, monkeypatch) -> None:
    real = steps.optimizer

    def optimizer(name, module):
        if name == "MeZO inplace":
            raise RuntimeError("in place is broken")
        return real(name, module)

    monkeypatch.setattr(steps, "optimizer", optimizer)
    monkeypatch.setattr(steps, "times", lambda *_: {})
    steps.steps(Run(said, "cpu", True), "OPT-1.3B")
    assert [name for name, problem in said.problems().items() if problem] == [
        f"memory of MeZO inplace, OPT-tiny {size}: runs" for size in ("1x16", "2x32")
    ]
    assert len(said.of("memory")) == 10 and len(said.of("step")) == 2


def test_events_bracket_the_call_alone(monkeypatch) -> None:
    """On a device that is made of a clock: the queue is filled behind a wait, the caches are flushed, and
    neither is timed."""
    clock, order = [0.0], []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            self.at = clock[0]
            order.append("mark")

        def elapsed_time(self, other) -> float:
            return (other.at - self.at) * 1e3

    class Flush:
        def zero_(self) -> None:
            clock[0] += 0.5
            order.append("flush")

    def sleep(cycles: int) -> None:
        clock[0] += cycles / 2e9
        order.append(f"wait {cycles / 2e9:.1g}")

    def call() -> None:
        clock[0] += 0.125
        order.append("call")

    cuda = SimpleNamespace(
        Event=Event,
        _sleep=sleep,
        synchronize=lambda: None,
        get_device_properties=lambda _: SimpleNamespace(L2_cache_size=50 << 20),
    )
    monkeypatch.setattr(
        timing, "torch", SimpleNamespace(cuda=cuda, empty=lambda *_, **__: Flush(), uint8=None)
    )
    events = timing.Events()
    assert events.cycles == pytest.approx(2e9)
    order.clear()
    assert events(call) == pytest.approx(0.125)
    assert order == ["wait 0.001", "flush", "mark", "call", "mark"]
    events.host[call] = 100.0
    order.clear()
    assert events(call) == pytest.approx(0.125) and order[0] == "wait 0.03" and events.host[call] < 1


def test_dense_figures(quick, said, monkeypatch) -> None:
    """Every group, with calls that all take a millisecond: shares and ratios are then the bytes'."""
    monkeypatch.setattr(dense, "timer_of", lambda run: Ticks({}))
    monkeypatch.setattr(dense.torch, "compile", lambda function: lambda *_: None)
    dense.dense(quick)
    dense.compiled(quick)
    expected = {
        "axpy_ cpu / copy": 100,
        "axpy_ cpu / eager": 1,
        "axpy_ cpu / compile": 1,
        "perturb pair cpu / copy": 150,
    }
    assert said.figures == pytest.approx({**expected, "K=8 cpu, passes / one": 1})
    assert len(said.of("group")) == 3 + 3 + 1 + 4 + 1 and not said.of("skip")
    keys = {key.replace("cpu", "cuda") for key in said.figures}
    assert {goal.key for goal in GOALS if goal.key.startswith(("axpy_ cuda", "perturb", "K="))} <= keys


def test_no_compiler_is_said(quick, said, monkeypatch) -> None:
    def broken(*_) -> None:
        raise RuntimeError("no C++ compiler found")

    monkeypatch.setattr(dense.torch, "compile", lambda function: broken)
    dense.compiled(quick)
    assert said.of("skip") == [
        {"name": "torch.compile of the eager perturb", "why": "RuntimeError: no C++ compiler found"}
    ]


def test_the_rest_is_said_when_the_time_is_up(said) -> None:
    dense.dense(Run(said, "cpu", True, until=time.monotonic()))
    assert [skip["why"] for skip in said.of("skip")] == ["the part's time was up"] * 6 and not said.of(
        "group"
    )


def test_figures_of_rules(quick, said, monkeypatch) -> None:
    """With eight milliseconds for eight passes, five for the eager loop and one for the rest."""
    monkeypatch.setattr(rules, "timer_of", lambda run: Ticks({"passes": 8e-3, "eagerly": 5e-3}))
    rules.rules(quick)
    assert said.figures == pytest.approx({
        "update_ momentum cpu / copy": 300, "update_ adam cpu / copy": 500,
        "update_ momentum cpu / torch.optim": 5,
        "update_ adam cpu / torch.optim": 5, "replay nearest cpu, passes / one": 8,
        "replay stochastic cpu, passes / one": 8,
    })  # fmt: skip
    assert len(said.of("group")) == 4 and not said.of("skip")


def test_factored_figures(quick, said, monkeypatch) -> None:
    monkeypatch.setattr(factors, "timer_of", lambda run: Ticks({"addmm": 1.5e-3}))
    factors.factored(quick)
    names = ("least / copy", "least / addmm_", "median / addmm_")
    found = {key: value for key, value in said.figures.items() if "," in key}
    assert found == pytest.approx(dict(zip([f"lowrank_ cpu, {name}" for name in names], (100, 1.5, 1.5))))
    assert said.figures["lowrank_ r=16 cpu 2 x 64x96 / addmm_"] == pytest.approx(1.5)
    assert {f"lowrank_ cuda, {name}" for name in names} <= {goal.key for goal in GOALS}


def test_products(quick, said, monkeypatch) -> None:
    monkeypatch.setattr(linear, "timer_of", lambda run: Ticks({"bare": 2e-3, "alone": 4e-3}))
    linear.products(quick)
    names = ("linear +- dense cpu, 16 tokens", "linear +- rank 8 cpu, 16 tokens")
    expected = {f"{name} / two F.linear": 0.5 for name in names}
    assert {key: said.figures[key] for key in expected} == pytest.approx(expected)
    tiles = {f"mm of {rows} rows, 512 tokens / whole": 1.0 for rows in (32, 33)}
    assert {key: said.figures[key] for key in tiles} == pytest.approx(tiles)
    swept = {f"+- by {rows} rows cpu, 512 tokens / two F.linear" for rows in (32, 33, 96)}
    assert set(said.figures) == {*expected, *tiles, *swept}
    (by_tiles,) = [group for group in said.of("group") if "idle to idle" in group["title"]]
    assert len(said.of("group")) == 4 and all("host_ms" in row for row in by_tiles["rows"])


@pytest.fixture
def small_model(monkeypatch):
    """A transformer of a few hundred weights in the place of the published shapes."""

    def on_device(name, dtype, device):
        # its embeddings are too large for a step of 1e-3 in bfloat16
        return replay.model(8, 1, torch.float32)

    def loss_of(module, batch, length):
        ids = torch.randint(0, replay.VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(1))
        return lambda: module(ids)

    monkeypatch.setattr(steps, "on_device", on_device)
    monkeypatch.setattr(steps, "loss_of", loss_of)


@pytest.mark.filterwarnings("ignore")
def test_steps(said, small_model) -> None:
    steps.steps(Run(said, "cpu", True), "OPT-1.3B")
    (first, second) = said.of("step")
    graphs = {f"{name}, graph" for name in steps.GRAPHED} if hasattr(zokern, "graph") else set()
    expected = {*steps.DENSE, *steps.FACTORED, "eager MeZO", *graphs}
    assert set(first["ratios"]) == expected == set(second["ratios"])
    assert all(ratio > 0 for ratio in first["ratios"].values()) and (first["tokens"], second["tokens"]) == (
        16,
        64,
    )
    assert {"MeZO scratch OPT-tiny 1x16 / forwards", "memory of a step, MeZO scratch OPT-tiny 1x16"} <= set(
        said.figures
    )
    assert (
        all(line["scratch"] > 0 for line in said.of("memory") if "scratch" in line["name"])
        and len(said.of("memory")) == 12
    )
    (trace, _) = said.of("trace")
    assert set(trace["traces"]) == {"two forwards", *steps.DENSE, *steps.FACTORED}
    assert all("host_ms" in row for group in said.of("group") for row in group["rows"])
    assert hasattr(zokern, "graph") or "zokern.graph is missing" in said.of("skip")[0]["why"]


def as_tiny(key: str) -> str:
    """The key of a figure of a published model as the small one's."""
    return re.sub(r"(OPT|Llama)-[0-9.]+B [0-9]+x[0-9]+", "OPT-tiny 1x16", key)


def graph_on_the_cpu(optimizer, closure):
    """What zokern.graph is without a GPU: the same code, run each time."""
    return lambda: zokern.step(optimizer, closure)


@pytest.mark.filterwarnings("ignore")
def test_every_aim_and_prediction_of_a_step_is_measured(said, small_model, monkeypatch) -> None:
    monkeypatch.setattr(zokern, "graph", graph_on_the_cpu, raising=False)
    steps.steps(Run(said, "cpu", True), "OPT-1.3B")
    assert {f"{name}, graph" for name in steps.GRAPHED} < set(said.of("step")[0]["ratios"])
    host = predict_step.Host(1.0, {"master": 1.0, "paired": 1.0, "loop": 1.0})
    times = dict.fromkeys(("device", "eager", "graph"), 1.0)
    row = predict_step.Row("OPT-1.3B", 16, 256, times, dict.fromkeys(host.steps, times))
    expected = {goal.key for goal in GOALS} | set(predict_page.row_figures(row))
    steps_alone = {as_tiny(key) for key in expected if "OPT" in key or "Llama" in key}
    assert len(steps_alone) >= 9 and steps_alone <= set(said.figures)


@pytest.mark.filterwarnings("ignore")
def test_a_graph_that_cannot_be_captured_leaves_the_others(said, small_model, monkeypatch) -> None:
    def refused(optimizer, closure):
        raise RuntimeError("a value was read")

    monkeypatch.setattr(zokern, "graph", refused, raising=False)
    steps.steps(Run(said, "cpu", True), "OPT-1.3B")
    wrong = [name for name, problem in said.problems().items() if problem == "RuntimeError: a value was read"]
    assert wrong == [
        f"{name} in a graph, OPT-tiny {size}: runs" for size in ("1x16", "2x32") for name in steps.GRAPHED
    ]
    assert {"MeZO master", "eager MeZO"} < set(said.of("step")[0]["ratios"])


@pytest.mark.filterwarnings("ignore")
def test_compiled_steps(said, small_model, monkeypatch) -> None:
    """With a compiler that hands back what it is given: what is called, and what is said."""
    made: list[object] = []
    monkeypatch.setattr(steps.torch, "compile", lambda function, dynamic: made.append(function) or function)
    monkeypatch.setattr(steps.nn.Module, "compile", lambda self: made.append(type(self).__name__))
    steps.compiled(Run(said, "cpu", True), "Llama-1B")
    assert made == ["Block", eager.perturbed, eager.updated] and not said.of("check")
    names = [row["name"] for group in said.of("group") for row in group["rows"]]
    assert names == ["two forwards, compiled", "two forwards", "MeZO master, compiled",
                     "two forwards, compiled", "eager MeZO, compiled"]  # fmt: skip
    assert set(said.figures) == {
        "two forwards, compiled OPT-tiny 1x16 / forwards",
        "MeZO master, compiled OPT-tiny 1x16 / compiled forwards",
        "eager MeZO, compiled OPT-tiny 1x16 / compiled forwards",
    }  # fmt: skip


def test_passes_of_the_eager_loop_are_those_that_it_is_given() -> None:
    """moves changes who computes, and no bit; another arithmetic is seen."""

    def run(*moves) -> list[torch.Tensor]:
        parameters = [torch.nn.Parameter(torch.linspace(-1, 1, 12).view(3, 4))]
        eager.step(parameters, lambda: parameters[0].square().sum(), 3, 1e-2, 1e-3, *moves)
        return parameters

    right = run()
    torch.manual_seed(0)
    assert torch.equal(run((eager.perturbed, eager.updated))[0], right[0])
    assert not torch.equal(run((eager.perturbed, lambda t, lr, c, decay: t))[0], right[0])


class Event:
    """One of kineto's."""

    def __init__(self, name: str, start: int = 0, length: int = 0, on_device: bool = False) -> None:
        self.start_ns, self.duration_ns, self.name = (lambda: start), (lambda: length), (lambda: name)
        self.on_device = on_device


def test_a_trace_counts_what_overlaps_once() -> None:
    events = [
        Event("second", 50, 100, True), Event("first", 0, 100, True), Event("inside", 60, 10, True),
        Event("later", 200, 5, True), Event("cudaLaunchKernel", 0, 900),
        Event("cudaStreamSynchronize", 900, 5), Event("cudaDeviceSynchronize", 950, 5),
        Event("cudaMemcpy", 960, 5), Event("cudaMemcpyAsync", 970, 5),
    ]  # fmt: skip
    found = trace.summary(events, lambda event: event.on_device)
    assert found == trace.Trace(kernels=4, busy=155e-9, waits=2)
    assert trace.summary([], lambda event: True) == trace.Trace()


def test_a_trace_is_read_from_the_profiler_itself() -> None:
    """Its events on a CPU, which stands for the device: no FunctionEvent is made."""
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], acc_events=False
    ) as profile:
        for _ in range(3):
            torch.ones(100).add_(1)
    events = profile.profiler.kineto_results.events()
    found = trace.summary(events, lambda event: event.name() == "aten::add_")
    assert found.kernels == 3 and 0 < found.busy < 1 and profile.profiler._function_events is None


def test_host_time_ends_when_the_call_returns(monkeypatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(timing.time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(timing, "synchronize", lambda device: clock.__setitem__(0, clock[0] + 0.5))

    def call() -> None:
        clock[0] += 0.125

    timer = timing.IdleToIdle("cuda")
    assert timer(call) == pytest.approx(0.625) and timer.host[call] == pytest.approx(0.125)


@pytest.mark.filterwarnings("ignore")
def test_steps_that_do_not_fit_say_so(said, small_model, monkeypatch) -> None:
    steps.steps(Run(said, "cpu", True, until=time.monotonic()), "OPT-13B")
    assert [skip["why"] for skip in said.of("skip")] == ["the part's time was up"] * 2
    monkeypatch.setattr(steps, "free_bytes", lambda device: 1000)
    steps.steps(Run(said, "cpu", True), "OPT-13B")
    assert "GB are free" in said.of("skip")[2]["why"]


def test_published_shapes() -> None:
    """Billions of parameters, on the meta device."""
    pytest.importorskip("transformers")
    from benchmarks.models import on_device

    with torch.device("meta"):
        found = on_device("OPT-1.3B", torch.bfloat16, "meta")
    assert sum(p.numel() for p in found.parameters()) / 1e9 == pytest.approx(1.316, abs=1e-3)
    assert {p.dtype for p in found.parameters()} == {
        torch.bfloat16
    } and torch.get_default_dtype() == torch.float32


# The clockwork ----------------------------------------------------------------------------------------------

WORKER = """
import json, sys, time
call, options, lines = sys.argv[1:4]
file = open(lines, "a", buffering=1)
say = lambda kind, **fields: file.write(json.dumps([kind, fields]) + "\\n")
say("check", name=call, problem=None, seconds=0)
if call == "slow":
    time.sleep(60)
if call == "crash":
    sys.exit("segmentation fault, as it were")
if call == "torn":
    file.write('["check", {"na')
    sys.exit(0)
if call == "wrong":
    say("check", name="a wrong bit", problem="1 of 3 differ", seconds=0)
say("end")
"""


@pytest.fixture
def worker(monkeypatch, tmp_path) -> None:
    """Parts that need no torch."""
    path = tmp_path / "worker.py"
    path.write_text(WORKER)
    monkeypatch.setattr(pool, "WORKER", (sys.executable, str(path)))


def test_parts_end_in_every_way(worker, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(pool, "GRACE", 0.0)
    parts = [
        Part(call, "", call, seconds=1.5 if call == "slow" else 30)
        for call in ("fine", "slow", "crash", "torn")
    ]
    folder = tmp_path / "lines"
    folder.mkdir()
    begun = time.monotonic()
    found = {outcome.part.name: outcome for outcome in pool.run_parts(parts, 30, folder, workers=4)}
    assert time.monotonic() - begun < 20
    assert {name: outcome.how for name, outcome in found.items()} == {
        "fine": "done", "slow": "stopped", "crash": "failed", "torn": "failed"
    }  # fmt: skip
    assert "segmentation fault" in found["crash"].why and "stopped after" in found["slow"].why
    assert all(
        outcome.lines == [("check", {"name": name, "problem": None, "seconds": 0})]
        for name, outcome in found.items()
    )


def test_parts_without_time_are_not_started(worker, tmp_path) -> None:
    (outcome,) = pool.run_parts([Part("late", "", "fine")], 1.0, tmp_path)
    assert (outcome.how, outcome.why) == ("not started", "no time was left")


def test_what_a_stopped_part_started_ends_with_it(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(pool, "GRACE", 0.0)
    child = (
        "import subprocess, time; p = subprocess.Popen(['sleep', '60']); "
        f"open({str(tmp_path / 'pid')!r}, 'w').write(str(p.pid)); time.sleep(60)"
    )
    monkeypatch.setattr(pool, "WORKER", (sys.executable, "-c", child))
    (outcome,) = pool.run_parts([Part("slow", "", "slow", seconds=1.5)], 30, tmp_path)
    assert outcome.how == "stopped"
    time.sleep(0.1)
    state = Path(f"/proc/{(tmp_path / 'pid').read_text()}/stat")
    assert not state.exists() or state.read_text().split()[2] == "Z"


def test_the_command(worker, tmp_path, capsys) -> None:
    """Stages in order, pages after every part, failures at the end: exit code 1, and the later stages run all
    the same."""
    stages = (
        Stage("correctness", "", 0.5, (Part("good", "", "fine"), Part("bad", "", "wrong")), together=True),
        Stage("steps", "", 1.0, (Part("later", "", "fine"),)),
    )
    assert command.run(stages, 60, tmp_path / "out", [], False, 2) == 1
    shown = capsys.readouterr()
    assert (
        "FAILED a wrong bit: 1 of 3 differ" in shown.err
        and "later: done" in shown.err
        and "3 of 4 checks passed" in shown.out
    )
    record = json.loads((tmp_path / "out" / "gpu.json").read_text())
    assert [part["how"] for part in record["parts"]] == ["done"] * 3
    assert "- **failed:** a wrong bit: 1 of 3 differ" in (tmp_path / "out" / "README.md").read_text()
    assert command.run(stages[1:], 60, tmp_path / "fine", [], False, 2) == 0


def test_a_run_that_breaks_off_leaves_its_pages(worker, tmp_path, monkeypatch) -> None:
    def parts(*arguments, **named):
        yield Outcome(
            Part("first", "", ""), "done", "", 1, [("check", {"name": "one", "problem": None, "seconds": 0})]
        )
        raise KeyboardInterrupt

    monkeypatch.setattr(pool, "run_parts", parts)
    with pytest.raises(KeyboardInterrupt):
        command.run((Stage("correctness", "", 1.0, ()),), 60, tmp_path, [], False, 1)
    assert "1 of 1 checks passed" in (tmp_path / "README.md").read_text()


def test_a_crash_or_an_unfinished_check_is_a_failure() -> None:
    record = Record()
    record.add("verbs", Outcome(Part("slow times", "", ""), "stopped", "stopped after 9 s"))
    assert record.failures() == []  # times that are missing are said on the page
    record.add("correctness", Outcome(Part("slow checks", "", ""), "stopped", "stopped after 9 s"))
    record.add("steps", Outcome(Part("broken", "", ""), "failed", "exit 1: ..."))
    assert record.failures() == ["slow checks: stopped: stopped after 9 s", "broken: failed: exit 1: ..."]


def test_dry_run(capsys) -> None:
    """Every stage and part to the last line, each with a reason, and nothing written."""
    before = sorted(RESULTS.rglob("*"))
    assert command.main(["--dry-run"] if torch.cuda.is_available() else []) == 0
    shown = capsys.readouterr().err
    assert all(f"stage {stage.name}: " in shown for stage in STAGES)
    parts = [part for stage in STAGES for part in stage.parts]
    assert all(f"  {part.name}: {part.what}" in shown for part in parts) and shown.count(
        "    not run: "
    ) == len(parts)
    assert (
        shown.rstrip().endswith("gpu.json, README.md, verbs.png, steps.png")
        and sorted(RESULTS.rglob("*")) == before
    )


def test_dry_run_of_one_stage(capsys) -> None:
    assert command.main(["--dry-run", "--only", "verbs"]) == 0
    shown = capsys.readouterr().err
    assert "stage verbs" in shown and "stage device" in shown and "stage steps" not in shown
    with pytest.raises(SystemExit):
        command.main(["--only", "coffee"])


def test_every_part_is_a_function() -> None:
    """plan.py names functions and arguments that exist."""
    import inspect

    for part in (part for stage in STAGES for part in stage.parts):
        module, name = part.call.split(":")
        function = getattr(importlib.import_module(f"benchmarks.gpu.{module}"), name)
        inspect.signature(function).bind(None, **part.options)
    assert sum(stage.share < 1 for stage in STAGES) == len(STAGES) - 1 and STAGES[-1].share == 1


def granted(stages: tuple[Stage, ...], seconds: float) -> dict[str, float]:
    """The seconds of each part that nothing is timed beside, where all take what they may."""
    found = {}
    for stage in stages:
        budget = stage.budget(seconds)
        for part in () if stage.together else stage.parts:
            found[part.name] = min(part.seconds, budget)
            budget -= found[part.name]
            seconds -= found[part.name]
        seconds -= budget if stage.together else 0.0
    return found


def check_plan(stages: tuple[Stage, ...]) -> None:
    """What decides is measured in ten minutes also after a slow build, whatever the checks take."""
    got = granted(stages, SECONDS - 90 - command.RESERVE)
    assert got["Llama-1B"] == got["OPT-1.3B"] == 75 and got["compiled"] > 40
    assert got["products"] >= 30 and got["dense"] >= 40 and got["factored"] >= 20
    order = list(got)
    assert order.index("OPT-1.3B") < order.index("products") < order.index("dense") < order.index("OPT-13B")
    assert order[-1] == "counters" and stages[1].name == "correctness" and stages[1].most <= 90
    quick = {part.name for part in stages[1].parts if part.quick}
    assert quick == {f"triton verbs {dtype}" for dtype in checks.DTYPES}


def test_what_decides_is_measured_first() -> None:
    check_plan(STAGES)


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: STAGES[:2] + STAGES[3:4] + STAGES[2:3] + STAGES[4:],  # verbs before steps
        lambda: (
            STAGES[0],
            replace(STAGES[1], share=0.45, most=600.0),
            *STAGES[2:],
        ),  # checks without a limit
        lambda: (*STAGES[:5], replace(STAGES[5], parts=STAGES[5].parts[::-1])),  # counters first
        lambda: (*STAGES[:2], replace(STAGES[2], share=0.2), *STAGES[3:]),  # steps that are cut short
    ],
)
def test_a_plan_that_measures_it_late_is_rejected(wrong) -> None:
    with pytest.raises(AssertionError):
        check_plan(wrong())


def test_a_part_may_be_quick_by_itself(worker, tmp_path, monkeypatch) -> None:
    said = "'[\"skip\", {\"name\": \"' + ' '.join(sys.argv) + '\"}]\\n'"
    asked = f"import sys; open(sys.argv[3], 'w').write({said})"
    monkeypatch.setattr(pool, "WORKER", (sys.executable, "-c", asked))
    parts = [
        Part("small", "", "one", quick=True),
        Part("full", "", "two"),
        Part("twice", "", "three", quick=True),
    ]
    counts = {}
    for options in ((), ("--quick",)):
        for outcome in pool.run_parts(parts, 60, tmp_path, options):
            counts[outcome.part.name, options] = outcome.lines[0][1]["name"].split().count("--quick")
    assert [counts[name, ()] for name in ("small", "full", "twice")] == [1, 0, 1]
    assert [counts[name, ("--quick",)] for name in ("small", "full", "twice")] == [1, 1, 1]


def test_a_real_worker(tmp_path) -> None:
    """The interpreter of Triton on a verb, in the process that a part gets."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed")
    lines = tmp_path / "lines"
    options = json.dumps({"backend": "triton", "dtype": "float32", "names": ["perturb rows", "sketch"]})
    arguments = [
        sys.executable,
        "-m",
        "benchmarks.gpu.worker",
        "checks:verbs",
        options,
        str(lines),
        "--device",
        "cpu",
        "--quick",
    ]
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(arguments, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    said = pool.read(lines)
    assert [kind for kind, _ in said] == ["check", "check", "end"]
    assert {fields["name"]: fields["problem"] for _, fields in said[:2]} == {
        "triton: perturb rows, float32": None, "triton: sketch, float32": None
    }  # fmt: skip


def test_a_source_tree_is_enough(monkeypatch) -> None:
    """zokern.triton_kernels from triton_kernels/, where zokern is not installed."""
    import zokern

    name = "zokern.triton_kernels"
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed")
    for module in [module for module in sys.modules if module.startswith(name)]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setattr(zokern, "triton_kernels", None, raising=False)
    benchmarks.gpu.use_tree()
    assert Path(sys.modules[name].__file__) == ROOT / "triton_kernels" / "__init__.py"
    assert zokern.triton_kernels.elementwise.axpy is not None
    for module in [module for module in sys.modules if module.startswith(name)]:
        sys.modules.pop(module)  # the test's own; monkeypatch puts the others back


# The page ---------------------------------------------------------------------------------------------------


def made_up() -> Record:
    """A record with one of everything. Nothing in it was measured."""
    record = Record()
    row = dict(
        ms=1.0,
        p10=0.9,
        p90=1.2,
        rounds=9,
        gb_per_s=3000.0,
        percent_of_copy=91.0,
        times_eager=5.5,
        bytes_per_element=4,
    )
    lines = [
        ("device", dict(name="MADE UP H100", date="2000-01-01", commit="none", cuda="0", capability="9.0")),
        ("device", dict(multiprocessors="1", memory_gb="1", l2_mb="1")),
        ("check", dict(name="right", problem=None, seconds=0)),
        ("check", dict(name="wrong", problem="1 of 3 differ, the first at 2", seconds=0)),
        ("skip", dict(name="steps of OPT-13B", why="needs 36 GB")),
        ("group", dict(title="axpy_", rows=[
            dict(name="copy", ms=1.0, p10=1.0, p90=1.0, rounds=9), dict(name="axpy_ normal cuda", **row)])),
        ("figure", dict(key="axpy_ cuda / copy", value=91.0)),
        ("figure", dict(key="MeZO scratch OPT-1.3B 1x16 / forwards", value=2.5)),
        ("figure", dict(key="another", value=3.0)),
        ("step", dict(model="OPT-1.3B", batch=1, length=16, tokens=16, ratios={"MeZO scratch": 2.5})),
        ("trace", dict(model="OPT-1.3B", batch=1, length=16, traces={
            "MeZO scratch": dict(kernels=77, busy=0.002, waits=3, share=0.5)})),
        ("counters", dict(name="axpy_ normal cuda: axpy<0>",
            metrics={"Duration": "310 us", "Warp Cycles": "9"})),
        ("memory", dict(name="MeZO scratch, OPT-1.3B 1x16",
            forward=3 << 30, extra=64 << 20, scratch=60 << 20)),
    ]  # fmt: skip
    record.add("correctness", Outcome(Part("all", "everything", ""), "done", "", 3, lines))
    return record


def test_page(monkeypatch) -> None:
    monkeypatch.setattr(predicted, "read", dict)
    text = page.page(made_up(), ["verbs.png"])
    lines = text.splitlines()
    assert lines[0] == "# MADE UP H100" and "The goals below were set for an H200." in lines
    assert (
        "| axpy_ Normal K=1, CUDA, share of the measured copy bandwidth | >= 90 % | 91.00 % | reached |"
        in lines
    )
    assert "| the same, 1x16 | <= 1.6 x | 2.50 x | not reached |" in lines
    assert sum(line.endswith("| - | not measured |") for line in lines) == len(GOALS) - 2
    assert "1 of 2 checks passed." in lines and "- **failed:** wrong: 1 of 3 differ, the first at 2" in lines
    assert "- steps of OPT-13B: needs 36 GB" in lines and "![verbs](verbs.png)" in lines
    assert (
        "| axpy_ normal cuda | 1 [0.9 1.2] | 9 | 3000 | 91 | 5.50 | 4 |" in lines
        and "| another | 3.00 |" in lines
    )
    assert (
        "| OPT-1.3B 1x16 | MeZO scratch | 77 | 2.00 | 50 | 3 |" in lines
        and "| MeZO scratch, OPT-1.3B 1x16 | 3072 | 64 | 60 |" in lines
    )
    assert "| axpy_ normal cuda: axpy<0> | 310 us |  |  |  |  |  |" in lines
    assert lines.index("| goal | must reach | measured |  |") < lines.index("## Correctness")


def test_page_compares_predictions_first(monkeypatch) -> None:
    """Line by line, before everything else; a figure that was not measured says so."""
    told = {
        "axpy_ cuda / copy": 100.0,
        "MeZO scratch OPT-1.3B 1x16 / forwards": 2.0,
        "MeZO paired Llama-1B 1x16 / forwards": 1.2,
    }
    monkeypatch.setattr(predicted, "read", lambda: told)
    lines = page.page(made_up()).splitlines()
    assert "| axpy_ cuda / copy | 100.00 | 91.00 | 0.91 |" in lines
    assert "| MeZO scratch OPT-1.3B 1x16 / forwards | 2.00 | 2.50 | 1.25 |" in lines
    assert "| MeZO paired Llama-1B 1x16 / forwards | 1.20 | - | not measured |" in lines
    head = lines.index("| prediction and measurement | predicted | measured | measured / predicted |")
    assert (
        head < lines.index("| goal | must reach | measured |  |")
        and sum("| 1.20 |" in line for line in lines) == 1
    )
    monkeypatch.setattr(predicted, "read", dict)
    assert "prediction and measurement" not in page.page(made_up())


def test_predictions_are_printed(worker, tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.setattr(predicted, "read", lambda: {"a figure": 1.5})
    command.run((Stage("steps", "", 1.0, (Part("later", "", "fine"),)),), 60, tmp_path, [], False, 2)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == "prediction and measurement predicted measured measured / predicted".split()
    assert lines[1].split() == "a figure 1.50 - not measured".split() and "goal" not in lines[0]


def test_page_without_plots_says_why() -> None:
    record = made_up()
    record.device["matplotlib"] = "absent"
    assert "No plots: matplotlib is not installed here." in page.page(record)


def test_page_of_nothing(monkeypatch) -> None:
    monkeypatch.setattr(predicted, "read", dict)
    text = page.page(Record())
    assert (
        text.startswith("# No device")
        and text.count("not measured") == len(GOALS)
        and "Nothing was checked." in text
    )


def test_plots_and_files(tmp_path) -> None:
    record = made_up()
    record.write(tmp_path)
    names = {"gpu.json", "README.md"} | (
        {"verbs.png", "steps.png"} if importlib.util.find_spec("matplotlib") else set()
    )
    assert {path.name for path in tmp_path.iterdir()} == names
    assert json.loads((tmp_path / "gpu.json").read_text())["figures"]["another"] == 3.0


def test_folder() -> None:
    record = made_up()
    assert record.folder() == RESULTS / "made-up-h100"
    assert record.folder(whole=False) == ROOT / "build" / "gpu"
    record.quick = True
    assert record.folder() == ROOT / "build" / "gpu"


def test_device_facts(quick, said, monkeypatch, tmp_path) -> None:
    device.facts(quick)
    (found,) = said.of("device")
    assert (
        found["torch"] == torch.__version__
        and found["commit"]
        and all(isinstance(value, str) for value in found.values())
    )
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 'NVIDIA H200, 580.1'\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    assert device.smi("name", "driver_version") == {"name": "NVIDIA H200", "driver_version": "580.1"}
    assert device.smi("name") == {}, "an answer of another shape is no answer"


def test_captured_calls_on_the_cpu() -> None:
    calls: list[int] = []
    captured = graphs.Captured(lambda: calls.append(1), "cpu")
    captured.replay()
    assert calls == [1, 1]


# The build before it ----------------------------------------------------------------------------------------

PYTHON = """#!/bin/sh
echo "$* cuda=$ZOKERN_BUILD_CUDA cpu=$ZOKERN_BUILD_CPU" >> {log}
case "$*" in
  *build_ext*) case "$ZOKERN_BUILD_CUDA$ZOKERN_BUILD_CPU" in {broken}) exit 1;; esac;;
  *benchmarks.gpu*) exit {code};;
esac
"""
# what does not compile: ZOKERN_BUILD_CUDA and ZOKERN_BUILD_CPU of the builds that fail, and their number
BUILDS = {"nothing": ("none", 1), "csrc/*.cu": ("''", 2), "csrc/*.cpp": ("''|0", 3)}


def make_gpu(folder: Path, broken: str, code: int = 0, text: str | None = None) -> tuple[int, list[str]]:
    """The exit code of `make gpu`, and the calls of Python, with one that compiles nothing."""
    log, python, file = folder / "log", folder / "python", folder / "Makefile"
    python.write_text(PYTHON.format(log=log, broken=broken, code=code))
    python.chmod(0o755)
    file.write_text((ROOT / "Makefile").read_text() if text is None else text)
    command = ["make", "-f", str(file), "gpu", f"PYTHON={python}", "GPU=--only device --out DIR"]
    environment = {
        key: value for key, value in os.environ.items() if "ZOKERN" not in key and "MAKE" not in key
    }
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=60)
    calls = [line for line in log.read_text().splitlines() if "build_ext" in line or "benchmarks" in line]
    return done.returncode, calls


def check_builds(folder: Path, broken: str, count: int, text: str | None = None) -> None:
    code, calls = make_gpu(folder, broken, text=text)
    assert code == 0 and sum("build_ext" in call for call in calls) == count, calls
    assert "-m benchmarks.gpu --since" in calls[-1] and "--only device --out DIR" in calls[-1]
    assert len(calls) == count + 1, "the clock started before the build, and the run is one"


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
@pytest.mark.parametrize("what", BUILDS)
def test_what_does_not_compile_is_left_out_and_the_rest_measured(what, tmp_path) -> None:
    check_builds(tmp_path, *BUILDS[what])


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_the_verdict_of_the_run_is_that_of_make(tmp_path) -> None:
    assert make_gpu(tmp_path, "none", code=1)[0] != 0


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_a_build_that_ends_the_run_is_rejected(tmp_path) -> None:
    text = (ROOT / "Makefile").read_text()
    (other,) = [line for line in text.splitlines() if "ZOKERN_BUILD_CUDA=0 $(COMPILE) \\" in line]
    wrong = text.replace(other, "\t@since=$$(date +%s); $(COMPILE) \\")
    with pytest.raises(AssertionError):
        check_builds(tmp_path, *BUILDS["csrc/*.cu"], text=wrong)
