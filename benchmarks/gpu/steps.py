"""Whole steps: their time over the two bare forwards that they contain, their peak memory over inference,
their kernels.

Models have published shapes and random weights, in bfloat16. Times run from an idle device to an idle device.
A group's cases take turns; those that may not meet in one group, because one writes weights that another
keeps updates for, have groups of their own, each with the two forwards in it.
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
from .run import Run, free_bytes, synchronize
from .timing import figure, idle_to_idle, measure

LR, EPS = 1e-6, 1e-3
BOUND, LOOP = "two forwards", "eager MeZO"
CELLS = ((16, 256), (1, 16), (4, 128), (16, 512))  # batch and length: those that the goals name come first
MIB = 1 << 20
ROOM = 10e9  # bytes beside the weights, for activations and two sets of logits
WAYS: dict[str, Callable[[], Any]] = {
    "MeZO scratch": lambda: zokern.Scratch(check=False), "MeZO inplace": zokern.InPlace,
    "MeZO paired": lambda: zokern.Paired(check=False),
    "MeZO master": zokern.Master,
}  # fmt: skip


def optimizer(name: str, module: nn.Module) -> zokern.MeZO | zokern.SubZero:
    if name == "SubZero":
        made: Any = zokern.SubZero(
            module, lr=LR, eps=EPS, dead_limit=None, evaluation=zokern.Paired(check=False)
        )
    else:
        made = zokern.MeZO(module, lr=LR, eps=EPS, dead_limit=None, evaluation=WAYS[name]())
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


def kernels(run: Run, call: Callable[[], Any]) -> int:
    """Kernels and copies that a call puts on the device; 0 without one."""
    if run.device != "cuda":
        return 0
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        call()
        synchronize(run.device)
    return sum(event.device_type == torch.autograd.DeviceType.CUDA for event in profile.events())


def forwards_of(loss: Callable[[], Any]) -> Callable[[], None]:
    @torch.no_grad()
    def forwards() -> None:
        loss()
        loss()

    return forwards


def cost(run: Run, module: nn.Module, batch: int, length: int, label: str) -> dict[str, int]:
    """Memory and kernels of each method, alone with the weights; the kernels of each are returned."""
    forwards = forwards_of(loss_of(module, batch, length))
    forwards()
    base, counted = peak(run, forwards), {BOUND: kernels(run, forwards)}

    def one(name: str) -> None:
        own = same_weights(module)
        made, loss = optimizer(name, own), loss_of(own, batch, length)
        zokern.step(made, loss)
        scratch = zokern.step(made, loss).scratch_bytes
        extra = peak(run, lambda: zokern.step(made, loss)) - base
        run.say("memory", name=f"{name}, {label}", forward=base, extra=extra, scratch=scratch)
        run.figure(f"memory of a step, {name} {label}", extra / MIB)
        counted[name] = kernels(run, lambda: zokern.step(made, loss))

    for name in (*WAYS, "SubZero"):
        run.attempt(f"memory of {name}, {label}", lambda name=name: one(name))
        clean(run)
    return counted


def clean(run: Run) -> None:
    gc.collect()
    if run.device == "cuda":
        torch.cuda.empty_cache()


def times(run: Run, module: nn.Module, batch: int, length: int, label: str) -> dict[str, float]:
    """Medians of the rounds' ratios over the two forwards of the same round."""
    timer, loss = idle_to_idle(run.device), loss_of(module, batch, length)
    forwards, ratios = forwards_of(loss), {}

    def group(title: str, cases: list[Case], rounds: int, seconds: float) -> None:
        found = measure(
            run, Group(f"{title}, {label}", [Case(BOUND, forwards), *cases], timer), rounds, seconds
        )
        for case in cases:
            if (ratio := figure(run, found, f"{case.name} {label} / forwards", case.name, BOUND)) is not None:
                ratios[case.name] = ratio

    def steps(name: str, own: nn.Module) -> Case:
        made, closure = optimizer(name, own), loss_of(own, batch, length)
        return Case(name, lambda: zokern.step(made, closure))

    rounds = 2 if run.quick else 15
    group("dense steps", [steps(name, module) for name in WAYS], rounds, 6)
    group("a factored step", [steps("SubZero", same_weights(module))], rounds, 3)
    clean(run)
    parameters, seeds = [p for p in module.parameters() if p.requires_grad], itertools.count()
    loop = Case(LOOP, lambda: eager.step(parameters, loss, next(seeds), LR, EPS))
    # last: it puts new tensors in the place of the weights
    group("the eager loop", [loop], 2 if run.quick else 5, 3)
    return ratios


def cell(run: Run, name: str, batch: int, length: int, whole: bool) -> None:
    """One model and batch; `whole` asks for memory and kernels too."""
    label = f"{name} {batch}x{length}"
    module = on_device(name, torch.bfloat16, run.device)
    counted = cost(run, module, batch, length, label) if whole else {}
    ratios = times(run, module, batch, length, label)
    run.say(
        "step", model=name, batch=batch, length=length, tokens=batch * length, ratios=ratios, kernels=counted
    )


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
