"""Faults and bad inputs, one test a row of the table of faults: refused before a weight is touched, or
survived with nothing lost."""

from __future__ import annotations

import hashlib
import itertools
import random
import sys
import threading
import warnings
from collections.abc import Callable
from fractions import Fraction
from functools import partial
from unittest.mock import patch

import numpy as np
import oracle
import pytest
import torch
from models import batch, build, changed, next_token_loss, refuse, same_bits, snapshot, tiny
from torch import Tensor, nn

import zokern
from zokern.evaluation import isolation, rng

pytestmark = pytest.mark.usefixtures("one_thread")

IDS = batch()
EXPLICIT = ("master", "paired", "scratch", "inplace")
EXACT_OR_NOT = ("master", "scratch", "inplace")  # by real numbers too, which 'paired' refuses
X = torch.linspace(-1, 1, 18).view(3, 6)


def two_layers(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    return build(lambda: nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 1)), dtype)


def told(evaluation: str = "master") -> dict:
    """Options for a closure that returns given losses, one at a reading:
    none is read twice or for a comparison."""
    return {
        "evaluation": zokern.Scratch(check=False) if evaluation == "scratch" else evaluation,
        "paired_check": None,
    }


def step_on(model: nn.Module, closure: Callable | None = None, **options) -> zokern.StepResult:
    return zokern.step(zokern.MeZO(model, **options), closure or (lambda: model(X).square().mean()))


# Which tensors ----------------------------------------------------------------------------------------------


def test_row_01_parameter_in_two_modules() -> None:
    model = two_layers()
    model.add_module("again", nn.Linear(6, 5))
    model.again.weight = model[0].weight
    seen = []
    optimizer = zokern.MeZO(model, lr=1.0, eps=1e-2, seed=1)
    before = model[0].weight.detach().clone()
    result = zokern.step(
        optimizer, lambda: (seen.append((model[0].weight + 0, model.again.weight + 0)), model[:3](X).sum())[1]
    )
    z = oracle.z("0.weight", before, 1)
    for sign, (first, second) in zip((1, -1), seen):
        assert same_bits(first, second)
        assert torch.allclose(first - before, sign * 1e-2 * z, atol=1e-6)
    # once, not twice
    oracle.check_update("0.weight", before, model[0].weight, 1, 0, [-result.coefficients[0]])


def test_row_02_two_parameters_on_one_storage() -> None:
    model = two_layers()
    model.second = nn.Parameter(model[0].weight.data)
    seen = []
    before = model[0].weight.detach().clone()
    result = step_on(
        model,
        lambda: (
            seen.append((model[0].weight + 0, model.second + 0)),
            model[:3](X).sum() + model.second.sum(),
        )[1],
        lr=1.0,
    )
    assert all(same_bits(a, b) for a, b in seen)
    assert model.second.data_ptr() == model[0].weight.data_ptr()
    name = next(n for n, _ in model.named_parameters() if n in ("0.weight", "second"))
    oracle.check_update(name, before, model[0].weight, 0, 0, [-result.coefficients[0]])
    partly = nn.Module()
    storage = torch.zeros(10)
    partly.a, partly.b = nn.Parameter(storage[:6]), nn.Parameter(storage[4:])
    refuse(partly, lambda: zokern.MeZO(partly), ValueError, "'a'", "'b'", "overlap", "clone")
    columns = nn.Module()
    storage = torch.zeros(4, 6)
    columns.a, columns.b = nn.Parameter(storage[:, :3]), nn.Parameter(storage[:, 3:])
    step_on(columns, lambda: (columns.a + columns.b).sum())


@pytest.mark.parametrize(
    "source", [lambda m: m, lambda m: list(m.named_parameters()), lambda m: [{"params": [m.a, m.b]}]]
)
def test_row_02_tie_without_the_module(source: Callable) -> None:
    """The other tensor object of the same elements is perturbed too, whatever the optimizer was given."""
    model, seen = nn.Module(), []
    model.a = nn.Parameter(torch.linspace(-1, 1, 36).view(6, 6))
    model.b = nn.Parameter(model.a.data)
    zokern.step(
        zokern.MeZO(source(model), lr=0.0, **told("scratch")),
        lambda: (
            seen.append((model.a + 0, model.b + 0)),
            nn.functional.linear(X @ model.a, model.b).square().mean(),
        )[1],
    )
    assert len(seen) == 2 and all(same_bits(a, b) for a, b in seen)


@pytest.mark.parametrize("order", [("a", "b"), ("b", "a")])
def test_row_02_tie_of_which_one_is_frozen(order: tuple[str, str]) -> None:
    """As with the module, the name that requires a gradient is trained, in whichever order they come."""
    tied = {"a": nn.Parameter(torch.ones(3))}
    tied["b"] = nn.Parameter(tied["a"].data, requires_grad=False)
    optimizer = zokern.MeZO([(name, tied[name]) for name in order], lr=1.0)
    result = zokern.step(optimizer, lambda: (tied["a"] + tied["b"]).sum())
    oracle.check_update("a", torch.ones(3), tied["a"], 0, 0, [-result.coefficients[0]])


def test_row_02_tie_that_is_cut_later() -> None:
    model = nn.Module()
    model.a = nn.Parameter(torch.ones(3, 6))
    model.b = nn.Parameter(model.a.data)
    optimizer = zokern.MeZO(model, eps=0.1)

    def again() -> None:
        zokern.step(optimizer, lambda: (X * model.a).sum() + model.b.float().square().sum())

    again()
    model.bfloat16()  # gives each its own storage
    refuse(model, again, RuntimeError, "'a'", "'b'", "same elements", "new optimizer")
    model.b.data = model.a.data
    again()
    both = nn.ParameterDict({"a": torch.ones(3), "b": torch.ones(3)})
    optimizer = zokern.MeZO(both)
    zokern.step(optimizer, lambda: (both["a"] + both["b"]).sum())
    both["b"].data = both["a"].data
    refuse(
        both,
        lambda: zokern.step(optimizer, lambda: (both["a"] + both["b"]).sum()),
        ValueError,
        "'a'",
        "'b'",
        "clone",
    )


def test_row_03_expanded_parameter() -> None:
    model = nn.Module()
    model.wide = nn.Parameter(torch.ones(1, 4).expand(3, 4))
    refuse(model, lambda: zokern.MeZO(model), ValueError, "'wide'", "overlapping", ".clone()")


OTHER_MEMORY = {
    "expanded": (
        lambda m: setattr(m[0].weight, "data", torch.ones(1, 6).expand(5, 6)),
        ("'0.weight'", ".clone()"),
    ),
    "double": (lambda m: m.double(), ("'0.weight'", "float64", "float32, bfloat16 or float16", "cast")),
    "shared": (
        lambda m: setattr(m[2].weight, "data", m[0].weight.data[:1, :5]),
        ("'0.weight'", "'2.weight'", "overlap"),
    ),
}


@pytest.mark.parametrize("change", OTHER_MEMORY)
@pytest.mark.parametrize("source", [lambda m: m, lambda m: list(m.named_parameters())])
def test_rows_02_03_14_parameter_that_becomes_other_memory(source: Callable, change: str) -> None:
    """Under the same Parameter: what was refused when the optimizer
    was built is refused at the next step, and after it."""
    model = two_layers()
    optimizer = zokern.MeZO(source(model), lr=0.1)

    def again() -> zokern.StepResult:
        return zokern.step(optimizer, lambda: model(X.to(model[0].bias.dtype)).square().mean())

    again()
    swap, words = OTHER_MEMORY[change]
    swap(model)
    for _ in range(2):
        refuse(model, again, ValueError, *words)
    model.float()
    model[0].weight.data, model[2].weight.data = torch.ones(5, 6), torch.ones(1, 5)
    assert again().step == 1


def test_row_18_weights_replaced_while_updates_wait() -> None:
    model = two_layers()
    optimizer = zokern.SubZero(model, rank=2, evaluation="scratch")
    closure = lambda: model(X).square().mean()  # noqa: E731
    zokern.step(optimizer, closure)
    model[0].weight.data = torch.ones(7, 6)
    for call in (optimizer.flush, lambda: zokern.step(optimizer, closure)):
        refuse(nn.Module(), call, RuntimeError, "'0.weight'", "optimizer.flush()", "defer=False")


def test_row_04_any_memory_layout_has_the_same_z() -> None:
    for order in itertools.permutations(range(3)):
        p = torch.zeros(torch.Size([(3, 4, 5)[i] for i in order])).permute(
            *[order.index(i) for i in range(3)]
        )
        assert p.shape == (3, 4, 5)
        model = nn.Module()
        model.w = nn.Parameter(p)
        result = step_on(
            model, lambda model=model: (model.w * torch.arange(60.0).view(3, 4, 5)).sum(), lr=1.0, seed=1
        )
        oracle.check_update("w", torch.zeros(3, 4, 5), model.w.contiguous(), 1, 0, [-result.coefficients[0]])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_row_05_gaps_of_a_slice_are_not_touched(dtype: torch.dtype) -> None:
    storage = torch.full((7, 12), 3.0, dtype=dtype)
    model = nn.Module()
    model.w = nn.Parameter(storage[1:6, 1::2])
    for evaluation in EXACT_OR_NOT:
        step_on(model, lambda: model.w.float().sum(), lr=0.1, eps=0.1, evaluation=evaluation)
    mask = torch.zeros(7, 12, dtype=torch.bool)
    mask[1:6, 1::2] = True
    assert (storage[~mask] == 3).all() and (storage[mask] != 3).float().mean() > 0.9


@pytest.mark.parametrize("shape", [(0,), (3, 0)])
def test_row_06_empty_parameter(shape: tuple[int, ...]) -> None:
    model = two_layers()
    model.empty = nn.Parameter(torch.empty(shape))
    with_empty = step_on(model, lambda: model[:3](X).mean() + model.empty.sum())
    alone = two_layers()
    assert with_empty.losses == step_on(alone, lambda: alone(X).mean()).losses
    only = nn.Module()
    only.empty = nn.Parameter(torch.empty(shape))
    step_on(only, lambda: float(only.empty.sum()), dead_limit=None)


def test_row_07_scalar_parameter() -> None:
    model = nn.Module()
    model.scale = nn.Parameter(torch.tensor(2.0))
    result = step_on(model, lambda: model.scale * 3, lr=0.1, seed=1)
    oracle.check_update("scale", torch.tensor(2.0), model.scale, 1, 0, [-0.1 * result.coefficients[0]])
    assert model.scale.shape == ()


@pytest.mark.parametrize("base", [2**31 - 32, 2**31 + 3, 2**32 - 32, 2**32 + 5, 2**33, 2**35 - 64])
@pytest.mark.parametrize("direction", ["normal", "rademacher"])
def test_row_08_element_numbers_beyond_32_bits(base: int, direction: str) -> None:
    """By a virtual offset: 64 elements that begin at a number that no tensor here reaches,
    against the block function itself."""
    from zokern.directions import resolve

    kind = resolve(direction)
    block = torch.arange(base // kind.per_block, (base + 63) // kind.per_block + 1)
    counters = torch.stack(
        [block, torch.full_like(block, 77), torch.full_like(block, 5), torch.zeros_like(block)], dim=-1
    )
    words = zokern.philox4x32(counters, (9, 0))
    values = kind.values(words).flatten()[base % kind.per_block :][:64]
    assert same_bits(zokern.draw(direction, (64,), seed=9, who=77, step=5, first=base), values)
    weight = torch.zeros(64)
    zokern.axpy_(weight, direction, seed=9, who=77, draws=[(5, 0)], coeffs=[1.0], first=base)
    assert same_bits(weight, values)
    assert same_bits(
        zokern.perturb(torch.zeros(64), direction, seed=9, who=77, step=5, scales=[1.0], first=base)[0][0],
        values,
    )
    wrapped = zokern.draw(direction, (64,), seed=9, who=77, step=5, first=base % 2**31)
    assert base < 2**31 or not same_bits(wrapped, values)  # a 32-bit index would be seen
    with pytest.raises(ValueError, match="2\\*\\*35"):
        zokern.draw(direction, (64,), seed=9, who=77, step=5, first=2**35 - 63)


def test_row_09_sizes_that_divide_nothing() -> None:
    sizes = list(range(1, 258, 1))
    model = nn.Module()
    storage = torch.full((sum(sizes) + len(sizes),), 7.0)  # a red element after each
    starts = list(itertools.accumulate([0, *[n + 1 for n in sizes]]))
    model.many = nn.ParameterList([nn.Parameter(storage[s : s + n]) for s, n in zip(starts, sizes)])
    result = step_on(model, lambda: sum(p.sum() for p in model.many), lr=0.1, seed=1)
    for name, p in model.named_parameters():
        oracle.check_update(name, torch.full(p.shape, 7.0), p, 1, 0, [-0.1 * result.coefficients[0]])
    assert (storage[torch.tensor(starts[1:]) - 1] == 7).all()


@pytest.mark.parametrize("offset", range(8))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_row_10_misaligned_parameter(offset: int, dtype: torch.dtype) -> None:
    ends = []
    for shift in (0, offset):
        model = nn.Module()
        storage = torch.zeros(80, dtype=dtype)
        storage[shift : shift + 59] = torch.linspace(-1, 1, 59).to(dtype)
        model.w = nn.Parameter(storage[shift : shift + 59])
        result = step_on(model, lambda model=model: model.w.float().square().sum(), lr=0.01, eps=1e-2)
        ends.append((result.losses, model.w.detach().clone()))
    assert ends[0][0] == ends[1][0] and same_bits(ends[0][1], ends[1][1])


def test_row_11_z_is_independent_of_the_device() -> None:
    """z is a function of names: the groups that a step makes by device do not enter.
    Two real devices need a GPU."""
    z = zokern.draw("normal", (65,), seed=1, who="w", step=3)
    assert same_bits(z, zokern.draw("normal", (65,), seed=1, who="w", step=3, backend="reference"))
    with pytest.raises(ValueError, match="tensors\\[1\\] is on meta.*one device"):
        zokern.axpy_(
            [torch.ones(2), torch.ones(2, device="meta")],
            "normal",
            seed=1,
            who=["a", "b"],
            draws=[(0, 0)],
            coeffs=[1.0],
        )
    if not torch.cuda.is_available():
        pytest.skip("the CPU part passed; a model split over two devices needs a GPU")
    model = two_layers()
    reference = step_on(model, lr=0.0, seed=2).coefficients[0]
    model[2].to("cuda")
    split = step_on(
        model, lambda: model[2](model[:2](X).cuda()).square().mean(), lr=0.0, seed=2
    ).coefficients[0]
    assert abs(split - reference) < 1e-3


def test_row_12_meta_parameter() -> None:
    model = two_layers()
    model.later = nn.Linear(2, 2, device="meta")
    with pytest.raises(ValueError, match="later.weight.*meta.*materialise"):
        zokern.MeZO(model)


def test_row_13_mixed_dtypes_share_z() -> None:
    model = nn.Module()
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        model.w = nn.Parameter(torch.zeros(33, dtype=dtype))
        model.other = nn.Parameter(
            torch.zeros(5, dtype=torch.float16 if dtype == torch.float32 else torch.float32)
        )
        losses = iter([1.0, 0.0])  # coefficient 1 at eps 1/2
        step_on(
            model,
            lambda losses=losses: (model.w.sum() + model.other.sum(), next(losses))[1],
            lr=1.0,
            eps=0.5,
            seed=4,
            **told(),
        )
        assert same_bits(model.w, (-oracle.z("w", model.w, 4)).to(dtype)), dtype


def test_row_14_float64_parameter() -> None:
    model = two_layers()
    model.wide = nn.Parameter(torch.ones(3, dtype=torch.float64))
    refuse(
        model,
        lambda: zokern.MeZO(model),
        ValueError,
        "'wide'",
        "float64",
        "float32, bfloat16 or float16",
        "cast",
        "freeze",
    )


@pytest.mark.parametrize(
    "source", [lambda m: m, lambda m: m.named_parameters(), lambda m: [{"params": list(m.parameters())}]]
)
def test_row_15_frozen_quantised_parameters_are_skipped(source: Callable) -> None:
    model = two_layers()
    for dtype in (torch.float8_e4m3fn, torch.int8, torch.uint8):
        setattr(model, str(dtype)[6:], nn.Parameter(torch.ones(4).to(dtype), requires_grad=False))
    model.later = nn.Parameter(torch.ones(4, device="meta"), requires_grad=False)
    kept = [p for p in model.parameters() if not p.requires_grad and not p.is_meta]
    before = [p.view(torch.uint8).clone() for p in kept]
    optimizer = zokern.MeZO(source(model), lr=1.0)
    zokern.step(optimizer, lambda: model[:3](X).mean())
    assert len(kept) == 3 and all(torch.equal(p.view(torch.uint8), b) for p, b in zip(kept, before))


def test_lazy_parameter() -> None:
    model = nn.Sequential(nn.LazyLinear(5), nn.Linear(5, 1))
    for source in (model, model.named_parameters()):
        with pytest.raises(ValueError, match="'0.weight' of a lazy module.*run the module once"):
            zokern.MeZO(source)
    model(X)
    step_on(model)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8, torch.int64, torch.bool, torch.complex64])
def test_row_16_parameter_that_cannot_be_trained(dtype: torch.dtype) -> None:
    model = two_layers()
    tensor = torch.ones(4).to(dtype)
    selected = [*model.named_parameters(), ("odd", tensor)]
    words = "'odd'", str(dtype)[6:], "expected float32, bfloat16 or float16", "leave it out"
    refuse(model, lambda: zokern.MeZO(selected), ValueError, *words)


def test_row_17_requires_grad_toggled_between_steps() -> None:
    ends = []
    for freeze in (False, True):
        model = tiny()
        optimizer = zokern.MeZO(model, lr=0.1, seed=2, **told())
        numbers = iter([1.0, 0.9, 0.8, 0.75, 0.5, 0.4])
        frozen = []
        for step in range(3):
            model.embed.weight.requires_grad_(not (freeze and step == 1))
            before = snapshot(model)
            zokern.step(optimizer, lambda model=model, numbers=numbers: (model(IDS), next(numbers))[1])
            frozen.append("embed.weight" not in changed(model, before))
        assert frozen == [False, freeze, False]
        ends.append(snapshot(model))
    assert [name for name in ends[0] if not same_bits(ends[0][name], ends[1][name])] == ["embed.weight"]


def test_row_18_parameter_added_removed_or_replaced() -> None:
    def replace(model) -> None:
        model[0].weight = nn.Parameter(torch.ones(5, 6))

    def remove(model) -> None:
        del model[0].bias

    def add(model) -> None:
        model.more = nn.Parameter(torch.ones(3))

    def module(model) -> None:
        model[0] = nn.Linear(6, 5)

    for change, word in (
        (replace, "'0.weight' was replaced"),
        (remove, "'0.bias' was removed"),
        (add, "'more'"),
        (module, "replaced"),
    ):
        for evaluation in EXACT_OR_NOT:
            model = two_layers()  # between steps
            optimizer = zokern.MeZO(model, lr=0.1, evaluation=evaluation)
            zokern.step(optimizer, lambda model=model: model(X).mean())
            change(model)
            refuse(
                model,
                lambda o=optimizer, m=model: zokern.step(o, lambda: m(X).mean()),
                RuntimeError,
                word,
                "optimizer",
            )
        if change is not add:
            model = two_layers()  # inside the closure
            optimizer = zokern.MeZO(model, lr=0.1)
            kept = {name: (p, p.detach().clone()) for name, p in model.named_parameters()}
            with pytest.raises((RuntimeError, AttributeError, TypeError)):
                zokern.step(optimizer, lambda model=model, change=change: (change(model), model(X).mean())[1])
            assert all(same_bits(p, before) for p, before in kept.values()) and optimizer.steps == 0


GIVEN = {  # ways to give an optimizer a model's parameters without the model
    "named": lambda model: model.named_parameters(),
    "other_names": lambda model: [(f"mine.{i}", p) for i, p in enumerate(model.parameters())],
    "tensors": lambda model: model.parameters(),
    "groups": lambda model: [{"params": [p]} for p in model.parameters()],
    "one": lambda model: [model[0].weight],
}


@pytest.mark.parametrize("evaluation", EXACT_OR_NOT)
@pytest.mark.parametrize("given", GIVEN)
def test_row_18_without_the_model(given: str, evaluation: str) -> None:
    """The first step finds the modules that hold the parameters,
    and what is replaced in them later is refused."""
    changes: dict[str, Callable] = {
        "replaced": lambda model: setattr(model[0], "weight", nn.Parameter(torch.ones(5, 6))),
        "removed": lambda model: delattr(model[0], "weight"),
        "module replaced": lambda model: model.__setitem__(0, nn.Linear(6, 5)),
    }
    for what, change in changes.items():
        model = two_layers()
        optimizer = zokern.MeZO(GIVEN[given](model), lr=0.1, evaluation=evaluation)
        old = dict(model.named_parameters())
        zokern.step(optimizer, lambda model=model: model(X).mean())
        before = {name: p.detach().clone() for name, p in old.items()}
        change(model)
        with pytest.raises(
            RuntimeError, match="parameter .* was (replaced|removed) after .*build a new optimizer"
        ):
            zokern.step(optimizer, lambda model=model: model(X).mean())
        assert all(same_bits(p, before[name]) for name, p in old.items()), what


def test_row_18_without_the_model_wrappers_come_and_go() -> None:
    """A module around the model, then another, and a model that is taken out of a container: all are the
    model that was found."""
    model = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5)).train()
    container = nn.ModuleList([two_layers(), model])
    optimizer = zokern.MeZO(model.named_parameters(), lr=0.1)

    def guarded() -> bool:
        zokern.step(optimizer, lambda: model.eval()(X).pow(3).mean())
        return model.training and model[1].training and container[0].training

    with patch("gc.get_objects", side_effect=AssertionError("modules are found by their forwards")):
        zokern.step(optimizer, lambda: model(X).pow(3).mean())
        assert guarded()
        container.pop(1)
        assert guarded()
        model[0] = nn.Sequential(model[0])  # stands in for the layer, and holds it
        assert guarded()


@pytest.mark.parametrize("given", ["model", "named"])
def test_row_18_a_module_that_is_added(given: str) -> None:
    """Its flags and statistics are put back as those of the first one are."""
    model, more = two_layers(), nn.BatchNorm1d(1).train()
    optimizer = zokern.MeZO(model if given == "model" else model.named_parameters(), lr=0.1)
    closure = lambda: more(model(X)).pow(3).mean()  # noqa: E731
    zokern.step(optimizer, lambda: model(X).pow(3).mean())
    optimizer.add_param_group({"params": [("more", more.weight)]})
    before = snapshot(more)
    zokern.step(optimizer, closure)
    assert changed(more, before) == ["weight"]
    zokern.step(optimizer, lambda: (more.eval(), closure())[1])
    assert more.training and changed(more, before) == ["weight"]


def test_parameters_without_a_module() -> None:
    """Tensors that no module holds, and those of a module that is gone, are trained as they are."""
    loose = [nn.Parameter(torch.ones(5, 6)), *nn.Linear(5, 1).parameters()]
    optimizer = zokern.MeZO(loose, lr=0.1)
    for _ in range(3):
        zokern.step(optimizer, lambda: nn.functional.linear(X @ loose[0].t(), *loose[1:]).mean())


def test_lazy_proxies_are_left_alone() -> None:
    """The look for modules runs no code of the objects that it passes."""

    class Proxy:
        @property
        def __class__(self):
            raise AssertionError("touched")

    proxies = [Proxy() for _ in range(3)]
    model = two_layers()
    zokern.step(zokern.MeZO(model.named_parameters(), lr=0.1), lambda: model(X).mean())
    assert len(proxies) == 3


WRITES = {
    "add_": lambda p: p.add_(1.0), "iadd": lambda p: p.__iadd__(1.0),
    "setitem": lambda p: p.__setitem__(0, 2.0),
    "data_mul": lambda p: p.data.mul_(0.5),
    "data_assigned": lambda p: setattr(p, "data", torch.zeros_like(p)),
    "detach": lambda p: p.detach().zero_(), "view": lambda p: p.view(-1)[0:2].fill_(3.0),
    "foreach": lambda p: torch._foreach_mul_([p], 0.5),
    "init": lambda p: nn.init.normal_(p), "init_zeros": lambda p: nn.init.zeros_(p),
    "out": lambda p: torch.mul(X[:1, :1], 2.0, out=p),
    "copy_": lambda p: p.copy_(torch.zeros_like(p)), "row": lambda p: p[0].fill_(1.0),
    "smaller": lambda p: setattr(p, "data", torch.zeros(2, 6)),
    "numpy": lambda p: p.detach().numpy().fill(0.5),
}  # fmt: skip


@pytest.mark.parametrize("stencil", ["central", "forward"])  # forward: theta itself is read first
@pytest.mark.parametrize("evaluation", ["auto", "master", "paired", "scratch"])
@pytest.mark.parametrize("write", WRITES)
def test_row_19_closure_writes_to_a_weight(write: str, evaluation: str, stencil: str) -> None:
    """It is refused, and no bit of a weight has changed."""
    model = two_layers()
    optimizer = zokern.MeZO(model, lr=0.1, evaluation=evaluation, stencil=stencil)
    refuse(
        model,
        lambda: zokern.step(optimizer, lambda: (WRITES[write](model[0].weight), model(X).mean())[1]),
        (RuntimeError, TypeError),
    )
    assert optimizer.steps == 0


@pytest.mark.parametrize("write", ["add_", "data_assigned", "detach"])
def test_row_19_the_closure_is_named(write: str) -> None:
    model = two_layers()
    call = lambda: step_on(model, lambda: (WRITES[write](model[0].weight), model(X).mean())[1])  # noqa: E731
    refuse(model, call, RuntimeError, "the closure changed the weights of '0.weight'", "must only read them")


def test_row_19_writes_in_place_are_noticed() -> None:
    """Without a copy nothing can be put back, but no update is added to the damage."""
    for write in WRITES:
        model = two_layers()
        optimizer = zokern.MeZO(model, lr=0.1, evaluation="inplace")
        with pytest.raises((RuntimeError, TypeError)):
            zokern.step(
                optimizer,
                lambda model=model, write=write: (WRITES[write](model[0].weight), model(X).mean())[1],
            )
        assert optimizer.steps == 0


def test_row_19_closure_writes_through_a_view_made_outside() -> None:
    model = two_layers()
    view = model[0].weight.detach()[0]
    words = "changed the weights of '0.weight'"
    refuse(model, lambda: step_on(model, lambda: (view.add_(1.0), model(X).mean())[1]), RuntimeError, words)


def test_row_19_training_step_in_the_closure() -> None:
    model = two_layers()
    inner = torch.optim.SGD(model.parameters(), lr=0.1)

    def closure():
        with torch.enable_grad():
            loss = model(X).square().mean()
            inner.zero_grad()
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        inner.step()
        return loss.detach()

    refuse(model, lambda: step_on(model, closure), RuntimeError, "closure")


@pytest.mark.parametrize("given", ["model", *GIVEN])
def test_row_20_batch_norm_statistics(given: str) -> None:
    for evaluation in EXACT_OR_NOT:
        model = build(lambda: nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Linear(5, 1))).train()
        statistics = {name: b.clone() for name, b in model.named_buffers()}
        optimizer = zokern.MeZO(
            GIVEN.get(given, lambda model: model)(model), lr=0.1, evaluation=evaluation, queries=2
        )
        for _ in range(3):
            zokern.step(optimizer, lambda model=model: model(X).square().mean())
            zokern.step(optimizer, lambda model=model: model.eval()(X).square().mean())
        assert all(module.training for module in model.modules()), evaluation
        assert all(same_bits(b, statistics[name]) for name, b in model.named_buffers()), evaluation
        model(X)
        # and outside a step they do move
        assert not same_bits(model[1].running_mean, statistics["1.running_mean"])


class Buffers(nn.Module):
    """Forward registers, deletes, fills or replaces buffers;
    those that it registers are computed from a weight."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.weight, self.gain = how, nn.Parameter(torch.randn(5, 6)), nn.Parameter(torch.ones(5))
        self.register_buffer("empty", None)
        self.register_buffer("first", torch.ones(1))
        self.register_buffer("last", torch.ones(2), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.how == "register" and not hasattr(self, "normed"):
            self.register_buffer(
                "normed", nn.functional.normalize(self.weight.detach(), dim=1), persistent=False
            )
        elif self.how == "delete" and hasattr(self, "first"):
            del self.first
        elif self.how == "fill" and self.empty is None:
            self.empty = nn.functional.normalize(self.weight.detach(), dim=1)
        elif self.how == "replace":
            self.first = self.weight.detach().sum()[None]
        normed = {"register": "normed", "fill": "empty"}.get(self.how)
        return nn.functional.linear(x, getattr(self, normed) if normed else self.weight) * self.gain


@pytest.mark.parametrize("evaluation", EXPLICIT)
@pytest.mark.parametrize("how", ["register", "delete", "fill", "replace"])
def test_row_20_registered_buffers(how: str, evaluation: str) -> None:
    """Every reading finds the buffers of the start, and leaves them:
    nothing stays that was computed from theta + eps z."""
    model = build(lambda: Buffers(how))
    buffers = list(model._buffers.items())
    hidden = set(model._non_persistent_buffers_set)
    state = list(model.state_dict())
    sides = []
    optimizer = zokern.MeZO(model, lr=0.0, evaluation=evaluation)
    result = zokern.step(optimizer, lambda: (sides.append(model(X).square().mean()), sides[-1])[1])
    now = list(model._buffers.items())
    assert [name for name, _ in now] == [name for name, _ in buffers] and all(
        a is b for (_, a), (_, b) in zip(now, buffers)
    )
    assert model._non_persistent_buffers_set == hidden and list(model.state_dict()) == state
    assert result.unseen == () and result.losses[0][0] != result.losses[0][1]
    assert result.evaluation == evaluation


@pytest.mark.parametrize("evaluation", EXACT_OR_NOT)
def test_row_20_buffer_above_the_budget(evaluation: str) -> None:
    """It is watched only: reading it is fine, and writing to it is refused before the update."""
    model = two_layers()
    model.register_buffer("large", torch.zeros(isolation.BUDGET // 4 + 1))
    before = snapshot(model)
    optimizer = zokern.MeZO(model, lr=0.1, evaluation=evaluation)
    with pytest.raises(
        RuntimeError, match=r"changed a buffer or attribute of shape \[1048577\].*4 MB.*eval mode"
    ):
        zokern.step(optimizer, lambda: (model.large[:1].add_(1.0), model[:3](X).mean())[1])
    assert optimizer.steps == 0
    assert all(
        (p - before[n]).abs().max() <= (1e-6 if evaluation == "inplace" else 0.0)
        for n, p in model.named_parameters()
    )
    zokern.step(optimizer, lambda: (model[:3](X) + model.large[0]).mean())


def test_row_21_random_streams() -> None:
    """The user's streams do not move; both sides see the same
    numbers (test_step.py measures the spread of dropout)."""
    model, seen = two_layers(), []

    def closure():
        seen[-1].append((torch.rand(2).tolist(), random.random(), np.random.rand()))
        return model(X).mean()

    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    expected = torch.rand(2).tolist(), random.random(), np.random.rand()
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    optimizer = zokern.MeZO(model, queries=2)
    for _ in range(2):
        seen.append([])
        zokern.step(optimizer, closure)
    assert (
        torch.rand(2).tolist(),
        random.random(),
        np.random.rand(),
    ) == expected and torch.initial_seed() == 1
    assert all(s == step[0] for step in seen for s in step) and seen[0][0] != seen[1][0]


def numpy_after(model: nn.Module, before: Callable[[], object]) -> list:
    """Draws from NumPy after a step whose closure draws from it too."""
    np.random.seed(1)
    before()
    zokern.step(zokern.MeZO(model, dead_limit=None), lambda: model(X).mean() + np.random.randn())
    return [np.random.randn(), np.random.rand(), type(np.random.get_bit_generator()).__name__]


@pytest.mark.parametrize("normals", [0, 1, 2])
def test_row_21_a_normal_of_numpy_that_waits(normals: int) -> None:
    """NumPy makes normals in pairs, and keeps the second beside its generator."""
    np.random.seed(1), np.random.randn(normals)
    expected = [np.random.randn(), np.random.rand(), "MT19937"]
    assert numpy_after(two_layers(), lambda: np.random.randn(normals)) == expected
    assert numpy_after(two_layers(), lambda: np.random.randn(normals)) == expected


def test_row_21_a_step_inside_a_closure_leaves_numpy_alone() -> None:
    """Each reading of the outer step sees the numbers that it would see without the inner step."""
    model, other, seen = two_layers(), two_layers(), {True: [], False: []}

    def closure(nested: bool) -> Tensor:
        drawn = [np.random.rand()]
        if nested:
            zokern.step(inner, lambda: other(X).mean() + np.random.rand())
        seen[nested].append([*drawn, np.random.rand()])
        return model(X).mean()

    for nested in seen:
        inner = zokern.MeZO(other, lr=0.0)
        zokern.step(zokern.MeZO(model, lr=0.0, evaluation="master"), partial(closure, nested))
    assert seen[True] == seen[False]


def test_row_21_a_generator_alone_is_rejected(monkeypatch) -> None:
    """Seen is a step that exchanges generators whatever waits, and whatever it stands in."""

    def exchanged() -> Callable[[], None]:
        own = np.random.get_bit_generator()
        np.random.set_bit_generator(rng._stand_in())
        return partial(np.random.set_bit_generator, own)

    monkeypatch.setattr(rng, "_numpy", exchanged)
    with pytest.raises(AssertionError):
        test_row_21_a_normal_of_numpy_that_waits(1)
    with pytest.raises(AssertionError):
        test_row_21_a_step_inside_a_closure_leaves_numpy_alone()


@pytest.mark.parametrize("evaluation", EXACT_OR_NOT)
@pytest.mark.parametrize("row", ["22_cache_in_the_closure", "23_next_batch_in_the_closure"])
def test_rows_22_23_closure_that_is_not_repeatable(row: str, evaluation: str) -> None:
    model, calls = two_layers(), itertools.count()

    def closure():
        return model(X * (1 + 0.01 * next(calls))).square().mean()

    optimizer = zokern.MeZO(model, lr=0.0, paired_check=3, evaluation=evaluation)
    before = snapshot(model)
    with pytest.raises(
        RuntimeError, match="returned .* and then .* for the same weights.*outside the closure"
    ):
        zokern.step(optimizer, closure)
    assert all((p - before[name]).abs().max() < 1e-6 for name, p in model.named_parameters())
    optimizer = zokern.MeZO(model, lr=0.0, paired_check=3, evaluation=evaluation)
    for _ in range(4):
        zokern.step(optimizer, lambda: model(X).square().mean())  # a good closure passes
    optimizer.run.step = 1
    zokern.step(optimizer, closure)  # between checks it cannot be told


@pytest.mark.parametrize("side", [0, 1])
@pytest.mark.parametrize(
    "error", [RuntimeError, KeyboardInterrupt, SystemExit, torch.OutOfMemoryError, GeneratorExit]
)
def test_row_24_exception_in_the_closure(error: type, side: int) -> None:
    model, calls = two_layers(), []

    def closure():
        calls.append(True)
        loss = model(X).mean()
        if len(calls) > side:
            raise error("planned")
        return loss

    optimizer = zokern.MeZO(model, lr=0.1)  # 'master'; 500 of them in every evaluation in test_exceptions.py
    stream = torch.get_rng_state()
    refuse(model, lambda: zokern.step(optimizer, closure), error, "planned")
    assert torch.equal(torch.get_rng_state(), stream) and optimizer.steps == 0


# Which losses -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("evaluation", EXACT_OR_NOT)
@pytest.mark.parametrize(
    "sides", [(1.0, float("nan")), (float("inf"), 1.0), (float("inf"), float("inf")), (float("nan"),) * 2]
)
def test_row_28_loss_is_not_finite(sides: tuple, evaluation: str) -> None:
    model = two_layers()
    optimizer = zokern.MeZO(model, lr=0.1, max_skips=3, **told(evaluation))
    before = snapshot(model)

    def unchanged() -> bool:
        return all(
            (p - before[name]).abs().max() <= (1e-6 if evaluation == "inplace" else 0.0)
            for name, p in model.named_parameters()
        )

    def bad():
        numbers = iter(sides)
        return zokern.step(optimizer, lambda: (model(X).mean(), next(numbers))[1])

    for step in range(2):
        result = bad()
        assert (
            result.skipped and result.step == step and repr(result.losses[0]) == repr(sides) and unchanged()
        )
    assert optimizer.guards.skips == 2
    with pytest.raises(RuntimeError, match="3 steps in a row.*no weight changed.*lower lr"):
        bad()
    assert unchanged()
    good = zokern.step(optimizer, lambda: model(X).square().mean())
    assert not good.skipped and optimizer.guards.skips == 0 and good.step == 3 and not unchanged()


HUGE = sys.float_info.max
OVERFLOWS = {
    "coefficient": ((3e38, -3e38), {"lr": 1e-30}),
    "lr times coefficient": ((1e35, -1e35), {"lr": 10.0}),
    "lr times coefficient of a later group": ((1e35, -1e35), {"lr": 10.0, "later": True}),
    "difference": ((HUGE, -HUGE), {}),
    "difference of a forward stencil": ((HUGE, -HUGE), {"stencil": "forward"}),
    "integer": ((10**400, 1.0), {}),
    "negative integer": ((1.0, -(10**400)), {}),
    "fraction": ((Fraction(10**400), 1.0), {}),
}


@pytest.mark.parametrize("evaluation", EXACT_OR_NOT)
@pytest.mark.parametrize("case", OVERFLOWS)
def test_row_29_overflow_of_finite_numbers(case: str, evaluation: str) -> None:
    """In float64 or in the float32 of the kernels:
    a step that is skipped, as with a loss that is not finite."""
    sides, options = OVERFLOWS[case]
    model, numbers = two_layers(), iter(sides)
    before = snapshot(model)
    given = {"weight_decay": 0.1, "lr": 0.1} | options
    groups: list[dict] | nn.Module = model
    if given.pop("later", False):
        groups = [
            {"params": [("0.weight", model[0].weight)], "lr": 1e-30},
            {"params": [("2.weight", model[2].weight)]},
        ]
    optimizer = zokern.MeZO(groups, **told(evaluation), **given)
    result = zokern.step(optimizer, lambda: (model(X), next(numbers))[1])
    assert result.skipped and optimizer.guards.skips == 1 and optimizer.steps == 1
    assert all(
        (p - before[n]).abs().max() <= (1e-6 if evaluation == "inplace" else 0.0)
        for n, p in model.named_parameters()
    )


def test_row_29_spread_of_large_losses() -> None:
    """FZOO squares the losses' distances from their mean."""
    model, numbers = two_layers(), itertools.cycle([1e200, -1e200, 3e200])
    result = zokern.step(zokern.FZOO(model, queries=2, **told()), lambda: (model(X), next(numbers))[1])
    assert result.skipped


def test_row_29_equal_losses_up_to_the_largest_are_a_step() -> None:
    """Their mean does not overflow, and nothing is raised after the weights have moved."""
    model = two_layers()
    optimizer = zokern.MeZO(model, lr=0.1, weight_decay=0.1, queries=3)
    result = zokern.step(optimizer, lambda: (model(X), HUGE)[1])
    assert result.loss == HUGE and not result.skipped and optimizer.steps == 1 and optimizer.result is result


def test_a_warning_that_is_an_error_does_not_hide_an_update() -> None:
    """The one sentence that can only be said after the update:
    the step counts, and its z is not used again."""
    model = two_layers(torch.bfloat16)
    optimizer = zokern.MeZO(model, lr=1e-9, eps=1e-2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(RuntimeWarning, match="half an ulp"):
            zokern.step(optimizer, lambda: model(X.bfloat16()).float().mean())
    assert optimizer.steps == 1


def test_row_30_clipped_coefficient() -> None:
    for sides, expected in (((1.0, 0.0), 0.25), ((0.0, 1.0), -0.25), ((1e-5, 0.0), 0.005)):
        model, numbers = two_layers(), iter(sides)
        before = model[0].weight.detach().clone()
        result = step_on(
            model,
            lambda model=model, numbers=numbers: (model(X).mean(), next(numbers))[1],
            lr=0.1,
            estimator=zokern.Spsa(clip=0.25),
            **told(),
        )
        assert result.coefficients[0] == pytest.approx(expected)
        oracle.check_update("0.weight", before, model[0].weight, 0, 0, [-0.1 * result.coefficients[0]])


def test_row_31_update_overflows_a_weight() -> None:
    for policy in ("raise", "ignore"):
        model = two_layers(torch.float16)
        with torch.no_grad():
            model[0].weight.fill_(65000.0)
        numbers = iter([1.0, 0.0])
        optimizer = zokern.MeZO(model, lr=100.0, nonfinite=policy, force=True, **told())

        def closure(model=model, numbers=numbers):
            model(X.half() * 1e-5)
            return next(numbers)

        if policy == "raise":
            with pytest.raises(RuntimeError, match="weights are inf or NaN.*lower lr.*nonfinite='ignore'"):
                zokern.step(optimizer, closure)
        else:
            zokern.step(optimizer, closure)
        assert not model[0].weight.isfinite().all() and optimizer.steps == 1


LOSSES = {
    "float": 0.5, "int": 1, "float32": torch.tensor(0.5), "shape_1": torch.tensor([0.5]),
    "float64": torch.tensor(0.5, dtype=torch.float64),
    "bfloat16": torch.tensor(0.5).bfloat16(), "numpy": np.float32(0.5), "numpy64": np.float64(0.5),
    "numpy_int": np.int64(1),
    "int_tensor": torch.tensor(1), "int_of_bool": torch.tensor(True),
    "uint8_int": torch.tensor([1], dtype=torch.uint8),
}  # fmt: skip


@pytest.mark.parametrize("kind", LOSSES)
def test_row_32_scalar_losses_are_accepted(kind: str) -> None:
    model = two_layers()
    result = step_on(model, lambda: (model(X).mean(), LOSSES[kind])[1])
    value = 1.0 if "int" in kind else 0.5
    assert result.losses == ((value, value),) and all(type(loss) is float for loss in result.losses[0])


NO_LOSSES = {
    "vector": (torch.ones(2), "shape (2,)"), "matrix_1x1": (torch.ones(1, 1), "shape (1, 1)"),
    "empty": (torch.ones(0), "shape (0,)"),
    "complex": (torch.tensor(1j), "complex64"),
    "None": (None, "None"), "string": ("0.5", "str"),
    "python_complex": (1j, "complex"), "list": ([0.5], "list"),
    "graph": (torch.tensor(1.0, requires_grad=True), "graph"), "numpy_vector": (np.ones(2), "ndarray"),
}  # fmt: skip


@pytest.mark.parametrize("kind", NO_LOSSES)
def test_row_33_other_losses_are_refused_at_the_first_reading(kind: str) -> None:
    model, calls = two_layers(), []
    value, word = NO_LOSSES[kind]
    optimizer = zokern.MeZO(model, lr=0.1)

    def closure():
        calls.append(True)
        model(X)
        return value

    refuse(
        model,
        lambda: zokern.step(optimizer, closure),
        (TypeError, ValueError),
        "closure returned",
        word,
        "scalar",
    )
    assert len(calls) == 1 and optimizer.steps == 0


def test_row_33_loss_with_a_graph() -> None:
    model = two_layers()

    def closure():
        with torch.enable_grad():
            return (model(X) * torch.ones(1, requires_grad=True)).mean()

    refuse(model, lambda: step_on(model, closure), ValueError, "graph", "enable_grad")


def test_row_34_loss_on_another_device() -> None:
    """One .item() a reading, in the step that caused it;
    a device error surfaces there. On a CPU: a meta loss cannot be read."""
    model = two_layers()
    refuse(
        model,
        lambda: step_on(model, lambda: (model(X), torch.ones((), device="meta"))[1]),
        (RuntimeError, ValueError, NotImplementedError),
    )
    if not torch.cuda.is_available():
        pytest.skip("the CPU part passed; a loss on a second device needs a GPU")
    assert step_on(model, lambda: model(X).mean().cuda()).step == 0


# Which numbers ----------------------------------------------------------------------------------------------

NOT_A_NUMBER = [float("nan"), float("inf"), -float("inf"), "1e-3", None, True]


@pytest.mark.parametrize("eps", [0.0, -1e-3, *NOT_A_NUMBER, 1e-60, 1e-40, 1e40])
def test_row_35_eps(eps) -> None:
    model = two_layers()
    refuse(model, lambda: zokern.MeZO(model, eps=eps), ValueError, f"eps is {eps!r}", "finite number > 0")
    optimizer = zokern.MeZO(model)
    optimizer.param_groups[0]["eps"] = eps
    refuse(model, lambda: zokern.step(optimizer, lambda: model(X).mean()), ValueError, f"eps is {eps!r}")


def test_row_36_eps_below_half_an_ulp() -> None:
    model = build(lambda: nn.Linear(64, 64), torch.bfloat16)
    with torch.no_grad():
        model.weight.copy_(torch.randn(64, 64, generator=torch.Generator().manual_seed(0)) * 0.02)
    x = torch.ones(1, 64, dtype=torch.bfloat16)

    def step(eps: float, **options):
        return zokern.step(zokern.MeZO(model, lr=0.0, eps=eps, **options), lambda: model(x).float().mean())

    refuse(model, lambda: step(1e-5), ValueError, "eps = 1e-05", "half an ulp", "raise eps", "force=True")
    step(1e-5, force=True)
    with pytest.warns(RuntimeWarning, match="larger eps"):
        step(1e-4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        step(1e-3)
        model.float()
        x = x.float()
        step(1e-6)  # float32 is not concerned


def weight(dtype: torch.dtype, rows: int = 64, columns: int = 64) -> nn.Parameter:
    values = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0)) * 0.02
    return nn.Parameter(values.to(dtype))


def test_row_36_names_the_group_and_its_eps() -> None:
    model = nn.ParameterDict(
        {"wide": weight(torch.float32), "many": weight(torch.bfloat16, 512), "few": weight(torch.bfloat16)}
    )
    groups = [
        {"params": [(n, model[n])], "eps": eps} for n, eps in (("wide", 0.5), ("many", 1e-2), ("few", 1e-6))
    ]
    optimizer = zokern.MeZO(groups, lr=0.0)
    words = "eps = 1e-06 is below half an ulp for 9", "'few'", "raise eps", "force=True"
    refuse(
        model,
        lambda: zokern.step(optimizer, lambda: sum(p.float().sum() for p in model.values())),
        ValueError,
        *words,
    )


@pytest.mark.parametrize("rows", [600, 2])  # the sample is less than a row, or many of them
def test_row_36_weights_with_gaps(rows: int) -> None:
    model = nn.Module()
    model.w = nn.Parameter(
        weight(torch.bfloat16, 600, rows).data.t()
        if rows == 2
        else weight(torch.bfloat16, rows, 20).data[:, ::2]
    )
    assert not model.w.is_contiguous()
    refuse(
        model,
        lambda: step_on(model, lambda: model.w.float().sum(), eps=1e-6),
        ValueError,
        "eps = 1e-06",
        "'w'",
        "half an ulp",
    )
    with pytest.warns(RuntimeWarning, match="update is below half an ulp"):
        result = step_on(model, lambda: model.w.float().sum(), eps=1e-2, lr=1e-9)
    assert result.dead_updates is not None and result.dead_updates > 0.9


def test_row_36_eps_is_checked_whenever_it_changes() -> None:
    model = nn.ParameterDict({"w": weight(torch.bfloat16)})
    optimizer = zokern.MeZO(model, lr=0.0, eps=1e-2)
    closure = lambda: model["w"].float().sum()  # noqa: E731
    zokern.step(optimizer, closure)
    optimizer.param_groups[0]["eps"] = 1e-6
    for _ in range(2):
        refuse(model, lambda: zokern.step(optimizer, closure), ValueError, "eps = 1e-06")
    optimizer.param_groups[0]["eps"] = 1e-2
    zokern.step(optimizer, closure)
    optimizer.guards.force = True
    optimizer.param_groups[0]["eps"] = 1e-6
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        zokern.step(optimizer, closure), zokern.step(optimizer, closure)
    assert sum("eps = 1e-06" in str(w.message) for w in caught) == 1  # once for an eps


@pytest.mark.parametrize("lr", [-1e-3, *NOT_A_NUMBER])
def test_row_37_lr(lr) -> None:
    model = two_layers()
    if lr is not None:  # which is the method's default
        refuse(model, lambda: zokern.MeZO(model, lr=lr), ValueError, f"lr is {lr!r}")
    optimizer = zokern.MeZO(model)
    optimizer.param_groups[0]["lr"] = lr
    refuse(model, lambda: zokern.step(optimizer, lambda: model(X).mean()), ValueError, f"lr is {lr!r}")
    if lr == -1e-3:
        with pytest.raises(ValueError, match="maximize=True"):
            zokern.MeZO(model, lr=lr)
    zokern.MeZO(model, lr=np.float32(0.1)), zokern.MeZO(model, lr=1), zokern.MeZO(model, lr=torch.tensor(0.1))


def test_row_38_update_below_half_an_ulp() -> None:
    """Nearest rounding leaves nearly all weights where they are and says so;
    the other two do not, and lose nothing."""
    model = build(lambda: nn.Linear(64, 64, bias=False), torch.bfloat16)
    with torch.no_grad():
        model.weight.copy_(torch.randn(64, 64, generator=torch.Generator().manual_seed(0)) * 0.02)
    start = model.weight.detach().clone()
    moved = {}
    for rounding in ("nearest", "stochastic", "residual"):
        with torch.no_grad():
            model.weight.copy_(start)
        optimizer = zokern.MeZO(model, lr=1e-6, rounding=rounding, **told())
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for _ in range(20):
                numbers = iter([2e-3, 0.0])
                result = zokern.step(
                    optimizer, lambda numbers=numbers: (model.weight.sum(), next(numbers))[1]
                )
                if rounding == "nearest" and result.step == 0:
                    assert result.dead_updates is not None and result.dead_updates > 0.9
        assert any("stochastic" in str(w.message) for w in caught) == (rounding == "nearest")
        exact = sum(-1e-6 * oracle.z("weight", start, 0, k).double() for k in range(20))
        low = optimizer.state[model.weight]["residual"].int() if rounding == "residual" else 0
        value = (model.weight.detach().float().view(torch.int32) + low).view(torch.float32).double()
        difference = value - start.double()
        moved[rounding] = (difference * exact).sum().item() / exact.square().sum().item()
    print(f"share of the update that arrived: {moved}")
    assert moved["nearest"] < 0.5 and abs(moved["stochastic"] - 1) < 0.5 and abs(moved["residual"] - 1) < 1e-2


@pytest.mark.parametrize("evaluation", EXACT_OR_NOT)
def test_row_39_dead_perturbation(evaluation: str) -> None:
    model = two_layers()
    before = snapshot(model)
    optimizer = zokern.MeZO(model, lr=0.1, evaluation=evaluation)

    def dead():
        return zokern.step(optimizer, lambda: (model(X), 1.0)[1])

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for step in range(19):
            dead()
            assert len(caught) == (step >= 2)
    assert "3 steps in a row" in str(caught[0].message)
    with pytest.raises(RuntimeError, match="20 steps in a row.*raise eps.*dead_limit=None"):
        dead()
    assert all(
        (p - before[name]).abs().max() <= (1e-5 if evaluation == "inplace" else 0.0)
        for name, p in model.named_parameters()
    )
    zokern.step(optimizer, lambda: model(X).square().mean())
    assert optimizer.guards.dead == 0
    free = zokern.MeZO(model, lr=0.1, dead_limit=None)
    for _ in range(25):
        zokern.step(free, lambda: (model(X), 1.0)[1])


def test_row_40_seeds() -> None:
    model = two_layers()
    for seed in (-1, 2**64, 2**70, 1.5, "0", None, True, float("nan")):
        refuse(
            model, lambda seed=seed: zokern.MeZO(model, seed=seed), ValueError, f"seed is {seed!r}", "2**64"
        )
    draws = [
        zokern.draw("normal", (64,), seed=seed, who="w", step=0) for seed in (0, 1, 2**32, 2**63, 2**64 - 1)
    ]
    assert len({tuple(z.tolist()) for z in draws}) == len(draws)
    for seed in (0, 2**63, 2**64 - 1, np.int64(3)):
        assert zokern.MeZO(model, seed=seed).seed == int(seed)


def test_row_41_no_z_is_used_twice() -> None:
    """Steps, queries and names of one run, and runs of neighbouring seeds: all first blocks differ."""
    seen = set()
    for seed, who, step, draw in itertools.product((0, 1, 2), ("a", "b"), range(40), range(4)):
        z = zokern.draw("normal", (8,), seed=seed, who=who, step=step, draw=draw)
        seen.add(hashlib.sha256(z.numpy().tobytes()).digest())
    assert len(seen) == 3 * 2 * 40 * 4
    optimizer, updates = zokern.MeZO(two_layers(), lr=0.0, **told()), []
    for _ in range(5):
        zokern.step(
            optimizer,
            lambda: (updates.append((optimizer.model[0].weight + 0).sum().item()), optimizer.model(X).mean())[
                1
            ],
        )
    assert len(set(updates)) == 10
    optimizer.run.step = 2**32
    with pytest.raises(ValueError, match="32 bits.*another seed"):
        zokern.step(optimizer, lambda: optimizer.model(X).mean())


# Beside the numbered rows: one step at a time ---------------------------------------------------------------


def test_unread_parameters_are_named_with_causes_and_ways_out() -> None:
    model = two_layers()
    with pytest.warns(RuntimeWarning) as caught:
        step_on(model, lambda: model[0](X).square().mean())
    (message,) = [str(w.message) for w in caught]
    words = [
        "2 trained parameters",
        "2.weight",
        "requires_grad_(False)",
        "Experts",
    ]
    assert [word for word in words if word not in message] == []


def test_step_inside_a_step_and_in_a_second_thread() -> None:
    model = two_layers()
    optimizer = zokern.MeZO(model, lr=0.1)
    refuse(
        model,
        lambda: zokern.step(optimizer, lambda: zokern.step(optimizer, lambda: model(X).mean()).loss),
        RuntimeError,
        "step in progress",
    )
    errors: list[BaseException] = []

    def second() -> None:
        try:
            zokern.step(optimizer, lambda: model(X).mean())
        except RuntimeError as error:
            errors.append(error)

    def closure():
        thread = threading.Thread(target=second)
        thread.start()
        thread.join()
        return model(X).mean()

    zokern.step(optimizer, closure)
    assert len(errors) > 2 and all("step in progress" in str(error) for error in errors)


def test_inference_parameter_is_refused() -> None:
    with torch.inference_mode():
        model = nn.Linear(2, 2)
    with pytest.raises(ValueError, match="'weight'.*inference_mode.*clone"):
        zokern.MeZO(model)


def test_fixture_rejects() -> None:
    """refuse() itself fails when a weight moved, when nothing was raised, and when a word is missing."""
    model = two_layers()

    def moves() -> None:
        with torch.no_grad():
            model[0].weight.add_(1.0)
        raise ValueError("word")

    for call, word in ((moves, "word"), (lambda: None, "word"), (lambda: step_on(model, seed=-1), "absent")):
        with pytest.raises((AssertionError, pytest.fail.Exception)):
            refuse(model, call, ValueError, word)


def test_next_token_loss_is_a_loss() -> None:
    """The shared loss reads the model: a frozen answer would make every comparison above pass."""
    model = tiny()
    result = step_on(model, lambda: next_token_loss(model(IDS), IDS))
    assert result.losses[0][0] != result.losses[0][1]
