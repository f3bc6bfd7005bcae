"""The verbs: axpy_ on one large tensor, on a list of small ones,
K draws in a pass, and perturb with one sign and with both."""

from __future__ import annotations

import pytest
import torch

import zokern
from zokern import backends, directions
from zokern.backends import Batch, Noise, Span

from . import eager
from .measure import Case, Group

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
EPS = 1e-3


def weights(elements: int, dtype: str) -> torch.Tensor:
    return zokern.draw("normal", elements, seed=1, who="weights", step=0, dtype=DTYPES[dtype])


def axpy(tensors, direction: str = "normal", who="w", draws: int = 1) -> None:
    zokern.axpy_(
        tensors, direction, seed=7, who=who, draws=[(0, k) for k in range(draws)], coeffs=[EPS] * draws
    )


@pytest.mark.parametrize("dtype", DTYPES)
def bench_axpy_large(benchmark, report, dtype: str) -> None:
    n = 1 << (22 if report.quick else 26)
    w = weights(n, dtype)
    other = torch.empty(n, dtype=DTYPES[dtype])
    buffer = torch.empty(n, dtype=DTYPES[dtype])
    parameter = torch.nn.Parameter(w.clone(), requires_grad=False)
    traffic = 2 * w.element_size()
    size, loop = f"{dtype} n={n}", f"eager perturb {dtype} n={n}"

    def case(name: str, call, of: str = "w += c") -> Case:
        return Case(f"{name} {size}", call, n, traffic, f"{of} {size}", loop)

    cases = [
        Case(f"copy out.copy_(w) {size}", lambda: other.copy_(w), n, traffic),
        Case(f"w += c {size}", lambda: w.add_(EPS), n, traffic),
        case("axpy_ rademacher K=1", lambda: axpy(w, "rademacher")),
        case("axpy_ normal K=1", lambda: axpy(w)),
        case("in-place torch, normal_ + add_", lambda: eager.in_place(w, buffer, EPS)),
        Case(loop, lambda: eager.perturb([parameter], 7, 1, EPS), n, traffic, f"w += c {size}", loop),
    ]
    group = Group(f"axpy_, one large tensor, {dtype}", cases).run(benchmark, 3 if report.quick else 9)
    report.add(
        group,
        **{
            f"axpy_ normal {dtype} / eager": group.ratio(loop, f"axpy_ normal K=1 {size}"),
            f"axpy_ normal {dtype} / in-place torch": group.ratio(
                f"in-place torch, normal_ + add_ {size}", f"axpy_ normal K=1 {size}"
            ),
            f"axpy_ rademacher {dtype} / w += c": group.ratio(
                f"axpy_ rademacher K=1 {size}", f"w += c {size}"
            ),
        },
    )


def bench_compiled(benchmark, report) -> None:
    """torch.compile of the eager perturb; a smaller tensor,
    because inductor draws its normals one lane at a time."""
    n = 1 << (20 if report.quick else 23)
    w = weights(n, "fp32")
    parameter = torch.nn.Parameter(w.clone(), requires_grad=False)
    compiled = torch.compile(eager.perturbed)
    try:
        compiled(w, 1.0, EPS)
    except Exception as error:  # no compiler on this machine, or none that inductor can use
        report.note(f"torch.compile of the eager perturb did not run here: {type(error).__name__}")
        pytest.skip(f"torch.compile: {error}")
    yardstick, loop = f"w += c fp32 n={n}", f"eager perturb fp32 n={n}"
    cases = [
        Case(yardstick, lambda: w.add_(EPS), n, 8),
        Case(f"axpy_ normal K=1 fp32 n={n}", lambda: axpy(w), n, 8, yardstick, loop),
        Case(loop, lambda: eager.perturb([parameter], 7, 1, EPS), n, 8, yardstick, loop),
        Case(f"torch.compile of it fp32 n={n}", lambda: compiled(w, 1.0, EPS), n, 8, yardstick, loop),
    ]
    group = Group("axpy_ and torch.compile, fp32", cases).run(benchmark, 3 if report.quick else 7)
    report.add(group, **{"axpy_ normal fp32 / torch.compile": group.ratio(cases[3].name, cases[1].name)})


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def bench_axpy_list(benchmark, report, dtype: str) -> None:
    count, each = 500, 4096
    flat = weights(count * each, dtype)
    tensors = [weights(each, dtype) for _ in range(count)]
    names = [f"layer.{i}.weight" for i in range(count)]
    ids = [zokern.stream.parameter_id(name) for name in names]
    parameters = [torch.nn.Parameter(t.clone(), requires_grad=False) for t in tensors]
    buffer = torch.empty(each, dtype=DTYPES[dtype])
    size = f"{dtype} {count} x {each}"
    n, traffic = count * each, 2 * flat.element_size()
    yardstick = f"w += c {dtype} n={count * each}"
    loop = f"eager perturb {size}"

    def by_hand() -> None:
        for t in tensors:
            eager.in_place(t, buffer, EPS)

    cases = [
        Case(yardstick, lambda: flat.add_(EPS), n, traffic),
        Case(
            f"_foreach_add_(ws, c) {size}", lambda: torch._foreach_add_(tensors, EPS), n, traffic, yardstick
        ),
        Case(f"axpy_ normal K=1 {size}", lambda: axpy(tensors, who=ids), n, traffic, yardstick, loop),
        Case(
            f"axpy_ normal K=1 by names {size}", lambda: axpy(tensors, who=names), n, traffic, yardstick, loop
        ),
        Case(
            f"axpy_ rademacher K=1 {size}",
            lambda: axpy(tensors, "rademacher", who=ids),
            n,
            traffic,
            yardstick,
            loop,
        ),
        Case(f"in-place torch, normal_ + add_ {size}", by_hand, n, traffic, yardstick, loop),
        Case(loop, lambda: eager.perturb(parameters, 7, 1, EPS), n, traffic, yardstick, loop),
    ]
    group = Group(f"axpy_, {count} tensors of {each}, {dtype}", cases).run(
        benchmark, 10 if report.quick else 40
    )
    report.add(group, **{f"axpy_ list {dtype} / eager": group.ratio(loop, f"axpy_ normal K=1 {size}")})


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("what", ["large", "layer"])
def bench_perturb(benchmark, report, dtype: str, what: str) -> None:
    """Into memory that is there already, as the step does; the public function allocates its results.

    A step perturbs matrices, or tiles of large ones, which stay in the caches for their product; what is
    larger than these is bound by memory."""
    n = 1 << (20 if what == "layer" else 22 if report.quick else 25)
    w = weights(n, dtype)
    plus, minus = torch.empty_like(w), torch.empty_like(w)
    backend, direction, spans = backends.resolve(None, w.device), directions.resolve("normal"), [Span(7)]
    size, width = f"{dtype} n={n}", w.element_size()
    yardstick = f"copy out.copy_(w) {size}"

    def launch(scales: list[float], outs: list[torch.Tensor]) -> None:
        backend.perturb(Batch([w], spans), Noise(direction, 7, [(0, 0)]), scales, [[out] for out in outs])

    def two() -> None:
        launch([EPS], [plus])
        launch([-EPS], [minus])

    cases = [
        Case(yardstick, lambda: plus.copy_(w), n, 2 * width),
        Case(
            f"perturb +- in one pass {size}",
            lambda: launch([EPS, -EPS], [plus, minus]),
            n,
            3 * width,
            yardstick,
        ),
        Case(f"perturb + then - {size}", two, n, 4 * width, yardstick),
        Case(
            f"zokern.perturb +- {size}",
            lambda: zokern.perturb(w, "normal", seed=7, who="w", step=0),
            n,
            3 * width,
            yardstick,
        ),
    ]
    group = Group(f"perturb, {what}, {dtype}", cases).run(benchmark, 5 if report.quick else 15)
    report.add(group, **{f"perturb pair {what} {dtype} / two": group.ratio(cases[2].name, cases[1].name)})


@pytest.mark.parametrize(
    "dtype, rounding",
    [("fp32", "nearest"), ("bf16", "nearest"), ("bf16", "stochastic"), ("bf16", "residual")],
)
def bench_replay(benchmark, report, dtype: str, rounding: str) -> None:
    """A run of steps of one term, each with its decay and its rounding: in one pass, and a pass a step."""
    n, steps = 1 << (20 if report.quick else 22), 16
    w = weights(n, dtype)
    low = {"residuals": torch.zeros(n, dtype=torch.int16)} if rounding == "residual" else {}
    names = dict(seed=7, who="w", rounding=rounding, **low)
    draws, coeffs, decays = [(step, 0) for step in range(steps)], [EPS] * steps, [0.999] * steps

    def passes() -> None:
        for k in range(steps):
            zokern.axpy_(
                w, "normal", draws=draws[k : k + 1], coeffs=coeffs[k : k + 1], decay=decays[k], **names
            )

    traffic, size = 2 * w.element_size() + 4 * len(low), f"{steps} steps {dtype} {rounding} n={n}"
    cases = [
        Case(
            f"replay of {size}",
            lambda: zokern.axpy_(w, "normal", draws=draws, coeffs=coeffs, decay=decays, each=True, **names),
            n,
            traffic,
        ),
        Case(f"a pass each, {size}", passes, n, steps * traffic),
    ]
    group = Group(f"axpy_ normal, replay, {dtype} {rounding}", cases).run(benchmark, 3 if report.quick else 7)
    report.add(
        group, **{f"replay {dtype} {rounding}, passes / one": group.ratio(cases[1].name, cases[0].name)}
    )


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def bench_draws(benchmark, report, dtype: str) -> None:
    n = 1 << (20 if report.quick else 24)
    w = weights(n, dtype)
    traffic, yardstick = 2 * w.element_size(), f"w += c {dtype} n={n}"

    def passes(k: int) -> None:
        for _ in range(k):
            axpy(w)

    cases = [Case(yardstick, lambda: w.add_(EPS), n, traffic)]
    for k in (1, 2, 3, 4, 6, 8):
        cases.append(Case(f"K={k} {dtype} in one pass", lambda k=k: axpy(w, draws=k), n, traffic, yardstick))
        cases.append(Case(f"K={k} {dtype} passes", lambda k=k: passes(k), n, k * traffic, yardstick))
    group = Group(f"axpy_ normal, K draws, {dtype}, n={n}", cases).run(benchmark, 5 if report.quick else 9)
    report.add(
        group,
        **{
            f"K={k} {dtype}, K passes / one": group.ratio(
                f"K={k} {dtype} passes", f"K={k} {dtype} in one pass"
            )
            for k in (4, 8)
        },
    )
