"""Directions with factors of z: what moves,
every evaluation and rule, resume, what is refused, and wrong versions.

The formulas of Sparse-MeZO's steps are in tests/methods/test_methods.py, those of the verbs in
tests/backends/test_scaled.py."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
from method_check import check_method
from models import batch, next_token_loss, same_bits, tiny
from recipes import METHODS
from torch import Tensor, nn

import zokern
from zokern.directions import scaled
from zokern.group import Group
from zokern.optimizer.scaling import Scaling

IDS = batch()
SPARSE = {
    "magnitude": {}, "global": {"scope": "global"}, "random": {"by": "random", "every": 2},
    "random global": {"by": "random", "scope": "global", "sparsity": 0.5},
}  # fmt: skip


def steps(optimizer, model: nn.Module, count: int) -> list:
    return [zokern.step(optimizer, lambda: next_token_loss(model(IDS), IDS)) for _ in range(count)]


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


# What moves -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", [zokern.Sgd, zokern.Momentum, zokern.Adam, zokern.SignSgd])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_small_weights_move_and_the_others_keep_their_bits(dtype: torch.dtype, rule) -> None:
    model = tiny(dtype)
    before = weights(model)
    optimizer = zokern.SparseMeZO(model, lr=1e-2, eps=1e-2, seed=4, rule=rule())
    with warnings.catch_warnings():  # what does not move is no underflow
        warnings.simplefilter("error")
        results = steps(optimizer, model, 3)
    assert all(result.dead_updates is None or result.dead_updates < 0.2 for result in results)
    for name, p in model.named_parameters():
        sizes = before[name].float().abs().flatten()
        small = (sizes <= sizes.sort().values[max(1, round(0.25 * len(sizes))) - 1]).view(p.shape)
        moved = p.detach() != before[name]
        assert not moved[~small].any() and moved[small].float().mean() > 0.7, name
        assert optimizer.state[p]["mask"].dtype == torch.bool and torch.equal(
            optimizer.state[p]["mask"], small
        )


def test_random_masks_have_the_stated_share_and_are_redrawn() -> None:
    theta = nn.Parameter(torch.zeros(200_000))
    optimizer = zokern.SparseMeZO([("w", theta)], lr=1.0, eps=1e-2, by="random", every=2, sparsity=0.9)
    masks = []
    for _ in range(4):
        before = theta.detach().clone()
        zokern.step(optimizer, lambda: (theta * torch.linspace(0, 1, 200_000)).sum())
        masks.append(theta.detach() != before)
        assert abs(float(masks[-1].double().mean()) - 0.1) < 0.003  # four deviations
    assert torch.equal(masks[0], masks[1]) and torch.equal(masks[2], masks[3])
    assert abs(float(masks[2][masks[0]].double().mean()) - 0.1) < 0.01
    assert "mask" not in optimizer.state[theta]


def test_global_shares_differ_by_tensor() -> None:
    params = {
        "small": nn.Parameter(torch.linspace(1, 2, 1000)),
        "large": nn.Parameter(torch.linspace(1.5, 4, 1000)),
    }
    optimizer = zokern.SparseMeZO(nn.ParameterDict(params), eps=1e-2, sparsity=0.75, scope="global")
    zokern.step(optimizer, lambda: sum((p * p).sum() for p in params.values()))
    masks = {name: optimizer.state[p]["mask"] for name, p in params.items()}
    assert sum(int(mask.sum()) for mask in masks.values()) == 500
    assert masks["small"].double().mean() > 0.4 > 0.1 > masks["large"].double().mean()


@pytest.mark.parametrize("shape", [(1,), (0,), (7,), (2, 0)])
def test_tensors_of_any_size(shape: tuple[int, ...]) -> None:
    """At least one weight of a tensor moves."""
    for options in SPARSE.values():
        given, other = nn.Parameter(torch.ones(shape)), nn.Parameter(torch.linspace(0, 1, 50))
        optimizer = zokern.SparseMeZO([("a", given), ("b", other)], lr=1e-2, eps=1e-2, **options)
        zokern.step(optimizer, lambda a=given, b=other: a.sum() + (b * b).sum())
        if not options and given.numel():
            assert bool((given != 1).any())


def test_smallest_is_a_sorted_list() -> None:
    tensors = [
        torch.randn(331).bfloat16().float() * 0.1,
        torch.randn(50),
        torch.zeros(3),
        torch.full((2,), 1e-42),
    ]
    ordered = torch.cat([t.abs() for t in tensors]).sort().values
    for share in (0.0, 1e-9, 0.01, 0.25, 0.8, 1.0):
        assert scaled.smallest(tensors, share) == float(ordered[max(1, round(share * len(ordered))) - 1])
    assert scaled.smallest([torch.randn(9, dtype=torch.float64).half()], 1.0) > 0


# Every way of reading losses, at shapes that are made by tiles, by rows and whole ---------------------------


class Large(nn.Module):
    """Matrices above the size that is resident:
    products, a transposed product, a lookup, a slice and a copy."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(700, 104)
        self.up = nn.Linear(104, 701)
        self.down = nn.Parameter(torch.randn(701, 104) * 0.05)
        self.table = nn.Parameter(torch.randn(900, 104) * 0.05)
        self.head = nn.Linear(104, 700, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        h = self.embed(ids)
        h = (
            torch.addmm(h.new_zeros(104), F.gelu(self.up(h)).flatten(0, 1), self.down).view_as(h)
            + self.table[3:8]
            + self.table[17]
        )
        return self.head(h)


def large(dtype: torch.dtype) -> Large:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        return Large().to(dtype)


@pytest.mark.parametrize("options", SPARSE.values(), ids=SPARSE)
@pytest.mark.parametrize(
    ("dtype", "rounding"),
    [(torch.float32, "nearest"), (torch.bfloat16, "residual"), (torch.bfloat16, "stochastic")],
)
def test_every_evaluation_reads_the_same_points(dtype: torch.dtype, rounding: str, options: dict) -> None:
    ids = torch.arange(15).view(3, 5) * 40
    found = {}
    for name, evaluation in {
        "master": "master", "scratch": "scratch", "paired": "paired",
        "narrow": zokern.Scratch(budget=1 << 20),
        "tiles": zokern.Paired(budget=1 << 20), "inplace": "inplace", "reference": "master",
    }.items():  # fmt: skip
        model = large(dtype)
        backend = "reference" if name == "reference" else "cpu"
        given = {
            "lr": 1e-3,
            "eps": 2e-2,
            "seed": 8,
            "rounding": rounding,
            "queries": 2,
            "evaluation": evaluation,
            "backend": backend,
        }
        optimizer = zokern.SparseMeZO(model, force=True, **given, **options)
        losses = [
            zokern.step(optimizer, lambda m=model: next_token_loss(m(ids), ids)).losses for _ in range(2)
        ]
        found[name] = torch.tensor(losses)
    spread = float((found["master"][..., 0] - found["master"][..., 1]).abs().max())
    assert torch.equal(found["master"], found["reference"]) and spread > 1e-3
    for name, losses in found.items():
        error = float((losses - found["master"]).abs().max())
        assert error <= (0.02 if dtype == torch.float32 else 0.5) * spread, (
            f"{name}: {error:.3g} of {spread:.3g}"
        )


def test_products_of_the_kernel_are_not_taken(monkeypatch) -> None:
    """The fused product makes z itself and knows no factors. Here it is as on a processor where it is the
    faster one."""
    from zokern.backends import get
    from zokern.gemm import library

    monkeypatch.setattr(library, "yields", lambda dtype: True)
    model, ids = large(torch.float32), torch.arange(15).view(3, 5)
    with patch.object(type(get("cpu")), "linear", side_effect=AssertionError("taken")) as fused:
        zokern.step(
            zokern.SparseMeZO(model, eps=1e-2, evaluation=zokern.Scratch(1 << 20)),
            lambda: next_token_loss(model(ids), ids),
        )
        assert not fused.called
        with pytest.raises(zokern.Refused, match="taken"):
            zokern.step(
                zokern.MeZO(model, eps=1e-2, evaluation=zokern.Scratch(1 << 20)),
                lambda: next_token_loss(model(ids), ids),
            )


# Runs -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", SPARSE.values(), ids=SPARSE)
def test_lr_0_moves_no_bit(options: dict) -> None:
    for rule in (zokern.Sgd(), zokern.Momentum(), zokern.Adam(), zokern.SignSgd()):
        model = tiny()
        with torch.no_grad():
            for p in model.parameters():
                p.view(-1)[::5] = -0.0
        before = weights(model)
        steps(zokern.SparseMeZO(model, lr=0.0, eps=1e-2, rule=rule, **options), model, 2)
        assert all(same_bits(p, before[name]) for name, p in model.named_parameters())


@pytest.mark.parametrize("options", SPARSE.values(), ids=SPARSE)
@pytest.mark.parametrize("rule", [zokern.Sgd, zokern.Adam, zokern.SignSgd])
def test_resumes_to_the_same_bits(options: dict, rule) -> None:
    """After any step, also between two masks:
    the weights have moved by then, and a mask by magnitude has not."""
    make = partial(zokern.SparseMeZO, lr=2e-2, eps=1e-2, **options)
    whole = tiny()
    steps(make(whole, seed=3, rule=rule()), whole, 5)
    for cut in (1, 3):
        first = tiny()
        optimizer = make(first, seed=3, rule=rule())
        steps(optimizer, first, cut)
        second = tiny()
        second.load_state_dict(first.state_dict())
        resumed = make(second, seed=77, rule=rule())
        resumed.load_state_dict(optimizer.state_dict())
        steps(resumed, second, 5 - cut)
        assert all(map(same_bits, second.parameters(), whole.parameters()))


def test_another_mask_is_refused_on_load() -> None:
    model = tiny()
    optimizer = zokern.SparseMeZO(model, eps=1e-2)
    steps(optimizer, model, 1)
    state = optimizer.state_dict()
    with pytest.raises(ValueError, match="direction.keep"):
        zokern.SparseMeZO(model, sparsity=0.5).load_state_dict(state)
    with pytest.raises(ValueError, match="direction"):
        zokern.MeZO(model).load_state_dict(state)
    state["state"][0]["mask"] = torch.ones(3, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"state 'mask' of parameter 'gain' is bool\[3\]"):
        optimizer.load_state_dict(state)


def test_frozen_and_thawed_parameters_keep_their_masks() -> None:
    model = tiny()
    optimizer = zokern.SparseMeZO(model, lr=1e-2, eps=1e-2)
    steps(optimizer, model, 1)
    masks = {name: optimizer.state[p]["mask"].clone() for name, p in model.named_parameters()}
    model.up.weight.requires_grad_(False)
    before = weights(model)
    steps(optimizer, model, 1)
    model.up.weight.requires_grad_(True)
    assert same_bits(model.up.weight, before["up.weight"])
    steps(optimizer, model, 1)
    for name, p in model.named_parameters():
        assert (
            torch.equal(optimizer.state[p]["mask"], masks[name])
            and not (p.detach() != before[name])[~masks[name]].any()
        )


# Factors that are given -------------------------------------------------------------------------------------


def test_given_factors() -> None:
    """A dict and a function of the same factors are one run;
    a factor of 1 is none; of 0, no perturbation and no move."""
    factors = {
        "up.weight": torch.rand(36, 12, generator=torch.Generator().manual_seed(1)),
        "gain": torch.zeros(12, dtype=torch.bool),
    }
    ends = []
    for scales in (
        factors,
        lambda name, p: factors.get(name),
        {**factors, "norm.weight": torch.ones(12, dtype=torch.bfloat16)},
    ):
        model = tiny()
        before = weights(model)
        steps(zokern.MeZO(model, lr=1e-2, eps=1e-2, seed=2, direction=zokern.Scaled(scales)), model, 2)
        ends.append(weights(model))
        assert same_bits(ends[-1]["gain"], before["gain"]) and not same_bits(
            ends[-1]["up.weight"], before["up.weight"]
        )
    assert all(same_bits(end[name], ends[0][name]) for end in ends[1:] for name in end)
    METHODS["scaled"] = partial(
        zokern.MeZO, lr=3e-3, direction=zokern.Scaled(lambda n, p: p.detach().abs() * 9 + 0.1)
    )
    try:
        check_method("scaled", queries=2)
    finally:
        del METHODS["scaled"]


def test_given_factors_are_copied() -> None:
    model, factors = tiny(), torch.ones(12)
    other = tiny()
    optimizer = zokern.MeZO(model, lr=1e-2, eps=1e-2, direction=zokern.Scaled({"gain": factors}))
    steps(optimizer, model, 1)
    factors.zero_()
    steps(optimizer, model, 1)
    steps(zokern.MeZO(other, lr=1e-2, eps=1e-2), other, 2)
    assert all(map(same_bits, model.parameters(), other.parameters()))


def test_clipped_norms_are_those_of_scaled_draws() -> None:
    """KerZOO's bound on the norm of each parameter's g:
    g is a sum of z s, so the move is as long as the bound."""
    model = tiny()
    before = weights(model)
    options = {
        "direction": zokern.Scaled(lambda name, p: torch.full_like(p.detach(), 0.25)),
        "estimator": zokern.Kernel(clip_norm=1e-3),
    }
    steps(zokern.MeZO(model, lr=1.0, eps=1e-2, **options), model, 1)
    moves = [float((p.detach() - before[name]).double().norm()) for name, p in model.named_parameters()]
    assert max(moves) == pytest.approx(1e-3, rel=1e-3)


BAD: dict[str, tuple[Callable, str]] = {
    "keep 0": (lambda: zokern.Masked(0.0), "keep is 0.0"),
    "keep 2": (lambda: zokern.Masked(2.0), "keep is 2.0"),
    "by": (lambda: zokern.Masked(0.5, by="size"), "by is 'size'; expected one of"),
    "scope": (lambda: zokern.Masked(0.5, scope="all"), "scope is 'all'"),
    "every": (lambda: zokern.Masked(0.5, every=0), "every is 0"),
    "sparsity": (lambda: zokern.SparseMeZO(tiny(), sparsity=1.0),
        "sparsity is 1.0; expected a number, 0 <= sparsity < 1"),
    "scales": (lambda: zokern.Scaled(3.0), "scales is float; expected a dict"),
    "base": (lambda: zokern.MeZO(tiny(), direction=zokern.Masked(0.5, base="cauchy")),
        "unknown direction 'cauchy'"),
    "lowrank": (lambda: zokern.MeZO(tiny(), direction=zokern.directions.Lazy(2, dense=zokern.Masked(0.5))),
        "dense='masked'"),
    "window": (
        lambda: zokern.MeZO(tiny(), direction=zokern.Masked(0.5), rule=zokern.WindowMomentum()),
        "rule is 'window_momentum' with direction 'masked', whose factors may differ",
    ),
    "cone": (lambda: zokern.ConMeZO(tiny(), direction=zokern.Masked(0.5)),
        "rule is 'cone' with direction 'masked'"),
    "sign": (lambda: zokern.SubZero(tiny(), rule=zokern.SignSgd()),
        "rule is 'sign' with direction 'subspace'; expected a dense z"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_arguments_are_refused_by_name(case: str) -> None:
    make, message = BAD[case]
    with pytest.raises((ValueError, TypeError), match=message):
        make()


@pytest.mark.parametrize(
    ("scales", "message"),
    [
        ({"upp.weight": torch.ones(3)}, r"scales has \['upp.weight'\]; expected names"),
        ({"gain": torch.ones(3)}, r"the factors of 'gain' are torch.float32\[3\]"),
        ({"gain": torch.ones(12, dtype=torch.float64)}, "torch.float64"), ({"gain": 2.0}, "'gain' are float"),
    ],
)  # fmt: skip
def test_bad_factors_are_refused_before_a_weight_moves(scales, message: str) -> None:
    model = tiny()
    before = weights(model)
    with pytest.raises(ValueError, match=message):
        steps(zokern.MeZO(model, lr=1.0, direction=zokern.Scaled(scales)), model, 1)
    assert all(same_bits(p, before[name]) for name, p in model.named_parameters())


# Wrong versions, which the formula of a step rejects --------------------------------------------------------


def update_without_factors():
    right = Group.axpy_

    def axpy_(self, *rest):
        kept, self.scales = self.scales, None
        try:
            return right(self, *rest)
        finally:
            self.scales = kept

    return patch.object(Group, "axpy_", axpy_)


def renewed(change: Callable):
    """Scaling.renew, and then a change of what every group has."""
    right = Scaling.renew

    def renew(self, plan):
        right(self, plan)
        for group in plan.groups:
            change(self, plan, group)

    return patch.object(Scaling, "renew", renew)


def by_the_weights_of_now(scaling, plan, group) -> None:
    for mask, theta in zip(group.scales, group.theta):
        mask.copy_(theta.abs() <= scaled.smallest([theta], 0.25))


def inverted(scaling, plan, group) -> None:
    if plan.step == 0:
        for mask in group.scales:
            mask.logical_not_()


WRONG = {
    "update without factors": ("SparseMeZO", {}, update_without_factors),
    "by the weights of now": ("SparseMeZO", {"lr": 3e-2}, lambda: renewed(by_the_weights_of_now)),
    "large weights": ("SparseMeZO", {}, lambda: renewed(inverted)),
    "ZO-Bench's share": (
        "SparseMeZO", {"by": "random"},
        lambda: patch.object(scaled, "NormalDist",
            lambda: type("Own", (), {"inv_cdf": lambda self, p: p})())),
    "a mask for each step": (
        "SparseMeZO", {"by": "random", "every": 3},
        lambda: patch.object(scaled.Masked, "born", lambda self, step: step)),
    "one mask for the run": (
        "SparseMeZO", {"by": "random", "every": 3},
        lambda: patch.object(scaled.Masked, "born", lambda self, step: 0)),
    "words of the direction": ("SparseMeZO", {"by": "random"}, lambda: patch.object(scaled, "WORD", 0)),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_wrong_version_is_rejected(case: str) -> None:
    name, options, wrong = WRONG[case]
    check_method(name, eps=1e-2, **options)
    with wrong(), pytest.raises(AssertionError):
        check_method(name, eps=1e-2, **options)
