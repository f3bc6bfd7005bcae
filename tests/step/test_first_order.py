"""Back-propagated terms of a step (Addax, Hybrid): wrong versions, the order of writes, memory, and what a
step leaves behind.

The formulas are in recipes.py, and test_methods.py holds the methods to them over 20 steps."""

from __future__ import annotations

import copy
import io
import sys
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from method_check import check_method
from models import batch, build, changed, next_token_loss, same_bits, snapshot, tiny
from mutant import replaced
from peak import Peak
from torch import Tensor, nn

import zokern
from zokern import first_order
from zokern.directions import Subspace
from zokern.estimator import Gradient, Mixed, Split
from zokern.rule import Sgd

pytestmark = pytest.mark.usefixtures("one_thread")

IDS, OTHERS = batch(), batch(2, 8).flip(0)
SGD = partial(torch.optim.SGD, lr=0.1)


def of_tiny(**options: Any) -> tuple[nn.Module, Callable, Callable]:
    model = tiny(**options)
    return model, lambda: next_token_loss(model(IDS), IDS), lambda: next_token_loss(model(OTHERS), OTHERS)


def gradients(model: nn.Module, closure: Callable) -> dict[str, Tensor]:
    names, params = zip(*model.named_parameters())
    found = torch.autograd.grad(closure(), params, allow_unused=True)
    return {name: torch.zeros_like(p) if g is None else g for name, p, g in zip(names, params, found)}


# Wrong versions ---------------------------------------------------------------------------------------------


def terms(change: Callable[[Any], Any]) -> ExitStack:
    """Estimates with other terms."""
    stack = ExitStack()
    for kind in (Mixed, Split):
        stack.enter_context(replaced(kind, "__call__", lambda right, *rest: map(change, right(*rest))))
    return stack


def weighed(factor: float) -> ExitStack:
    return terms(lambda e: replace(e, gradient=replace(e.gradient, weight=factor * e.gradient.weight)))


def apart(right, self, plan, group, weights, gradient, weight, *rest):
    """Along the draws, and then along the gradient."""
    right(self, plan, group, weights, gradient, 0.0, *rest)
    return right(self, plan, group, [], gradient, weight, *rest)


def moved_first(right, found, plan, gradient, moves, rule, closure, sign):
    """The gradient of other weights, a thousandth away."""

    tensors = [t for group in plan.groups for t in group.theta]
    kept = [t.clone() for t in tensors]

    def late() -> Tensor:
        for t in tensors:
            t.data.mul_(1.001)
        return closure()

    take = rule.descend

    def back(part, group, *rest):
        for t, before in zip(tensors, kept):
            if t.data_ptr() == group.theta[0].data_ptr():
                t.data.copy_(before)
        return take(part, group, *rest)

    return right(found, plan, gradient, moves, SimpleNamespace(descend=back, base=None), late, sign)


def descends(change: Callable) -> Any:
    return replaced(Sgd, "descend", change)


WRONG: dict[str, tuple[str, dict, Callable]] = {
    "up": ("Addax", {}, lambda: weighed(-1.0)),
    "alpha on both": ("Addax", {}, lambda: terms(lambda e: replace(e, gradient=Gradient(0.4)))),
    "no draws": ("Addax", {},
        lambda: descends(
            lambda right, self, plan, group, weights, *rest: right(self, plan, group, [], *rest))),
    "some parameters": ("Addax", {},
        lambda: terms(lambda e: replace(e, gradient=replace(e.gradient, names=("up.weight", "gain"))))),
    "not decayed": ("Addax", {"weight_decay": 0.5},
        lambda: descends(lambda right, *rest: right(*rest[:-1], 1.0))),
    "decayed twice": ("Addax", {"weight_decay": 0.5}, lambda: descends(apart)),
    "at other weights": ("Addax", {}, lambda: replaced(sys.modules["zokern.step"], "descend", moved_first)),
    "half a step of torch's": ("Hybrid", {"optimizer": SGD}, lambda: weighed(0.5)),
    "z of all": ("Hybrid", {},
        lambda: replaced(Split, "parts", lambda right, self, names: (right(self, names)[0], tuple(names)))),
}  # fmt: skip


@pytest.mark.parametrize("wrong", WRONG)
def test_a_wrong_term_is_rejected(wrong: str) -> None:
    name, options, mistake = WRONG[wrong]
    with mistake(), pytest.raises(AssertionError, match="away from the formula|against"):
        check_method(name, evaluation="master", **options)


# The order of things ----------------------------------------------------------------------------------------


def test_both_losses_are_of_one_theta() -> None:
    """Of two closures: the gradient is that of `first_order` at
    the weights before the step, and so are the coefficients."""
    model, zo, fo = of_tiny()
    start, gradient = snapshot(model), gradients(model, fo)
    optimizer = zokern.Addax(model, lr=1e-2, alpha=0.25, seed=1, evaluation="master")
    result = zokern.step(optimizer, zo, first_order=fo)
    assert abs(result.first_order_loss - 4.0) < 0.2 and result.first_order_loss != result.loss
    for name, p in model.named_parameters():
        z = zokern.draw("normal", tuple(p.shape), seed=1, who=name, step=0, draw=0)
        want = start[name] - 1e-2 * (result.coefficients[0] * z + 0.75 * gradient[name])
        assert (p - want).abs().max() <= 1e-6, name
    other = tiny()
    alone = zokern.MeZO(other, lr=1e-2, seed=1, evaluation="master")
    assert (
        result.coefficients[0]
        == 0.25 * zokern.step(alone, lambda: next_token_loss(other(IDS), IDS)).coefficients[0]
    )


@pytest.mark.parametrize("name", ["Addax", "Hybrid"])
def test_maximize_ascends(name: str) -> None:
    """The bits of a run that descends along the negative loss."""
    ends = []
    for sign in (1.0, -1.0):
        model, closure, _ = of_tiny()
        optimizer = getattr(zokern, name)(model, lr=1e-2, seed=3, maximize=sign < 0, evaluation="master")
        for _ in range(3):
            zokern.step(optimizer, lambda sign=sign, closure=closure: sign * closure())
        ends.append(snapshot(model))
    assert all(same_bits(ends[0][n], t) for n, t in ends[1].items())


def test_parameters_that_the_gradient_does_not_reach_move_along_z() -> None:
    model, closure, _ = of_tiny()
    before = snapshot(model)
    optimizer = zokern.Addax(model, lr=1e-2, alpha=0.5, seed=3, evaluation="master")
    result = zokern.step(optimizer, closure, first_order=lambda: model.head.weight.square().sum())
    for name, p in model.named_parameters():
        z = zokern.draw("normal", tuple(p.shape), seed=3, who=name, step=0, draw=0)
        term = 0.5 * 2 * before[name] if name == "head.weight" else 0.0
        assert (p - (before[name] - 1e-2 * (result.coefficients[0] * z + term))).abs().max() <= 1e-6, name


def check_two_objects() -> None:
    """Two parameters of one memory have a gradient each; the memory moves once, along their sum."""
    model, closure, _ = of_tiny()
    model.head.weight = nn.Parameter(model.embed.weight.detach())
    before, gradient = snapshot(model), gradients(model, closure)
    optimizer = zokern.Addax(model, lr=1e-2, alpha=0.0, weight_decay=1.0, evaluation="master")
    zokern.step(optimizer, closure)
    want = 0.99 * before["embed.weight"] - 1e-2 * (gradient["embed.weight"] + gradient["head.weight"])
    assert (model.embed.weight - want).abs().max() <= 1e-6, "the sum of both"
    assert torch.equal(model.head.weight, model.embed.weight)


def test_objects_of_one_memory_move_once() -> None:
    check_two_objects()

    def each(right, self, name, count, tensor):
        return right(self, name, 1, tensor)

    with replaced(first_order._Tape, "_arrive", each), pytest.raises(AssertionError, match="the sum of both"):
        check_two_objects()


@pytest.mark.parametrize("name", ["Addax", "Hybrid"])
@pytest.mark.parametrize("rounding", ["nearest", "stochastic", "residual"])
def test_lr_0_changes_no_bit(name: str, rounding: str) -> None:
    model, closure, _ = of_tiny(dtype=torch.bfloat16)
    with torch.no_grad():
        model.gain[0] = -0.0
    before = snapshot(model)
    options = {"optimizer": partial(torch.optim.SGD, lr=0.0)} if name == "Hybrid" else {"alpha": 0.5}
    optimizer = getattr(zokern, name)(
        model, lr=0.0, weight_decay=0.5, rounding=rounding, eps=1e-2, force=True, **options
    )
    for _ in range(3):
        zokern.step(optimizer, closure)
    assert changed(model, before) == []


def test_one_rounding_of_16_bit_weights() -> None:
    """The float32 sum of all terms is rounded once:
    half an ulp from the formula, and with residual bits 2^-16 of that."""
    for rounding, ulps in (("nearest", 0.5), ("residual", 2.0**-15)):
        model, closure, _ = of_tiny(dtype=torch.bfloat16, width=16)
        before, gradient = snapshot(model), gradients(model, closure)
        optimizer = zokern.Addax(
            model, lr=0.5, alpha=0.5, seed=1, rounding=rounding, eps=1e-2, evaluation="master", force=True
        )
        result = zokern.step(optimizer, closure)
        for name, p in model.named_parameters():
            z = zokern.draw("normal", tuple(p.shape), seed=1, who=name, step=0, draw=0).double()
            want = before[name].double() - 0.5 * (result.coefficients[0] * z + 0.5 * gradient[name].double())
            low = (
                optimizer.state[p]["residual"].int()
                if rounding == "residual"
                else torch.zeros_like(p, dtype=torch.int32)
            )
            got = ((p.detach().view(torch.int16).int() << 16) + low).view(torch.float32).double()
            ulp = 2.0 ** (torch.floor(torch.log2(want.abs().clamp(min=1e-30))) - 7)
            assert ((got - want).abs() <= (ulps + 1e-4) * ulp + 1e-7).all(), name


@pytest.mark.parametrize("direction", ["normal", Subspace(3, 3, reshape="none")], ids=["dense", "subspace"])
def test_weights_with_strides_move_too(direction: Any) -> None:
    """A transposed matrix and convolutions in channels_last: the same values as where they are contiguous."""
    ends = []
    for contiguous in (True, False):
        model = build(lambda: nn.Sequential(nn.Conv2d(2, 4, 3), nn.Flatten(), nn.Linear(64, 5)))
        if not contiguous:
            model[0].weight = nn.Parameter(model[0].weight.detach().to(memory_format=torch.channels_last))
            model[2].weight = nn.Parameter(model[2].weight.detach().t().contiguous().t())
        x = torch.randn(5, 2, 6, 6, generator=torch.Generator().manual_seed(1))
        optimizer = zokern.Addax(model, lr=1e-2, alpha=0.5, direction=direction, evaluation="master")
        for _ in range(2):
            zokern.step(optimizer, lambda model=model, x=x: model(x).square().mean())
        ends.append(snapshot(model))
    assert all(torch.allclose(ends[0][n], t, atol=1e-6) for n, t in ends[1].items())


# Memory -----------------------------------------------------------------------------------------------------


LAYERS, WIDTH, ROWS = 8, 64, 256


def deep(rows: int = ROWS, width: int = WIDTH) -> tuple[nn.Module, Callable]:
    model = build(
        lambda: nn.Sequential(
            *[nn.Sequential(nn.Linear(width, width, bias=False), nn.Tanh()) for _ in range(LAYERS)]
        )
    )
    x = torch.randn(rows, width, generator=torch.Generator().manual_seed(0))
    return model, lambda: model(x).square().mean()


def saved_by(optimizer: Any, closure: Callable) -> int:
    """Bytes that autograd saves in a step, parameters aside."""
    weights = {p.data_ptr() for group in optimizer.param_groups for p in group["params"]}
    sizes: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        if t.data_ptr() not in weights:
            sizes[t.data_ptr()] = t.nbytes
        return t

    def hooked() -> Any:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            return closure()

    zokern.step(optimizer, hooked)
    return sum(sizes.values())


def test_nothing_below_the_split_is_saved() -> None:
    """Hybrid saves the input of its first-order layers and what they make, and nothing of those below, which
    have no gradients."""
    activation = ROWS * WIDTH * 4
    for count in (1, 3):
        model, closure = deep()
        first = [model[i] for i in range(LAYERS - count, LAYERS)]
        optimizer = zokern.Hybrid(
            model, lr=1e-3, first_order=first, optimizer=SGD, evaluation="master", paired_check=None
        )
        found = saved_by(optimizer, closure)
        assert (count + 1) * activation <= found <= (count + 1) * activation + 128, (
            f"{found} B for {count} layers"
        )
        assert all(p.grad is None for p in model.parameters()) and all(
            p.requires_grad for p in model.parameters()
        )


def test_a_graph_of_the_whole_model_is_noticed() -> None:
    """Where every parameter requires a gradient, all layers are saved."""
    model, closure = deep()

    def all_of_it(right, plan, names, take):
        tape = right(plan, names, take)
        tape.others = []
        return tape

    with replaced(first_order, "_Tape", all_of_it):
        optimizer = zokern.Hybrid(
            model, first_order=[model[-1]], optimizer=SGD, evaluation="master", paired_check=None
        )
        assert saved_by(optimizer, closure) > LAYERS * ROWS * WIDTH * 4


class Hoards(Sgd):
    """Keeps gradients until the end, as torch's optimizers do."""

    def __init__(self) -> None:
        self.kept: list[Tensor] = []

    def descend(self, plan, group, weights, gradient, weight, lr, decay):
        self.kept.append(gradient)
        return super().descend(plan, group, weights, gradient, weight, lr, decay)


def gradient_peak(rule: Any) -> float:
    """The peak of a back-propagation and its writes over the
    activations of the forward, in weights of one layer."""
    model, closure = deep(rows=4, width=128)
    optimizer = zokern.Addax(model, lr=1e-3, alpha=0.5, rule=rule, evaluation="master", paired_check=None)
    zokern.step(optimizer, closure)
    peaks = []

    def measured() -> Tensor:
        return closure()

    def counted(right, *rest):
        with Peak() as peak:
            right(*rest)
        peaks.append(peak.most)

    with replaced(sys.modules["zokern.step"], "descend", counted):
        zokern.step(optimizer, measured)
    return peaks[0] / (128 * 128 * 4)


def test_gradients_are_freed_one_by_one() -> None:
    """A gradient, its float32 move, and the next gradient: fewer than three layers of eight. Kept until the
    end they are eight."""
    assert gradient_peak(Sgd()) < 3.5
    assert gradient_peak(Hoards()) > 8.0


# What a step leaves behind ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["Addax", "Hybrid"])
def test_flags_gradients_and_buffers_are_as_before(name: str) -> None:
    model = build(lambda: nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 2)))
    frozen = model[0].bias.requires_grad_(False)
    x, buffers = torch.randn(6, 4), {n: b.clone() for n, b in model.named_buffers()}
    mine = torch.ones_like(model[0].weight)
    model[0].weight.grad = mine
    optimizer = getattr(zokern, name)(model, lr=1e-3)
    state = torch.get_rng_state()
    with pytest.warns(RuntimeWarning, match="running statistics"):
        zokern.step(optimizer, lambda: model(x).square().mean())
    assert all(same_bits(b, buffers[n]) for n, b in model.named_buffers()) and torch.equal(
        state, torch.get_rng_state()
    )
    assert model[0].weight.grad is mine and not frozen.requires_grad
    assert all(
        p.requires_grad and p.grad is None
        for n, p in model.named_parameters()
        if n not in ("0.weight", "0.bias")
    )


@pytest.mark.parametrize("name", ["Addax", "Hybrid"])
def test_an_error_in_the_forward_moves_nothing(name: str) -> None:
    model, closure, _ = of_tiny()
    before = snapshot(model)
    optimizer = getattr(zokern, name)(model, lr=1e-2)

    def fails() -> Tensor:
        closure()
        raise ArithmeticError("in the loss")

    with pytest.raises(ArithmeticError, match="in the loss"):
        zokern.step(optimizer, closure, first_order=fails)
    assert changed(model, before) == [] and optimizer.steps == 0
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


def test_an_error_in_back_propagation_has_used_the_step() -> None:
    """Parameters above it have moved, as the docstring says; Hybrid's have not."""
    for name, moved in (("Addax", ["head.weight", "gain"]), ("Hybrid", [])):
        model, closure, _ = of_tiny()
        before = snapshot(model)
        optimizer = getattr(zokern, name)(
            model, lr=1e-2, **({} if name == "Addax" else {"first_order": "head"})
        )

        def fails(gradient: Tensor) -> None:
            raise ArithmeticError("in backward")

        hook = (model.down if name == "Addax" else model.head).weight.register_hook(fails)
        with pytest.raises(ArithmeticError, match="in backward"):
            zokern.step(optimizer, closure)
        hook.remove()
        assert sorted(changed(model, before)) == sorted(moved) and optimizer.steps == len(moved[:1])
        zokern.step(optimizer, closure)


@pytest.mark.parametrize("name", ["Addax", "Hybrid"])
def test_a_loss_that_is_not_finite_is_skipped(name: str) -> None:
    model, closure, _ = of_tiny()
    before = snapshot(model)
    optimizer = getattr(zokern, name)(model, lr=1e-2)
    result = zokern.step(optimizer, closure, first_order=lambda: closure() * torch.inf)
    assert (
        result.skipped
        and changed(model, before) == []
        and optimizer.guards.skips == 1
        and optimizer.steps == 1
    )
    assert not zokern.step(optimizer, closure).skipped


def test_weights_that_become_nan_are_an_error() -> None:
    model, closure, _ = of_tiny()
    optimizer = zokern.Addax(model, lr=1e-2)
    with pytest.raises(RuntimeError, match="weights are inf or NaN after the update"):
        zokern.step(optimizer, closure, first_order=lambda: (model.gain - model.gain).abs().sqrt().sum())


def test_a_closure_that_writes_weights_is_an_error() -> None:
    model, closure, _ = of_tiny()

    def writes() -> Tensor:
        with torch.no_grad():
            model.gain.mul_(1.0)
        return closure()

    with pytest.raises(RuntimeError, match="the closure changed the weights of 'gain'"):
        zokern.step(zokern.Addax(model, lr=1e-2), closure, first_order=writes)


def test_hybrid_resumes_with_the_state_of_its_optimizer() -> None:
    """To the bit; and to other bits where that state is forgotten."""
    ends = []
    for resumes in ("no", "yes", "forgets"):
        model, closure, _ = of_tiny()
        adamw = partial(torch.optim.AdamW, lr=1e-2)
        make = partial(zokern.Hybrid, lr=1e-2, first_order="head", optimizer=adamw)
        optimizer = make(model)
        for step in range(5):
            if step == 2 and resumes != "no":
                file = io.BytesIO()
                torch.save(optimizer.state_dict(), file)
                file.seek(0)
                state = torch.load(file, weights_only=True)
                if resumes == "forgets":
                    del state["zokern"]["state"]["estimator"]["optimizer"]
                optimizer = make(model)
                optimizer.load_state_dict(state)
            zokern.step(optimizer, closure)
        ends.append(snapshot(model))
    assert all(same_bits(ends[0][n], t) for n, t in ends[1].items())
    assert not all(same_bits(ends[0][n], t) for n, t in ends[2].items())


# Arguments --------------------------------------------------------------------------------------------------


def test_which_parameters_are_first_order() -> None:
    model = tiny()
    both = {"up.weight", "up.bias", "head.weight"}
    chosen = [
        (None, {"head.weight"}), (model.up, {"up.weight", "up.bias"}), ([model.up, model.head], both),
        (["down", "norm.bias"], {"down.weight", "norm.bias"}), ([model.gain], {"gain"}),
        (lambda name: "bias" in name, {"up.bias", "norm.bias"}),
    ]  # fmt: skip
    for given, want in chosen:
        assert zokern.Hybrid(model, first_order=given).estimator.first == want
    layers = [nn.Linear(2, 2, bias=False) for _ in range(3)]
    blocks = nn.ModuleDict({"embed": nn.Embedding(3, 2), "h": nn.ModuleList(layers), "out": nn.Linear(2, 3)})
    assert zokern.Hybrid(blocks).estimator.first == {"h.2.weight", "out.weight", "out.bias"}
    tied = tiny(tied=True)
    assert zokern.Hybrid(tied, first_order=tied.head).estimator.first == {"embed.weight"}


def step_of(make: Callable, loss: Callable = Tensor.sum, **given: Any) -> Callable:
    """A call that takes one step of an optimizer of the model."""
    return lambda m: zokern.step(make(m), lambda: loss(m(IDS)), **given)


NOTHING = ValueError, "the first-order loss has no graph"
BAD: dict[str, tuple[Callable, type, str]] = {
    "none": (lambda m: zokern.Hybrid(m, first_order="nothing"), ValueError,
        "first_order has 'nothing', which no"),
    "all": (lambda m: zokern.Hybrid(m, first_order=m), ValueError, "first_order chooses 8 of 8"),
    "false": (lambda m: zokern.Hybrid(m, first_order=lambda name: False), ValueError,
        "first_order chooses 0 of 8"),
    "alpha": (lambda m: zokern.Addax(m, alpha=1.5), ValueError, "alpha is 1.5; expected 0 <= alpha <= 1"),
    "negative alpha": (lambda m: zokern.Addax(m, alpha=-0.5), ValueError, "alpha is -0.5"),
    "rule": (step_of(lambda m: zokern.Addax(m, rule=zokern.Adam())), TypeError,
        "rule is Adam, which.*zokern.Sgd"),
    "blocks": (step_of(lambda m: zokern.Addax(m, estimator=zokern.Blockwise())), ValueError,
        "inner is Blockwise"),
    "no graph": (step_of(zokern.Addax, lambda y: y.sum().detach()), *NOTHING),
    "number": (step_of(zokern.Addax, lambda y: y.sum().item()), *NOTHING),
    "not used": (step_of(zokern.MeZO, first_order=abs), TypeError,
        "first_order is .*estimator Spsa.*zokern.Addax"),
    "no function": (step_of(zokern.Addax, first_order=3), TypeError, "first_order is 3"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_arguments_are_refused_by_name(case: str) -> None:
    make, kind, words = BAD[case]
    model = tiny()
    before = snapshot(model)
    with pytest.raises(kind, match=words):
        make(model)
    assert changed(model, before) == []


@pytest.mark.parametrize("inner", [zokern.ForwardGradient(), zokern.Blockwise(), zokern.Sign()])
def test_other_estimators_serve_the_rest(inner: Any) -> None:
    """The loss of a fixed batch falls, and the first-order parameters move."""
    model, closure, _ = of_tiny()
    before = snapshot(model)
    optimizer = zokern.Hybrid(
        model, lr=1e-4, first_order=["head"], optimizer=SGD, estimator=copy.deepcopy(inner)
    )
    losses = [zokern.step(optimizer, closure).first_order_loss for _ in range(10)]
    assert losses[-1] < losses[0] - 0.1 and len(changed(model, before)) == 8


@pytest.mark.parametrize("name", ["Addax", "Hybrid"])
def test_it_learns_faster_than_without_gradients(name: str) -> None:
    """At the defaults, in 10 steps of a fixed batch; and with the gradient's sign wrong the loss grows."""

    def fall(make: Callable, steps: int = 10) -> float:
        model, closure, _ = of_tiny(width=16)
        optimizer = make(model)
        start = float(closure())
        for _ in range(steps):
            zokern.step(optimizer, closure)
        return start - float(closure())

    alone, mixed = fall(zokern.MeZO), fall(getattr(zokern, name))
    print(f"{name}: {mixed:.4f} in 10 steps at its defaults, MeZO {alone:.4f}")
    assert mixed > 5 * abs(alone)
    with weighed(-1.0):
        assert fall(getattr(zokern, name)) < 0.0


def test_a_tied_head_is_back_propagated_as_a_whole() -> None:
    """Both uses have a share in its gradient."""
    model, closure, _ = of_tiny(tied=True)
    before, gradient = snapshot(model), gradients(model, closure)
    optimizer = zokern.Hybrid(model, lr=0.0, first_order=[model.head], optimizer=SGD)
    zokern.step(optimizer, closure)
    assert torch.allclose(
        model.embed.weight, before["embed.weight"] - 0.1 * gradient["embed.weight"], atol=1e-7
    )
