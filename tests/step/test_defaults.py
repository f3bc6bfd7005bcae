"""Nothing here depends on the process's default dtype or default device:
no tensor is made in the one or on the other.

A library that calls torch.zeros(n) makes bfloat16 under torch.set_default_dtype(torch.bfloat16) and nothing
at all under torch.set_default_device("meta"). Kernels take addresses, and read what they find there as
float32.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from recipes import METHODS
from torch import Tensor, nn

import zokern
from zokern import gemm
from zokern.backends import Batch, Noise, Sides, Span, Thin, Weight, get
from zokern.directions import Aligned, Diagonal, Lazy, Matrix, Normal, Subspace
from zokern.directions.orthonormal import orthonormal
from zokern.gemm import library
from zokern.group import Group
from zokern.methods.tezo import spectral_ranks
from zokern.modules import Tree
from zokern.plan import Plan
from zokern.rule import renew

ROOT = Path(__file__).parents[2]
# What torch.set_default_dtype or torch.set_default_device decides, where a call does not.
FACTORIES = frozenset(
    "empty empty_strided empty_permuted zeros ones full eye tensor as_tensor asarray scalar_tensor arange "
    "range linspace logspace rand randn randint randperm normal tril_indices triu_indices complex "
    "bartlett_window blackman_window hamming_window hann_window kaiser_window sparse_coo_tensor "
    "sparse_csr_tensor".split()
)
OLD = frozenset(
    "Tensor FloatTensor DoubleTensor HalfTensor BFloat16Tensor IntTensor LongTensor BoolTensor "
    "ByteTensor".split()
)

# The source -------------------------------------------------------------------------------------------------


def undecided(source: str) -> list[str]:
    """Calls that leave the dtype or the device of a new tensor to the process."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.module == "torch":
            found += [f"{node.lineno}: from torch import {a.name}" for a in node.names if a.name in FACTORIES]
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
            continue
        if not isinstance(node.func.value, ast.Name) or node.func.value.id != "torch":
            continue
        name, said = node.func.attr, {keyword.arg for keyword in node.keywords}
        lacks = name in FACTORIES and not {"dtype", "device"} <= said
        if lacks or name in OLD or (name == "Generator" and not node.args and not said):
            found.append(f"{node.lineno}: {ast.unparse(node)}")
    return found


def test_no_tensor_is_made_by_default() -> None:
    wrong = []
    for folder in ("zokern", "triton_kernels"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            name, calls = path.relative_to(ROOT).as_posix(), undecided(path.read_text(encoding="utf-8"))
            wrong += [f"{name}:{call}" for call in calls]
    assert not wrong, "say dtype= and device= in\n" + "\n".join(wrong)


@pytest.mark.parametrize("call", [
    "torch.zeros(3)", "torch.zeros(3, dtype=torch.int64)", "torch.empty((2, 3), device=d)",
    "torch.tensor([1.0])", "torch.Generator()",
    "torch.as_tensor(x, dtype=torch.float64)", "torch.FloatTensor(3)", "torch.arange(n)",
])  # fmt: skip
def test_a_factory_that_leaves_it_open_is_found(call: str) -> None:
    assert undecided(f"def f(d, x, n):\n    return {call}\n") == [f"2: {call}"]
    assert undecided("from torch import zeros") and not undecided(
        "torch.zeros(3, dtype=t, device=d); x.new_zeros(3); torch.zeros_like(x)"
    )


# The verbs, the parts and the methods under other defaults --------------------------------------------------

CPU = {"device": torch.device("cpu")}
FLOAT = {"dtype": torch.float32, **CPU}


@pytest.fixture(params=["bfloat16", "float16", "float64", "meta"])
def elsewhere(request) -> Iterator[Callable[[], None]]:
    """Call it to move the process's defaults; they are put back after the test."""
    dtype = torch.get_default_dtype()

    def move() -> None:
        if request.param == "meta":
            torch.set_default_device("meta")
        else:
            torch.set_default_dtype(getattr(torch, request.param))

    yield move
    torch.set_default_device(None)
    torch.set_default_dtype(dtype)


def data(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 1) -> Tensor:
    generator = torch.Generator("cpu").manual_seed(seed)
    return torch.empty(shape, **FLOAT).normal_(generator=generator).to(dtype)


def verbs(backend: str) -> Iterator[Any]:
    """Every verb, with what it returns and writes."""
    names = {"seed": 7, "who": "w", "backend": backend}
    for direction in ("normal", "rademacher"):
        yield zokern.draw(direction, (5, 9), step=2, dtype=torch.bfloat16, device="cpu", **names)
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            w = data(12, 10, dtype=dtype)
            yield (
                zokern.axpy_(
                    w,
                    direction,
                    draws=[(1, 0), (2, 1)],
                    coeffs=[0.1, 0.2],
                    decay=0.9,
                    rounding="stochastic",
                    **names,
                ),
                w,
            )
            yield zokern.perturb(data(12, 10, dtype=dtype), direction, step=1, scales=[1e-3, -1e-3], **names)
    low = torch.zeros(12, 10, dtype=torch.int16, **CPU)
    w = data(12, 10, dtype=torch.bfloat16)
    yield (
        zokern.axpy_(w, "normal", draws=[(1, 0)], coeffs=[0.1], rounding="residual", residuals=low, **names),
        w,
        low,
    )
    yield (
        zokern.lowrank_(
            w, data(12, 3), data(10, 4), core=data(3, 4), rounding="residual", residuals=low, **names
        ),
        w,
        low,
    )
    for core in (None, data(3)):
        yield (
            zokern.lowrank_(
                w, data(12, 3), data(10, 3), core=core, scale=0.1, decay=0.9, who="w", backend=backend
            ),
            w,
        )
    states = [torch.zeros(12, 10, **FLOAT) for _ in range(2)]
    scalars = zokern.Adam().scalars(0.1, 0.99, 2)
    yield (
        zokern.update_(
            w, "normal", "adam", draws=[(1, 0)], coeffs=[0.5], states=states, scalars=scalars, **names
        ),
        w,
        states,
    )
    yield zokern.philox4x32([[1, 2, 3, 4]], [5, 6], backend=backend)
    for dtype in (torch.float32, torch.bfloat16):
        weight, x, b = data(12, 10, dtype=dtype), data(4, 10, dtype=dtype), data(12, dtype=dtype)
        yield zokern.linear(x, weight, scales=[1e-3, -1e-3, 0.0], bias=b, tile=40, **names)
        yield zokern.linear(x, weight, (data(12, 2), data(10, 2)), scales=[1e-3, 0.0], bias=b, **names)
        yield zokern.linear(x, weight, (data(12, 2), data(10, 2)), scales=[1e-3, -1e-3], bias=b, **names)
    yield zokern.sketch("normal", (8, 6), data(6, 2), draws=[(0, 0)], coeffs=[1.0], tile=12, **names)
    yield zokern.sketch("normal", (8, 6), data(8, 2), draws=[(0, 0)], coeffs=[1.0], transposed=True, **names)


def test_every_verb(elsewhere, both_products) -> None:
    before = [list(verbs(backend)) for backend in ("cpu", "reference")]
    elsewhere()
    after = [list(verbs(backend)) for backend in ("cpu", "reference")]
    assert_same(before, after)


def normals(matrices, shapes, step: int, draw: int) -> list[Tensor]:
    outs = [torch.empty(shape, **FLOAT) for shape in shapes]
    get("cpu").draw(
        Batch(outs, [Span(matrix.who) for matrix in matrices]), Noise(Normal(), 3, [(step, draw)])
    )
    return outs


class OnOurs(Group):
    """A group whose factors are drawn in float32 on the CPU."""

    def source(self, seed: int, plan=None) -> Any:
        return normals


FACTORED = {"subspace": Subspace(3, 5), "lazy": Lazy(2, 5), "diagonal": Diagonal(3), "aligned": Aligned(3, 5)}


def matrices(rank: int = 3) -> list[Matrix]:
    return [Matrix(name, i, 12, 10, rank, torch.device("cpu")) for i, name in enumerate(("a", "b"))]


def drawn(factored) -> Iterator[Any]:
    found = matrices(factored.rank)
    factored.refresh(found, normals, 0)
    for matrix in found:
        matrix.extra["spectrum"] = data(factored.rank)
    yield [(matrix.left, matrix.right) for matrix in found], factored.draws(found, normals, 1, 0)


def stepped(rule, factored) -> Iterator[Any]:
    """Two updates by a rule: of dense parameters,
    or of matrices whose updates wait, over a change of the basis."""
    tensors = [data(12, 10), data(12, 10, seed=2)]
    found = None if factored is None else matrices(factored.rank)
    group = OnOurs(["a", "b"], tensors, [Span(0), Span(1)], None, 1e-3, {}, get("cpu"), found)
    states: dict[Tensor, dict] = {tensor: {} for tensor in tensors}
    for step in (4, 5):
        plan = Plan([group], Normal(), 3, step, "nearest", Tree([]), factored, words=(0, 1))
        if factored is not None:
            for matrix in found or ():
                matrix.pending = None
            renew(rule, factored, group, states, 3, step)
        for lr in (0.1, 0.0):
            rule.update(plan, group, [0.3, -0.2], lr, 0.99, states, defer=True)
        group.drawn.clear()
    yield tensors, [dict(state) for state in states.values()], [matrix.pending for matrix in found or ()]


def estimated() -> Iterator[Any]:
    """What every estimator makes of losses that are a function of the points."""
    group = Group(["a"], [data(12, 10)], [Span(0)], None, 1e-3, {"lr": 0.1, "weight_decay": 0.0}, get("cpu"))
    plan = Plan([group], Normal(), 3, 4, "nearest", Tree([]))

    class Given:
        def losses(self, points, scope=None):
            return torch.tensor(
                [1.0 + sum((1 + word) * a for word, a in p.terms) for p in points],
                dtype=torch.float64,
                device="cpu",
            )

    for name in ("Spsa", "Spread", "Sign", "Kernel", "Conservative", "Blockwise", "Bayesian"):
        yield [(e.draws, e.coefficients, e.losses) for e in getattr(zokern, name)()(Given(), plan)]


def parts() -> Iterator[Any]:
    for factored in FACTORED.values():
        yield from drawn(factored)
    for rule in (zokern.Sgd(), zokern.Momentum(), zokern.Adam()):
        yield from stepped(rule, None)
    for rule in (zokern.Sgd(), zokern.Momentum()):
        yield from stepped(rule, FACTORED["subspace"])
        yield from stepped(rule, FACTORED["lazy"])
    yield from stepped(zokern.Adam(inside=True, bias_correction=False), FACTORED["diagonal"])
    yield orthonormal([data(9, 3), data(9, 3, seed=2), data(7, 2)])
    yield from estimated()
    for dtype in (torch.float32, torch.bfloat16):
        yield (
            library.linear(data(20, 10, dtype=dtype), data(12, 10, dtype=dtype)),
            library.wide(data(20, 10), data(12, 10), dtype),
        )
        thin = Thin([0, 1], data(3, 10), data(2, 3, 3), data(12, 3))
        xs, weight = [data(4, 10, dtype=dtype), data(5, 10, dtype=dtype)], data(12, 10, dtype=dtype)
        for biases in ([None, None], [data(12, dtype=dtype)] * 2):
            yield gemm.factored_linear(
                get("reference"), Weight(weight, Span(0), shrink=0.99), Sides(xs, biases, thins=[thin])
            )
    model = nn.Linear(10, 12, **FLOAT)
    with torch.no_grad():
        model.weight.copy_(data(12, 10))
    yield spectral_ranks(model)


def test_directions_rules_and_products(elsewhere) -> None:
    before = list(parts())
    elsewhere()
    assert_same(before, list(parts()))


HERE: dict[str, Callable[[Any], Any]] = {
    "mezo": lambda model: zokern.MeZO(model, lr=1e-3, rounding="stochastic", weight_decay=0.1),
    "mezo_residual": lambda model: zokern.MeZO(model, lr=1e-3, eps=0.1, rounding="residual"),
    "mezo_momentum": lambda model: zokern.MeZO(model, lr=1e-3, rule=zokern.Momentum()),
    "mezo_adam": lambda model: zokern.MeZO(model, lr=1e-3, rule=zokern.Adam()),
    **{
        f"mezo_{way}": partial(zokern.MeZO, lr=1e-3, evaluation=way)
        for way in ("master", "paired", "scratch", "inplace")
    },
    **{name: METHODS[name] for name in ("fzoo", "subzero", "lozo_m", "tezo_adam", "pgap", "FGD", "Addax")},
}


@pytest.mark.parametrize("which", HERE)
def test_methods_and_evaluations(which: str, elsewhere) -> None:
    def run() -> tuple:
        dtype = torch.bfloat16 if which == "mezo_residual" else torch.float32
        model = nn.Sequential(
            nn.Linear(10, 12, dtype=dtype, **CPU), nn.Tanh(), nn.Linear(12, 4, dtype=dtype, **CPU)
        )
        with torch.no_grad():
            for i, parameter in enumerate(model.parameters()):
                parameter.copy_(data(*parameter.shape, seed=i))
        optimizer, x = HERE[which](model), data(6, 10, dtype=dtype)
        results = [zokern.step(optimizer, lambda: model(x).float().square().mean()) for _ in range(3)]
        return [result.losses for result in results], [p.detach() for p in model.parameters()]

    before = run()
    elsewhere()
    assert_same(before, run())


def assert_same(a: Any, b: Any, where: str = "") -> None:
    """Equal values, bits, dtypes and devices of whatever holds tensors."""
    if isinstance(a, Tensor):
        assert isinstance(b, Tensor) and (a.dtype, a.device, a.shape) == (b.dtype, b.device, b.shape), where
        assert torch.equal(a, b), where
    elif isinstance(a, dict):
        assert list(a) == list(b), where
        for key in a:
            assert_same(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), where
        for i, (one, other) in enumerate(zip(a, b)):
            assert_same(one, other, f"{where}[{i}]")
    else:
        assert a == b, where


class Careless(Subspace):
    """Draws of the process's default dtype, on its default device."""

    def draws(self, matrices, source, step: int, draw: int) -> list[Tensor]:
        return [torch.ones(matrix.rank, matrix.rank) for matrix in matrices]


def test_a_tensor_made_by_default_is_seen(elsewhere) -> None:
    before = list(drawn(Careless(3, 5)))
    elsewhere()
    with pytest.raises(AssertionError):
        assert_same(before, list(drawn(Careless(3, 5))))
