"""The elementwise verbs against a copy, and against what people write instead, in turns in the same run."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import zokern
from zokern.backends import Backend, Batch, Noise, Span, Terms
from zokern.directions import resolve

from .. import eager
from ..measure import Case, Group
from . import randn
from .checks import DTYPES
from .run import Run, free_bytes
from .timing import figure, in_time, measure, timer_of

EPS = 1e-3
SHORT = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}
DRAWS = 8


def weights(run: Run, n: int, dtype: torch.dtype) -> Tensor:
    """Normals of size 0.02, made on the device: zeros would be kinder than weights are."""
    w = torch.empty(n, dtype=dtype, device=run.device)
    return w.normal_(std=0.02, generator=torch.Generator(run.device).manual_seed(1))


class Passes:
    """The verbs of one backend over given tensors, as a step calls them: into memory that is there
    already."""

    def __init__(self, backend: Backend, thetas: list[Tensor]) -> None:
        self.backend, self.thetas = backend, thetas
        self.spans = [Span(zokern.stream.parameter_id(f"w.{i}")) for i in range(len(thetas))]
        self.coeffs = torch.full((DRAWS,), EPS, device=thetas[0].device)

    def axpy(
        self,
        direction: str = "normal",
        terms: int = 1,
        rounding: str = "nearest",
        lows: list[Tensor] | None = None,
    ) -> Any:
        draws, a = [(3, k) for k in range(terms)], self.coeffs[:terms]
        return lambda: self.backend.axpy_(
            Batch(self.thetas, self.spans, rounding, lows), Noise(resolve(direction), 7, draws), Terms(a)
        )

    def draw(self, outs: list[Tensor], direction: str = "normal") -> Any:
        return lambda: self.backend.draw(Batch(outs, self.spans), Noise(resolve(direction), 7, [(3, 0)]))

    def perturb(self, sides: list[list[Tensor]]) -> Any:
        scales = [EPS, -EPS][: len(sides)]
        return lambda: self.backend.perturb(
            Batch(self.thetas, self.spans), Noise(resolve("normal"), 7, [(3, 0)]), scales, sides
        )


def large(run: Run) -> int:
    """Elements of a tensor far above the caches, as the memory that is free allows."""
    return 1 << 16 if run.quick else 1 << 30 if free_bytes(run.device) > 24e9 else 1 << 27


def axpy_large(run: Run, n: int) -> None:
    """One tensor far above the caches, bfloat16: the line that the goals are about."""
    w, other = (weights(run, n, torch.bfloat16) for _ in range(2))
    parameter = torch.nn.Parameter(w.clone(), requires_grad=False)
    size = f"bf16 n={n}"
    copy, loop = f"copy {size}", f"eager perturb {size}"

    def case(name: str, call: Any, **options: Any) -> Case:
        return Case(f"{name} {size}", call, n, 4, copy, loop, **options)

    cases = [
        Case(copy, lambda: other.copy_(w), n, 4),
        case("w += c", lambda: w.add_(EPS)),
        case("in-place torch, normal_ + add_", lambda: eager.in_place(w, other, EPS)),
        Case(loop, lambda: eager.perturb([parameter], 7, 1, EPS), n, 4, copy, loop),
    ]
    if randn.triton is not None and run.device == "cuda":
        cases.append(case("tl.randn axpy", lambda: randn.axpy_(w, 7, EPS)))
    for name, backend in run.backends().items():
        passes = Passes(backend, [w])
        cases.append(case(f"axpy_ normal K=1 {name}", passes.axpy()))
        cases.append(case(f"axpy_ rademacher K=1 {name}", passes.axpy("rademacher")))
    group = measure(run, Group(f"axpy_, one tensor, {size}", cases, timer_of(run)), 30, 12)
    for name in run.backends():
        ours = f"axpy_ normal K=1 {name} {size}"
        figure(run, group, f"axpy_ {name} / copy", copy, ours, 100)
        figure(run, group, f"axpy_ {name} / eager", loop, ours)
        figure(run, group, f"axpy_ {name} / tl.randn", f"tl.randn axpy {size}", ours)


def compiled(run: Run) -> None:
    """torch.compile of the eager perturb: a part of its own, since inductor may take a minute for it."""
    n = large(run)
    w, size = weights(run, n, torch.bfloat16), f"bf16 n={n}"
    other, copy, compiled = torch.empty_like(w), f"copy {size}", f"torch.compile of the eager perturb {size}"
    function = torch.compile(eager.perturbed)
    try:
        function(w, 1.0, EPS)
    except Exception as error:  # no compiler that inductor can use: the line says so
        return run.skip("torch.compile of the eager perturb", f"{type(error).__name__}: {str(error)[:200]}")
    cases = [
        Case(copy, lambda: other.copy_(w), n, 4),
        Case(compiled, lambda: function(w, 1.0, EPS), n, 4, copy),
    ]
    for name, backend in run.backends().items():
        cases.append(
            Case(f"axpy_ normal K=1 {name} {size}", Passes(backend, [w]).axpy(), n, 4, copy, compiled)
        )
    group = measure(run, Group(f"axpy_ and torch.compile (as eager), {size}", cases, timer_of(run)), 30, 8)
    for name in run.backends():
        figure(run, group, f"axpy_ {name} / compile", compiled, f"axpy_ normal K=1 {name} {size}")
    return None


def perturb_large(run: Run, n: int) -> None:
    w = weights(run, n, torch.bfloat16)
    outs = [torch.empty_like(w) for _ in "+-"]
    size = f"bf16 n={n}"
    copy = f"copy {size}"
    cases = [Case(copy, lambda: outs[0].copy_(w), n, 4)]
    for name, backend in run.backends().items():
        passes = Passes(backend, [w])
        cases.append(Case(f"perturb +- {name} {size}", passes.perturb([[out] for out in outs]), n, 6, copy))
        cases.append(Case(f"perturb + {name} {size}", passes.perturb([[outs[0]]]), n, 4, copy))
        cases.append(Case(f"draw normal {name} {size}", passes.draw([outs[1]]), n, 2, copy))
    group = measure(run, Group(f"perturb and draw, one tensor, {size}", cases, timer_of(run)), 30, 8)
    for name in run.backends():
        # 6 bytes to the copy's 4
        figure(run, group, f"perturb pair {name} / copy", copy, f"perturb +- {name} {size}", 150)


def draws(run: Run, n: int) -> None:
    """K draws in one pass, and K passes."""
    w = weights(run, n, torch.bfloat16)
    other = torch.empty_like(w)
    cases = [Case("copy", lambda: other.copy_(w), n, 4)]

    def passes_of(call: Any, count: int) -> Any:
        def several() -> None:
            for _ in range(count):
                call()

        return several

    for name, backend in run.backends().items():
        passes = Passes(backend, [w])
        for k in (1, 2, 4, DRAWS):
            cases.append(Case(f"K={k} in one pass {name}", passes.axpy(terms=k), n, 4, "copy"))
        cases.append(Case(f"K={DRAWS} passes {name}", passes_of(passes.axpy(), DRAWS), n, 4 * DRAWS, "copy"))
    group = measure(run, Group(f"axpy_ normal, K draws, bf16 n={n}", cases, timer_of(run)), 20, 8)
    for name in run.backends():
        figure(
            run,
            group,
            f"K={DRAWS} {name}, passes / one",
            f"K={DRAWS} passes {name}",
            f"K={DRAWS} in one pass {name}",
        )


def dtypes(run: Run, n: int) -> None:
    """Every dtype and rounding at one size."""
    for label, dtype in DTYPES.items():
        w, short = weights(run, n, dtype), SHORT[label]
        other, low, width = (
            torch.empty_like(w),
            torch.zeros(n, dtype=torch.int16, device=run.device),
            dtype.itemsize,
        )
        copy = f"copy {short}"
        cases = [Case(copy, lambda o=other, w=w: o.copy_(w), n, 2 * width)]
        for name, backend in run.backends().items():
            passes = Passes(backend, [w])
            cases.append(Case(f"axpy_ normal {short} {name}", passes.axpy(), n, 2 * width, copy))
            cases.append(
                Case(f"axpy_ rademacher {short} {name}", passes.axpy("rademacher"), n, 2 * width, copy)
            )
            if dtype != torch.float32:
                cases.append(
                    Case(
                        f"axpy_ normal stochastic {short} {name}",
                        passes.axpy(rounding="stochastic"),
                        n,
                        2 * width,
                        copy,
                    )
                )
            if dtype == torch.bfloat16:
                call = passes.axpy(rounding="residual", lows=[low])
                cases.append(Case(f"axpy_ normal residual {short} {name}", call, n, 8, copy))
        measure(run, Group(f"axpy_, roundings, {short} n={n}", cases, timer_of(run)), 20, 4)


def sizes(run: Run, counts: tuple[int, ...]) -> None:
    """From what one launch costs to what the memory gives."""
    timer = timer_of(run)
    for n in counts:
        w = weights(run, n, torch.bfloat16)
        other, copy = torch.empty_like(w), f"copy n={n}"
        cases = [Case(copy, lambda o=other, w=w: o.copy_(w), n, 4)]
        for name, backend in run.backends().items():
            cases.append(Case(f"axpy_ normal n={n} {name}", Passes(backend, [w]).axpy(), n, 4, copy))
        measure(run, Group(f"axpy_ by size, bf16 n={n}", cases, timer), 40, 2)


def lists(run: Run, count: int, each: int) -> None:
    """Many small tensors: one launch for the list, and a loop over it."""
    flat = weights(run, count * each, torch.bfloat16)
    thetas, other, n = list(flat.view(count, each).unbind()), torch.empty_like(flat), count * each
    parameters = [torch.nn.Parameter(t.clone(), requires_grad=False) for t in thetas]
    size = f"bf16 {count} x {each}"
    copy, loop = f"one copy of all {size}", f"eager perturb {size}"
    cases = [
        Case(copy, lambda: other.copy_(flat), n, 4),
        Case(f"_foreach_add_(ws, c) {size}", lambda: torch._foreach_add_(thetas, EPS), n, 4, copy, loop),
        Case(loop, lambda: eager.perturb(parameters, 7, 1, EPS), n, 4, copy, loop, every=4),
    ]
    for name, backend in run.backends().items():
        cases.append(Case(f"axpy_ normal {name} {size}", Passes(backend, thetas).axpy(), n, 4, copy, loop))
    measure(run, Group(f"axpy_, a list, {size}", cases, timer_of(run)), 20, 5)


def dense(run: Run) -> None:
    """Everything but torch.compile, the goals' lines first."""
    n = large(run)
    in_time(run, {
        "axpy_, one tensor": lambda: axpy_large(run, n),
        "perturb and draw": lambda: perturb_large(run, n),
        "K draws": lambda: draws(run, n >> 1),
        "dtypes and roundings": lambda: dtypes(run, n >> 2),
        "a list": lambda: lists(run, 50 if run.quick else 2000, 4096),
        "sizes": lambda: sizes(run, tuple(n >> k for k in (14, 10, 6, 3))),
    })  # fmt: skip
