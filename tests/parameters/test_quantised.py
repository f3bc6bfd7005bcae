"""Frozen quantised weights under trained adapters: every evaluation reads what a hand-written loop over plain
tensors reads, the adapters learn, and the frozen bytes stay."""

from __future__ import annotations

import copy
from collections.abc import Callable
from unittest.mock import patch

import pytest
import torch
from quantised import (
    KINDS,
    WIDTH,
    Answering,
    Drifting,
    Repacked,
    Wrapped,
    bits,
    by_hand,
    model_of,
    plain,
    quantise,
)
from torch import Tensor, nn

import zokern
from zokern.evaluation import Isolation
from zokern.evaluation import isolation as isolation_module

EVALUATIONS = ("auto", "paired", "master", "scratch", "inplace")
SEED, EPS, LR, STEPS = 3, 1e-2, 0.1, 12
X, Y = torch.randn(2, 8, WIDTH, generator=torch.Generator().manual_seed(5)).unbind(0)


def loss_of(model: Callable[[Tensor], Tensor]) -> Tensor:
    return (model(X) - Y).square().mean()


def check_as_by_hand(
    make: Callable[[Tensor], nn.Module],
    evaluation: str,
    warm: bool = False,
    between: Callable[[nn.Module, int], None] = lambda model, step: None,
    lr: float = LR,
) -> None:
    """Losses, adapters and frozen bytes of a run against those of a loop over plain tensors."""
    model, right = model_of(make), model_of(plain)
    if warm:
        loss_of(model)
    value = right[0].base(torch.eye(WIDTH))
    optimizer = zokern.MeZO(model, lr=lr, eps=EPS, seed=SEED, evaluation=evaluation)
    names = optimizer.param_groups[0]["param_names"]
    assert names == [f"{i}.{name}.weight" for i in (0, 2) for name in ("down", "up")]
    before: list[Tensor] = []
    with torch.no_grad():
        start = float(loss_of(right))
    for step in range(STEPS):
        between(model, step)
        result = zokern.step(optimizer, lambda: loss_of(model))
        expected = by_hand(right, loss_of, step, LR, EPS, SEED)
        assert result.losses[0] == pytest.approx(expected, rel=2e-5), f"step {step} reads another loss"
        slope = (expected[0] - expected[1]) / (2 * EPS)
        assert result.coefficients[0] == pytest.approx(slope, rel=1e-3, abs=1e-3)
        before = before or bits(model)
    assert all(map(torch.equal, before, bits(model))), "a frozen byte has changed"
    assert not any(copied.dtype == torch.int8 and type(copied) is not Tensor for copied in kept(optimizer))
    with torch.no_grad():
        assert float(loss_of(model)) < 0.97 * start, "the adapters learned nothing"
        assert float(loss_of(model)) == pytest.approx(float(loss_of(right)), rel=1e-4)
        assert torch.allclose(model[0].base(torch.eye(WIDTH)), value)
    for p, q in zip(*[[p for p in m.parameters() if p.requires_grad] for m in (model, right)]):
        assert torch.allclose(p, q, atol=1e-4)


def kept(optimizer) -> list[Tensor]:
    """The tensors of which a step keeps copies to put them back."""
    return [tensor for tensor, _, _ in optimizer.work.tree.copies.values()]


@pytest.mark.parametrize("evaluation", EVALUATIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_step_reads_what_a_loop_by_hand_reads(kind: str, evaluation: str) -> None:
    """The first forward of the model is inside the step."""
    check_as_by_hand(KINDS[kind], evaluation)


@pytest.mark.parametrize("evaluation", EVALUATIONS)
def test_weights_that_a_checkpoint_unpacks_are_packed_again(evaluation: str) -> None:
    def unpack(model: nn.Module, step: int) -> None:
        if step in (3, 6):
            for layer in (model[0].base, model[2].base):
                layer.flip(False)

    check_as_by_hand(Repacked, evaluation, warm=True, between=unpack)


def test_parameters_without_their_module() -> None:
    """The first forward shows the modules, and packs their weights."""
    for kind in ("moved", "repacked"):
        losses = []
        for make in (KINDS[kind], plain):
            model = model_of(make)
            named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
            optimizer = zokern.MeZO(named, lr=LR, eps=EPS, seed=SEED)
            losses += [[zokern.step(optimizer, lambda model=model: loss_of(model)).loss for _ in range(4)]]
        assert losses[0] == pytest.approx(losses[1], rel=2e-5)


@pytest.mark.parametrize("evaluation", EVALUATIONS)
def test_a_base_that_every_forward_writes_to_is_refused(evaluation: str) -> None:
    optimizer = zokern.MeZO(model_of(Drifting), lr=LR, evaluation=evaluation)
    with pytest.raises(RuntimeError, match="changes frozen weights in every forward"):
        zokern.step(optimizer, lambda: loss_of(optimizer.model))


def test_a_copy_of_a_model_is_a_model() -> None:
    for kind, make in KINDS.items():
        model = model_of(make)
        loss = float(loss_of(model).detach())
        twin = copy.deepcopy(model)
        optimizer = zokern.MeZO(twin, lr=LR, eps=EPS, seed=SEED)
        for _ in range(3):
            zokern.step(optimizer, lambda twin=twin: loss_of(twin))
        assert float(loss_of(model).detach()) == loss != float(loss_of(twin).detach()), kind


# What must not pass -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("evaluation", EVALUATIONS)
@pytest.mark.parametrize("kind", ["moved", "repacked"])
def test_check_rejects_half_of_a_packing_put_back(kind: str, evaluation: str) -> None:
    """An isolation that puts back what a module says of its weight, and not the weight."""
    with patch.object(Isolation, "_settle", lambda self: False):
        with pytest.raises((AssertionError, RuntimeError)):
            check_as_by_hand(KINDS[kind], evaluation)
        if kind == "repacked":
            with pytest.raises(AssertionError, match="reads another loss"):
                test_weights_that_a_checkpoint_unpacks_are_packed_again(evaluation)


def test_check_rejects_an_isolation_that_looks_past_wrappers() -> None:
    with patch.object(isolation_module, "inside_of", lambda tensor: []):
        with pytest.raises(
            (AssertionError, pytest.fail.Exception), match="DID NOT RAISE|Regex pattern did not"
        ):
            test_a_base_that_every_forward_writes_to_is_refused("scratch")


def test_check_rejects_a_frozen_byte_that_changed() -> None:
    def flip(model: nn.Module, step: int) -> None:
        if step == STEPS - 1:
            model[2].base.weight.numbers[-1, -1] ^= 1

    with pytest.raises(AssertionError, match="another loss|frozen byte"):
        check_as_by_hand(KINDS["wrapped"], "master", between=flip)


def test_check_rejects_another_base_and_a_step_of_nothing() -> None:
    def half(weight: Tensor) -> nn.Module:
        layer = KINDS["wrapped"](weight)
        layer.weight.scale.mul_(0.5)
        return layer

    with pytest.raises(AssertionError, match="reads another loss"):
        check_as_by_hand(half, "master")
    with pytest.raises(AssertionError, match="reads another loss"):
        check_as_by_hand(KINDS["wrapped"], "master", lr=0.0)


# Refusals ---------------------------------------------------------------------------------------------------

ADAPTERS = "quantised weights stay frozen, and adapters beside them are trained: peft.get_peft_model"


class State4bit(nn.Parameter):
    """As bitsandbytes packs 4 bits into a floating-point dtype (bnb_4bit_quant_storage)."""

    quant_state = object()


@pytest.mark.parametrize("weight, error, words", [
    (lambda: nn.Parameter(Wrapped(*quantise(X))), TypeError, "Wrapped, a wrapper.*" + ADAPTERS),
    (lambda: State4bit(torch.zeros(4).bfloat16()), TypeError, "'w' is State4bit, packed.*" + ADAPTERS),
    (lambda: quantise(X)[0], ValueError, "'w' is int8.*leave it out; " + ADAPTERS),
    (lambda: torch.zeros(4, dtype=torch.uint8), ValueError, "'w' is uint8.*" + ADAPTERS),
    (lambda: torch.zeros(4).to(torch.float8_e4m3fn), ValueError, "'w' is float8_e4m3fn.*" + ADAPTERS),
])  # fmt: skip
def test_a_quantised_weight_is_not_trained_itself(weight: Callable, error: type, words: str) -> None:
    with pytest.raises(error, match=words):
        zokern.MeZO([("w", weight()), ("v", nn.Parameter(torch.ones(3)))])


def test_a_base_without_adapters_is_refused() -> None:
    for kind in KINDS:
        model = model_of(KINDS[kind]).requires_grad_(False)
        with pytest.raises(ValueError, match="no trainable parameter.*add adapters to a frozen base"):
            zokern.MeZO(model)


def test_a_thawed_wrapper_is_named() -> None:
    model = model_of(KINDS["wrapped"])
    model[2].base.weight.requires_grad_(True)
    with pytest.raises(TypeError, match="'2.base.weight' is Wrapped.*" + ADAPTERS):
        zokern.MeZO(model)
    assert type(model_of(KINDS["answering"])[0].base.weight) is Answering


def test_a_base_that_was_made_in_inference_mode() -> None:
    """Its tensors have no version counter."""
    with torch.inference_mode():
        base = plain(X[:, :WIDTH].repeat(2, 1)).requires_grad_(False)
    model = nn.Sequential(base, nn.Linear(WIDTH, WIDTH))
    for evaluation in EVALUATIONS:
        optimizer = zokern.MeZO(model, lr=LR, evaluation=evaluation)
        results = [zokern.step(optimizer, lambda: loss_of(model)) for _ in range(2)]
        assert not any(result.skipped for result in results)
