"""The command: runs what is not done yet, within the hours that are given, and writes page and plot."""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from benchmarks.report import Report
from examples.demo.training import Score, score
from zokern import methods

from . import __doc__ as about
from . import problems
from .order import ADAPTERS, LARGE, MODELS, SETS, SMALL, Run, order
from .page import page
from .reading import groups
from .store import Store
from .train import measure, wanted

Problems = Callable[[str, str, int, int], problems.Problem]


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="python -m benchmarks.study", description=(about or "").partition("\n")[0]
    )
    add = made.add_argument
    add(
        "--hours",
        type=float,
        default=4.0,
        help="no run begins that is expected to end later, by those of its model (default %(default)s)",
    )
    add("--forwards", type=int, default=300, help=f"that train a run of {SMALL} (default %(default)s)")
    add("--large-forwards", type=int, default=100, help=f"that train a run of {LARGE} (default %(default)s)")
    add("--batch", type=int, default=10, help="rows, equally many of each label (default %(default)s)")
    add("--held-out", type=int, default=250, help="rows to judge by (default %(default)s)")
    add("--words", type=int, default=12, help="of a row at most (default %(default)s)")
    add("--threads", type=int, help="of torch (default: torch's own choice)")
    add(
        "--only",
        nargs="+",
        metavar="METHOD",
        choices=methods.METHODS,
        help="run these alone; the others stay missing",
    )
    add("--models", nargs="+", choices=MODELS, default=MODELS, help="the same for models")
    add("--sets", nargs="+", choices=SETS, default=SETS, help="the same for sets")
    add("--file", type=Path, help="rows; page and plot are beside it (default: the folder of this machine)")
    add("--anew", action="store_true", help="start again: rows that are there are lost")
    add("--retry", action="store_true", help="run again what failed")
    add("--page", action="store_true", help="run nothing: write page and plot of the rows that are there")
    return made


def clock(seconds: float) -> str:
    """Returns hours and minutes."""
    minutes = round(seconds / 60)
    return f"{minutes // 60}:{minutes % 60:02d}"


def expected(run: Run, rows: Sequence[Mapping[str, Any]]) -> float:
    """Returns the seconds that a run is expected to take: the median of those of its model that are done; 0
    before there are any."""
    known = [row["wall_seconds"] for row in rows if row["model"] == run.model]
    return statistics.median(known) if known else 0.0


def tuned(run: Run, rows: Sequence[Mapping[str, Any]]) -> Mapping[str, Any] | None:
    """Returns a row of the same model, set and method that has an lr, a settled one where there is one; None:
    there is none yet."""
    alike = [row for row in rows if Run.of(row)._replace(seed=run.seed) == run and "error" not in row]
    return next((row for row in alike if wanted(row) is None), alike[0] if alike else None)


def done(store: Store, retry: bool) -> set[Run]:
    """Returns the runs that need not be run again: those whose lr is settled, and unless `retry` those that
    failed."""
    open_ = {Run.of(row) for row in store.latest() if "error" not in row and wanted(row) is not None}
    return store.done(retry) - open_


def run_all(
    todo: Sequence[Run],
    store: Store,
    settings: argparse.Namespace,
    record: Mapping[str, Any],
    problem: Problems,
) -> None:
    """Runs what is not done, in order, until all is done or
    the next one would end after the time that is given."""
    from tqdm.auto import tqdm

    ends, before = time.monotonic() + 3600 * settings.hours, dict[tuple[str, str], Score]()
    known_runs = done(store, settings.retry)
    left = [run for run in todo if run not in known_runs]
    with tqdm(total=len(todo), initial=len(todo) - len(left), unit="run", desc="study") as bar:
        for number, run in enumerate(left):
            rest = ends - time.monotonic()
            if rest <= 0 or expected(run, store.rows) > rest:
                tqdm.write(
                    f"the time is up: {len(left) - number} of {len(todo)} runs are left; the same command "
                    "goes on"
                )
                return
            plan = sum(expected(later, store.rows) for later in left[number:])
            bar.set_postfix_str(f"{run}; left: {clock(plan)} of the plan, {clock(rest)} of --hours")
            task = problem(run.model, run.data, settings.words, settings.held_out)
            if (run.model, run.data) not in before:
                before[run.model, run.data] = score(task.model, task.words, task.rows.held_out)
            forwards = store.settings["forwards"][run.model]
            latest, start = store.latest(), before[run.model, run.data]
            known, old = tuned(run, latest), next((row for row in latest if Run.of(row) == run), None)
            what = str(run) if known and wanted(known) is None else f"{run}, tuned first"
            with tqdm(total=forwards, unit="forward", desc=what, leave=False) as inner:
                row = measure(run, task, start, settings, forwards, inner.update, known, old)
            store.append(dict(record) | row)
            bar.update()
            tqdm.write(line(row))


def line(row: Mapping[str, Any]) -> str:
    """Returns a run in words."""
    if "error" in row:
        return f"{Run.of(row)}: {row['error']}"
    shares = " ".join(f"{point['right'] / point['rows']:.2f}" for point in row["points"])
    loss = f"{row['points'][0]['loss']:.3f} -> {row['points'][-1]['loss']:.3f}"
    return f"{Run.of(row)}: lr {row['lr']:.1e}, loss {loss}, accuracy {shares}, {row['wall_seconds']:.0f} s"


def write(store: Store, names: Sequence[str]) -> None:
    """Writes study.md and, where matplotlib is installed, study.png beside the rows."""
    folder, rows = store.path.parent, store.latest()
    (folder / "study.md").write_text(page(store.settings, rows, names))
    if find_spec("matplotlib") is None:
        print("no plot: matplotlib is not installed")
        return
    from .plot import plot

    title = f"{len(rows)} runs, commits {', '.join(sorted({row['commit'] for row in rows}))}"
    plot(groups(rows, store.settings["forwards"]), title, folder / "study.png")
    print(f"{folder / 'study.md'}: {len(rows)} runs")


def main(argv: Sequence[str] | None = None, problem: Problems | None = None) -> int:
    """Runs a study. 0 when it ended by itself, 2 when it cannot begin, 130 after Ctrl-C; page and plot are
    written all the same."""
    given = sys.argv[1:] if argv is None else list(argv)
    settings = parser().parse_args(given)
    report = Report(quick=False, command=" ".join(["python -m benchmarks.study", *given]))
    if settings.threads:
        torch.set_num_threads(settings.threads)
    path = settings.file or report.folder() / "study.jsonl"
    budgets = {SMALL: settings.forwards, LARGE: settings.large_forwards, ADAPTERS: settings.large_forwards}
    kept = {"forwards": budgets} | {name: getattr(settings, name) for name in ("batch", "held_out", "words")}
    try:
        if problem is None and not settings.page and (absent := problems.missing()):
            raise ValueError(
                f"not installed: {', '.join(absent)}; make install has them, or pip install --no-deps"
            )
        store = Store.read(path) if settings.page else Store(path, kept, settings.anew)
    except ValueError as error:
        print(f"benchmarks.study: {error}", file=sys.stderr)
        return 2
    names, code = list(methods.METHODS), 0
    only = set(settings.only or names), set(settings.models), set(settings.sets)
    todo = [
        run
        for run in order(names)
        if all(own in some for own, some in zip((run.method, run.model, run.data), only))
    ]
    machine = report.machine
    record = {key: machine[key] for key in ("commit", "date", "command", "torch")} | {
        "machine": f"{machine['cpu']} {machine['isa']}"
    }
    try:
        if not settings.page:
            run_all(todo, store, settings, record, problem or problems.problem)
    except KeyboardInterrupt:
        code = 130
    write(store, names)
    return code


if __name__ == "__main__":
    sys.exit(main())
