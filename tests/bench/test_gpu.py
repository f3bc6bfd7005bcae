"""benchmarks/gpu without a GPU: its checks run on the CPU and reject wrong backends, its clockwork runs with
made-up times and parts.

The device is "cpu" and the backend the CPU's own, one with a mistake, or Triton's interpreter; the judge is
the CPU backend as it is there. A made-up record is written to a temporary folder and nowhere else.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import conformance
import pytest
import torch

from zokern import backends

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
from wrong.addressing import ClockOnce  # noqa: E402

import benchmarks.gpu  # noqa: E402
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
    steps,
    timing,
)
from benchmarks.gpu.goals import GOALS  # noqa: E402
from benchmarks.gpu.plan import STAGES, Part, Stage  # noqa: E402
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


class ProductOnce(Around):
    """As ClockOnce, of the product."""

    def linear(self, weight, sides, noise):
        self.step = getattr(self, "step", noise.draws[0][0] + int(noise.clock))
        late = [(self.step, draw) for _, draw in noise.draws]
        return RIGHT.linear(weight, sides, noise._replace(draws=late, clock=None))


@pytest.mark.parametrize("check", graphs.CHECKS.values())
def test_graphs(check) -> None:
    """On a CPU the call stands for the graph: a clock that is read once is the mistake that a graph can
    make."""
    check(RIGHT, "cpu", torch.bfloat16, 301)
    with pytest.raises(AssertionError, match="replay"):
        check(ProductOnce() if check is graphs.check_fused else ClockOnce(), "cpu", torch.bfloat16, 37)


CLEAN = "========= COMPUTE-SANITIZER\n========= ERROR SUMMARY: 0 errors\n"
FOUND = "========= COMPUTE-SANITIZER\n========= Invalid __global__ write of size 2 bytes\n========= ERROR SUMMARY: 3 errors\n"
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
    counters.probe(quick)
    assert len(said.of("probe")) == 8
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(
        counters.shutil, "which", lambda name, which=shutil.which: which(name) if "/" not in name else None
    )
    counters.counters(quick)
    tool = tmp_path / "ncu"
    tool.write_text(f"#!/bin/sh\necho \"$@\" > {tmp_path}/asked\necho '{NCU}'\n")
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
    assert len(said.of("memory")) == 8 and len(said.of("step")) == 2


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
    assert said.figures == pytest.approx({f"{name} / two F.linear": 0.5 for name in names})
    assert len(said.of("group")) == 2 and said.of("group")[0]["rows"][1]["times_eager"] == pytest.approx(2)


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
    assert set(first["ratios"]) == {*steps.WAYS, "SubZero", "eager MeZO"} == set(second["ratios"])
    assert all(ratio > 0 for ratio in first["ratios"].values()) and (first["tokens"], second["tokens"]) == (
        16,
        64,
    )
    assert {"MeZO scratch OPT-tiny 1x16 / forwards", "memory of a step, MeZO scratch OPT-tiny 1x16"} <= set(
        said.figures
    )
    assert (
        all(line["scratch"] > 0 for line in said.of("memory") if "scratch" in line["name"])
        and len(said.of("memory")) == 10
    )
    keys = {key.replace("OPT-tiny 1x16", "OPT-1.3B 16x256") for key in said.figures}
    assert {
        goal.key for goal in GOALS if goal.key.endswith("16x256 / forwards") or "memory" in goal.key
    } <= keys


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
    child = f"import subprocess, time; p = subprocess.Popen(['sleep', '60']); open({str(tmp_path / 'pid')!r}, 'w').write(str(p.pid)); time.sleep(60)"
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
        ("group", dict(title="axpy_", rows=[dict(name="copy", ms=1.0, p10=1.0, p90=1.0, rounds=9), dict(name="axpy_ normal cuda", **row)])),
        ("figure", dict(key="axpy_ cuda / copy", value=91.0)),
        ("figure", dict(key="MeZO scratch OPT-1.3B 1x16 / forwards", value=2.5)),
        ("figure", dict(key="another", value=3.0)),
        ("step", dict(model="OPT-1.3B", batch=1, length=16, tokens=16, ratios={"MeZO scratch": 2.5}, kernels={"MeZO scratch": 77})),
        ("counters", dict(name="axpy_ normal cuda: axpy<0>", metrics={"Duration": "310 us", "Warp Cycles": "9"})),
        ("memory", dict(name="MeZO scratch, OPT-1.3B 1x16", forward=3 << 30, extra=64 << 20, scratch=60 << 20)),
    ]  # fmt: skip
    record.add("correctness", Outcome(Part("all", "everything", ""), "done", "", 3, lines))
    return record


def test_page() -> None:
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
    assert "| OPT-1.3B | 1x16 | 77 |" in lines and "| MeZO scratch, OPT-1.3B 1x16 | 3072 | 64 | 60 |" in lines
    assert "| axpy_ normal cuda: axpy<0> | 310 us |  |  |  |  |  |" in lines
    assert lines.index("| goal | must reach | measured |  |") < lines.index("## Correctness")


def test_page_without_plots_says_why() -> None:
    record = made_up()
    record.device["matplotlib"] = "absent"
    assert "No plots: matplotlib is not installed here." in page.page(record)


def test_page_of_nothing() -> None:
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
