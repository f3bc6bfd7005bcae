"""Forward mode: slopes against back-propagation,
what a reading leaves behind, what it takes, and what is refused."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any
from unittest.mock import patch

import models
import pytest
import torch
import torch.nn.functional as F
from method_check import check_method
from models import batch, build, changed, next_token_loss, snapshot, tiny
from mutant import replaced
from peak import Peak
from recipes import Formula
from torch import Tensor, nn
from torch.autograd import forward_ad

import zokern
from zokern.directions import Subspace
from zokern.evaluation import jvp, rng

pytestmark = pytest.mark.usefixtures("one_thread")

IDS = batch()
SEED = 11


def of_tiny(**options: Any) -> tuple[nn.Module, Callable]:
    model = tiny(**options)
    return model, lambda: next_token_loss(model(IDS), IDS)


def of_architecture(name: str) -> tuple[nn.Module, Callable]:
    model, inputs = build(models.ARCHITECTURES[name]).eval(), models.inputs(name)
    return model, lambda: model(**inputs).loss


def of_two_objects() -> tuple[nn.Module, Callable]:
    """Two parameters of one memory, which copies of state dicts or old checkpoints make."""
    model, closure = of_tiny()
    model.head.weight = nn.Parameter(model.embed.weight.detach())
    return model, closure


def of_norms() -> tuple[nn.Module, Callable]:
    model = build(
        lambda: nn.Sequential(
            nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Linear(48, 4)
        )
    )
    x = torch.randn(5, 2, 6, 6, generator=torch.Generator().manual_seed(1))
    return model, lambda: F.cross_entropy(model(x), torch.arange(5) % 4)


def of_strides() -> tuple[nn.Module, Callable]:
    """A weight that is stored transposed, and one in channels_last."""
    model = build(lambda: nn.Sequential(nn.Conv2d(2, 4, 3), nn.Flatten(), nn.Linear(64, 5))).to(
        memory_format=torch.channels_last
    )
    model[2].weight = nn.Parameter(model[2].weight.detach().t().contiguous().t())
    x = torch.randn(5, 2, 6, 6, generator=torch.Generator().manual_seed(1))
    return model, lambda: model(x).square().mean()


MODELS: dict[str, Callable[[], tuple[nn.Module, Callable]]] = {
    "tiny": of_tiny, "tied": partial(of_tiny, tied=True), "two objects": of_two_objects,
    "dropout": partial(of_tiny, dropout=0.5),
    "batch norm": of_norms, "strides": of_strides, "lora": models.lora,
    **{name: partial(of_architecture, name) for name in ("llama", "gpt2", "bert", "t5")},
}  # fmt: skip


def gradients(closure: Callable, params: dict[str, Tensor]) -> dict[str, Tensor]:
    """By back-propagation, under the random state of step 0; summed over the objects of one memory."""
    with rng.preserved():
        rng.seed(rng.seed_of(SEED, 0))
        found = dict(zip(params, torch.autograd.grad(closure(), list(params.values()), allow_unused=True)))
    return {name: torch.zeros_like(params[name]) if g is None else g for name, g in found.items()}


def check_slopes(case: str, queries: int = 2, evaluation: Any = "jvp", **options: Any) -> None:
    """c_k is <gradient, z_k>, to rounding of the forward pass; nothing has changed."""
    model, closure = MODELS[case]()
    params = {name: p for name, p in model.named_parameters() if p.requires_grad}
    owners = {
        name: next(n for n, q in params.items() if q.data_ptr() == p.data_ptr()) for name, p in params.items()
    }
    with torch.no_grad():
        before = snapshot(model)
    gradient = gradients(closure, params)
    for name, t in before.items():  # back-propagation has moved running statistics
        dict([*model.named_parameters(), *model.named_buffers()])[name].data.copy_(t)
    optimizer = zokern.FGD(
        model, lr=0.0, queries=queries, seed=SEED, evaluation=evaluation, paired_check=None, **options
    )
    result = zokern.step(optimizer, closure)
    assert changed(model, before) == [] and all(p.grad is None for p in params.values())
    assert result.evaluation == "jvp"
    for k, got in enumerate(result.coefficients):
        z = {
            n: zokern.draw("normal", tuple(p.shape), seed=SEED, who=owners[n], draw=k, step=0).double()
            for n, p in params.items()
        }
        terms = [(gradient[n].double() * z[n]).sum() for n in params]
        size = float(torch.stack([gradient[n].double().norm() for n in params]).norm())
        assert abs(got - float(sum(terms))) <= 2e-5 * size, f"slope {got}, not {float(sum(terms))}"
    losses = [loss for (loss,) in result.losses]
    with torch.no_grad(), rng.preserved():
        rng.seed(rng.seed_of(SEED, 0))
        assert all(abs(loss - float(closure())) <= 1e-5 * abs(loss) or case == "dropout" for loss in losses)


@pytest.mark.parametrize("case", MODELS)
@pytest.mark.filterwarnings("ignore:.*running statistics")
def test_a_slope_is_the_product_with_the_gradient(case: str) -> None:
    check_slopes(case)


class EqualTangents(zokern.Jvp):
    """Reads every query along the first draw."""

    def slopes(self, plan, words, closure):
        return super().slopes(plan, [words[0]] * len(words), closure)


class NextStep(zokern.Jvp):
    """Along z of the step after."""

    def slopes(self, plan, words, closure):
        plan.step += 1
        try:
            return super().slopes(plan, words, closure)
        finally:
            plan.step -= 1


class FirstGroup(zokern.Jvp):
    """Passes over the last parameter."""

    def slopes(self, plan, words, closure):
        return super().slopes(plan.only(tuple(plan.names[:-1])), words, closure)


class Differences(zokern.Jvp):
    """Central differences of a large offset in place of derivatives."""

    def slopes(self, plan, words, closure):
        points = [zokern.evaluation.Point(((word, sign * 0.3),)) for word in words for sign in (1.0, -1.0)]
        losses = self.losses(plan, points, closure).view(-1, 2)
        return losses.mean(1), (losses[:, 0] - losses[:, 1]) / 0.6


class Unseeded(zokern.Jvp):
    """Dropout masks of its own."""

    def slopes(self, plan, words, closure):
        with patch.object(jvp, "loss_tensor", lambda loss: loss.double()):
            return super().slopes(plan, words, lambda: (torch.manual_seed(3), closure())[1])


WRONG_SLOPES = {
    "equal tangents": ("tiny", EqualTangents), "next step": ("tiny", NextStep),
    "a parameter less": ("llama", FirstGroup),
    "differences": ("tiny", Differences), "other masks": ("dropout", Unseeded),
}  # fmt: skip


@pytest.mark.parametrize("wrong", WRONG_SLOPES)
def test_wrong_slopes_are_rejected(wrong: str) -> None:
    case, make = WRONG_SLOPES[wrong]
    with pytest.raises(AssertionError, match="slope"):
        check_slopes(case, evaluation=make())


@pytest.mark.parametrize("mistake", ["one object", "fused attention"])
def test_a_reading_needs_its_contexts(mistake: str) -> None:
    """Both objects of one memory carry the tangent; fused attention is off."""
    if mistake == "one object":
        right = jvp._attached
        seen: set[int] = set()

        def once(parameter, value, tangent):  # of one memory
            known = value.data_ptr() in seen
            seen.add(value.data_ptr())
            return tangent if known else right(parameter, value, tangent)

        with patch.object(jvp, "_attached", once), pytest.raises(AssertionError, match="slope"):
            check_slopes("two objects", queries=1)
        return

    @contextmanager
    def nothing(*_: Any) -> Iterator[None]:
        yield

    with (
        patch.object(jvp, "sdpa_kernel", nothing),
        pytest.raises(zokern.Refused, match="attn_implementation='eager'"),
    ):
        check_slopes("llama")


# 16-bit weights ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("direction", ["normal", Subspace(3, 3)], ids=["dense", "subspace"])
def test_16_bit_tangents_lie_along_the_update(dtype: torch.dtype, direction: Any) -> None:
    """Tangents have the weights' dtype, z of the update has float32: the cosine of the two is above
    0.9999."""
    model, closure = of_tiny(dtype=dtype, width=16)
    optimizer = zokern.FGD(model, lr=1e-3, seed=SEED, direction=direction)
    tangents: dict[str, Tensor] = {}

    def fill(right, plan, group, word, outs):
        right(plan, group, word, outs)
        tangents.update({name: out.clone() for name, out in zip(group.names, outs)})

    with replaced(jvp, "_fill", fill):
        zokern.step(optimizer, closure)
    formula = Formula.of(optimizer, model)
    for name, tangent in tangents.items():
        assert tangent.dtype == dtype
        cosine = F.cosine_similarity(tangent.double().flatten(), formula.z(name, 0, 0).flatten(), 0)
        assert cosine > 0.9999, f"{name}: {float(cosine)}"
        with pytest.raises(AssertionError):
            wrong = formula.z(name, 1, 0).flatten()
            assert F.cosine_similarity(tangent.double().flatten(), wrong, 0) > 0.9999


# What a reading leaves behind -------------------------------------------------------------------------------


class Keeps(nn.Module):
    """Writes a buffer, an attribute and random streams, and keeps an activation."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)
        self.register_buffer("mean", torch.zeros(4))
        self.seen, self.fails = None, False

    def forward(self, x: Tensor) -> Tensor:
        y = self.inner(x) * torch.rand(4)
        self.mean.mul_(0.9).add_(y.mean(0))
        self.seen = y
        if self.fails:
            raise ArithmeticError("in the loss")
        return y.square().mean()


@pytest.mark.parametrize("fails", [False, True])
def test_a_reading_leaves_nothing_behind(fails: bool) -> None:
    model = build(Keeps)
    model.fails = fails
    x, before, state = torch.ones(3, 4), snapshot(model), torch.get_rng_state()
    optimizer = zokern.FGD(model, lr=0.0, queries=2)
    if fails:
        with pytest.raises(ArithmeticError, match="in the loss"):
            zokern.step(optimizer, lambda: model(x))
        assert optimizer.steps == 0
    else:
        zokern.step(optimizer, lambda: model(x))
    assert changed(model, before) == [] and model.seen is None and torch.equal(torch.get_rng_state(), state)
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    with forward_ad.dual_level():
        assert all(forward_ad.unpack_dual(t).tangent is None for t in [*model.parameters(), *model.buffers()])
    assert torch.backends.cuda.flash_sdp_enabled()


def test_a_closure_that_writes_weights_is_an_error() -> None:
    model, closure = of_tiny()
    before = snapshot(model)

    def writes() -> Tensor:
        model.gain.mul_(2.0)
        return closure()

    with pytest.raises(RuntimeError, match="the closure changed the weights of 'gain'"):
        zokern.step(zokern.FGD(model), writes)
    assert changed(model, before) == ["gain"]


@pytest.mark.parametrize("rounding", ["nearest", "residual"])
def test_lr_0_changes_no_bit(rounding: str) -> None:
    model, closure = of_tiny(dtype=torch.bfloat16)
    before = snapshot(model)
    optimizer = zokern.FGD(model, lr=0.0, weight_decay=0.5, rounding=rounding, queries=2)
    for _ in range(3):
        zokern.step(optimizer, closure)
    assert changed(model, before) == []


def test_deferred_updates_are_in_what_a_slope_is_read_of() -> None:
    """After a check by 'paired' the updates of a low-rank direction are deferred;
    slopes are those of theta all the same."""
    check_method("FGD", steps=7, direction=Subspace(3, 50), paired_check=2)


def test_equal_losses_are_not_dead_and_slopes_of_0_are() -> None:
    """A query has one loss, so the losses of a step say nothing."""
    model = nn.Linear(3, 1)
    x = torch.ones(2, 3)
    optimizer = zokern.FGD(model, lr=0.0, dead_limit=3)
    for _ in range(5):
        zokern.step(optimizer, lambda: model(x).sum())
    flat = zokern.FGD(model, lr=0.0, dead_limit=3)
    with (
        pytest.raises(RuntimeError, match="equal 3 steps in a row"),
        pytest.warns(RuntimeWarning, match="equal 3 steps"),
    ):
        for _ in range(5):
            zokern.step(flat, lambda: (model(x) * 0.0).sum())


def test_the_fall_that_is_predicted_happens() -> None:
    model, closure = of_tiny()
    optimizer = zokern.FGD(model, lr=1e-4, queries=4, seed=2)
    result = zokern.step(optimizer, closure)
    fell = result.loss - float(closure())
    assert (
        result.predicted_fall > 0.0 and abs(fell - result.predicted_fall) < 0.1 * result.predicted_fall + 2e-6
    )


def test_it_learns() -> None:
    """A fixed batch, by more than 0.04 in 25 steps; with the sign of the slopes wrong the loss grows."""

    def fall(steps: int) -> float:
        model, closure = of_architecture("gpt2")
        optimizer = zokern.FGD(model, lr=1e-3)
        losses = [zokern.step(optimizer, closure).loss for _ in range(steps)]
        return losses[0] - sum(losses[-5:]) / 5

    assert fall(25) > 0.04
    with replaced(
        zokern.Jvp, "slopes", lambda right, *rest: (lambda losses, slopes: (losses, -slopes))(*right(*rest))
    ):
        assert fall(12) < 0.0


# What it cannot read ----------------------------------------------------------------------------------------


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    def backward(ctx, g):
        return 2 * g


@torch.library.custom_op("zokern_tests::doubled", mutates_args=())
def doubled(x: Tensor) -> Tensor:
    return 2 * x


LINEAR = nn.Linear(4, 4)
X = torch.ones(2, 3, 4)
REFUSED: dict[str, tuple[nn.Module, Callable, str]] = {
    "lstm": (LSTM := nn.LSTM(4, 4), lambda: LSTM(X)[0].sum(), "mkldnn_rnn_layer|rnn"),
    "function": (LINEAR, lambda: Doubled.apply(LINEAR(X)).sum(), "jvp function for custom autograd.Function"),
    "operator": (LINEAR, lambda: doubled(LINEAR(X)).sum(),
        "operator zokern_tests.doubled.default drops the derivative"),
    "number": (LINEAR, lambda: LINEAR(X).sum().item(), "no derivative by a trained parameter"),
    "count": (LINEAR, lambda: (LINEAR(X) > 0).sum(), "no derivative by a trained parameter"),
    "detached": (LINEAR, lambda: LINEAR(X).detach().sum(), "no derivative by a trained parameter"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_has_no_forward_mode_is_refused_by_name(case: str) -> None:
    model, closure, words = REFUSED[case]
    before = snapshot(model)
    with pytest.raises(zokern.Refused, match=words) as caught:
        zokern.step(zokern.FGD(model), closure)
    assert "zokern.MeZO" in str(caught.value) and "evaluation='master'" in str(caught.value)
    assert changed(model, before) == []


def test_an_operator_that_drops_tangents_is_silent_without_the_watch() -> None:
    """What the watch is for: a part of the loss would be left out of the derivative."""

    @contextmanager
    def nothing() -> Iterator[None]:
        yield

    closure = lambda: (LINEAR(X).square() + doubled(LINEAR(X))).sum()  # noqa: E731
    with patch.object(jvp, "_Watch", nothing):
        zokern.step(zokern.FGD(LINEAR, lr=0.0), closure)
    with pytest.raises(zokern.Refused, match="doubled"):
        zokern.step(zokern.FGD(LINEAR, lr=0.0), closure)


def test_evaluations_of_losses_read_no_slopes() -> None:
    for evaluation in ("master", "paired", "scratch", "inplace"):
        said = f"evaluation is '{evaluation}', which reads losses alone.*ForwardGradient.*evaluation='jvp'"
        with pytest.raises(ValueError, match=said):
            zokern.step(zokern.FGD(LINEAR, evaluation=evaluation), lambda: LINEAR(X).sum())


def test_eps_plays_no_part() -> None:
    """Neither in a slope, nor where rounding to 16 bits would swallow a perturbation of its size."""
    model, closure = of_tiny(dtype=torch.bfloat16, width=16)
    found = []
    for eps in (1e-9, 1.0):
        optimizer = zokern.FGD(copy.deepcopy(model), lr=0.0, eps=eps, seed=1)
        found.append(
            zokern.step(optimizer, lambda m=optimizer.model: next_token_loss(m(IDS), IDS)).coefficients
        )
    assert found[0] == found[1]
    with pytest.raises(ValueError, match="eps = 1e-09 is below half an ulp"):
        zokern.step(zokern.MeZO(model, lr=0.0, eps=1e-9), closure)


def test_lr_is_tuned_by_slopes() -> None:
    """zokern.tune asks the estimator itself;
    the step at its lr takes about the share of the loss that was asked for."""
    model, closure = of_tiny()
    optimizer = zokern.FGD(model, queries=4, seed=1)
    tuned = zokern.tune(optimizer, closure, share=0.02)
    assert 0.0 < tuned.lr < 1.0 and tuned.eps == 1e-3
    tuned.apply(optimizer)
    result = zokern.step(optimizer, closure)
    assert 0.0 < result.predicted_fall < 0.1 * result.loss


def test_jvp_reads_losses_as_master_does() -> None:
    ends = []
    for evaluation in ("master", "jvp"):
        model, closure = of_tiny()
        optimizer = zokern.MeZO(model, lr=1e-2, seed=3, evaluation=evaluation)
        ends.append(([zokern.step(optimizer, closure).losses for _ in range(3)], snapshot(model)))
    assert ends[0][0] == ends[1][0] and all(torch.equal(ends[0][1][n], t) for n, t in ends[1][1].items())


@pytest.mark.parametrize(
    ("options", "words"), [({"queries": 0}, "queries is 0"), ({"clip": -1.0}, "clip is -1.0")]
)
def test_bad_arguments_are_refused_by_name(options: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        zokern.FGD(LINEAR, **options)


def test_a_slope_is_clipped() -> None:
    model, closure = of_tiny()
    free, bound = (
        zokern.FGD(copy.deepcopy(model), lr=0.0, seed=1, queries=4, clip=clip) for clip in (None, 0.1)
    )
    found = [
        zokern.step(o, lambda m=o.model: next_token_loss(m(IDS), IDS)).coefficients for o in (free, bound)
    ]
    assert found[1] == tuple(min(0.1, max(-0.1, c)) for c in found[0]) and max(map(abs, found[0])) > 0.1


# Memory -----------------------------------------------------------------------------------------------------


def deep(layers: int = 6, width: int = 64, rows: int = 512) -> tuple[nn.Module, Callable]:
    """Activations of a layer are eight times its weights."""
    model = build(
        lambda: nn.Sequential(
            *[nn.Sequential(nn.Linear(width, width, bias=False), nn.Tanh()) for _ in range(layers)]
        )
    )
    x = torch.randn(rows, width, generator=torch.Generator().manual_seed(0))
    return model, lambda: model(x).square().mean()


class Hoards(zokern.Jvp):
    """Reads with a graph, as back-propagation would."""

    def slopes(self, plan, words, closure):
        kept = []

        def recorded() -> Tensor:
            with torch.enable_grad():
                loss = closure()
            kept.append(loss)
            return loss.detach() if forward_ad.unpack_dual(loss).tangent is None else Detached.apply(loss)

        return super().slopes(plan, words, recorded)


class Detached(torch.autograd.Function):
    """A loss without its graph, with its tangent."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def jvp(ctx, t):
        return t.clone()


class Twice(zokern.Jvp):
    """Holds the tangents of both queries at once."""

    def slopes(self, plan, words, closure):
        kept = [torch.empty_like(t) for t in plan.tensors]  # noqa: F841
        return super().slopes(plan, words, closure)


def check_memory(evaluation: Any) -> None:
    """A step of two queries: z of all weights once, and three activations:
    a product's tangent is the sum of two products."""
    model, closure = deep()
    optimizer = zokern.FGD(model, lr=0.0, queries=2, evaluation=evaluation, paired_check=None)
    zokern.step(optimizer, closure)
    with torch.no_grad(), Peak() as bare:
        closure()
    with Peak() as step:
        result = zokern.step(optimizer, closure)
    weights = sum(p.nbytes for p in model.parameters())
    activation, extra = 512 * 64 * 4, step.most - bare.most
    print(f"extra peak of a step: {extra} B; weights {weights} B, an activation {activation} B")
    assert result.scratch_bytes == weights
    assert extra <= weights + 3 * activation + 4096, f"{extra} B is more than tangents"


def test_the_memory_of_a_step_is_its_tangents() -> None:
    check_memory("jvp")


@pytest.mark.parametrize("wrong", [Hoards, Twice])
def test_more_memory_is_noticed(wrong: type) -> None:
    with pytest.raises(AssertionError, match="is more than tangents"):
        check_memory(wrong())
