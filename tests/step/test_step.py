"""One step against its formula: losses bit for bit,
the update bit for bit and in float64, and nothing else touched."""

from __future__ import annotations

import contextlib
import itertools
import math
import subprocess
import sys
import warnings
from collections.abc import Callable
from unittest.mock import patch

import oracle
import pytest
import torch
import torch.nn.functional as F
from models import batch, build, changed, next_token_loss, same_bits, snapshot, tiny
from torch import nn

import zokern
from zokern.evaluation import rng

pytestmark = pytest.mark.usefixtures("one_thread")

IDS = batch()
MAXIMIZED = {"maximize": True}


def closure_of(model: nn.Module) -> Callable:
    return lambda: next_token_loss(model(IDS), IDS)


def check_step(
    evaluation="scratch",
    lr=0.1,
    eps=1e-3,
    weight_decay=0.0,
    queries=1,
    seed=5,
    stencil="central",
    clip=None,
    steps=2,
    tied=False,
    **options,
):
    """Steps of a float32 model against the oracle; AssertionError when anything differs."""
    model = tiny(tied=tied)
    optimizer = zokern.MeZO(
        model,
        lr=lr,
        eps=eps,
        weight_decay=weight_decay,
        seed=seed,
        estimator=zokern.Spsa(queries, stencil, clip),
        evaluation=evaluation,
        **options,
    )
    direction = options.get("direction", "normal")
    offsets = {"central": (1.0, -1.0), "forward": (1.0, 0.0)}[stencil]
    for step in range(steps):
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        result = zokern.step(optimizer, closure_of(model))
        assert (
            result.step == step
            and result.seed == seed
            and len(result.losses) == queries
            and not result.skipped
        )
        coefficients = []
        for query in range(queries):
            for side, offset in enumerate(offsets):
                weights = (
                    oracle.perturbed(before, offset * eps, seed, step, query, direction) if offset else before
                )
                expected = oracle.loss(model, weights, lambda call: next_token_loss(call(IDS), IDS))
                assert result.losses[query][side] == expected, f"loss of query {query} at {offset} eps"
            c = oracle.coefficient(result.losses[query], offsets, eps)
            coefficients.append(c if clip is None else max(-clip, min(clip, c)))
        assert result.coefficients == tuple(coefficients)
        assert math.isclose(result.loss, sum(map(sum, result.losses)) / (2 * queries), rel_tol=1e-12)
        sign = 1.0 if options.get("maximize") else -1.0
        amounts = [sign * lr * c / queries for c in coefficients]
        for name, p in model.named_parameters():
            oracle.check_update(
                name, before[name], p, seed, step, amounts, 1.0 - lr * weight_decay, direction
            )
            zokern.axpy_(before[name], direction, seed=seed, who=name,
                draws=[(step, k) for k in range(queries)], coeffs=amounts,
                         decay=1.0 - lr * weight_decay)  # fmt: skip
            assert same_bits(p, before[name]), f"{name}: not the bits of axpy_"


CASES = {
    "plain": {},
    "forward": {"stencil": "forward"},
    "queries2": {"queries": 2},
    "queries3_forward": {"queries": 3, "stencil": "forward"},
    "queries4_decay": {"queries": 4, "weight_decay": 0.3},
    "decay": {"weight_decay": 0.5},
    "maximize": MAXIMIZED,
    "clip": {"clip": 1e-3},
    "rademacher": {"direction": "rademacher"},
    "tied": {"tied": True},
    "reference": {"backend": "reference", "steps": 1},
    "seed_zero": {"seed": 0},
    "seed_middle": {"seed": 2**63},
    "seed_last": {"seed": 2**64 - 1},
}


@pytest.mark.parametrize("evaluation", ["master", "scratch"])
@pytest.mark.parametrize("case", CASES)
def test_step_equals_formula(case: str, evaluation: str) -> None:
    check_step(evaluation, **CASES[case])


def wrong_axpy(change: Callable):
    """Group.axpy_ with its coefficients and decay changed first."""
    right = zokern.group.Group.axpy_

    def axpy_(self, noise, coeffs, decay, rounding, control=None):
        decay = decay if control is None else float(control[0])
        draws, coeffs, decay = change(noise.draws, [float(c) for c in coeffs], decay)
        return right(self, noise._replace(draws=draws), coeffs, decay, rounding)

    return patch.object(zokern.group.Group, "axpy_", axpy_)


def wrong_perturb(change: Callable):
    """Backend perturb, as the evaluation calls it, with draw and scales changed first."""
    from zokern.backends.cpu import Cpu

    right = Cpu.perturb

    def perturb(self, batch, noise, scales, outs):
        ((step, draw),) = noise.draws
        draw, scales = change(draw, scales)
        return right(self, batch, noise._replace(draws=[(step, draw)]), scales, outs)

    return patch.object(Cpu, "perturb", perturb)


SLOPES = zokern.Spsa.slopes
WRONG_STEPS = {
    "sign_flip": lambda: wrong_axpy(lambda draws, coeffs, decay: (draws, [-c for c in coeffs], decay)),
    "mean_forgotten": lambda: wrong_axpy(
        lambda draws, coeffs, decay: (draws, [len(coeffs) * c for c in coeffs], decay)
    ),
    "decay_forgotten": lambda: wrong_axpy(lambda draws, coeffs, decay: (draws, coeffs, 1.0)),
    "one_draw_for_all": lambda: wrong_axpy(
        lambda draws, coeffs, decay: ([draws[0]] * len(draws), coeffs, decay)
    ),
    "queries_in_reverse": lambda: wrong_axpy(lambda draws, coeffs, decay: (draws[::-1], coeffs, decay)),
    "last_step_number": lambda: wrong_axpy(
        lambda draws, coeffs, decay: ([(s + 1, d) for s, d in draws], coeffs, decay)
    ),
    "sides_swapped": lambda: wrong_perturb(lambda draw, scales: (draw, [-s for s in scales])),
    "half_eps": lambda: wrong_perturb(lambda draw, scales: (draw, [s / 2 for s in scales])),
    "one_query_only": lambda: wrong_perturb(lambda draw, scales: (0, scales)),
    "coefficient_doubled": lambda: patch.object(
        zokern.Spsa, "slopes", lambda self, d, losses, plan: 2.0 * SLOPES(self, d, losses, plan)
    ),
    "name_ignored": lambda: patch(
        "zokern.parameters.ids", lambda names, taken=None: (dict.fromkeys(names, 7), {})
    ),
}


@pytest.mark.parametrize("wrong", WRONG_STEPS)
def test_check_rejects_wrong_step(wrong: str) -> None:
    with WRONG_STEPS[wrong](), pytest.raises(AssertionError):
        check_step(queries=2, weight_decay=0.5)


def test_groups_have_their_own_lr_eps_and_decay() -> None:
    model = tiny()
    named = dict(model.named_parameters())
    first = {name: p for name, p in named.items() if p.dim() > 1}
    options = [{"lr": 0.1, "eps": 1e-3, "weight_decay": 0.2}, {"lr": 0.3, "eps": 4e-3, "weight_decay": 0.0}]
    groups = [first, {name: p for name, p in named.items() if name not in first}]
    optimizer = zokern.MeZO([{"params": list(g.items()), **o} for g, o in zip(groups, options)], seed=3)
    before = {name: p.detach().clone() for name, p in named.items()}
    result = zokern.step(optimizer, closure_of(model))
    eps = {name: o["eps"] for g, o in zip(groups, options) for name in g}
    sides = [
        oracle.loss(
            model,
            oracle.perturbed(before, {n: sign * e for n, e in eps.items()}, 3, 0, 0),
            lambda call: next_token_loss(call(IDS), IDS),
        )
        for sign in (1, -1)
    ]
    assert result.losses == (tuple(sides),)
    for group, o in zip(groups, options):
        amount = -o["lr"] * oracle.coefficient(sides, (1, -1), o["eps"])
        for name, p in group.items():
            oracle.check_update(name, before[name], p, 3, 0, [amount], 1 - o["lr"] * o["weight_decay"])


def test_record() -> None:
    model = tiny(torch.bfloat16)
    model.idle = nn.Parameter(torch.ones(3, 3, dtype=torch.bfloat16))
    optimizer = zokern.MeZO(model, lr=1e-2, seed=9, queries=2)
    result = zokern.step(optimizer, closure_of(model))
    assert result is optimizer.result and optimizer.steps == 1
    assert (result.seed, result.step, result.skipped, result.evaluation, result.backend) == (
        9,
        0,
        False,
        "master",
        "cpu",
    )
    assert (
        result.unseen == ("idle",)
        and result.whole == ()
        and result.swallowed is not None
        and "first step" in result.why
    )
    assert len(result.losses) == len(result.coefficients) == 2 and all(
        len(sides) == 2 for sides in result.losses
    )
    assert 0 < result.scratch_bytes <= 64 << 20
    assert result.dead_updates is not None and 0.0 <= result.dead_updates <= 1.0
    later = zokern.step(optimizer, closure_of(model))
    assert (later.step, later.evaluation, later.unseen, later.swallowed) == (
        1,
        "paired",
        (),
        None,
    ) and "15 rows" in later.why


@pytest.mark.parametrize("make", [
    lambda o: torch.optim.lr_scheduler.StepLR(o, 2, 0.5),
    lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda k: 1 / (1 + k)),
    lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 5),
    lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 0.1, total_steps=9, cycle_momentum=False),
], ids=["StepLR", "LambdaLR", "CosineAnnealingLR", "OneCycleLR"])  # fmt: skip
def test_schedulers(make: Callable) -> None:
    """They run without a warning, and each step uses the lr of its moment."""
    model = tiny()
    optimizer = zokern.MeZO(model, lr=0.1, seed=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scheduler = make(optimizer)
        rates = []
        for step in range(5):
            before = {name: p.detach().clone() for name, p in model.named_parameters()}
            rates.append(optimizer.param_groups[0]["lr"])
            result = zokern.step(optimizer, closure_of(model))
            scheduler.step()
            for name, p in model.named_parameters():
                oracle.check_update(name, before[name], p, 1, step, [-rates[-1] * result.coefficients[0]])
    assert len(set(rates)) > 1


# Rounding ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_update_of_16_bit_weights(dtype: torch.dtype, rounding: str) -> None:
    model = tiny(dtype)
    optimizer = zokern.MeZO(model, lr=0.01, weight_decay=0.1, queries=2, seed=4, rounding=rounding)
    for step in range(3):
        expected = {name: p.detach().clone() for name, p in model.named_parameters()}
        result = zokern.step(optimizer, closure_of(model))
        amounts = [-0.01 * c / 2 for c in result.coefficients]
        for name, p in model.named_parameters():
            zokern.axpy_(
                expected[name], "normal", seed=4, who=name, draws=[(step, 0), (step, 1)], coeffs=amounts,
                decay=1 - 0.01 * 0.1, rounding=rounding, backend="reference",
            )  # fmt: skip
            assert same_bits(p, expected[name]), name


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_a_run_is_replayed_in_one_pass(rounding: str) -> None:
    """50 steps of two queries under a schedule and with decay:
    their results and rates, one axpy_ call, the same weights."""
    model = tiny(torch.bfloat16)
    replayed = {name: p.detach().clone() for name, p in model.named_parameters()}
    summed = [p.clone() for p in replayed.values()]
    optimizer = zokern.MeZO(model, lr=0.01, eps=0.01, weight_decay=0.1, queries=2, seed=4, rounding=rounding)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 50)
    draws, coeffs, decays = [], [], []
    for _ in range(50):
        lr = optimizer.param_groups[0]["lr"]
        result = zokern.step(optimizer, closure_of(model))
        draws += [(result.step, query) for query in range(2)]
        coeffs += [lr * (-c / 2) for c in result.coefficients]
        decays.append(1.0 - lr * 0.1)
        schedule.step()
    names = dict(seed=4, who=list(replayed), draws=draws, coeffs=coeffs, rounding=rounding)
    zokern.axpy_(list(replayed.values()), "normal", **names, decay=decays, each=2)
    zokern.axpy_(summed, "normal", **names, decay=math.prod(decays))
    for (name, p), wrong in zip(model.named_parameters(), summed):
        assert same_bits(p, replayed[name]), name
        assert not same_bits(p, wrong), (
            f"{name}: one rounding at the end is as good, so this run shows nothing"
        )


def test_residual_is_an_exact_float32_master() -> None:
    """bfloat16 weights with their low bits follow the float32 run bit for bit, over losses that are given."""
    losses = torch.randn(200, generator=torch.Generator().manual_seed(1)).tolist()
    masters = []
    for dtype, rounding in ((torch.bfloat16, "residual"), (torch.float32, "nearest")):
        model = tiny(torch.bfloat16).to(dtype)
        optimizer = zokern.MeZO(
            model,
            lr=1e-5,
            weight_decay=0.1,
            seed=2,
            rounding=rounding,
            evaluation="master",
            paired_check=None,
        )
        numbers = iter(losses)
        for _ in range(100):
            zokern.step(
                optimizer, lambda model=model, numbers=numbers: float(model(IDS).mean()) * 0 + next(numbers)
            )
        weights = []
        for p in model.parameters():
            low = optimizer.state[p]["residual"].int() if rounding == "residual" else 0
            weights.append(p.detach().float().view(torch.int32) + low)
        masters.append(weights)
    assert all(torch.equal(a, b) for a, b in zip(*masters))


def test_residual_reaches_the_forward() -> None:
    """theta + low bits is what is perturbed: with the low bits moved, the loss moves."""
    model = tiny(torch.bfloat16)
    optimizer = zokern.MeZO(model, lr=0.0, seed=2, rounding="residual", dead_limit=None)
    zokern.step(optimizer, closure_of(model))
    optimizer.run.step = 0
    low = optimizer.state[model.up.weight]["residual"]
    first = zokern.step(optimizer, closure_of(model)).losses
    low.fill_(32000)
    optimizer.run.step = 0
    assert zokern.step(optimizer, closure_of(model)).losses != first


# What a step must not do ------------------------------------------------------------------------------------


ZEROS = {
    "lr": {"lr": 0.0, "weight_decay": 0.1},
    "dead": {"lr": 0.1},
    "underflow": {"lr": 1e-50},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("method", ["MeZO", "SubZero", "LOZO", "TeZO"])
@pytest.mark.parametrize("case", ["lr", "dead", "underflow"])
@pytest.mark.parametrize("defer", [False, True])
def test_a_step_of_nothing_keeps_negative_zeros(
    case: str, method: str, dtype: torch.dtype, defer: bool
) -> None:
    """Pruned weights have many. An update of 0 z, by lr or by equal losses, is no launch;
    nor is the write of what waits."""
    model = build(lambda: nn.Linear(40, 30), dtype)
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(-0.0)
    before, x = snapshot(model), torch.ones(2, 40, dtype=dtype)
    optimizer = getattr(zokern, method)(model, force=True, seed=1, defer=defer, **ZEROS[case])
    for _ in range(3):
        zokern.step(optimizer, lambda: (model(x), 1.0)[1] if case == "dead" else model(x).float().sum())
    optimizer.flush()
    assert changed(model, before) == []


def test_dropout_is_paired() -> None:
    """Both sides see one mask: it adds next to nothing to the spread of the coefficients,
    and steps differ in their masks."""

    def spread(p: float) -> float:
        model = tiny(dropout=p)
        optimizer = zokern.MeZO(model, lr=0.0, seed=1, evaluation="master", paired_check=None)
        return (
            torch.tensor([zokern.step(optimizer, closure_of(model)).coefficients[0] for _ in range(100)])
            .std()
            .item()
        )

    alone, paired = spread(0.0), spread(0.1)
    print(
        f"std of the coefficient: {alone:.4f} without dropout, {paired:.4f} with, ratio {paired / alone:.3f}"
    )
    assert paired / alone < 1.05
    with (
        patch.object(rng, "seed", lambda number: None),
        patch.object(rng, "preserved", contextlib.nullcontext),
    ):
        assert spread(0.1) / alone > 3  # unpaired masks are noticed


def test_masks_differ_between_steps() -> None:
    model, masks = tiny(dropout=0.5), []
    optimizer = zokern.MeZO(model, lr=0.0)  # read by 'master', then by 'paired', which is compared

    def closure():
        masks[-1].append(F.dropout(torch.ones(64), 0.5))
        return next_token_loss(model(IDS), IDS)

    for _ in range(3):
        masks.append([])
        zokern.step(optimizer, closure)
    assert all(torch.equal(mask, masks[step][0]) for step in range(3) for mask in masks[step])
    assert not torch.equal(masks[0][0], masks[1][0]) and not torch.equal(masks[1][0], masks[2][0])


def test_order_and_freezing_change_no_z() -> None:
    """Each parameter's update is the same in any order and company, for given losses."""
    names = [name for name, _ in tiny().named_parameters()]

    def updates(order: list[str], frozen: str | None = None) -> dict[str, torch.Tensor]:
        model = tiny()
        named = dict(model.named_parameters())
        if frozen is not None:
            named[frozen].requires_grad_(False)
        optimizer = zokern.MeZO([(name, named[name]) for name in order if name != frozen], lr=0.1, seed=3,
                                evaluation="master", paired_check=None)  # fmt: skip
        numbers = iter([1.0, 0.5, 0.25, 0.3])
        for _ in range(2):
            zokern.step(optimizer, lambda: model(IDS).sum() * 0 + next(numbers))
        return snapshot(model)

    start, base = snapshot(tiny()), updates(names)
    for other in (updates(names[::-1]), updates(names[2:] + names[:2])):
        assert all(same_bits(base[name], other[name]) for name in names)
    for frozen in (names[0], names[3]):
        other = updates(names, frozen)
        assert same_bits(other[frozen], start[frozen])
        assert all(same_bits(base[name], other[name]) for name in names if name != frozen)
    with patch("zokern.parameters.ids", lambda names, taken=None: ({n: i for i, n in enumerate(names)}, {})):
        other = updates(names[::-1])  # ids by position are noticed
        assert not all(same_bits(base[name], other[name]) for name in names)


def test_tied_weights_are_one_tensor_with_one_z() -> None:
    model = tiny(tied=True)
    optimizer = zokern.MeZO(model, lr=0.1, seed=1)
    assert [name for g in optimizer.param_groups for name in g["param_names"]].count("embed.weight") == 1
    seen = []
    zokern.step(
        optimizer,
        lambda: (seen.append((model.embed.weight + 0, model.head.weight + 0)), model(IDS).mean())[1],
    )
    for embed, head in seen:
        assert same_bits(embed, head)
    check_step(tied=True)


INFERENCE: dict[str, Callable] = {
    "mezo": zokern.MeZO,
    "residual": lambda model, **o: zokern.MeZO(model, rounding="residual", **o),
    "adam": lambda model, **o: zokern.MeZO(model, rule=zokern.Adam(), **o),
    "inplace": lambda model, **o: zokern.MeZO(model, evaluation="inplace", **o),
    "scratch": lambda model, **o: zokern.MeZO(model, evaluation="scratch", **o),
    "paired": lambda model, **o: zokern.MeZO(model, evaluation="paired", **o),
    "subzero": zokern.SubZero,
    "lozo": lambda model, **o: zokern.LOZO(model, momentum=0.9, interval=2, **o),
    "tezo": lambda model, **o: zokern.TeZO(model, rule="adam", **o),
}


@pytest.mark.parametrize(
    ("method", "where", "backend"),
    [
        *itertools.product(INFERENCE, ["step", "closure"], ["cpu"]),
        ("scratch", "objective", "cpu"),
        ("mezo", "step", "reference"),
    ],
)
def test_inference_mode(method: str, where: str, backend: str) -> None:
    """Around steps or in the closure it changes no bit, nor what later steps outside of it find. A step in it
    may write the closure's own inference tensors, in every way but 'paired', which refuses a write of all
    sides into one tensor."""
    dtype, ids = torch.bfloat16 if method == "residual" else torch.float32, torch.arange(6).view(2, 3)
    ends = []
    for inside in (False, True):
        model = build(
            lambda: nn.Sequential(nn.Embedding(260, 256), nn.Linear(256, 20), nn.LayerNorm(20)), dtype
        )
        optimizer = INFERENCE[method](model, lr=1e-3, eps=1e-2, seed=1, backend=backend, force=True)
        with torch.inference_mode(inside and where != "closure"):
            cache = torch.zeros(2, 3, 20)

        def loss(out: torch.Tensor, _: object = None, cache: torch.Tensor = cache) -> torch.Tensor:
            if method != "paired":
                cache.copy_(out)
            return out.float().square().mean()

        def closure(model: nn.Module = model, loss: Callable = loss, inside: bool = inside) -> torch.Tensor:
            with torch.inference_mode() if inside and where == "closure" else contextlib.nullcontext():
                return loss(model(ids))

        with torch.inference_mode(inside and where != "closure"):
            read = zokern.Objective(model, ids, loss) if where == "objective" else closure
            results = [zokern.step(optimizer, read) for _ in range(3)]
        results.append(zokern.step(optimizer, lambda model=model: model(ids).float().square().mean()))
        optimizer.flush()
        model(ids).float().sum().backward()
        ends.append(([result.losses for result in results], snapshot(model)))
    assert ends[0][0] == ends[1][0]
    assert all(same_bits(ends[0][1][name], ends[1][1][name]) for name in ends[0][1])


# In place ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stencil", ["central", "forward"])
def test_inplace_measures_what_scratch_measures(stencil: str) -> None:
    """In float32, up to rounding; and the weights end where scratch's end, up to three roundings."""
    ends = []
    for evaluation in ("scratch", "inplace"):
        model = tiny()
        optimizer = zokern.MeZO(
            model, lr=0.01, weight_decay=0.1, queries=2, seed=3, evaluation=evaluation, stencil=stencil
        )
        results = [zokern.step(optimizer, closure_of(model)) for _ in range(5)]
        ends.append((results, snapshot(model)))
    for a, b in zip(ends[0][0], ends[1][0]):
        assert b.evaluation == "inplace"
        for c, d in zip(a.coefficients, b.coefficients):
            # float32 losses near 4 over 2 eps: 2.4e-4 an ulp
            assert abs(c - d) < 2e-3, (a.coefficients, b.coefficients)
    for name, weight in ends[0][1].items():
        assert (weight - ends[1][1][name]).abs().max() < 1e-4, name  # 2e-3 lr |z|; the weights moved by 1e-2


def test_inplace_drifts_as_documented() -> None:
    """bfloat16 at lr = 0: about sqrt(steps) times 1 % RMS after 10. The other evaluations change no bit
    (test_evaluations.py)."""
    model = nn.Linear(64, 64, bias=False).to(torch.bfloat16)
    with torch.no_grad():
        model.weight.copy_(torch.randn(64, 64, generator=torch.Generator().manual_seed(0)) * 0.02)
    before, x = model.weight.detach().float(), torch.ones(1, 64, dtype=torch.bfloat16)
    optimizer = zokern.MeZO(model, lr=0.0, seed=1, evaluation="inplace", dead_limit=None)
    for _ in range(100):
        zokern.step(optimizer, lambda: model(x).float().mean())
    drift = ((model.weight.float() - before).norm() / before.norm()).item()
    assert 0.02 < drift < 0.08, drift


# Tiles and memory -------------------------------------------------------------------------------------------


class Wide(nn.Module):
    """One large parameter and a use of it, with a loss."""

    def __init__(self, shape: tuple[int, ...], use: Callable) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            self.weight = nn.Parameter(torch.randn(shape) * 0.02)
            self.bias = nn.Parameter(torch.randn(shape[0] if use is F.linear else shape[-1]))
        self.use = use

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.use is F.linear:
            y = F.linear(x, self.weight, self.bias)
        elif self.use is torch.addmm:
            y = torch.addmm(self.bias, x, self.weight)
        elif self.use is F.embedding:
            y = F.embedding(torch.tensor([[3, 1999, 3], [0, 7, 1001]]), self.weight) + self.bias
        else:
            y = self.use(x, self.weight)
        return (y * torch.linspace(-1, 1, y.shape[-1])).square().mean()


TILED = {
    "linear": ((2000, 300), F.linear, 300),
    "conv1d": ((300, 2000), torch.addmm, 300),
    "embedding": ((2000, 300), F.embedding, 1),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", TILED)
def test_small_budget_tiles(kind: str, dtype: torch.dtype) -> None:
    """A matrix above the budget is used tile by tile:
    the same losses up to the order of a matrix product's sums."""
    shape, use, width = TILED[kind]
    x = torch.randn(4, width, generator=torch.Generator().manual_seed(2)).to(dtype)
    losses = []
    for budget in (1 << 20, 64 << 20):
        model = Wide(shape, use).to(dtype)
        rounding = "residual" if dtype == torch.bfloat16 else "nearest"
        optimizer = zokern.MeZO(model, lr=0.0, seed=1, evaluation=zokern.Scratch(budget), rounding=rounding)
        result = zokern.step(optimizer, lambda model=model: model(x).float())
        assert 0 < result.scratch_bytes <= budget and result.whole == () and result.unseen == ()
        losses.append(result.losses[0])
    bound = 1e-6 if dtype == torch.float32 else 4e-3
    if kind == "embedding":
        assert losses[0] == losses[1]
    for a, b in zip(*losses):
        assert abs(a - b) <= bound * abs(b), f"{a} against {b}: {abs(a - b) / abs(b):.2g}"
    weights = dict(Wide(shape, use).to(dtype).named_parameters())
    expected = oracle.loss(
        Wide(shape, use).to(dtype), oracle.perturbed(weights, 1e-3, 1, 0, 0), lambda call: call(x).float()
    )
    assert abs(losses[1][0] - expected) <= bound * abs(expected)


def test_tiles_are_checked(by_tiles) -> None:
    """A tile that starts at the wrong number of the stream is noticed."""
    from zokern.evaluation.copies import Copies

    right = Copies.fill

    def wrong(self, group, i, view, span, *rest):
        return right(self, group, i, view, zokern.backends.Span(span.who, 0, span.pitch, span.rows), *rest)

    def losses(function: Callable, check: bool) -> tuple:
        model = Wide(*TILED["linear"][:2])
        optimizer = zokern.MeZO(model, lr=0.0, seed=1, evaluation=zokern.Scratch(1 << 20, check))
        with patch.object(Copies, "fill", function):
            return zokern.step(optimizer, lambda: model(x)).losses[0]

    x = torch.randn(4, 300, generator=torch.Generator().manual_seed(2))
    assert abs(losses(right, False)[0] - losses(wrong, False)[0]) > 1e-6 * losses(right, True)[0]
    with pytest.raises(zokern.Refused, match="cannot follow; use evaluation='master'"):
        losses(wrong, True)


@pytest.mark.parametrize(
    "use", [lambda x, w: x @ w, lambda x, w: torch.einsum("bi,ij->bj", x, w), lambda x, w: x @ w[:]]
)
def test_record_names_what_was_not_tiled(use: Callable) -> None:
    model = Wide((300, 2000), use)
    del model.bias
    x = torch.ones(2, 300)
    result = zokern.step(zokern.MeZO(model, lr=0.0, evaluation=zokern.Scratch(1 << 20)), lambda: model(x))
    assert result.whole == ("weight",) and result.scratch_bytes >= 300 * 2000 * 4


MEASURE = """
import torch, zokern
from torch import nn
from zokern.gemm import library
torch.set_num_threads(1)
fused = library.yields
def status(name):
    return int(next(line for line in open("/proc/self/status") if line.startswith(name)).split()[1]) << 10
def step(model, x, budget, evaluation=None):
    optimizer = zokern.MeZO(model, lr=1e-6, evaluation=evaluation or zokern.Scratch(budget, check=False))
    return zokern.step(optimizer, lambda: model(x).square().mean())
def whole(x):
    return x @ model.weight.t()
step(nn.Linear(300, 300), torch.ones(2, 300), 1 << 20)  # libraries and threads
model, x = nn.Linear(3500, 3500, bias=False), torch.ones(2, 3500)
with torch.no_grad():
    model(x)
for kind in ("tiles", "fused", "whole", "master", "inplace"):
    library.yields = fused if kind == "fused" else lambda dtype: False
    model.forward = whole if kind == "whole" else lambda x: nn.functional.linear(x, model.weight)
    open("/proc/self/clear_refs", "w").write("5")
    before = status("VmHWM")
    step(model, x, 16 << 20, kind if kind in ("master", "inplace") else None)
    print(status("VmHWM") - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads peak memory from /proc")
def test_measured_memory_keeps_the_budget() -> None:
    """A step on a 49 MB matrix with a budget of 16 MB: peak resident memory rises by the budget and at most 8
    MB; under 'master' by one copy, in place by nothing."""
    run = subprocess.run([sys.executable, "-c", MEASURE], capture_output=True, text=True, check=False)
    if "clear_refs" in run.stderr:
        pytest.skip("this system does not let a process reset its peak memory")
    assert run.returncode == 0, run.stderr
    tiles, fused, whole, master, inplace = map(int, run.stdout.split())
    print(
        f"extra peak of a step at a budget of 16 MB: {tiles / 2**20:.1f} MB by tiles, {fused / 2**20:.1f} MB "
        "fused"
    )
    assert max(tiles, fused) <= (16 + 8) << 20
    assert whole > 40 << 20  # a step that copies the whole matrix is noticed
    assert inplace <= 8 << 20 and 40 << 20 < master <= (3500 * 3500 * 4) + (8 << 20)
