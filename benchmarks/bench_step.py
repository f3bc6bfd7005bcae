"""A MeZO step of a 125M OPT model against its own two forwards and against the eager loop's step."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch

import zokern

from . import eager
from .measure import Case, Group

LR, EPS = 1e-6, 1e-3


@pytest.mark.alone
@pytest.mark.filterwarnings("ignore:rounding to nearest")
@pytest.mark.parametrize("dtype, batch, length", [("fp32", 4, 128), ("fp32", 1, 32), ("fp32", 1, 4), ("bf16", 1, 128)])
def bench_step(benchmark, report, dtype: str, batch: int, length: int) -> None:
    pytest.importorskip("transformers")
    from .models import loss_of, opt_125m

    model = opt_125m(dtype)
    twin = copy.deepcopy(model)  # the eager loop's own: its weights drift
    loss, twin_loss = loss_of(model, batch, length), loss_of(twin, batch, length)
    scratch, auto, inplace, master = (
        zokern.MeZO(model, lr=LR, eps=EPS, evaluation=name) for name in ("scratch", "auto", "inplace", "master")
    )
    parameters, seeds = [p for p in twin.parameters() if p.requires_grad], itertools.count()
    n = sum(p.numel() for p in parameters)
    flat = torch.cat([p.detach().reshape(-1) for p in model.parameters()])

    @torch.no_grad()
    def forwards() -> None:
        loss()
        loss()

    for optimizer in (scratch, auto, inplace, master):  # choices and comparisons are made in the first steps
        for _ in range(3):
            zokern.step(optimizer, loss)
    short = batch * length <= 128
    slow = 1 if report.quick else 4 if short else 3
    cases = [
        Case(f"w += c over the {n / 1e6:.0f}M weights", lambda: flat.add_(0.0), n, 2 * flat.element_size()),
        Case("two forwards: the bound", forwards),
        Case("zokern.step: scratch", lambda: zokern.step(scratch, loss), eager="eager step: MeZO loop"),
        Case("zokern.step auto: paired", lambda: zokern.step(auto, loss), eager="eager step: MeZO loop"),
        Case("zokern.step: inplace", lambda: zokern.step(inplace, loss), eager="eager step: MeZO loop", every=slow),
        Case("zokern.step: master", lambda: zokern.step(master, loss), eager="eager step: MeZO loop", every=slow),
        Case("eager step: MeZO loop", lambda: eager.step(parameters, twin_loss, next(seeds), LR, EPS), every=slow),
    ]
    what = f"{dtype} {batch}x{length}"
    group = Group(f"step, OPT-125M {what}", cases).run(benchmark, 2 if report.quick else 24 if short else 12)
    step, paired, bound, loop = (cases[i].name for i in (2, 3, 1, 6))
    assert auto.result is not None and auto.result.evaluation == "paired"
    report.add(
        group,
        **{
            f"step {what} / forwards": group.ratio(step, bound),
            f"eager step {what} / forwards": group.ratio(loop, bound),
            f"step {what} / eager": group.ratio(loop, step),
            f"step auto {what} / forwards": group.ratio(paired, bound),
            f"step auto {what} / eager": group.ratio(loop, paired),
        },
    )
