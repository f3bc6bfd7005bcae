"""`python -m zokern bench`: what steps and kernels cost on this machine, in about a minute.

    python -m zokern bench                            # a model of OPT-125M's shape, random weights
    python -m zokern bench --model FOLDER --length 128 --plot bench.png --json bench.json

Steps    a step of MeZO, of SubZero, and of the eager loop of PyTorch, each over two bare forwards
kernels  passes over one large tensor, beside a copy of it and the eager loop's way

What is compared takes turns, round by round, and a ratio is the median over the rounds. Other programs that
run meanwhile make the figures worse, and less equal from run to run.
"""

from __future__ import annotations

import argparse
import copy
import functools
import json
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from .. import methods
from ..ops import axpy_, lowrank_, perturb
from ..step import step
from ..training.loading import needed
from . import info

LR, EPS = 1e-6, 1e-3
LEAST, MOST = 3, 50  # rounds of a comparison
ROWS, COLUMNS, RANK = 4096, 4096, 16  # of the tensor that kernels pass over
METHODS = ("MeZO", "SubZero")
KERNEL_SHARE = 0.25  # of the time
Call = Callable[[], Any]


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the table; 2 when something is missing."""
    options = _parser().parse_args(argv)
    if options.threads:
        torch.set_num_threads(options.threads)
    say = (lambda text: None) if options.quiet else functools.partial(print, flush=True)
    try:
        for path in filter(None, (options.json, options.plot)):
            if not path.absolute().parent.is_dir():
                raise ValueError(f"{path}: the folder {path.absolute().parent} does not exist")
        if options.plot:
            needed("matplotlib")
        needed("transformers")  # before a quarter of a minute is spent
        report = bench(options, say)
    except (OSError, ImportError, ValueError, RuntimeError) as error:
        print(f"zokern bench: {error}", file=sys.stderr)
        return 2
    print(table(report))
    if options.json:
        options.json.write_text(json.dumps(report, indent=1) + "\n")
    if options.plot:
        plot(report, options.plot)
        print(f"plot {options.plot}")
    return 0


def bench(options: argparse.Namespace, say: Any) -> dict[str, Any]:
    """Returns the report: machine, model, kernels and steps, as plain data; times in seconds."""
    started = time.perf_counter()
    device = torch.device(options.device)
    say("kernels")
    kernel_rows = kernels(device, KERNEL_SHARE * options.seconds)
    module, name = _model(options)
    ids = torch.randint(
        4, module.config.vocab_size, (options.batch_size, options.length), dtype=torch.int64, device="cpu"
    ).to(device)
    rows, share = [], (1.0 - KERNEL_SHARE) * options.seconds / (len(METHODS) + 1)
    for method in (*METHODS, "eager"):
        say(f"steps: {method}")
        rows.append(steps(method, module, ids, share))
    found = info.gather()
    return {
        "machine": {
            "gpu": found["gpus"] if device.type == "cuda" else [], "threads": torch.get_num_threads(),
            "instruction_set": found["cpu"]["instruction_set"], "versions": found["versions"],
            "backends": {kind: why is None for kind, why in found["backends"].items()},
        },
        "model": {"name": name, "weights": sum(p.numel() for p in module.parameters()),
                  "dtype": options.dtype, "batch_size": options.batch_size, "length": options.length},
        "steps": rows, "kernels": kernel_rows, "seconds": time.perf_counter() - started,
    }  # fmt: skip


def rounds(cases: dict[str, Call], seconds: float, device: torch.device) -> dict[str, list[float]]:
    """Returns the seconds of each case in every round. In a round each runs once, in turn.

    A first round warms up. Then there are LEAST rounds, and up to MOST within `seconds`."""
    times: dict[str, list[float]] = {name: [] for name in cases}
    for call in cases.values():
        call()
    begun = time.perf_counter()
    for number in range(MOST):
        if number >= LEAST and time.perf_counter() - begun > seconds:
            break
        for name, call in cases.items():
            _wait(device)
            start = time.perf_counter()
            call()
            _wait(device)
            times[name].append(time.perf_counter() - start)
    return times


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def ratio(over: Sequence[float], under: Sequence[float]) -> float:
    """Returns the median over the rounds of the quotient of two times."""
    return median(a / b for a, b in zip(over, under))


def kernels(device: torch.device, seconds: float) -> list[dict[str, Any]]:
    """Times passes over float32 [ROWS, COLUMNS]. `traffic` is the bytes that a pass has to move for an
    element; `over_copy` is time over that of a copy that moves as much."""
    make = functools.partial(torch.empty, ROWS, COLUMNS, dtype=torch.float32, device=device)
    w, other, third = make().normal_(), make(), make()
    left, right = (torch.randn(n, RANK, dtype=torch.float32, device=device) for n in (ROWS, COLUMNS))
    name: dict[str, Any] = {"seed": 1, "who": "w"}

    def eager_both() -> None:
        z = torch.randn_like(w)
        torch.add(w, z, alpha=EPS, out=other)
        torch.add(w, z, alpha=-EPS, out=third)

    # name: (call, bytes of an element, the eager way)
    cases: dict[str, tuple[Call, int, Call | None]] = {
        "copy": (lambda: other.copy_(w), 8, None),
        "axpy_, theta + a z": (
            lambda: axpy_(w, "normal", draws=[(0, 0)], coeffs=[EPS], **name),
            8,
            lambda: w.add_(torch.randn_like(w), alpha=EPS),
        ),
        "perturb, both signs": (
            lambda: perturb(w, "normal", step=0, scales=(EPS, -EPS), out=[other, third], **name),
            12,
            eager_both,
        ),
        f"lowrank_, rank {RANK}": (
            lambda: lowrank_(w, left, right, scale=EPS**2),
            8,
            lambda: w.add_(left @ right.T, alpha=EPS**2),
        ),
    }
    calls = {label: call for label, (call, _, _) in cases.items()}
    calls |= {f"eager {label}": eager for label, (_, _, eager) in cases.items() if eager is not None}
    times = rounds(calls, seconds, device)
    return [
        {
            "name": label, "seconds": median(times[label]), "traffic": traffic,
            "over_copy": ratio(times[label], times["copy"]) * cases["copy"][1] / traffic,
            "eager_over": ratio(times[f"eager {label}"], times[label]) if eager else None,
            "rounds": len(times[label]),
        }
        for label, (_, traffic, eager) in cases.items()
    ]  # fmt: skip


def steps(method: str, module: Any, ids: Tensor, seconds: float) -> dict[str, Any]:
    """Times steps over two bare forwards of the same weights, with no optimizer's hooks on them."""
    bare = copy.deepcopy(module, {id(p): p for p in module.parameters()})

    @torch.no_grad()
    def forwards() -> None:
        for _ in range(2):
            bare(input_ids=ids, labels=ids).loss.reshape(1)

    closure = lambda: module(input_ids=ids, labels=ids).loss  # noqa: E731
    evaluation = ""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a training run
        if method == "eager":
            call: Call = functools.partial(eager_step, list(module.parameters()), closure)
        else:
            make: Any = methods.METHODS[method]
            optimizer = make(module, lr=LR, eps=EPS, dead_limit=None)
            for _ in range(2):  # the first step chooses the evaluation, the second compares its losses
                evaluation = step(optimizer, closure).evaluation
            call = lambda: step(optimizer, closure)  # noqa: E731
        times = rounds({"bound": forwards, "step": call}, seconds, ids.device)
        if method != "eager":
            optimizer.flush()
    return {
        "name": method if method != "eager" else "MeZO, the eager loop", "evaluation": evaluation,
        "seconds": median(times["step"]), "forwards_seconds": median(times["bound"]),
        "over_forwards": ratio(times["step"], times["bound"]), "rounds": len(times["step"]),
    }  # fmt: skip


@torch.no_grad()
def eager_step(parameters: Sequence[nn.Parameter], closure: Callable[[], Tensor]) -> None:
    """Takes MeZO's step as its public loop does: z is drawn again in each of four passes over the weights.
    Malladi et al. 2023, Algorithm 1."""

    def move(scale: float) -> None:
        torch.manual_seed(0)
        for p in parameters:
            p.data = p.data + scale * torch.normal(0.0, 1.0, p.shape, dtype=p.dtype, device=p.device)

    move(EPS)
    above = closure()
    move(-2.0 * EPS)
    below = closure()
    move(EPS)
    move(-LR * ((above - below) / (2.0 * EPS)).item())


def _model(options: argparse.Namespace) -> tuple[Any, str]:
    """Returns a model in eval mode and its name: of a folder, or random weights in OPT-125M's shape."""
    transformers = needed("transformers")
    dtype = getattr(torch, options.dtype)
    if options.model is None:
        torch.manual_seed(0)
        module, name = transformers.OPTForCausalLM(transformers.OPTConfig()).to(dtype), "OPT-125M's shape"
    elif not Path(options.model, "config.json").is_file():
        raise ValueError(
            f"--model is {options.model!r}; expected a folder with a config.json, as save_pretrained "
            "writes it"
        )
    else:
        module = transformers.AutoModelForCausalLM.from_pretrained(options.model, dtype=dtype)
        name = Path(options.model).name
    return module.eval().to(options.device), name


def table(report: dict[str, Any]) -> str:
    """Returns the report as text."""
    model, machine = report["model"], report["machine"]
    kinds = ", ".join(name for name, on in machine["backends"].items() if on)
    where = ", ".join(machine["gpu"]) or f"CPU with {machine['instruction_set'] or 'no compiled kernels'}"
    lines = [
        f"{where}, {machine['threads']} threads; backends {kinds}",
        f"{model['name']}, {model['weights'] / 1e6:.0f}M weights, {model['dtype']}, "
        f"{model['batch_size']} x {model['length']} tokens",
        "",
        f"{'step':24}{'ms':>10}{'two forwards, ms':>18}{'step / forwards':>17}  evaluation",
    ]
    for row in report["steps"]:
        lines.append(
            f"{row['name']:24}{1e3 * row['seconds']:10.1f}{1e3 * row['forwards_seconds']:18.1f}"
            f"{row['over_forwards']:17.2f}  {row['evaluation']}".rstrip()
        )
    lines += ["", f"{'kernel':24}{'ms':>10}{'ns / element':>18}{'time / copy':>17}  eager / kernel"]
    for row in report["kernels"]:
        eager = "" if row["eager_over"] is None else f"{row['eager_over']:.1f}"
        each = 1e9 * row["seconds"] / (ROWS * COLUMNS)
        figures = f"{1e3 * row['seconds']:10.1f}{each:18.2f}{row['over_copy']:17.2f}"
        lines.append(f"{row['name']:24}{figures}  {eager}".rstrip())
    few = min(row["rounds"] for row in (*report["steps"], *report["kernels"]))
    note = (
        f"medians of {few} rounds or more, float32 {ROWS} x {COLUMNS} for kernels; {report['seconds']:.0f} s"
    )
    return "\n".join([*lines, "", note])


def plot(report: dict[str, Any], path: Path) -> None:
    """Draws steps over two forwards, and kernels over a copy, into a file."""
    matplotlib = needed("matplotlib")
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(10, 3), layout="constrained")
    for axis, rows, key, title in (
        (axes[0], report["steps"], "over_forwards", "step / two bare forwards"),
        (axes[1], report["kernels"], "over_copy", "pass / copy of as many bytes"),
    ):
        names, values = [row["name"] for row in rows][::-1], [row[key] for row in rows][::-1]
        bars = axis.barh(names, values, color=["0.6" if "eager" in n or n == "copy" else "C0" for n in names])
        axis.bar_label(bars, fmt="%.2f", padding=3)
        axis.axvline(1.0, color="0.3", linestyle=":", linewidth=1)
        axis.set(xlabel=title, xlim=(0, 1.2 * max(values)))
    model = report["model"]
    figure.suptitle(f"{model['name']}, {model['dtype']}, {model['batch_size']} x {model['length']} tokens")
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _parser() -> argparse.ArgumentParser:
    parse = argparse.ArgumentParser(
        prog="zokern bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parse.add_argument
    add(
        "--model",
        metavar="FOLDER",
        help="a causal language model (default: random weights, OPT-125M's shape)",
    )
    add("--batch-size", type=int, default=1, metavar="ROWS", help="default %(default)s")
    add("--length", type=int, default=32, metavar="TOKENS", help="of a row (default %(default)s)")
    add("--dtype", choices=("float32", "bfloat16", "float16"), default="float32", help="default %(default)s")
    cuda = torch.cuda.is_available()
    add("--device", default="cuda" if cuda else "cpu", help="default here: %(default)s")
    add("--seconds", type=float, default=60.0, help="for all rounds together, about (default %(default)s)")
    add("--threads", type=int, help="of torch (default: torch's own choice)")
    add("--json", type=Path, metavar="FILE", help="write the report")
    add("--plot", type=Path, metavar="FILE", help="draw it (needs matplotlib)")
    add("--quiet", action="store_true", help="print the table alone")
    return parse
