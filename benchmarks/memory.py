"""Measures the peak memory of one process: forwards, then steps. Prints JSON, in bytes.

`python -m benchmarks.memory OPT-125M fp32 4 128 MeZO 2`: model, dtype, batch, length, what steps, threads.

The kernel's high-water mark (VmHWM) is read after the forwards, set back (clear_refs) and read after the
steps. So loading the model does not hide what a step takes. What steps is one of

    forward         bare forwards: nothing more
    doubled         forwards of twice the batch: the activations of both sides of a pair
    AdamW           back-propagation and torch.optim.AdamW; no checkpointing of activations
    eager M         the eager loop of the method M
    M               the method M at its defaults, without the comparison of losses in its first steps
    M first steps   the same with the comparison, which holds a copy of the weights for its time
    MeZO E          MeZO by the evaluation E, also without it; 'MeZO scratch 64' has a budget of 64 MB
"""

from __future__ import annotations

import ctypes
import gc
import itertools
import json
import re
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

import zokern
from zokern.evaluation import EVALUATIONS

from .models import loss_of, model
from .steps import loop_of

LR, EPS = 1e-6, 1e-3


def high_water() -> int:
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found.group(1)) * 1024


def reset_high_water() -> bool:
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def optimizer(module: nn.Module, method: str, *words: str) -> Any:
    if words == ("first", "steps"):
        return getattr(zokern, method)(module, lr=LR, eps=EPS)
    name = words[0] if words else "paired"
    budget = {"budget": int(words[1]) << 20} if words[1:] else {}
    unchecked = {} if name in ("inplace", "jvp", "master") else {"check": False}
    return getattr(zokern, method)(
        module, lr=LR, eps=EPS, evaluation=EVALUATIONS[name](**budget, **unchecked)
    )


def stepper(module: nn.Module, batch: int, length: int, what: str) -> Callable[[], int]:
    """Returns a call that takes a step and says its scratch bytes."""
    loss, seeds = loss_of(module, batch, length), itertools.count()
    if what in ("forward", "doubled"):
        read = torch.no_grad()(loss_of(module, 2 * batch if what == "doubled" else batch, length))
        return lambda: 0 * read().numel()
    if what == "AdamW":
        adamw = torch.optim.AdamW(module.parameters(), lr=LR)

        def descend() -> int:
            adamw.zero_grad()
            loss().backward()
            adamw.step()
            return 0

        return descend
    if what.startswith("eager "):
        loop = loop_of(what.removeprefix("eager "), module)

        def walk() -> int:
            loop.step(loss, next(seeds))
            return 0

        return walk
    made = optimizer(module, *what.split())
    return lambda: zokern.step(made, loss).scratch_bytes


def main(name: str, dtype: str, batch: int, length: int, what: str, threads: int) -> dict[str, object]:
    torch.set_num_threads(threads)
    warnings.simplefilter("ignore")
    module = model(name, dtype)
    loss = loss_of(module, batch, length)
    exact = reset_high_water()
    with torch.no_grad():
        for _ in range(3):
            loss()
    forward = high_water()
    reset_high_water()
    step = stepper(module, batch, length, what)
    scratch = max(step() for _ in range(2 if what.startswith("eager") else 3))
    return {"forward": forward, "step": high_water(), "scratch_bytes": scratch, "exact": exact}


if __name__ == "__main__":
    name, dtype, batch, length, what, threads = sys.argv[1:]
    print(json.dumps(main(name, dtype, int(batch), int(length), what, int(threads))))
