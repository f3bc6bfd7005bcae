"""Whole steps: their time over the two bare forwards that they contain, their host time, their peak memory
over inference, and what they put on the device.

Models have published shapes and random weights, in bfloat16. Times run from an idle device to an idle device.
A group's cases take turns; those that may not meet in one group, because one writes weights that another
keeps updates for, have groups of their own, each with the two forwards in it. A step in a CUDA graph is
compared with two forwards in one.
"""

from __future__ import annotations

import gc
import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

import zokern

from .. import eager
from ..measure import Case, Group
from ..models import loss_of, on_device, same_weights
from .graphs import Captured
from .run import Run, free_bytes, synchronize
from .timing import IdleToIdle, figure, measure
from .trace import Trace, trace

LR, EPS = 1e-6, 1e-3
BOUND, GRAPH, LOOP = "two forwards", "two forwards, graph", "eager MeZO"
# Batch and length of 4096, 16 and 512 tokens: those that the goals and benchmarks/predict.py name.
CELLS = ((16, 256), (1, 16), (4, 128))
MIB = 1 << 20
ROOM = 10e9  # bytes beside the weights, for activations and two sets of logits
Make = Callable[..., Any]
DENSE: dict[str, Callable[[], Any]] = {
    "MeZO master": zokern.Master, "MeZO paired": lambda: zokern.Paired(check=False),
    "MeZO scratch": lambda: zokern.Scratch(check=False), "MeZO inplace": zokern.InPlace,
}  # fmt: skip
FACTORED: dict[str, Make] = {"SubZero": zokern.SubZero, "LOZO": zokern.LOZO}
GRAPHED = ("MeZO master", "MeZO paired")


def optimizer(name: str, module: nn.Module) -> Any:
    make, way = (zokern.MeZO, DENSE[name]) if name in DENSE else (FACTORED[name], DENSE["MeZO paired"])
    made = make(module, lr=LR, eps=EPS, dead_limit=None, evaluation=way())
    # the ten steps in which it also samples the weights for dead updates are not what a run is made of
    made.run.step = 10
    return made


def peak(run: Run, call: Callable[[], Any]) -> int:
    """Most bytes that were allocated at once during a call; 0 without a device."""
    if run.device != "cuda":
        call()
        return 0
    synchronize(run.device)
    torch.cuda.reset_peak_memory_stats()
    call()
    synchronize(run.device)
    return torch.cuda.max_memory_allocated()


def forwards_of(loss: Callable[[], Any]) -> Callable[[], None]:
    @torch.no_grad()
    def forwards() -> None:
        loss()
        loss()

    return forwards


def cost(run: Run, module: nn.Module, batch: int, length: int, label: str) -> dict[str, Trace]:
    """Memory of each method, alone with the weights, and what it puts on the device, which is returned."""
    forwards = forwards_of(loss_of(module, batch, length))
    forwards()
    base, found = peak(run, forwards), {BOUND: trace(run, forwards)}

    def one(name: str) -> None:
        own = same_weights(module)
        made, loss = optimizer(name, own), loss_of(own, batch, length)
        zokern.step(made, loss)
        scratch = zokern.step(made, loss).scratch_bytes
        extra = peak(run, lambda: zokern.step(made, loss)) - base
        run.say("memory", name=f"{name}, {label}", forward=base, extra=extra, scratch=scratch)
        run.figure(f"memory of a step, {name} {label}", extra / MIB)
        found[name] = trace(run, lambda: zokern.step(made, loss))

    for name in (*DENSE, *FACTORED):
        run.attempt(f"memory of {name}, {label}", lambda name=name: one(name))
        clean(run)
    return found


def clean(run: Run) -> None:
    gc.collect()
    if run.device == "cuda":
        torch.cuda.empty_cache()


def times(run: Run, module: nn.Module, batch: int, length: int, label: str) -> dict[str, float]:
    """Medians of the rounds' ratios over the two forwards of the same round."""
    timer, ratios = IdleToIdle(run.device), dict[str, float]()
    forwards = forwards_of(loss_of(module, batch, length))

    def group(title: str, cases: list[Case], rounds: int, seconds: float) -> None:
        own = Group(f"{title}, {label}", [Case(BOUND, forwards), *cases], timer)
        found = measure(run, own, rounds, seconds)
        if BOUND in found.by_name and title == "dense steps":
            run.figure(f"{BOUND} {label}, ms", found.rows()[0]["ms"])
        for case in cases:
            if (ratio := figure(run, found, f"{case.name} {label} / forwards", case.name, BOUND)) is not None:
                ratios[case.name] = ratio

    def steps(name: str, own: nn.Module) -> Case:
        made, closure = optimizer(name, own), loss_of(own, batch, length)
        return Case(name, lambda: zokern.step(made, closure))

    rounds = 2 if run.quick else 15
    group("dense steps", [steps(name, module) for name in DENSE], rounds, 5)
    for name in FACTORED:
        group(f"steps of {name}", [steps(name, same_weights(module))], rounds, 2)
    clean(run)
    ratios |= graph_times(run, module, batch, length, label)
    # last: it puts new tensors in the place of the weights
    group("the eager loop", [eager_loop(module, batch, length)], 2 if run.quick else 5, 2)
    return ratios


def eager_loop(module: nn.Module, batch: int, length: int, moves: Any = None) -> Case:
    parameters, seeds = [p for p in module.parameters() if p.requires_grad], itertools.count()
    loss, options = loss_of(module, batch, length), {} if moves is None else {"moves": moves}
    return Case(LOOP, lambda: eager.step(parameters, loss, next(seeds), LR, EPS, **options))


def graph_times(run: Run, module: nn.Module, batch: int, length: int, label: str) -> dict[str, float]:
    """Steps that were captured once, zokern.graph, over two forwards in a graph."""
    if not hasattr(zokern, "graph"):
        run.skip(f"steps in a graph, {label}", "zokern.graph is missing in this tree")
        return {}
    ratios = {}

    def one(name: str) -> None:
        own = same_weights(module)
        made, loss = optimizer(name, own), loss_of(own, batch, length)
        zokern.step(made, loss)
        forwards = Captured(forwards_of(loss_of(module, batch, length)), run.device)
        case = Case(f"{name}, graph", zokern.graph(made, loss))
        cases, timer = [Case(GRAPH, forwards.replay), case], IdleToIdle(run.device)
        title = f"{name} in a graph, {label}"
        found = measure(run, Group(title, cases, timer), 2 if run.quick else 15, 3)
        key = f"{case.name} {label} / graph of forwards"
        if (ratio := figure(run, found, key, case.name, GRAPH)) is not None:
            ratios[case.name] = ratio
            run.figure(f"{GRAPH} {label}, ms", found.rows()[0]["ms"])

    for name in GRAPHED:
        run.attempt(f"{name} in a graph, {label}", lambda name=name: one(name))
        clean(run)
    return ratios


def cell(run: Run, name: str, batch: int, length: int, whole: bool) -> None:
    """One model and batch; `whole` asks for memory and kernels too."""
    label = f"{name} {batch}x{length}"
    module = on_device(name, torch.bfloat16, run.device)
    ratios = times(run, module, batch, length, label)
    run.say("step", model=name, batch=batch, length=length, tokens=batch * length, ratios=ratios)
    if whole:
        found = cost(run, module, batch, length, label)
        traces = {method: one._asdict() for method, one in found.items()}
        run.say("trace", model=name, batch=batch, length=length, traces=traces)


def steps(run: Run, model: str, cells: tuple = CELLS) -> None:
    """A model at every batch, as far as memory and time go."""
    if run.quick:
        model, cells = "OPT-tiny", ((1, 16), (2, 32))
    size = sum(p.numel() for p in on_device(model, torch.bfloat16, "meta").parameters()) * 2
    if size + ROOM > free_bytes(run.device):
        return run.skip(
            f"steps of {model}",
            f"needs {(size + ROOM) / 1e9:.0f} GB, {free_bytes(run.device) / 1e9:.0f} GB are free",
        )
    for at, (batch, length) in enumerate(cells):
        label = f"steps of {model} {batch}x{length}"
        if run.left < 8:
            run.skip(label, "the part's time was up")
            continue
        run.attempt(label, lambda batch=batch, length=length, at=at: cell(run, model, batch, length, at < 2))
        clean(run)
    return None


# torch.compile ----------------------------------------------------------------------------------------------


def compile_blocks(module: nn.Module) -> None:
    """Compiles a model by its blocks: they share their code, so it is compiled once and not for each."""
    lists = [m for m in module.modules() if isinstance(m, (nn.ModuleList, nn.Sequential))]
    for block in max(lists, key=len):
        block.compile()


def compiled_moves() -> tuple[Callable, Callable]:
    """Returns the passes of the eager loop, compiled. Their numbers are tensors: no step compiles anew."""
    moved, updated = (torch.compile(f, dynamic=True) for f in (eager.perturbed, eager.updated))

    def number(value: float) -> Any:
        return torch.tensor(value, dtype=torch.float32)

    return (
        lambda t, scaling, eps: moved(t, number(scaling), number(eps)).to(t.dtype),
        lambda t, lr, c, decay: updated(t, number(lr), number(c), number(decay)).to(t.dtype),
    )


def compiled(run: Run, model: str, cells: tuple = CELLS) -> None:
    """The eager loop under torch.compile, model and passes, and 'master' on the compiled model: over the two
    forwards of the compiled one."""
    if run.quick:
        model, cells = "OPT-tiny", ((1, 16),)
    for batch, length in cells:
        label = f"{model} {batch}x{length}"
        if run.left < 10:
            run.skip(f"compiled steps of {label}", "the part's time was up")
            continue
        run.attempt(
            f"compiled steps of {label}",
            lambda b=batch, n=length, at=label: compiled_cell(run, model, b, n, at),
        )
        clean(run)


def compiled_cell(run: Run, model: str, batch: int, length: int, label: str) -> None:
    module = on_device(model, torch.bfloat16, run.device)
    plain = same_weights(module)
    compile_blocks(module)
    bound, own = f"{BOUND}, compiled", loss_of(module, batch, length)
    made, timer = optimizer("MeZO master", module), IdleToIdle(run.device)
    loop = eager_loop(module, batch, length, compiled_moves())
    names = {"MeZO master, compiled": lambda: zokern.step(made, own), f"{LOOP}, compiled": loop.call}
    cases = [Case(bound, forwards_of(own)), Case(BOUND, forwards_of(loss_of(plain, batch, length)))]
    # the loop puts new tensors in the place of the weights: a group of its own, and the last
    for name, call in names.items():
        title = f"{name}, {label}"
        found = measure(run, Group(title, [*cases, Case(name, call)], timer), 2 if run.quick else 10, 4)
        figure(run, found, f"{name} {label} / compiled forwards", name, bound)
        figure(run, found, f"{bound} {label} / forwards", bound, BOUND)
        cases = [Case(bound, forwards_of(own))]
