"""update_: momentum and Adam on one large tensor and on a list of small ones, against torch.optim on a
gradient drawn eagerly.

The eager line is ZO-Bench's: z from torch.normal, p.grad = c z, one step of torch.optim.SGD(momentum=0.9) or
torch.optim.Adam, whose states have the weights' dtype. update_ keeps them in float32.
"""

from __future__ import annotations

import pytest
import torch

import zokern

from . import eager
from .bench_elementwise import DTYPES, weights
from .measure import Case, Group

LR = 1e-6
RULES = {"momentum": (zokern.Momentum(0.9, dampening=0.0), 1), "adam": (zokern.Adam(), 2)}


def call_of(rule: str, tensors: list[torch.Tensor], direction: str = "normal"):
    kind, states = RULES[rule]
    kept = [[torch.zeros(t.shape) for t in tensors] for _ in range(states)]
    who, scalars = [f"w{i}" for i in range(len(tensors))], kind.scalars(LR, updates=2)

    def call() -> None:
        zokern.update_(
            tensors,
            direction,
            rule,
            seed=7,
            who=who,
            draws=[(0, 0)],
            coeffs=[0.5],
            states=kept,
            scalars=scalars,
        )

    return call


def optimizer_of(rule: str, tensors: list[torch.Tensor]):
    """p.grad = c z for every p, then the step of torch.optim."""
    parameters = [torch.nn.Parameter(t.clone()) for t in tensors]
    kinds = {
        "momentum": lambda: torch.optim.SGD(parameters, lr=LR, momentum=0.9),
        "adam": lambda: torch.optim.Adam(parameters, lr=LR),
    }
    optimizer = kinds[rule]()

    def call() -> None:
        torch.manual_seed(7)
        for p in parameters:
            p.grad = 0.5 * eager.normal_like(p.data)
        optimizer.step()
        optimizer.zero_grad()

    return call


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("rule", RULES)
def bench_update_large(benchmark, report, rule: str, dtype: str) -> None:
    n = 1 << (21 if report.quick else 25)
    w, other = weights(n, dtype), torch.empty(n, dtype=DTYPES[dtype])
    traffic = 2 * w.element_size() + 8 * RULES[rule][1]
    copy, loop = f"copy out.copy_(w) {dtype} n={n}", f"torch.optim on an eager gradient, {rule} {dtype} n={n}"
    cases = [
        Case(copy, lambda: other.copy_(w), n, 2 * w.element_size()),
        *(
            Case(f"update_ {rule} {z} {dtype} n={n}", call_of(rule, [w], z), n, traffic, copy, loop)
            for z in ("normal", "rademacher")
        ),
        Case(loop, optimizer_of(rule, [w]), n, traffic, copy, loop),
    ]
    group = Group(f"update_, one large tensor, {rule} {dtype}", cases).run(
        benchmark, 3 if report.quick else 9
    )
    report.add(group, **{f"update_ {rule} {dtype} / torch.optim": group.ratio(loop, cases[1].name)})


@pytest.mark.parametrize("rule", RULES)
def bench_update_list(benchmark, report, rule: str) -> None:
    """The tensors of a small model in one launch."""
    sizes = [768] * 60 + [768 * 768] * (4 if report.quick else 24)
    tensors = [weights(size, "bf16") for size in sizes]
    n, loop = sum(sizes), f"torch.optim on an eager gradient, {rule}, {len(sizes)} tensors bf16"
    cases = [
        Case(
            f"update_ {rule} normal, {len(sizes)} tensors bf16",
            call_of(rule, tensors),
            n,
            4 + 8 * RULES[rule][1],
            "",
            loop,
        ),
        Case(loop, optimizer_of(rule, tensors), n, 4 + 8 * RULES[rule][1], "", loop),
    ]
    group = Group(f"update_, a list of small tensors, {rule}", cases).run(benchmark, 3 if report.quick else 9)
    report.add(group, **{f"update_ {rule} list / torch.optim": group.ratio(loop, cases[0].name)})
