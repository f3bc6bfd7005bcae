"""What an optimizer is given, and what changes under it between steps: seen again at every step, refused by
name, or followed."""

from __future__ import annotations

import copy
import pickle
from collections import defaultdict
from collections.abc import Callable
from unittest.mock import patch

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from models import build, refuse, same_bits
from torch import Tensor, nn

import zokern
from zokern.fingerprint import Held
from zokern.optimizer import work
from zokern.optimizer.low_bits import LowBits

X = torch.linspace(-1, 1, 18).view(3, 6)


def layers(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    return build(lambda: nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 6)), dtype)


def loss_of(model: nn.Module) -> Callable[[], Tensor]:
    return lambda: model(X.to(next(model.parameters()).dtype)).float().square().mean()


# Parameters that change between steps -----------------------------------------------------------------------


def larger(p: nn.Parameter) -> None:
    p.data = torch.ones(50, 6, dtype=p.dtype)


@pytest.mark.parametrize(
    "options", [{}, {"rule": zokern.Momentum()}, {"rule": zokern.Adam()}], ids=["sgd", "momentum", "adam"]
)
def test_data_whose_rows_are_one(options: dict) -> None:
    model = layers()
    optimizer = zokern.MeZO(model, lr=0.1, **options)
    zokern.step(optimizer, loss_of(model))
    model[0].weight.data = torch.ones(1, 6).expand(5, 6)
    refuse(
        model,
        lambda: zokern.step(optimizer, loss_of(model)),
        ValueError,
        "'0.weight'",
        "overlapping elements",
    )


def test_residuals_do_not_outlive_their_shape() -> None:
    model = layers(torch.bfloat16)
    optimizer = zokern.MeZO(model, lr=1e-3, rounding="residual", eps=1e-2)
    zokern.step(optimizer, loss_of(model))
    larger(model[0].weight)
    refuse(model, lambda: zokern.step(optimizer, loss_of(model)), ValueError, "'0.weight'", "[50, 6]")


def test_a_dtype_that_cannot_be_trained_any_more() -> None:
    model = layers()
    optimizer = zokern.MeZO(model, lr=0.1)
    zokern.step(optimizer, loss_of(model))
    model.double()
    refuse(model, lambda: zokern.step(optimizer, loss_of(model)), ValueError, "'0.weight'", "float64")
    model.to(torch.bfloat16)
    assert not zokern.step(optimizer, loss_of(model)).skipped


def test_data_that_overlaps_another_parameter() -> None:
    model = layers()
    optimizer = zokern.MeZO(model, lr=0.1)
    zokern.step(optimizer, loss_of(model))
    model[0].bias.data = model[0].weight.data.view(-1)[:5]
    refuse(
        model, lambda: zokern.step(optimizer, loss_of(model)), ValueError, "'0.weight'", "'0.bias'", "overlap"
    )


@pytest.mark.parametrize("evaluation", ["master", "paired", "scratch", "inplace"])
def test_data_that_the_closure_swaps(evaluation: str) -> None:
    """Kernels that restore or update would reach beyond smaller data, so the parameter gets its own back."""
    model = layers()
    before = model[0].bias.detach().clone()

    def closure() -> float:
        model[0].bias.data = torch.ones(2)
        return 1.0

    with pytest.raises(RuntimeError, match="closure.*'0.bias'"):
        zokern.step(zokern.MeZO(model, lr=0.1, evaluation=evaluation), closure)
    assert evaluation == "inplace" or same_bits(model[0].bias, before)


def test_a_check_that_is_made_once_is_rejected() -> None:
    blind = lambda held, tensors: [t.dtype for t in tensors] == held.dtypes  # noqa: E731
    with patch.object(Held, "by", blind), pytest.raises((pytest.fail.Exception, RuntimeError)):
        test_data_whose_rows_are_one({})


def test_param_groups_that_were_edited_by_hand() -> None:
    model = layers()
    optimizer = zokern.MeZO(model, lr=0.1)
    zokern.step(optimizer, loss_of(model))
    optimizer.param_groups[0]["params"].pop()
    refuse(
        model, lambda: zokern.step(optimizer, loss_of(model)), RuntimeError, "param_groups", "add_param_group"
    )


@pytest.mark.parametrize(
    "look",
    [lambda o: None, lambda o: o.state_dict(), lambda o: o.flush()],
    ids=["step", "state_dict", "flush"],
)
@pytest.mark.parametrize("edit", [lambda p: p.zero_(), lambda p: p.clamp_(-0.1, 0.1)], ids=["zero", "clamp"])
def test_low_bits_belong_to_the_weights_that_were_updated(edit: Callable, look: Callable) -> None:
    """Weights that somebody wrote are exact as they are:
    the residuals of the old ones are not added to them."""
    model = layers(torch.bfloat16)
    optimizer = zokern.MeZO(model, lr=1e-2, eps=1e-2, rounding="residual")
    for _ in range(3):
        zokern.step(optimizer, loss_of(model))
    weight = model[0].weight
    assert int(optimizer.state[weight]["residual"].count_nonzero()) > 10
    other = model[2].weight
    low = optimizer.state[other]["residual"].clone()
    with torch.no_grad():
        edit(weight)
    look(optimizer)
    optimizer.param_groups[0]["lr"] = 0.0
    zokern.step(optimizer, loss_of(model))
    assert int(optimizer.state[weight]["residual"].count_nonzero()) == 0 and same_bits(
        optimizer.state[other]["residual"], low
    )


def check_devices(low_bits: Callable) -> None:
    """Low bits of a list lie beside its weights, where there are none too: a launch has one device."""
    mixed = [torch.empty(4, dtype=dtype, device="meta") for dtype in (torch.bfloat16, torch.float32)]
    low = low_bits(True, defaultdict(dict)).of(mixed)
    assert [bits.device.type for bits in low] == ["meta", "meta"] and [b.numel() for b in low] == [4, 0]


def test_low_bits_lie_where_the_weights_do() -> None:
    check_devices(LowBits)

    class OnTheHost(LowBits):
        def _of(self, tensor: Tensor) -> Tensor:
            found = super()._of(tensor)
            return found if tensor.dtype == torch.bfloat16 else torch.empty(0, dtype=torch.int16)

    with pytest.raises(AssertionError):
        check_devices(OnTheHost)


# Views and ties ---------------------------------------------------------------------------------------------


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.linspace(-1, 1, 36).sin().view(6, 6))
        self.b = nn.Parameter(self.a.data)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(F.linear(x, self.a), self.b)


def losses(model: nn.Module, evaluation: object, given: Callable = lambda m: m) -> tuple[float, ...]:
    optimizer = zokern.MeZO(given(model), lr=0.0, eps=1e-2, evaluation=evaluation)
    return [zokern.step(optimizer, loss_of(model)) for _ in range(2)][1].losses[0]


@pytest.mark.parametrize("evaluation", ["auto", "master", "paired", "scratch"])
@pytest.mark.parametrize("given", [
    lambda m: m, lambda m: m.named_parameters(), lambda m: [{"params": list(m.named_parameters())}],
], ids=["module", "named", "groups"])  # fmt: skip
def test_both_names_of_tied_elements_are_perturbed(given: Callable, evaluation: str) -> None:
    found, right = losses(Tied(), evaluation, given), losses(Tied(), "inplace", given)
    assert found == pytest.approx(right, rel=1e-6) and found[0] != found[1]


class Views(nn.Module):
    """The decoder is the encoder's transpose, made once;
    or a buffer, or a frozen parameter, on some of its rows."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.e = nn.Parameter(torch.linspace(-1, 1, 36).sin().view(6, 6))
        if kind == "attribute":
            self.d = self.e.t()
        elif kind == "detached":
            self.d = self.e.data.t()
        elif kind == "buffer":
            self.register_buffer("d", self.e.data[:3], persistent=False)
        elif kind == "same":
            self.register_buffer("d", self.e.data, persistent=False)
        else:
            self.d = nn.Parameter(self.e.data[:3], requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(F.linear(x, self.e), self.d)


KINDS: dict[str, tuple[Callable, Callable]] = {
    **{
        kind: (lambda kind=kind: Views(kind), lambda m: m)
        for kind in ("attribute", "detached", "buffer", "same", "frozen")
    },
    "one name of a tie": (Tied, lambda m: [("a", m.a)]),
}


@pytest.mark.filterwarnings("ignore:this closure is read by evaluation 'master'")
@pytest.mark.parametrize("kind", KINDS)
def test_views_made_before_the_step(kind: str) -> None:
    """Real parameters show in them. Stand-ins do not, and the comparison of the first step says so."""
    make, given = KINDS[kind]
    right = losses(make(), "inplace", given)
    for evaluation in ("master", "auto"):
        assert losses(make(), evaluation, given) == pytest.approx(right, rel=1e-6) and right[0] != right[1]
    for evaluation in ("scratch", "paired"):
        model = make()
        refuse(
            model,
            lambda m=model, e=evaluation: losses(m, e, given),
            zokern.Refused,
            "cannot follow",
            "use evaluation='master'",
        )
    # without the comparison it would be silent
    for evaluation in (zokern.Scratch(check=False), zokern.Paired(check=False)):
        assert losses(make(), evaluation, given) != pytest.approx(right, rel=1e-4)


def test_views_that_the_loss_does_not_read() -> None:
    for evaluation in ("scratch", "paired"):
        model = Views("attribute")
        unused = zokern.step(
            zokern.MeZO(model, lr=0.0, evaluation=evaluation),
            lambda m=model: F.linear(X, m.e).square().mean(),
        )
        assert unused.losses[0][0] != unused.losses[0][1]


# What is given ----------------------------------------------------------------------------------------------


def test_frozen_weights_of_any_kind_may_be_named() -> None:
    model = layers()
    model.packed = nn.Parameter(torch.ones(4, dtype=torch.int8), requires_grad=False)
    model.shape_only = nn.Parameter(torch.ones(4, device="meta"), requires_grad=False)
    result = zokern.step(zokern.MeZO(model.named_parameters(), lr=0.1), lambda: model[:3](X).square().mean())
    assert not result.skipped


class Wrapper(torch.Tensor):
    """As quantisation libraries wrap their weights: a tensor around others, without memory of its own."""

    inside: Tensor

    @staticmethod
    def __new__(cls, inside: Tensor):
        return torch.Tensor._make_wrapper_subclass(cls, inside.shape, dtype=inside.dtype)

    def __init__(self, inside: Tensor) -> None:
        self.inside = inside

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.detach.default:
            return cls(args[0].inside)
        return func(*(a.inside if isinstance(a, cls) else a for a in args), **(kwargs or {}))


@pytest.mark.parametrize("given", [lambda m: m, lambda m: m.named_parameters()], ids=["module", "named"])
def test_wrapped_weights_may_be_there_and_not_be_trained(given: Callable) -> None:
    model = layers()
    model.packed = nn.Parameter(Wrapper(torch.ones(5)), requires_grad=False)
    model.register_buffer("scale", Wrapper(torch.ones(5)))
    loss = lambda: (model[0](X) * model.packed * model.scale).square().mean()  # noqa: E731
    result = zokern.step(zokern.MeZO(given(model), lr=0.1), loss)
    assert not result.skipped and result.losses[0][0] != result.losses[0][1]
    with pytest.raises(TypeError, match="'w' is Wrapper.*plain tensor"):
        zokern.MeZO([("w", nn.Parameter(Wrapper(torch.ones(5))))])


def test_a_compiled_model_has_the_z_of_the_model() -> None:
    model = layers()
    results = [
        zokern.step(zokern.MeZO(given, lr=0.0), loss_of(model)).losses
        for given in (model, torch.compile(model, backend="eager"))
    ]
    assert results[0] == results[1]


def test_lazy_parameters_are_named() -> None:
    with pytest.raises(ValueError, match="'weight' of a lazy module"):
        zokern.MeZO(nn.LazyLinear(3))


@pytest.mark.parametrize("given, error, words", [
    (lambda m: dict(m.named_parameters()), TypeError, "params is a dict"),
    (lambda m: None, TypeError, "params is None"),
    (lambda m: [{"parameters": list(m.parameters())}], ValueError, "expected a dict with 'params'"),
    (lambda m: [(p, name) for name, p in m.named_parameters()], TypeError,
        r"expected \(name, tensor\) pairs"),
    (lambda m: [{"params": [m[0].weight]}, {"params": [m[0].weight]}], ValueError,
        "same elements.*one group"),
])  # fmt: skip
def test_params_of_other_forms(given: Callable, error, words: str) -> None:
    with pytest.raises(error, match=words):
        zokern.MeZO(given(layers()))


class Alike:
    """Looks like a rule and like an estimator, and inherits none of what a step asks them."""

    name, queries, lr = "alike", 1, 1.0

    def update(self, *given): ...

    def __call__(self, *given): ...


@pytest.mark.parametrize("options, error, words", [
    ({"paired_check": -5}, ValueError, "paired_check is -5"),
    ({"paired_check": 1.5}, ValueError, "paired_check is 1.5"),
    ({"paired_check": "3"}, ValueError, "paired_check is '3'"),
    ({"max_skips": -1}, ValueError, "max_skips is -1"),
    ({"dead_limit": 0}, ValueError, "dead_limit is 0"),
    ({"dead_limit": True}, ValueError, "dead_limit is True"),
    ({"maximize": "no"}, ValueError, "maximize is 'no'"), ({"rule": "adam"}, TypeError, "rule is 'adam'"),
    ({"rule": zokern.Adam}, TypeError, "rule is"),
    ({"rule": Alike()}, TypeError, "rule is .*another zokern.Rule object"),
    ({"estimator": Alike()}, TypeError, "estimator is .*another zokern.Estimator object"),
    ({"backend": 3}, TypeError, "backend is 3"), ({"queries": 2.0}, ValueError, "queries is 2.0"),
    ({"lr": torch.ones(2)}, ValueError, "lr is tensor"),
    ({"eps": 1e-60}, ValueError, "eps is 1e-60; expected a finite number"),
])  # fmt: skip
def test_options_of_other_kinds(options: dict, error, words: str) -> None:
    with pytest.raises(error, match=words):
        zokern.MeZO(layers(), **options)


def test_numbers_of_numpy_are_numbers() -> None:
    model = layers()
    assert (
        len(
            zokern.step(
                zokern.MeZO(model, queries=np.int64(3), max_skips=np.int32(2)), loss_of(model)
            ).coefficients
        )
        == 3
    )


@pytest.mark.parametrize("take", [copy.deepcopy, copy.copy, pickle.dumps])
def test_copies_of_an_optimizer_are_refused(take: Callable) -> None:
    with pytest.raises(TypeError, match="load_state_dict"):
        take(zokern.MeZO(layers()))


# Perturbations that rounding swallows -----------------------------------------------------------------------


def test_the_eps_of_the_message_is_the_group_s() -> None:
    model = layers()
    model[2].to(torch.bfloat16)
    groups = [
        {"params": list(model[0].named_parameters()), "eps": 0.5},
        {"params": list(model[2].named_parameters("two")), "eps": 1e-6},
    ]
    refuse(model, lambda: zokern.step(zokern.MeZO(groups), lambda: 0.0), ValueError, "eps = 1e-06", "100%")


def test_a_transposed_weight_is_sampled_too() -> None:
    weight = nn.Parameter(torch.linspace(1, 2, 600).view(20, 30).bfloat16().t())
    with pytest.raises(ValueError, match="eps = 1e-06"):
        zokern.step(zokern.MeZO([("w", weight)], eps=1e-6), lambda: weight.float().sum())


def test_an_eps_that_was_edited_is_looked_at_again() -> None:
    model = layers(torch.bfloat16)
    optimizer = zokern.MeZO(model, lr=0.0, eps=0.1)
    zokern.step(optimizer, loss_of(model))
    optimizer.param_groups[0]["eps"] = 1e-6
    refuse(model, lambda: zokern.step(optimizer, loss_of(model)), ValueError, "eps = 1e-06")


# State of another run ---------------------------------------------------------------------------------------


def other_shape(state: dict) -> None:
    for values in state["state"].values():
        for key, value in values.items():
            if isinstance(value, Tensor):
                values[key] = torch.zeros(3, 4, dtype=value.dtype)


def other_dtype(state: dict) -> None:
    for values in state["state"].values():
        for key, value in values.items():
            if isinstance(value, Tensor):
                values[key] = value.double()


@pytest.mark.parametrize("break_it", [other_shape, other_dtype])
@pytest.mark.parametrize("options, dtype, key", [
    ({"rounding": "residual", "eps": 1e-2}, torch.bfloat16, "residual"),
    ({"rule": zokern.Momentum()}, torch.float32, "momentum"),
    ({"rule": zokern.Adam()}, torch.float32, "first"),
])  # fmt: skip
def test_state_of_another_shape_is_refused(
    options: dict, dtype: torch.dtype, key: str, break_it: Callable
) -> None:
    model = layers(dtype)
    optimizer = zokern.MeZO(model, lr=1e-3, **options)
    zokern.step(optimizer, loss_of(model))
    state = copy.deepcopy(optimizer.state_dict())
    break_it(state)
    kept = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError, match=rf"state '{key}' of parameter '0.weight'.*needs a contiguous"):
        optimizer.load_state_dict(state)
    now = optimizer.state_dict()
    assert now["zokern"] == kept["zokern"]
    for index, values in kept["state"].items():
        assert all(
            same_bits(v, now["state"][index][k]) if isinstance(v, Tensor) else v == now["state"][index][k]
            for k, v in values.items()
        )


def test_a_load_without_the_check_is_rejected() -> None:
    with patch.object(work, "check_state", lambda *_: None), pytest.raises(pytest.fail.Exception):
        test_state_of_another_shape_is_refused(
            {"rule": zokern.Momentum()}, torch.float32, "momentum", other_shape
        )


RECIPES: dict[str, tuple[Callable, Callable, str]] = {
    "direction": (lambda m: zokern.MeZO(m), lambda m: zokern.MeZO(m, direction="rademacher"), "direction"),
    "method": (lambda m: zokern.SubZero(m, rank=2), lambda m: zokern.MeZO(m), "direction"),
    "rank": (lambda m: zokern.SubZero(m, rank=2), lambda m: zokern.SubZero(m, rank=3), "rank"),
    "interval": (lambda m: zokern.LOZO(m, interval=5), lambda m: zokern.LOZO(m, interval=6), "interval"),
    "rule": (
        lambda m: zokern.MeZO(m, rule=zokern.Adam()),
        lambda m: zokern.MeZO(m, rule=zokern.Momentum()),
        "rule",
    ),
    "queries": (lambda m: zokern.MeZO(m, queries=4), lambda m: zokern.MeZO(m), "estimator.queries"),
    "stencil": (lambda m: zokern.MeZO(m), lambda m: zokern.MeZO(m, stencil="forward"), "estimator.stencil"),
    "rounding": (lambda m: zokern.MeZO(m, rounding="stochastic"), lambda m: zokern.MeZO(m), "rounding"),
}


@pytest.mark.parametrize("which", RECIPES)
def test_another_recipe_is_refused(which: str) -> None:
    first, second, word = RECIPES[which]
    model = layers()
    optimizer, other = first(model), second(model)
    zokern.step(optimizer, loss_of(model))
    state = optimizer.state_dict()
    with pytest.raises(ValueError, match=f"written with {word}=.*recipe"):
        other.load_state_dict(state)
    assert other.steps == 0
    if which in ("queries", "stencil", "direction"):
        state["zokern"]["recipe"] = None
        other.load_state_dict(state)
        assert other.steps == 1 and not zokern.step(other, loss_of(model)).skipped


@pytest.mark.parametrize("entry, value", [("seed", 2**64), ("step", -3), ("step", 2**32 + 1)])
def test_seed_and_step_of_a_state_are_checked(entry: str, value: int) -> None:
    optimizer = zokern.MeZO(layers())
    state = optimizer.state_dict()
    state["zokern"][entry] = value
    with pytest.raises(ValueError, match=entry):
        optimizer.load_state_dict(state)
    assert optimizer.steps == 0 and optimizer.seed == 0
