"""torch.compile: what it made stays compiled under every evaluation, and is made once.

A backend counts the graphs that torch makes and those that it runs. Wrong evaluations are rejected by each
check.
"""

from __future__ import annotations

import copy
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from models import build, same_bits
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode

import zokern
from zokern.evaluation import compiled, exchange, scratch

pytestmark = pytest.mark.usefixtures("one_thread", "fresh_graphs")

LR, EPS = 1e-3, 1e-3
STEPS = 7  # two, in which graphs may be made, and five
WAYS: dict[str, Callable[[], Any]] = {
    "master": zokern.Master, "inplace": zokern.InPlace, "paired": zokern.Paired, "scratch": zokern.Scratch,
    "paired, large": lambda: zokern.Paired(budget=1 << 20),
    "scratch, large": lambda: zokern.Scratch(budget=1 << 20),
}  # fmt: skip


@pytest.fixture
def fresh_graphs():
    """Other tests' graphs count towards the limit of recompilations."""
    if not exchange.guards_see_stand_ins():
        pytest.skip(f"guards of torch {torch.__version__} do not see stand-ins, so Python runs")
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@dataclass
class Counted:
    """A backend of torch.compile that counts graphs when they are made and when they run."""

    base: str = "aot_eager"
    made: list[int] = field(default_factory=lambda: [0])
    ran: list[int] = field(default_factory=lambda: [0])

    def __call__(self, graph: Any, inputs: Sequence[Any]) -> Callable:
        self.made[-1] += 1
        run = torch._dynamo.lookup_backend(self.base)(graph, inputs)

        def counted(*args: Any) -> Any:
            self.ran[-1] += 1
            return run(*args)

        return counted

    def next(self) -> None:
        self.made.append(0)
        self.ran.append(0)


class Block(nn.Module):
    """Every kind of use: lookup, norm, products with and without bias, a transposed one, by hand."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.embed, self.norm = nn.Embedding(400, width), nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, width), nn.Linear(width, width, bias=False)
        self.weight, self.bias = nn.Parameter(torch.randn(width, 9) / 9), nn.Parameter(torch.zeros(9))

    def forward(self, ids: Tensor) -> Tensor:
        h = self.norm(self.embed(ids))
        h = h + self.down(torch.tanh(self.up(h)))
        y = torch.addmm(self.bias, h.flatten(0, 1), self.weight)
        return y.view(*ids.shape, 9) * (1 + self.up.weight.square().mean())


class Outer(nn.Module):
    """A compiled module inside an eager one."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block, self.gain = block, nn.Parameter(torch.ones(9))

    def forward(self, ids: Tensor) -> Tensor:
        return self.block(ids) * self.gain


def small() -> nn.Module:
    return Outer(Block(12))


def wide() -> nn.Module:
    """Matrices above the size of those that are copied before a reading, and few enough for one graph."""
    return Outer(Block(300))


def llama() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 288, "intermediate_size": 300, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = transformers.LlamaConfig(
        vocab_size=40, num_key_value_heads=2, max_position_embeddings=16, use_cache=False, **sizes
    )
    return transformers.LlamaForCausalLM(config)


def ids(number: int) -> Tensor:
    return torch.randint(0, 40, (2, 6), generator=torch.Generator().manual_seed(number))


def loss_of(out: Any) -> Tensor:
    return getattr(out, "logits", out).float().square().mean()


def in_place(model: nn.Module, backend: Counted) -> nn.Module:
    model.compile(backend=backend)
    return model


def inside(model: Any, backend: Counted) -> nn.Module:
    model.block = torch.compile(model.block, backend=backend)
    return model


# what the closure calls, and what the closure becomes
HOW: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "wrapper": (lambda m, b: torch.compile(m, backend=b), lambda loss, b: loss),
    "in place": (in_place, lambda loss, b: loss),
    "inside": (inside, lambda loss, b: loss),
    "part": (lambda m, b: (in_place(m.block, b), m)[1], lambda loss, b: loss),
    "function": (lambda m, b: torch.compile(lambda x: m(x), backend=b), lambda loss, b: loss),
    "closure": (lambda m, b: m, lambda loss, b: torch.compile(loss, backend=b)),
}


@dataclass
class Run:
    """Steps on a new batch each."""

    results: list
    counts: Counted
    before: dict[str, Tensor]
    after: dict[str, Tensor]

    @property
    def coefficients(self) -> list[float]:
        return [c for result in self.results for c in result.coefficients]


def run(
    way: Any, make: Callable[[], nn.Module] = small, how: str | None = "wrapper", base: str = "aot_eager",
    method: Callable = zokern.MeZO, dtype: torch.dtype = torch.float32, steps: int = STEPS, **options: Any
) -> Run:  # fmt: skip
    model, counts = build(make, dtype), Counted(base)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = method(model, **{"lr": LR, "eps": EPS, "seed": 3, "evaluation": way} | options)
    called = model if how is None else HOW[how][0](model, counts)
    results = []
    for number in range(steps):
        x = ids(number)

        def loss(x: Tensor = x) -> Tensor:
            return loss_of(called(x))

        results.append(zokern.step(optimizer, loss if how is None else HOW[how][1](loss, counts)))
        counts.next()
    after = {name.replace("_orig_mod.", ""): p.detach() for name, p in model.named_parameters()}
    return Run(results, counts, before, after)


def moved(run: Run) -> dict[str, Tensor]:
    """Returns the weights where the coefficients of a run take them, by the verb alone."""
    weights = copy.deepcopy(run.before)
    for result in run.results:
        (c,) = result.coefficients
        for name, tensor in weights.items():
            draws = {"seed": 3, "who": name, "draws": [(result.step, 0)]}
            zokern.axpy_(tensor, "normal", **draws, coeffs=[-LR * c])
    return weights


def check_same(mine: Run, right: Run) -> None:
    largest = max(map(abs, right.coefficients))
    assert mine.coefficients == pytest.approx(right.coefficients, rel=1e-3, abs=1e-3 * largest)


def check_stays_compiled(way: Any, passes: int, **how: Any) -> None:
    """No graph is made after two steps; each pass of a closure runs as many; and the losses are those of an
    eager model, read by 'master'."""
    mine, right = run(way, **how), run("master", **how | {"how": None})
    assert not any(mine.counts.made[2:]), mine.counts.made
    ran = mine.counts.ran[2:STEPS]
    assert ran == [ran[0]] * 5 and passes <= ran[0] < 2 * passes, ran
    assert [result.why for result in mine.results] == [""] * STEPS
    check_same(mine, right)
    if how.get("method") is None and getattr(way, "exact", True):
        expected = moved(mine)
        assert all(same_bits(mine.after[name], expected[name]) for name in expected)


PASSES = {"master": 2, "inplace": 2, "paired": 1, "scratch": 2, "paired, large": 1, "scratch, large": 2}


@pytest.mark.parametrize("way", WAYS)
def test_a_compiled_model_stays_compiled(way: str) -> None:
    """Its graphs run at every reading, and are not made again."""
    check_stays_compiled(WAYS[way](), PASSES[way], make=wide)


@pytest.mark.parametrize("how", HOW)
def test_whatever_is_compiled_stays_so(how: str) -> None:
    check_stays_compiled(zokern.Paired(), 1, how=how)


@pytest.mark.parametrize("way", ["paired", "paired, large"])
def test_a_compiled_transformer_stays_compiled(way: str) -> None:
    check_stays_compiled(WAYS[way](), 1, make=llama)


def test_the_backend_eager() -> None:
    check_stays_compiled(zokern.Paired(budget=1 << 20), 1, make=wide, base="eager")


def check_python(way: Any) -> None:
    """As on a torch whose guards do not see stand-ins: Python runs in the place of graphs, and says so."""
    mine, right = run(way, make=wide), run("master", make=wide, how=None)
    check_same(mine, right)
    assert all(f"guards of torch {torch.__version__}" in result.why for result in mine.results)


def test_python_runs_where_guards_do_not_see_stand_ins(monkeypatch) -> None:
    with pytest.raises(AssertionError):
        check_python(zokern.Paired(budget=1 << 20))
    monkeypatch.setattr(exchange, "guards_see_stand_ins", lambda: False)
    check_python(zokern.Paired(budget=1 << 20))


def test_a_graph_that_is_not_made_again_is_noticed(monkeypatch) -> None:
    see = exchange.guards_see_stand_ins.__wrapped__
    assert see()
    monkeypatch.setattr(
        torch, "compile", lambda module, backend: backend(torch.fx.symbolic_trace(module), [])
    )
    assert not see()


def dropping() -> nn.Module:
    return nn.Sequential(wide(), nn.Dropout(0.3), nn.Linear(9, 5)).train()


def check_masks(way: Any, base: str, dtype: torch.dtype) -> None:
    """All sides have the dropout mask that the compiled model has under 'master'."""
    how = {"make": dropping, "how": "in place", "base": base, "dtype": dtype, "eps": 1e-2, "steps": 4}
    mine, right = run(way, **how), run("master", **how)
    assert mine.counts.ran[3] and mine.results[-1].why == ""
    losses = [[v for result in one.results for v in result.losses[0]] for one in (mine, right)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4 if dtype == torch.float32 else 3e-2)


@pytest.mark.parametrize(
    "base, dtype", [("inductor", torch.float32), ("aot_eager", torch.float32), ("aot_eager", torch.bfloat16)]
)
def test_dropout(base: str, dtype: torch.dtype) -> None:
    if base == "inductor" and shutil.which(os.environ.get("CXX", "g++")) is None:
        pytest.skip("no C++ compiler")
    check_masks(zokern.Paired(budget=1 << 20), base, dtype)


def test_masks_of_another_draw_are_rejected(monkeypatch) -> None:
    def other(x: Any, p: float, train: bool | None) -> Any:
        return compiled.Mapped(x._stack * torch.rand(x.shape).lt(1 - p) / (1 - p)), x

    monkeypatch.setitem(compiled.HANDLERS, torch.ops.aten.native_dropout.default, other)
    with pytest.raises(AssertionError, match="approx"):
        check_masks(zokern.Paired(budget=1 << 20, check=False), "aot_eager", torch.float32)


METHODS: dict[str, Callable] = {
    "factored": zokern.SubZero, "factored, drawn": zokern.LOZO, "nine points": zokern.FZOO,
    "scaled": zokern.HiZOO, "several draws": zokern.KerZOO,
}  # fmt: skip


@pytest.mark.parametrize("budget", [None, 1 << 20])
@pytest.mark.parametrize("name", METHODS)
def test_methods(name: str, budget: int | None) -> None:
    check_stays_compiled(zokern.Paired(budget), 1, make=wide, method=METHODS[name])


def test_a_layer_shares_its_graph() -> None:
    """What is compiled for one layer serves the others: a graph knows no parameter by name."""

    class Layers(nn.Module):
        def __init__(self, count: int = 12) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(Outer(nn.Linear(9, 9)) for _ in range(count))

        def forward(self, x: Tensor) -> Tensor:
            for block in self.blocks:
                x = torch.tanh(block(x))
            return x

    model, counts = build(Layers), Counted()
    for block in model.blocks:
        block.compile(backend=counts)
    optimizer = zokern.MeZO(model, lr=LR, eps=EPS, evaluation="paired")
    for number in range(STEPS):
        x = torch.randn(4, 9, generator=torch.Generator().manual_seed(number))
        zokern.step(optimizer, lambda x=x: loss_of(model(x)))
        counts.next()
    assert counts.made[0] <= 4 and not any(counts.made[2:])
    assert counts.ran[2:STEPS] == [12] * 5


# 16 bits ----------------------------------------------------------------------------------------------------


class Gain(nn.Module):
    """Ones in bfloat16, and the rest in float32."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(9))

    def forward(self, x: Tensor) -> Tensor:
        return self.gain * F.one_hot(x % 9, 9).float()


def check_small_vectors() -> None:
    """In bfloat16 a weight of 1.0 is perturbed by less than half an ulp, in a float32 copy."""
    mine = run(zokern.Paired(check=False), Gain, "in place", dtype=torch.bfloat16, eps=1e-4, lr=0.0)
    right = run("master", Gain, how=None, eps=1e-4, lr=0.0)
    assert any(mine.counts.ran[2:]) and mine.coefficients == pytest.approx(right.coefficients, rel=0.05)


def test_small_vectors_of_16_bits() -> None:
    check_small_vectors()


def test_vectors_that_are_rounded_are_rejected(monkeypatch) -> None:
    monkeypatch.setattr(compiled, "WIDE", set())
    with pytest.raises(AssertionError):
        check_small_vectors()


@pytest.mark.parametrize("rounding", ["nearest", "residual"])
@pytest.mark.parametrize("budget", [None, 1 << 20])
def test_16_bits(budget: int | None, rounding: str) -> None:
    options = {"make": wide, "dtype": torch.bfloat16, "eps": 1e-2, "rounding": rounding}
    mine = run(zokern.Paired(budget), **options)
    right = run(zokern.Paired(budget), how=None, **options)
    assert not any(mine.counts.made[2:]) and mine.counts.ran[2:STEPS] == [1] * 5
    losses = [[v for part in r.losses for v in part] for one in (mine, right) for r in one.results]
    assert sum(losses[:STEPS], []) == pytest.approx(sum(losses[STEPS:], []), rel=2e-2)


# Operations -------------------------------------------------------------------------------------------------


def test_operations_have_fakes() -> None:
    """Of a product, looked-up rows and a whole copy, called as a graph calls them."""
    model, seen = build(wide), []

    def closure() -> Tensor:
        block, operations = model.block, torch.ops.zokern
        up, embed, x = block.up.weight, block.embed.weight, torch.randn(2, 12, 300)
        if not (isinstance(up, compiled.Unmade) and isinstance(embed, compiled.Unmade)):
            return loss_of(model(ids(0)))  # the first look, at the weights themselves
        for operation, args in (
            (operations.perturbed_product, (up._theta, x, None, 2, False)),
            (operations.perturbed_product, (up._theta, x[0], torch.randn(2, 300), 2, True)),
            (operations.perturbed_rows, (embed._theta, ids(0), 2, False)),
            (operations.perturbed_rows, (embed._theta, torch.stack([ids(0), ids(1)]), 2, True)),
            (operations.perturbed, (up._theta, 2)),
        ):
            with FakeTensorMode() as mode:
                fakes = [mode.from_tensor(arg) if isinstance(arg, Tensor) else arg for arg in args]
                fake = operation(*fakes)
            real = operation(*args)
            assert (fake.shape, fake.dtype, fake.stride()) == (real.shape, real.dtype, real.stride())
            seen.append(operation)
        return loss_of(model(ids(0)))

    model.block.compile(backend="eager")
    optimizer = zokern.MeZO(model, lr=LR, eps=EPS, evaluation=zokern.Paired(1 << 20, check=False))
    assert zokern.step(optimizer, closure).why == ""
    assert len(set(seen)) == 3


# Where graphs cannot stay -----------------------------------------------------------------------------------


class Reshaped(nn.Module):
    """Writes a shape in place, which no compiled stand-in follows."""

    def __init__(self, change: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.block, self.gain, self.change = Block(12), nn.Parameter(torch.ones(9)), change

    def forward(self, x: Tensor) -> Tensor:
        y = self.block(x) * self.gain
        torch._dynamo.graph_break()
        self.change(y)
        return y.square()


@pytest.mark.parametrize("way", ["paired", "scratch"])
def test_what_cannot_stay_compiled_runs_as_python(way: str) -> None:
    """With the reason in the result, and the same losses."""
    make = lambda: Reshaped(lambda y: y.unsqueeze_(0))  # noqa: E731
    mine, right = run(WAYS[way](), make), run("master", make, how=None)
    assert {result.evaluation for result in mine.results} == {way} and mine.counts.ran[-2] == 0
    assert all("torch.compile's graphs run as Python: " in result.why for result in mine.results)
    assert "unsqueeze_" in mine.results[-1].why
    check_same(mine, right)


@pytest.mark.parametrize("method", [zokern.LeZO, zokern.BlockMeZO])
def test_changing_sets_of_parameters_end_in_python(method: Callable) -> None:
    """Each has graphs of its own, of which torch makes few: then it would make none, without a word."""

    def layers() -> nn.Module:
        return nn.Sequential(Block(12), *(nn.Sequential(nn.Linear(9, 9), nn.Tanh()) for _ in range(9)))

    mine = run("paired", layers, method=method, steps=12)
    right = run("master", layers, how=None, method=method, steps=12)
    assert f"more than {scratch.SETS} sets" in mine.results[-1].why
    assert sum(mine.counts.made) <= 2 * scratch.SETS + 2
    check_same(mine, right)


@pytest.mark.parametrize("way", ["paired", "scratch"])
def test_graphs_that_misread_larger_inputs_give_way(way: str, monkeypatch) -> None:
    """In the step that finds it."""
    right, factor, losses = exchange.losses, 1.0, []
    monkeypatch.setattr(exchange, "losses", lambda *given: right(*given) * factor)
    for evaluation in (way, "master"):
        model, factor = build(small), 1.0
        called = torch.compile(model, backend="eager") if evaluation == way else model
        optimizer = zokern.MeZO(model, lr=LR, eps=EPS, seed=3, evaluation=evaluation)
        for x in (ids(0), ids(1), torch.cat([ids(2), ids(3)])):
            factor = 1.0 if len(x) == 2 else 2.0
            result = zokern.step(optimizer, partial(lambda call, x: loss_of(call(x)), called, x))
        losses.append(result.losses[0])
        assert ("differ" in result.why) == (evaluation == way)
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_a_closure_at_fault_raises_what_it_raises() -> None:
    """And graphs stay."""
    model, counts = build(small), Counted()
    called = torch.compile(model, backend=counts)
    optimizer = zokern.MeZO(model, lr=LR, eps=EPS, evaluation="paired")
    for fault in (False, True, False):
        counts.next()

        def closure(fault: bool = fault) -> Tensor:
            loss = loss_of(called(ids(0)))
            if fault:
                raise LookupError("no such row")
            return loss

        if fault:
            with pytest.raises(LookupError, match="no such row"):
                zokern.step(optimizer, closure)
        else:
            assert zokern.step(optimizer, closure).why == ""
    assert counts.ran[-1] == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_write_to_a_weight_is_found(dtype: torch.dtype) -> None:
    class Writes(Outer):
        def forward(self, x: Tensor) -> Tensor:
            y = super().forward(x)
            self.gain.mul_(1.0)
            return y

    with pytest.raises(RuntimeError, match="'gain'"):
        run(zokern.Paired(check=False), lambda: Writes(Block(12)), "in place", dtype=dtype, eps=1e-2)


def test_stand_ins_leave_no_trace() -> None:
    """Parameters are of their class, with their attributes, after a step and after an exception."""
    model = build(wide)
    called = torch.compile(model, backend="eager")

    def state() -> dict[str, tuple]:
        return {
            name: (type(p), {key for key in vars(p) if "dynamo" not in key}, p.data_ptr())
            for name, p in model.named_parameters()
        }

    before = state()
    optimizer = zokern.MeZO(model, lr=LR, eps=EPS, evaluation=zokern.Paired(1 << 20))
    for _ in range(2):
        zokern.step(optimizer, lambda: loss_of(called(ids(0))))
    with pytest.raises(ZeroDivisionError):
        zokern.step(optimizer, lambda: loss_of(called(ids(0))) / (1 // 0))
    assert state() == before


# Evaluation 'auto' ------------------------------------------------------------------------------------------


def check_auto(how: str) -> None:
    mine = run("auto", how=how, steps=3)
    assert {result.evaluation for result in mine.results} == {"master"}, mine.results[-1].why
    assert "torch.compile" in mine.results[-1].why


@pytest.mark.parametrize("how", HOW)
def test_auto_reads_a_compiled_model_by_master(how: str) -> None:
    check_auto(how)


def test_auto_that_forgets_graphs_is_rejected(monkeypatch) -> None:
    right = zokern.evaluation.auto._choose
    monkeypatch.setattr(
        zokern.evaluation.auto, "_choose", lambda plan, seen, safe: right(plan, (*seen[:2], 0), safe)
    )
    with pytest.raises(AssertionError):
        check_auto("closure")


# Wrong evaluations ------------------------------------------------------------------------------------------


class Python(zokern.Paired):
    """Runs what torch.compile made as Python."""

    def _runs_graphs(self, plan: Any) -> bool:
        return False


class Forgets(zokern.Paired):
    """Throws graphs away."""

    def losses(self, *given: Any) -> Tensor:
        torch.compiler.reset()
        return super().losses(*given)


class Apart(zokern.Paired):
    """Reads every side in a pass of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.sides = 1


class Nearer(zokern.Paired):
    """Reads points that are not as far from theta as asked."""

    def __init__(self) -> None:
        super().__init__(check=False)

    def read(self, plan: Any, points: Any, *rest: Any) -> Tensor:
        return super().read(plan, [point.scaled(0.9) for point in points], *rest)


class Farther(zokern.Sgd):
    """Moves the weights by more than asked."""

    def update(self, plan: Any, group: Any, weights: Any, lr: float, *rest: Any) -> Any:
        return super().update(plan, group, weights, lr * 1.01, *rest)


@pytest.mark.parametrize("wrong", [Python, Forgets, Apart, Nearer])
def test_wrong_evaluations_are_rejected(wrong: Callable[[], Any]) -> None:
    with pytest.raises(AssertionError):
        check_stays_compiled(wrong(), 1, how="in place")


def test_a_wrong_update_is_rejected() -> None:
    mine = run("paired", rule=Farther())
    assert not all(same_bits(mine.after[name], tensor) for name, tensor in moved(mine).items())
