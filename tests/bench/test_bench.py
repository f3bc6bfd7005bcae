"""The benchmark harness: groups share the bound of a step, pages say their commit, methods are discovered."""

from __future__ import annotations

import gc
import json
import sys
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from mutant import mutant

import zokern

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from benchmarks import bench_methods, bench_step, launches, steps  # noqa: E402
from benchmarks.eager_methods import LOOPS  # noqa: E402
from benchmarks.measure import Case, Group  # noqa: E402
from benchmarks.report import HOW, Report  # noqa: E402
from benchmarks.steps import BOUND, Forwards, Shape, Step, Times  # noqa: E402

PAGES = sorted((ROOT / "benchmarks" / "results").glob("*/bench.json"))
TINY = Shape("OPT-tiny", "fp32", 1, 4, threads=1)
STEPS = [
    Step("MeZO"),
    Step("MeZO", "master"),
    Step("SubZero"),
    Step("LOZO", refresh=True),
    Step("MeZO", eager=True),
]


class Benchmark:
    """Stands for pytest-benchmark's fixture, and runs what it is given once."""

    def pedantic(self, call: Callable[[], Any], **_: Any) -> None:
        call()


# The bound ------------------------------------------------------------------------------------------------


class Conditions:
    """A timer whose seconds tell what the process holds:
    it counts trees of modules, sets of weights, and threads."""

    def __init__(self) -> None:
        gc.collect()
        self.before = {id(m) for m in self.models()}
        self.seen: list[tuple[int, int, int]] = []

    def models(self) -> list[torch.nn.Module]:
        return [m for m in gc.get_objects() if type(m).__name__ == "OPTForCausalLM"]

    def __call__(self, call: Callable[[], Any]) -> float:
        call()
        models = [m for m in self.models() if id(m) not in self.before]
        weights = {next(m.parameters()).data_ptr() for m in models}
        self.seen.append((len(models), len(weights), torch.get_num_threads()))
        return 1.0 + 0.3 * (len(models) - 2) + 0.3 * (len(weights) - 1)


def check_conditions(measure: Callable[..., Times], step: Step) -> Times:
    """Rejects a harness that takes a time while the process
    holds more or less than one set of weights and two modules."""
    timer = Conditions()
    found = measure(TINY, step, 0.0, timer)
    assert set(timer.seen) == {(2, 1, TINY.threads)}, f"{step.name} was timed under {timer.seen}"
    assert len(found.bound) == len(found.step) == len(timer.seen) / 2
    return found


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def fresh():
    """Nothing of an earlier test is in the cache."""
    steps.times.cache_clear()
    yield
    steps.times.cache_clear()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("step", STEPS, ids=lambda step: step.name)
def test_a_bound_and_its_step_have_equal_conditions(step: Step, threads) -> None:
    pytest.importorskip("transformers")
    check_conditions(steps.measure, step)


WRONG = {
    "the bound before the other module is built": (
        "module = model(shape.model, shape.dtype)\n",
        "module = model(shape.model, shape.dtype)\n"
        "    first = timer(torch.no_grad()(shape.closure(module)))\n",
    ),
    "a module that another step has left behind": (
        "module = model(shape.model, shape.dtype)\n",
        "module = model(shape.model, shape.dtype)\n    left = model(shape.model, shape.dtype)\n",
    ),
    "a copy of the weights for the bound": ("same_weights(module)", "__import__('copy').deepcopy(module)"),
    "the threads of the parent": ("torch.set_num_threads(shape.threads)", "torch.set_num_threads(2)"),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("why", WRONG)
def test_unequal_conditions_are_rejected(why: str, threads) -> None:
    pytest.importorskip("transformers")
    wrong = mutant(steps, "measure", *WRONG[why])
    with pytest.raises(AssertionError, match="MeZO was timed under"):
        check_conditions(wrong, Step("MeZO"))


def of_groups(monkeypatch, measure: Callable[..., Times]) -> Report:
    """Two groups of one shape as the harness makes them, each step by `measure`, in this process."""
    monkeypatch.setattr(steps, "times", lambda shape, step, seconds: measure(shape, step, seconds))
    report = Report(quick=True)
    steps.bench(Benchmark(), report, "evaluations", TINY, [Step("MeZO"), Step("MeZO", "scratch")])
    steps.bench(Benchmark(), report, "methods", TINY, [Step("MeZO"), Step("SubZero"), Step("LOZO")])
    return report


@pytest.mark.filterwarnings("ignore")
def test_two_groups_have_one_bound(monkeypatch, threads) -> None:
    """A harness that keeps all modules is rejected:
    its first bound is measured before the other modules are built."""
    pytest.importorskip("transformers")
    report = of_groups(monkeypatch, lambda *of: steps.measure(*of, timer=Conditions()))
    first, second = ({row["name"]: row for row in group["rows"]} for group in report.groups)
    assert first["MeZO"]["bound_ms"] == second["MeZO"]["bound_ms"] == 1000.0
    assert first["MeZO"]["over_forwards"] == second["MeZO"]["over_forwards"]
    assert report.notes() == []

    kept: list[Any] = []
    timer = Conditions()

    def together(shape: Shape, step: Step, seconds: float) -> Times:
        from benchmarks.models import model

        kept.append(model(shape.model, shape.dtype))
        return steps.measure(shape, step, seconds, timer)

    assert any("OPT-tiny fp32 1x4 took" in note for note in of_groups(monkeypatch, together).notes())


def processor(call: Callable[[], Any]) -> float:
    """Seconds of this process on its processor: what other processes take does not count."""
    start = time.process_time()
    call()
    return time.process_time() - start


def test_processes_of_two_groups_measure_one_bound(fresh) -> None:
    """Within noise: a bound of one forward, or of three, is not within it."""
    pytest.importorskip("transformers")
    bounds = [
        min(steps.times(TINY, step, 1.0, processor).bound)
        for step in (Step("MeZO", "scratch"), Step("SubZero"))
    ]
    assert max(bounds) < 1.4 * min(bounds)
    assert steps.times(TINY, Step("SubZero"), 1.0, processor) is steps.times(
        TINY, Step("SubZero"), 1.0, processor
    )


def test_a_failure_in_the_process_is_one_here(fresh) -> None:
    pytest.importorskip("transformers")
    with pytest.raises(ValueError, match="no model 'OPT-none'"):
        steps.times(Shape("OPT-none", "fp32", 1, 4, threads=1), Step("MeZO"), 0.0)


def group_of(ratios: dict[Step, float]) -> steps.Steps:
    made = {
        step: Times([2.0, 1.0, 4.0], [2 * ratio, ratio, 4 * ratio], "paired")
        for step, ratio in ratios.items()
    }
    return steps.Steps("methods", TINY, made)


def test_ratios_go_over_the_bound_of_their_own_process() -> None:
    group = group_of({Step("MeZO"): 0.5, Step("SubZero"): 1.0, Step("MeZO", eager=True): 4.0})
    group.found["eager MeZO"].bound[:] = [
        20.0,
        10.0,
        40.0,
    ]  # a slower hour: its step is 10 times as slow there
    group.found["eager MeZO"].step[:] = [80.0, 40.0, 160.0]
    rows = {row["name"]: row for row in group.rows()}
    assert rows["MeZO"]["times_eager"] == 8.0 and "times_eager" not in rows["SubZero"]
    assert (rows["MeZO"]["over_forwards"], rows["eager MeZO"]["over_forwards"]) == (0.5, 4.0)
    assert rows[BOUND]["rounds"] == 9 and "over_forwards" not in rows[BOUND]


# Methods --------------------------------------------------------------------------------------------------


def asked(monkeypatch, bench: Callable[..., None], *shape: Shape) -> tuple[list[Step], Report]:
    """The steps that a benchmark of the harness times, with made-up times."""
    found: list[Step] = []

    def times(shape: Shape, step: Step, seconds: float) -> Times:
        found.append(step)
        return Times([1.0, 1.0], [2.0, 2.0], "paired")

    monkeypatch.setattr(steps, "times", times)
    report = Report(quick=True)
    bench(Benchmark(), report, *shape)
    return found, report


def test_every_file_of_methods_is_timed(monkeypatch) -> None:
    pytest.importorskip("transformers")
    files = {path.stem for path in (ROOT / "zokern" / "methods").glob("*.py")} - {"__init__"}
    found, report = asked(monkeypatch, bench_methods.bench_methods, TINY)
    timed = {
        getattr(zokern, step.method).__module__.rsplit(".", 1)[1]
        for step in found
        if step == Step(step.method)
    }
    assert timed == files - {"subzero_plus"}
    many, _ = asked(monkeypatch, bench_methods.bench_many)
    assert {step.method for step in many} == {"SubZeroPlus"}, "its 100 losses a step are timed by themselves"
    assert Step("MeZO", eager=True) in found and Step("LOZO", refresh=True) in found
    assert report.found()["LOZO, a new basis every 50 steps included, OPT-tiny fp32 1x4 / forwards"][0] == 2.0


def rows_of(monkeypatch, report: Report, **seconds: float) -> tuple[list[list[Step]], list[str]]:
    """bench_eager of some methods, whose loops take twice the time in the first round and three times in the
    second, and whose forwards half of it: the steps that were timed together, and what was said."""
    asked, said = list[list[Step]](), list[str]()

    def turns(shape: Shape, both: list[Step], _: float) -> list[Times]:
        asked.append(both)
        taken = seconds[both[0].method]
        bare = Times([], [taken / 2, taken], "2")
        return [Times([], [taken, 2 * taken], "paired"), Times([], [2 * taken, 6 * taken], ""), bare]

    monkeypatch.setattr(bench_methods, "turns", turns)
    report.say = said.append
    for method in seconds:
        with report.saving():
            bench_methods.bench_eager(Benchmark(), report, method)
    return asked, said


def test_a_method_is_timed_in_turns_with_its_loop(monkeypatch, tmp_path) -> None:
    """Both have the same queries, and the row of each is said as it is found."""
    pytest.importorskip("transformers")
    report = run("aaaaaaa", "first", 1.0, tmp_path)
    asked, said = rows_of(monkeypatch, report, MeZO=0.1, SubZeroPlus=0.2)
    few = (("queries", 8),)
    plus = Step("SubZeroPlus", options=few)
    assert asked == [
        [Step("MeZO"), Step("MeZO", eager=True), Forwards(Step("MeZO"))],
        [plus, Step("SubZeroPlus", eager=True, options=few), Forwards(plus)],
    ]
    assert said[0] == "MeZO: 150 ms, the eager loop 400 ms, 2.50x; over 2 forwards 5.00x" and len(said) == 2
    rows = {row["name"]: row for row in report.groups[-1]["rows"]}
    assert rows["MeZO"]["times_eager"] == 2.5 and rows["SubZeroPlus queries=8"]["eager_ms"] == 800.0
    monkeypatch.delitem(LOOPS, "MeZO")
    with pytest.raises(pytest.skip.Exception, match="MeZO has no eager loop"):
        bench_methods.bench_eager(Benchmark(), report, "MeZO")


def test_the_page_has_a_row_as_soon_as_it_is_found_and_keeps_those_of_other_runs(
    monkeypatch, tmp_path
) -> None:
    pytest.importorskip("transformers")
    rows_of(monkeypatch, run("aaaaaaa", "first", 1.0, tmp_path), MeZO=0.1, LOZO=0.2)
    rows_of(monkeypatch, run("bbbbbbb", "first", 1.0, tmp_path), LOZO=0.3, TeZO=0.4)
    page = (tmp_path / "README.md").read_text()
    table = page.split("## methods and their eager loops, OPT-125M bf16 1x128")[1]
    assert [line.split(" | ")[0] for line in table.splitlines() if "2.50" in line] == [
        "| MeZO", "| LOZO", "| TeZO"
    ]  # fmt: skip
    assert table.count("aaaaaaa") == 1 and "| 450 [" in table and "| 300 [" not in table
    report = Report.load(tmp_path / "bench.json")
    assert report.found()["least of the methods OPT-125M bf16 1x128 / eager"][0] == 2.5
    assert report.found()["MeZO OPT-125M bf16 1x128 / eager"][1]["commit"] == "aaaaaaa"
    assert "2.50 x (commit aaaaaaa) | missed" in page and "2.50 x | missed" in page


def clock(call: Callable[[], Any]) -> float:
    """When a step is taken."""
    call()
    return time.monotonic()


def check_turns(found: list[Times]) -> None:
    """Rejects steps that were not taken in turns."""
    when = [moment for moments in zip(*(each.step for each in found)) for moment in moments]
    assert when == sorted(when) and len(when) == 4, f"steps were taken at {when}"


@pytest.mark.filterwarnings("ignore")
def test_steps_that_are_compared_take_turns() -> None:
    pytest.importorskip("transformers")
    both = Step("SubZero"), Step("SubZero", eager=True)
    check_turns(found := steps.turns(TINY, both, 0.0, clock))
    assert [each.evaluation for each in found] == ["paired", ""]
    with pytest.raises(AssertionError, match="steps were taken at"):
        check_turns([steps.turns(TINY, [step], 0.0, clock)[0] for step in both])
    with pytest.raises(ValueError, match="no model 'OPT-none'"):
        steps.turns(Shape("OPT-none", "fp32", 1, 4, threads=1), both, 0.0)


def check_forwards(kind: type[Forwards], monkeypatch) -> None:
    """The bare forwards are as many as the losses that a step reads: a slope is two, a gradient three."""
    from benchmarks.models import model

    calls: list[None] = []
    loss = closure_of(TINY)
    monkeypatch.setattr(Shape, "closure", lambda self, module: lambda: calls.append(None) or loss(module))
    for method, number in (("MeZO", 2), ("FZOO", 9), ("FGD", 2), ("Addax", 5), ("HiZOO", 3)):
        call, said = kind(Step(method)).start(model(TINY.model, TINY.dtype), TINY)
        calls.clear()
        call()
        assert (len(calls), said) == (number, str(number)), method


def closure_of(shape: Shape) -> Callable[[Any], Any]:
    right = Shape.closure
    return lambda module: right(shape, module)()


class TwoForwards(Forwards):
    """Those of a central difference, whatever the method reads."""

    def start(self, module: Any, shape: Shape) -> tuple[Callable[[], Any], str]:
        forward = shape.closure(module)
        return lambda: (forward(), forward()), "2"


@pytest.mark.filterwarnings("ignore")
def test_bare_forwards_are_as_many_as_a_step_reads(monkeypatch) -> None:
    pytest.importorskip("transformers")
    check_forwards(Forwards, monkeypatch)
    with pytest.raises(AssertionError, match="FZOO"):
        check_forwards(TwoForwards, monkeypatch)


def test_every_evaluation_has_a_step_beside_the_eager_loop(monkeypatch) -> None:
    pytest.importorskip("transformers")
    found, _ = asked(monkeypatch, bench_step.bench_step, TINY)
    assert {step.evaluation for step in found if not step.eager} == {
        "",
        "inplace",
        "master",
        "paired",
        "scratch",
    }
    assert Step("MeZO", eager=True) in found


def test_estimators_are_those_that_need_no_argument() -> None:
    assert {"Bayesian", "Blockwise", "Conservative", "Kernel", "Sign", "Spread"} <= set(
        bench_methods.ESTIMATORS
    )
    for name in bench_methods.ESTIMATORS:
        Step("MeZO", options=(("estimator", name),)).optimizer(torch.nn.Linear(2, 2), TINY)


# Pages ----------------------------------------------------------------------------------------------------


def run(commit: str, title: str, seconds: float, folder: Path) -> Report:
    report = Report(quick=False, command="python -m pytest benchmarks")
    report.machine |= {"commit": commit, "date": "2026-01-02"}
    report.folder = lambda: folder  # type: ignore[method-assign]
    report.show = lambda to, drawn=True: (to / "README.md").write_text(report.markdown())
    report.note(f"a note of {title}")
    figures = {"axpy_ normal fp32 / eager": 30.0, "other": 2.0} if title == "first" else {}
    report.add(Group(title, [Case("one", lambda: None, times=[seconds])]), **figures)
    return report


def test_a_page_keeps_what_was_not_measured_with_its_commit(tmp_path) -> None:
    run("aaaaaaa", "first", 1.0, tmp_path).write(anew=True)
    run("aaaaaaa", "second", 2.0, tmp_path).write(anew=False)
    before = (tmp_path / "README.md").read_text()
    assert before.startswith("Measured at commit aaaaaaa on 2026-01-02;") and "Of commit" not in before
    run("bbbbbbb", "second", 3.0, tmp_path).write(anew=False)
    page = (tmp_path / "README.md").read_text()
    first, second = page.split("## first")[1].split("## second")
    assert "Of commit aaaaaaa, 2026-01-02, torch" in first and "1000" in first
    assert "3000" in second and "Of commit" not in second and "2000" not in page
    assert page.splitlines()[0] == (
        "Measured at commit bbbbbbb on 2026-01-02; later changes of the code are not in it. 1 of its 2 "
        "groups are of other runs, and each says of which."
    )
    assert "30.00 x (commit aaaaaaa) | reached" in page and "- a note of first" in page and HOW in page
    run("ccccccc", "second", 4.0, tmp_path).write(anew=True)
    assert "## first" not in (tmp_path / "README.md").read_text()


def test_what_is_loaded_is_what_was_written(tmp_path) -> None:
    report = run("aaaaaaa", "first", 1.0, tmp_path)
    report.write(anew=True)
    assert Report.load(tmp_path / "bench.json").markdown() == report.markdown()


@pytest.mark.parametrize("file", PAGES, ids=lambda file: file.parent.name)
def test_a_page_says_its_commit_first_and_is_what_its_json_says(file: Path) -> None:
    page = (file.parent / "README.md").read_text()
    assert page.startswith(f"Measured at commit {json.loads(file.read_text())['machine']['commit']} on ")
    assert page == Report.load(file).markdown()


@pytest.mark.parametrize("file", PAGES, ids=lambda file: file.parent.name)
def test_a_panel_has_twelve_bars_and_steps_have_the_eager_loop(file: Path, tmp_path, monkeypatch) -> None:
    pytest.importorskip("matplotlib")
    from benchmarks import plot

    drawn: list[Any] = []
    monkeypatch.setattr(plot.plt, "close", drawn.append)
    report = Report.load(file)
    plot.plot(report, tmp_path / "bench.png")
    panels = [axis for figure in drawn for axis in figure.axes]
    assert panels and all(len(axis.patches) <= plot.BARS for axis in panels)
    drawn.clear()
    plot.plot_steps(report, tmp_path / "steps.png")
    for figure in drawn:
        assert all("eager MeZO" in [line.get_label() for line in axis.lines] for axis in figure.axes)
    plot.plt.close("all")


# Host time of launches ------------------------------------------------------------------------------------


def test_launches_reach_the_stubs(monkeypatch) -> None:
    """Every verb on every kind of list, with real kernels back in their places afterwards."""
    reached: set[str] = set()
    for name in ("axpy", "perturb", "update", "lowrank_tiles"):
        note = staticmethod(lambda *_, name=name, **__: reached.add(name))
        monkeypatch.setattr(launches.Module, name, note)
    before = {name: vars(getattr(launches.triton, name, types)).copy() for name in launches.KERNELS}
    monkeypatch.setattr(launches, "CALLS", 2)
    found = launches.measured(1)
    assert reached == {"axpy", "perturb", "update", "lowrank_tiles"} and min(found.values()) > 0
    assert len(found) == len(launches.VERBS) * len(launches.LISTS) * len({name for name, *_ in found})
    for name, held in before.items():
        assert vars(getattr(launches.triton, name, types)) == held
