"""The page of a run: goals first, then what was checked, what was measured, and what was not."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from .record import Record

MIB = 1 << 20
PREDICTED = ("prediction and measurement", "predicted", "measured", "measured / predicted")
COLUMNS = (
    ("gb_per_s", "GB/s", ".0f"), ("percent_of_copy", "% of copy", ".0f"), ("times_eager", "x eager", ".2f"),
    ("bytes_per_element", "B/el", "d"),
    ("host_ms", "host ms", ".3g"),
)  # fmt: skip


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    return [
        f"| {' | '.join(head)} |",
        "|" + "---|" * len(head),
        *(f"| {' | '.join(map(cell, row))} |" for row in rows),
    ]


def cell(text: str) -> str:
    return text.replace("|", "/").replace("\n", " ")


def page(record: Record, pictures: Sequence[str] = ()) -> str:
    text = [*head(record), *predictions(record), *goals(record), *checks(record)]
    if record.device.get("matplotlib") == "absent":
        text += ["", "No plots: matplotlib is not installed here."]
    for name in pictures:
        text += ["", f"![{name.removesuffix('.png')}]({name})"]
    text += [*steps(record), *groups(record), *counters(record), *others(record), *course(record)]
    return "\n".join(text) + "\n"


def head(record: Record) -> list[str]:
    d = record.device
    if not d:
        return ["# No device", "", "The part that reads the device's name did not end; see the last table."]
    sm, most, memory = (d.get(f"clocks_{key}", "?") for key in ("sm", "max_sm", "mem"))
    clocks = f"{sm} of {most} SM, {memory} memory under load"
    versions = ", ".join(
        f"{name} {d.get(name, '?')}" for name in ("torch", "triton", "transformers", "python", "zokern")
    )
    lines = [
        f"# {d['name']}",
        "",
        f"`make gpu`{' --quick' if record.quick else ''}, {d['date']}, commit {d['commit']}. "
        f"{d['multiprocessors']} multiprocessors, "
        f"{d['memory_gb']} GB, L2 {d['l2_mb']} MB, compute capability {d['capability']}; clocks {clocks}; "
        f"driver {d.get('driver_version', '?')}, "
        f"CUDA {d['cuda']}; {versions}.",
        f"Bits are judged by backend `{d.get('judge', '?')}`. "
        "Medians of rounds in which the cases of a group take turns; a ratio is the median of the rounds' "
        "ratios. Caches are flushed before a "
        "verb; GB/s count the bytes that the work must move (z moves none).",
    ]
    if record.quick:
        lines += ["", "**A quick run: small tensors and few rounds. Its figures say nothing.**"]
    if "H200" not in d["name"]:
        lines += ["", "The goals below were set for an H200."]
    return lines


def predictions(record: Record) -> list[str]:
    """Every figure of benchmarks/results/predicted.md, line by line."""
    rows = record.predictions()
    return ["", *table(PREDICTED, rows)] if rows else []


def goals(record: Record) -> list[str]:
    return ["", *table(("goal", "must reach", "measured", ""), record.goals())]


def checks(record: Record) -> list[str]:
    """How many passed, each that did not, and each that could not be made."""
    wrong = record.failures()
    passed = sum(check["problem"] is None for check in record.checks)
    text = ["", "## Correctness", "", f"{passed} of {len(record.checks)} checks passed."]
    if not record.checks:
        text[-1] = "Nothing was checked."
    text += ["", *(f"- **failed:** {cell(line)}" for line in wrong)] if wrong else []
    if record.skips:
        text += [
            "",
            "Not run:",
            "",
            *(f"- {cell(skip['name'])}: {cell(skip['why'])}" for skip in record.skips),
        ]
    return text


def steps(record: Record) -> list[str]:
    if not record.steps:
        return []
    names = list(dict.fromkeys(name for step in record.steps for name in step["ratios"]))
    rows = [
        [
            step["model"],
            f"{step['batch']}x{step['length']}",
            *(f"{step['ratios'][n]:.2f}" if n in step["ratios"] else "" for n in names),
        ]
        for step in record.steps
    ]
    text = ["", "## Steps: time over two bare forwards", "", *table(("model", "tokens", *names), rows)]
    if record.traces:
        rows = [
            [
                f"{cell['model']} {cell['batch']}x{cell['length']}",
                method,
                str(one["kernels"]),
                f"{1e3 * one['busy']:.2f}",
                f"{100 * one['share']:.0f}",
                str(one["waits"]),
            ]
            for cell in record.traces
            for method, one in cell["traces"].items()
        ]
        head = (
            "model and tokens",
            "step",
            "kernels and copies",
            "busy ms",
            "busy % of the step",
            "host waits",
        )
        text += ["", "What a step puts on the device (torch.profiler):", "", *table(head, rows)]
    if record.memory:
        rows = [
            [m["name"], *(f"{m[key] / MIB:.0f}" for key in ("forward", "extra", "scratch"))]
            for m in record.memory
        ]
        text += [
            "",
            "Peak memory, MB:",
            "",
            *table(("step", "peak of a forward", "extra of a step", "scratch_bytes"), rows),
        ]
    return text


def groups(record: Record) -> list[str]:
    text = []
    for group in record.groups:
        shown = [column for column in COLUMNS if any(column[0] in row for row in group["rows"])]
        rows = []
        for row in group["rows"]:
            time = f"{row['ms']:.4g} [{row['p10']:.4g} {row['p90']:.4g}]"
            rows.append(
                [
                    row["name"],
                    time,
                    str(row["rounds"]),
                    *(format(row[k], form) if k in row else "" for k, _, form in shown),
                ]
            )
        head = ("case", "median ms [p10 p90]", "rounds", *(title for _, title, _ in shown))
        text += ["", f"## {group['title']}", "", *table(head, rows)]
    return text


def counters(record: Record) -> list[str]:
    from .counters import SHOWN

    rows = [
        (kernel["name"], *(kernel["metrics"].get(name, "") for name in SHOWN)) for kernel in record.counters
    ]
    text = ["", "## Hardware counters (ncu; all of them: gpu.json)", "", *table(("kernel", *SHOWN), rows)]
    return text if rows else []


def others(record: Record) -> list[str]:
    from .goals import GOALS

    rest = {key: value for key, value in record.figures.items() if key not in {goal.key for goal in GOALS}}
    rows = [(key, f"{value:.2f}") for key, value in rest.items()]
    return ["", "## Other figures", "", *table(("figure", "value"), rows)] if rest else []


def course(record: Record) -> list[str]:
    rows = [
        (
            p["stage"],
            p["name"],
            p["what"],
            f"{p['how']}{': ' if p['why'] else ''}{p['why']}",
            f"{p['seconds']:.0f}",
        )
        for p in record.parts
    ]
    return ["", "## Course of the run", "", *table(("stage", "part", "what", "how it ended", "s"), rows)]
