"""Uses of a parameter that are rare, each read as real parameters are, or refused by name. What 16-bit copies
must not round is not rounded."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from models import build, same_bits
from readings import check_refusal
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode

import zokern
from zokern.backends import Sides, Span, Thin, Weight, cpu
from zokern.evaluation import copies, standin
from zokern.gemm import library

X = torch.linspace(-1, 1, 4 * 300).view(4, 300)
EPS = 1e-2
BUDGET = 1 << 20


def matrix() -> nn.Parameter:
    """Too large to be copied ahead of the reading, by its size and by the budget."""
    weight = nn.Parameter(torch.linspace(-1, 1, 480 * 300).sin().view(480, 300) * 0.05)
    assert weight.numel() > copies.RESIDENT and weight.nbytes > BUDGET // 2
    return weight


def squared(y: Tensor) -> Tensor:
    return y.square().mean()


def dual(w: Tensor) -> float | Tensor:
    with forward_ad.dual_level():
        y = forward_ad.unpack_dual(squared(F.linear(forward_ad.make_dual(X, X), w)))
        return 0.0 if y.tangent is None else y.tangent


def nested(w: Tensor) -> Tensor:
    return squared(F.linear(torch.nested.nested_tensor([X[:1], X[1:]], layout=torch.jagged), w).values())


def slope(w: Tensor, twice: bool = False) -> Tensor:
    """The loss of a closure that differentiates by its inputs, as a physics-informed one does."""
    with torch.enable_grad():
        x = X.clone().requires_grad_()
        (found,) = torch.autograd.grad(F.linear(x, w).tanh().sum(), x, create_graph=twice)
        if twice:
            (found,) = torch.autograd.grad(found.square().sum(), x)
    return squared(found.detach()) * 1e2


def recorded(w: Tensor) -> Tensor:
    with torch.enable_grad():
        return squared(F.linear(X, w)).detach()


PRODUCTS: dict[str, Callable[[Tensor], float | Tensor]] = {
    "a bias of one number": lambda w: squared(F.linear(X, w, torch.ones(1))),
    "a bias without dimensions": lambda w: squared(F.linear(X, w, torch.tensor(2.0))),
    "a bias for each row": lambda w: squared(F.linear(X, w, torch.ones(4, 480) * X[:, :1])),
    "addmm with a bias of one number": lambda w: squared(
        torch.addmm(torch.ones(1), X @ torch.ones(300, 480), w)
    ),
    "a negative view": lambda w: F.linear(torch._neg_view(X), w).exp().mean(),
    "nested rows": nested,
    "torch.func.grad": lambda w: squared(torch.func.grad(lambda x: squared(F.linear(x, w)))(X)) * 1e3,
    "torch.func.jvp": lambda w: torch.func.jvp(lambda x: squared(F.linear(x, w)), (X,), (X,))[1],
    "torch.vmap": lambda w: torch.vmap(lambda x: squared(F.linear(x, w)))(X).sum(),
    "forward mode": dual,
    "rows one by one": lambda w: sum(row.square().mean() for row in w[:20]),
    "some rows": lambda w: squared(w[3:70]) + squared(w[-1]) + squared(w[torch.tensor([5, 5, 399, -2])]),
    "the gradient by the input": slope,
    "autograd for nothing": recorded,
    "the curvature by the input": lambda w: slope(w, twice=True),
}
# What may be refused: transforms and derivatives inside the closure, beside torch.vmap or at a use
REFUSED = {
    "the gradient by the input",
    "the curvature by the input",
    "torch.func.grad",
    "torch.func.jvp",
    "torch.vmap",
    "forward mode",
    "nested rows",
    "a negative view",
}


def reading(loss: Callable[[Tensor], float | Tensor], evaluation, weight: nn.Parameter) -> tuple[float, ...]:
    optimizer = zokern.MeZO([("w", weight)], lr=0.0, eps=EPS, seed=5, evaluation=evaluation)
    return zokern.step(optimizer, lambda: loss(weight)).losses[0]


def check(loss: Callable[[Tensor], float | Tensor], evaluation) -> None:
    found, expected = reading(loss, evaluation, matrix()), reading(loss, "inplace", matrix())
    assert found == pytest.approx(expected, rel=1e-5) and found[0] != found[1]
    assert found[0] - found[1] == pytest.approx(expected[0] - expected[1], rel=0.05)


WAYS = {
    "master": zokern.Master,
    "paired": lambda: zokern.Paired(BUDGET, check=False),
    "scratch": lambda: zokern.Scratch(BUDGET, check=False),
}
CHECKED = {"paired": zokern.Paired, "scratch": zokern.Scratch}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("use", PRODUCTS)
def test_products(use: str, way: str) -> None:
    try:
        check(PRODUCTS[use], WAYS[way]())
    except Exception as error:
        if isinstance(error, AssertionError) or way == "master" or use not in REFUSED:
            raise
        check_refusal(error)


@pytest.mark.parametrize("use", ["a bias of one number", "some rows", "rows one by one"])
@pytest.mark.parametrize("way", ["paired", "scratch"])
def test_a_use_that_reads_the_weights_as_they_are_is_rejected(use: str, way: str, monkeypatch) -> None:
    """Stand-ins that hand out copies of one side for all, or of theta."""
    right = copies.Copies.stack
    monkeypatch.setattr(standin, "HANDLERS", {})
    monkeypatch.setattr(
        copies.Copies, "stack", lambda self, g, i: self.plan.groups[g].theta[i].expand_as(right(self, g, i))
    )
    with pytest.raises(AssertionError):
        check(PRODUCTS[use], WAYS[way]())
    with pytest.raises(zokern.Refused, match="cannot follow"):
        check(PRODUCTS[use], CHECKED[way](BUDGET))


@pytest.mark.parametrize("size, dtype", [(479, torch.float32), (481, torch.float32), (480, torch.float64)])
def test_what_torch_refuses_stays_refused(size: int, dtype: torch.dtype) -> None:
    with pytest.raises(RuntimeError):
        reading(
            lambda w: squared(F.linear(X, w, torch.ones(size, dtype=dtype))), zokern.Scratch(BUDGET), matrix()
        )


@pytest.mark.skipif(cpu.why_off() is not None, reason="the compiled module is missing")
@pytest.mark.parametrize(
    "what", ["x", "bias", "out", "first", "middle", "last", "strides of out", "dtype of out"]
)
def test_the_kernel_is_handed_no_other_shape(what: str) -> None:
    given = {
        "x": torch.ones(3, 20), "bias": torch.ones(30), "out": torch.ones(3, 30), "first": torch.ones(5, 20),
        "middle": torch.ones(5, 7),
        "last": torch.ones(30, 7),
    }  # fmt: skip
    if what == "strides of out":
        given["out"] = torch.ones(30, 3).t()
    elif what == "dtype of out":
        given["out"] = torch.ones(3, 30).bfloat16()
    else:
        given[what] = given[what][..., :-1].contiguous()
    sides = Sides(
        [given["x"]], [given["bias"]], thins=[Thin([0], given["first"], given["middle"][None], given["last"])]
    )
    with pytest.raises(ValueError, match=r"expected (\[|contiguous)"):
        cpu.Cpu().linear(Weight(torch.ones(30, 20), Span(0)), sides, outs=[given["out"]])


# Small 16-bit weights ---------------------------------------------------------------------------------------

V = torch.linspace(-1, 1, 64).sin()
CONVERTED: dict[str, Callable[[Tensor], Tensor]] = {
    "times float32": lambda w: w * V, "float32 times": lambda w: V * w, "mul": lambda w: V.mul(w),
    "torch.add": lambda w: torch.add(w, V),
    "float": lambda w: w.float(), "to dtype": lambda w: w.to(torch.float32), "to tensor": lambda w: w.to(V),
    "to keyword": lambda w: w.to(dtype=torch.float32),
    "type": lambda w: w.type(torch.float32), "type name": lambda w: w.type("torch.FloatTensor"),
    "type_as": lambda w: w.type_as(V),
    "double": lambda w: w.double(),
}  # fmt: skip


@pytest.mark.parametrize("evaluation", ["scratch", "paired"])
@pytest.mark.parametrize("use", CONVERTED)
def test_small_16_bit_weights_meet_float32_unrounded(use: str, evaluation: str) -> None:
    """eps is below half an ulp of bfloat16: rounded to it, no difference would be left."""
    weight, eps = nn.Parameter(torch.ones(64, dtype=torch.bfloat16)), 2.0**-11
    optimizer = zokern.MeZO(
        [("w", weight)], lr=0.0, eps=eps, seed=5, evaluation=WAYS[evaluation](), paired_check=None
    )
    result = zokern.step(optimizer, lambda: (CONVERTED[use](weight) * V * V.sign()).sum())
    z = zokern.draw("normal", (64,), seed=5, who="w", step=0)
    scale = V if "times" in use or use == "mul" else 1.0
    assert result.coefficients[0] == pytest.approx(float((z * scale * V.abs()).sum()), rel=1e-2)


def test_conversions_keep_their_dtype_and_share_nothing() -> None:
    weight = nn.Parameter(torch.ones(64, dtype=torch.bfloat16))
    seen = []

    def loss() -> Tensor:
        wide = weight.float()
        seen.append(
            (
                wide.dtype,
                weight.to("cpu").dtype,
                (weight * V).dtype,
                (weight * weight).dtype,
                weight.half().dtype,
                weight.type(),
            )
        )
        wide.zero_()
        return (weight * V).sum()

    optimizer = zokern.MeZO([("w", weight)], lr=0.0, eps=EPS, evaluation=WAYS["scratch"](), paired_check=None)
    result = zokern.step(optimizer, loss)
    kinds = (
        torch.float32,
        torch.bfloat16,
        torch.float32,
        torch.bfloat16,
        torch.float16,
        "torch.BFloat16Tensor",
    )
    assert set(seen) == {kinds} and result.losses[0][0] != result.losses[0][1]
    exact = (weight.double() * V.double()).to(torch.float64)
    found = []
    optimizer.result, optimizer.guards.dead = result, 0
    zokern.step(optimizer, lambda: (found.append(weight * V.double()), exact.sum())[1])
    assert {y.dtype for y in found} == {torch.float64} and not same_bits(found[0], found[0].float().double())


def test_a_rounded_copy_is_rejected(monkeypatch) -> None:
    monkeypatch.setattr(standin, "PRODUCTS", set())
    with pytest.raises(AssertionError):
        test_small_16_bit_weights_meet_float32_unrounded("times float32", "scratch")


class Conversions(TorchDispatchMode):
    """Counts conversions to another dtype."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten._to_copy.default
        return func(*args, **(kwargs or {}))


def check_product_of_16_bits(shape: tuple[int, ...], conversions: int, evaluation: str) -> None:
    """A product with a vector is computed in float32 by one operation, and rounded by another."""
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(3)).bfloat16()
    weight, counted = nn.Parameter(torch.ones(shape, dtype=torch.bfloat16)), []

    def loss() -> Tensor:
        with Conversions() as mode:
            y = weight * x
        counted.append(mode.count)
        return y.float().square().sum() + y.float()[0].sum()

    optimizer = zokern.MeZO(
        [("w", weight)], lr=0.0, eps=2.0**-5, seed=5, evaluation=WAYS[evaluation](), paired_check=None
    )
    losses = zokern.step(optimizer, loss).losses[0]
    assert counted[0] == conversions
    z = zokern.draw("normal", shape, seed=5, who="w", step=0)
    for found, sign in zip(losses, (1, -1)):
        y = ((1 + sign * 2.0**-5 * z) * x.float()).bfloat16().float()
        assert found == pytest.approx(float(y.square().sum() + y[0].sum()), rel=1e-6)


@pytest.mark.parametrize("evaluation", ["scratch", "paired"])
@pytest.mark.parametrize("shape, conversions", [((64,), 1), ((), 2)])
def test_a_product_of_16_bits_converts_its_result_alone(
    shape: tuple[int, ...], conversions: int, evaluation: str
) -> None:
    """A number is no vector: torch would round it to the dtype of the other factor."""
    check_product_of_16_bits(shape, conversions, evaluation)


@pytest.mark.parametrize("wrong", [True, False])
def test_products_with_other_conversions_are_rejected(monkeypatch, wrong: bool) -> None:
    monkeypatch.setattr(standin, "_mixes", lambda func, values: wrong)
    with pytest.raises(AssertionError):
        check_product_of_16_bits(() if wrong else (64,), 2 if wrong else 1, "scratch")


NORMED = {
    "both trained": (True, True), "bias frozen": (True, False), "weight frozen": (False, True),
    "no bias": (True, None), "no weight": (None, True),
}  # fmt: skip


@pytest.mark.parametrize("which", NORMED)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_layer_norm_of_16_bits_reads_float32_vectors(dtype: torch.dtype, which: str) -> None:
    """eps is below half an ulp of both vectors; the sum is float32 and rounded once, whoever does it."""
    eps = torch.finfo(dtype).eps / 16
    x = torch.randn(5, 7, 64, generator=torch.Generator().manual_seed(3)).to(dtype)
    trained = dict(zip(("weight", "bias"), NORMED[which]))
    vectors = {
        name: nn.Parameter(torch.full((64,), 1.0 + i, dtype=dtype))
        for i, name in enumerate(trained)
        if trained[name] is not None
    }
    seen: list[Tensor] = []

    def loss() -> Tensor:
        seen.append(F.layer_norm(x, (64,), vectors.get("weight"), vectors.get("bias")))
        return seen[-1].float().square().sum()

    zokern.step(
        zokern.MeZO(
            [(n, p) for n, p in vectors.items() if trained[n]],
            lr=0.0,
            eps=eps,
            seed=5,
            force=True,
            evaluation=WAYS["scratch"](),
            paired_check=None,
        ),
        loss,
    )
    for y, sign in zip(seen[:2], (1, -1)):
        moved = {n: p.detach().float() for n, p in vectors.items()}
        for n in moved:
            if trained[n]:
                moved[n] = moved[n] + sign * eps * zokern.draw("normal", (64,), seed=5, who=n, step=0)
        right = F.layer_norm(x.float(), (64,), moved.get("weight"), moved.get("bias")).to(dtype)
        still = F.layer_norm(
            x.float(), (64,), *(vectors[n].detach().float() if n in vectors else None for n in trained)
        ).to(dtype)
        assert y.dtype == dtype and (y != right).float().mean() < 0.01 < 0.03 < (y != still).float().mean()


def test_rounded_or_mixed_vectors_are_rejected(monkeypatch) -> None:
    with monkeypatch.context() as wrong:
        wrong.setattr(standin, "NORMS", set())
        with pytest.raises(AssertionError):
            test_a_layer_norm_of_16_bits_reads_float32_vectors(torch.bfloat16, "both trained")
    monkeypatch.setattr(standin, "_mixes", lambda func, values: True)
    with pytest.raises(RuntimeError, match="mixed dtype"):
        test_a_layer_norm_of_16_bits_reads_float32_vectors(torch.bfloat16, "bias frozen")


@pytest.mark.skipif(cpu.why_off() is not None, reason="the compiled kernels are off")
def test_a_16_bit_bias_is_added_in_float32(monkeypatch) -> None:
    """x picks a column of -1, which is too coarse for eps;
    what it leaves of the bias, which is 1, is eps z."""
    monkeypatch.setattr(library, "yields", lambda dtype: True)
    eps, weight = 2.0**-11, torch.zeros(900, 300, dtype=torch.bfloat16)
    weight[:, 0] = -1.0
    x, w, b = torch.eye(1, 300).bfloat16(), nn.Parameter(weight), nn.Parameter(torch.ones(900).bfloat16())
    seen: list[Tensor] = []

    def loss() -> Tensor:
        seen.append(F.linear(x, w, b).flatten())
        return seen[-1].float().sum()

    optimizer = zokern.MeZO(
        [("w", w), ("b", b)],
        lr=0.0,
        eps=eps,
        seed=5,
        evaluation=WAYS["scratch"](),
        force=True,
        paired_check=None,
    )
    zokern.step(optimizer, loss)
    z = zokern.draw("normal", (900,), seed=5, who="b", step=0)
    both = [y.float() for y in seen[:2]]
    torch.testing.assert_close(torch.stack(both), eps * torch.stack([z, -z]), rtol=2.0**-8, atol=2.0**-22)


def test_a_bias_rounded_to_16_bits_is_rejected(monkeypatch) -> None:
    right = copies.Copies.stack
    monkeypatch.setattr(copies.Copies, "stack", lambda self, g, i: right(self, g, i).bfloat16().float())
    with pytest.raises(AssertionError):
        test_a_16_bit_bias_is_added_in_float32(monkeypatch)


def test_one_number_of_numpy_is_read() -> None:
    """Memory that leaves torch is that of real parameters, or of a copy, or there is none."""
    weight = nn.Parameter(torch.linspace(-1, 1, 30).view(6, 5))
    loss = lambda w: float((w.detach().numpy() ** 2).sum())  # noqa: E731
    found = [reading(loss, way, weight) for way in ("master", "inplace")]
    assert found[0] == pytest.approx(found[1], rel=1e-6) and found[0][0] != found[0][1]
    assert reading(loss, "scratch", weight) == pytest.approx(found[0], rel=1e-6)
    large = [reading(loss, way, matrix()) for way in (WAYS["scratch"](), "inplace")]
    assert large[0] == pytest.approx(large[1], rel=1e-6) and large[0][0] != large[0][1]
    for way in (zokern.Paired(), zokern.Paired(BUDGET)):
        with pytest.raises(RuntimeError) as caught:
            reading(loss, way, weight if way.arena.budget is None else matrix())
        check_refusal(caught.value)


# The record -------------------------------------------------------------------------------------------------


def test_the_record_counts_copies_that_live_at_once() -> None:
    lstm = build(lambda: nn.LSTM(300, 300, 2))
    optimizer = zokern.MeZO(lstm, lr=0.0, evaluation=zokern.Scratch(budget=1 << 20))
    result = zokern.step(optimizer, lambda: lstm(X)[0].sum())
    whole = sum(p.nbytes for n, p in lstm.named_parameters() if n in result.whole)
    assert len(result.whole) == 4 and whole <= result.scratch_bytes < whole + (1 << 20)


def check_bounds(bad: int) -> None:
    """Copies of looked-up rows: the embedding does not fit the budget."""
    model = nn.Sequential(nn.Embedding(30_000, 64), nn.Linear(64, 2))
    paired = zokern.Paired(budget=1 << 20, check=False)
    optimizer = zokern.MeZO(model, evaluation=paired, paired_check=None)
    before, ids = model[0].weight.detach().clone(), torch.tensor([1, bad])
    with pytest.raises(IndexError, match="'0.weight' has 30000 rows"):
        zokern.step(optimizer, lambda: model(ids).square().mean())
    assert torch.equal(model[0].weight, before)


@pytest.mark.parametrize("bad", [30_000, -1])
def test_an_index_out_of_range_is_refused(bad: int) -> None:
    check_bounds(bad)


def test_an_index_that_is_clamped_is_rejected(monkeypatch) -> None:
    right = copies.Copies.rows

    def clamped(self: Any, g: int, i: int, indices: Sequence[Tensor]) -> Tensor:
        one = indices[0].clamp(0, self.plan.groups[g].theta[i].shape[0] - 1)
        return right(self, g, i, [one for _ in indices])

    monkeypatch.setattr(copies.Copies, "rows", clamped)
    with pytest.raises(pytest.fail.Exception, match="DID NOT RAISE"):
        check_bounds(30_000)
