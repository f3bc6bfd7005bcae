"""update_, a rule with state in one pass, beside torch.optim on an eager gradient; and many steps replayed in
one pass, beside one pass a step."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

import zokern
from zokern.backends import Backend, Batch, Noise, Span, Terms, Update
from zokern.directions import resolve

from .. import eager
from ..measure import Case, Group
from .dense import large, weights
from .run import Run
from .timing import figure, in_time, measure, timer_of

LR, COEFFICIENT, STEPS = 1e-6, 0.5, 8
RULES = {"momentum": (zokern.Momentum(0.9, dampening=0.0), 1), "adam": (zokern.Adam(), 2)}
OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "momentum": lambda ps: torch.optim.SGD(ps, lr=LR, momentum=0.9),
    "adam": lambda ps: torch.optim.Adam(ps, lr=LR),
}  # fmt: skip


def update(run: Run, rule: str, n: int) -> None:
    """ZO-Bench's way on the other side: p.grad = c z, and a step of torch.optim, whose states are
    bfloat16."""
    w = weights(run, n, torch.bfloat16)
    kind, count = RULES[rule]
    states = [[torch.zeros(n, device=run.device)] for _ in range(count)]
    coeffs, scalars = (
        torch.tensor(x, device=run.device) for x in ([COEFFICIENT], kind.scalars(LR, updates=2))
    )
    parameter = torch.nn.Parameter(w.clone())
    optimizer = OPTIMIZERS[rule]([parameter])

    def eagerly() -> None:
        torch.manual_seed(7)
        parameter.grad = COEFFICIENT * eager.normal_like(parameter.data)
        optimizer.step()

    def call_of(backend: Backend) -> Callable[[], Any]:
        spans = [Span(zokern.stream.parameter_id("w"))]
        return lambda: backend.update_(
            Batch([w], spans), Noise(resolve("normal"), 7, [(3, 0)]), Update(coeffs, rule, scalars, states)
        )

    other, traffic, loop = torch.empty_like(w), 4 + 8 * count, f"torch.optim on an eager gradient, {rule}"
    cases = [Case("copy", lambda: other.copy_(w), n, 4), Case(loop, eagerly, n, traffic)]
    cases += [
        Case(f"update_ {rule} {name}", call_of(backend), n, traffic, "copy", loop)
        for name, backend in run.backends().items()
    ]
    group = measure(
        run, Group(f"update_ {rule}, bf16 with float32 states, n={n}", cases, timer_of(run)), 20, 5
    )
    for name in run.backends():
        figure(
            run, group, f"update_ {rule} {name} / copy", "copy", f"update_ {rule} {name}", 100 * traffic / 4
        )
        figure(run, group, f"update_ {rule} {name} / torch.optim", loop, f"update_ {rule} {name}")


def replay(run: Run, rounding: str, n: int) -> None:
    """Steps of one query, a rounding after each."""
    w, spans = weights(run, n, torch.bfloat16), [Span(zokern.stream.parameter_id("w"))]
    other, coeffs, draws = (
        torch.empty_like(w),
        torch.full((STEPS,), 1e-6, device=run.device),
        [(s, 0) for s in range(STEPS)],
    )
    kind, decays = resolve("normal"), [0.999] * STEPS

    def fused(backend: Backend) -> Callable[[], Any]:
        return lambda: backend.axpy_(
            Batch([w], spans, rounding), Noise(kind, 7, draws), Terms(coeffs, decays, 1)
        )

    def apart(backend: Backend) -> Callable[[], Any]:
        def passes() -> None:
            for s in range(STEPS):
                backend.axpy_(
                    Batch([w], spans, rounding),
                    Noise(kind, 7, draws[s : s + 1]),
                    Terms(coeffs[s : s + 1], 0.999),
                )

        return passes

    cases = [Case("copy", lambda: other.copy_(w), n, 4)]
    for name, backend in run.backends().items():
        cases.append(Case(f"{STEPS} steps in one pass {name}", fused(backend), n, 4, "copy"))
        cases.append(Case(f"{STEPS} passes {name}", apart(backend), n, 4 * STEPS, "copy"))
    group = measure(
        run,
        Group(f"replay of {STEPS} steps of one term, {rounding}, bf16 n={n}", cases, timer_of(run)),
        20,
        4,
    )
    for name in run.backends():
        figure(
            run,
            group,
            f"replay {rounding} {name}, passes / one",
            f"{STEPS} passes {name}",
            f"{STEPS} steps in one pass {name}",
        )


def rules(run: Run) -> None:
    n = large(run) >> 3
    in_time(run, {
        **{f"update_ {rule}": partial(update, run, rule, n) for rule in RULES},
        **{f"a replay, {rounding}": partial(replay, run, rounding, n) for rounding in ("nearest",
            "stochastic")},
    })  # fmt: skip
