"""Lists that a caller keeps: every backend may prepare a launch once for them, with equal bits at each call.

The checks have the form of conformance.py's. Numbers, steps and lists beside the tensors change from call to
call, and each result is compared with the reference's on copies.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from guarded import equal
from torch import Tensor

from zokern.backends import Batch, Noise, Outer, Span, SpanList, TensorList, Terms, Update
from zokern.backends.reference import Reference
from zokern.directions import resolve

SEED, NORMAL = 5, resolve("normal")
ADAM = (1.0, 0.1, 0.9, 0.1, 0.99, 0.01, 0.0, 1.0, 1e-8)
SHAPES = ((300,), (5,), (16, 24))

Sides = list[TensorList]


def numbers(count: int, device: str = "cpu") -> Tensor:
    return torch.full((count,), 0.5, device=device)


def noise(step: int, draws: int = 1) -> Noise:
    return Noise(NORMAL, SEED, [(step, k) for k in range(draws)])


def kept_lists(device: str = "cpu", scaled: bool = False, residual: bool = False) -> tuple[Batch, Sides]:
    """A batch that its caller keeps, and two lists of results or states of it."""
    dtype, generator = torch.bfloat16 if residual else torch.float32, torch.Generator().manual_seed(SEED)
    first = [torch.randn(shape, generator=generator).to(device, dtype) for shape in SHAPES]
    thetas, spans = TensorList.lasting(first), SpanList([Span(i) for i in range(3)])
    scales = [torch.full((300,), 2.0, device=device), None, None] if scaled else None
    low = TensorList.lasting([torch.zeros(t.shape, dtype=torch.int16, device=device) for t in first])
    batch = Batch(thetas, spans, "residual" if residual else "nearest", low if residual else None, scales)
    return batch, [TensorList.lasting([torch.zeros(t.shape, device=device) for t in first]) for _ in range(2)]


def axpy(on: Any, batch: Batch, sides: Sides, step: int, k: int, device: str = "cpu") -> None:
    on.axpy_(batch, noise(step, k), Terms(numbers(k, device), 0.5 + step))


def perturb(on: Any, batch: Batch, sides: Sides, step: int, k: int, device: str = "cpu") -> None:
    on.perturb(batch, noise(step), [0.1 * step, -1.0], sides)


def update(on: Any, batch: Batch, sides: Sides, step: int, k: int, device: str = "cpu") -> None:
    scalars = torch.tensor(ADAM, device=device)
    on.update_(batch, noise(step, k), Update(numbers(k, device), "adam", scalars, sides))


VERBS: dict[str, Callable] = {"axpy_": axpy, "perturb": perturb, "update_": update}


def copied(batch: Batch, sides: Sides) -> tuple[Batch, Any]:
    """The same on the CPU, in lists that nobody keeps."""

    def copies(tensors: Any) -> Any:
        return None if tensors is None else [None if t is None else t.to("cpu", copy=True) for t in tensors]

    lists = {name: copies(getattr(batch, name)) for name in ("tensors", "residuals", "scales")}
    return batch._replace(**lists), [copies(side) for side in sides]


def check_verb(verb: str, kind: dict, backend: Any, device: str = "cpu", scale: str = "full") -> None:
    batch, sides = kept_lists(device, **kind)
    alive = [sides]  # what a wrong launch would write to
    for step in range(4):
        for draws in (1, 2):
            other, theirs = copied(batch, sides)
            VERBS[verb](backend, batch, sides, step, draws, device)
            VERBS[verb](Reference(), other, theirs, step, draws)
            for mine, right in zip([batch.tensors, *sides], [other.tensors, *theirs]):
                for a, b in zip(mine, right):
                    equal(a, b, f"{verb} at step {step}")
        if step == 1:  # other results or states, and then the first again
            sides = [TensorList.lasting([t + 1 for t in side]) for side in sides]
            alive.append(sides)
        elif step == 2:
            sides = alive[0]


def check_lowrank(backend: Any, device: str = "cpu", scale: str = "full") -> None:
    """Small whole numbers, whose sums are exact in any order."""
    left, right = (torch.arange(n * 16).view(n, 16) % 5 - 2.0 for n in (16, 24))
    thetas = TensorList.lasting([torch.zeros(16, 24, device=device)])
    sides = [TensorList.lasting([side.to(device, copy=True)]) for side in (left, right)]
    outs = TensorList.lasting([torch.zeros(16, 24, device=device)])
    batch, expected = Batch(thetas, SpanList([Span(1)])), torch.zeros(16, 24)
    for step, size in enumerate((0.5, 0.5, 2.0, 0.5)):
        backend.lowrank_(batch, Outer(*sides, [size]), None, outs)
        equal(outs[0], expected + size * left @ right.t(), f"lowrank_ to outs at step {step}")
        backend.lowrank_(batch, Outer(*sides, [size]))
        expected = expected + size * left @ right.t()
        equal(thetas[0], expected, f"lowrank_ at step {step}")
        if step == 1:
            sides[0][0].mul_(-1), left.mul_(-1)  # the factors themselves may change where they lie


KINDS: dict[str, dict] = {"": {}, "_scaled": {"scaled": True}, "_residual": {"residual": True}}
CHECKS: dict[str, Callable] = {
    f"kept_{verb}{name}": partial(check_verb, verb, kind) for verb in VERBS for name, kind in KINDS.items()
} | {"kept_lowrank_": check_lowrank}
