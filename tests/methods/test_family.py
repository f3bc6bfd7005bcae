"""What estimators of parts, of examples and of earlier draws promise beyond their formulas."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any
from unittest.mock import patch

import pytest
import torch
from family import EVALUATIONS, NAMES, Rows, loss, weights
from method_check import check_resume
from models import same_bits, snapshot
from torch import Tensor

import zokern
from zokern.estimator.blocks import block_of, layer_of, module_of, sublayer_of
from zokern.methods import METHODS

pytestmark = pytest.mark.usefixtures("one_thread")

FAMILY = (
    "AdaMeZO", "BSZO", "BlockMeZO", "DPZO", "LeZO", "MeZOGV", "RLOO", "ZOAdam", "ZOConservative",
    "ZOMomentum", "ZOSignSGD",
)  # fmt: skip


# Every method of the family ---------------------------------------------------------------------------------


def closure_of(method: str, model: Rows) -> Callable[[], Tensor]:
    return model if method == "DPZO" else lambda: model().mean()


@pytest.mark.parametrize("evaluation", EVALUATIONS)
@pytest.mark.parametrize("method", FAMILY)
def test_without_lr_no_bit_moves(method: str, evaluation: str) -> None:
    model = Rows()
    before = snapshot(model)
    decay = {} if method == "ZOConservative" else {"weight_decay": 0.1}
    optimizer = METHODS[method](model, lr=0.0, eps=1e-2, evaluation=evaluation, **decay)
    for _ in range(12 if method == "AdaMeZO" else 3):
        zokern.step(optimizer, closure_of(method, model))
    drift = 1e-6 if evaluation == "inplace" else 0.0
    assert all((p - before[n]).abs().max() <= drift for n, p in model.named_parameters())
    assert evaluation == "inplace" or all(same_bits(p, before[n]) for n, p in model.named_parameters())


@pytest.mark.parametrize("after", [1, 5, 11])
@pytest.mark.parametrize("method", FAMILY)
def test_a_resumed_run_has_the_same_bits(method: str, after: int) -> None:
    make = partial(METHODS[method], evaluation="scratch")
    check_resume(partial(make, seed=7), 13, after, Rows, partial(closure_of, method), make)


@pytest.mark.parametrize("method", ["BSZO", "MeZOGV"])
def test_what_an_estimator_learned_is_needed(method: str) -> None:
    with (
        patch("zokern.optimizer.checkpoint.load_parts", lambda optimizer, own: None),
        pytest.raises(AssertionError),
    ):
        test_a_resumed_run_has_the_same_bits(method, 5)


FALLS: dict[str, float] = {  # lr for this small model: defaults suit 1e8 weights
    **dict.fromkeys(FAMILY, 3e-3), "AdaMeZO": 2e-5, "ZOMomentum": 3e-4, "ZOAdam": 3e-3, "BSZO": 100.0,
}  # fmt: skip


def fall(method: str, steps: int = 60, **options: Any) -> float:
    """By which share the loss of a fixed batch falls."""
    model = Rows()
    start = float(model().mean().detach())
    optimizer = METHODS[method](model, lr=FALLS[method], seed=1, evaluation="paired", **options)
    for _ in range(steps):
        zokern.step(optimizer, closure_of(method, model))
    return 1.0 - float(model().mean().detach()) / start


@pytest.mark.parametrize("method", FAMILY)
def test_the_loss_falls(method: str) -> None:
    assert fall(method) > 0.02 and fall(method, maximize=True) < 0.0


@pytest.mark.parametrize("method", [name for name in FAMILY if name != "DPZO"])  # whose noise has no sign
def test_a_reward_is_maximised_as_its_negative_is_minimised(method: str) -> None:
    """Bit for bit. Conservative steps are too long here, so that it chooses among its three."""
    ends, lr = [], 0.1 if method == "ZOConservative" else FALLS[method]
    for sign in (1.0, -1.0):
        model = Rows()
        optimizer = METHODS[method](model, lr=lr, maximize=sign < 0, evaluation="master", seed=2)
        for _ in range(12):
            zokern.step(optimizer, lambda model=model, sign=sign: sign * model().mean())
        ends.append(snapshot(model))
    assert all(same_bits(ends[0][n], ends[1][n]) for n in ends[0])


# Blocks and layers ------------------------------------------------------------------------------------------

GROUPINGS = {
    "model.embed_tokens.weight": (None, "model.embed_tokens", "model.embed_tokens", "model.embed_tokens"),
    "model.layers.11.self_attn.q_proj.weight":
        ("model.layers.11", "model.layers.11", "model.layers.11.self_attn",
            "model.layers.11.self_attn.q_proj"),
    "model.layers.11.fc1.bias": ("model.layers.11", "model.layers.11", "model.layers.11.fc1",
        "model.layers.11.fc1"),
    "lm_head.weight": (None, "lm_head", "lm_head", "lm_head"),
}  # fmt: skip


@pytest.mark.parametrize("name", GROUPINGS)
def test_parameters_are_grouped_by_their_names(name: str) -> None:
    assert (layer_of(name), block_of(name), sublayer_of(name), module_of(name)) == GROUPINGS[name]


def test_the_blocks_of_opt_are_as_many_as_in_the_benchmark() -> None:
    """L + 3, 5 L + 3, 8 L + 3 for OPT with L layers (Zhang et al. 2024, module-wise perturbation)."""
    transformers = pytest.importorskip("transformers")
    shape = {
        "hidden_size": 8,
        "ffn_dim": 16,
        "num_hidden_layers": 4,
        "num_attention_heads": 2,
        "word_embed_proj_dim": 8,
    }
    model = transformers.OPTForCausalLM(
        transformers.OPTConfig(vocab_size=11, max_position_embeddings=8, **shape)
    )
    names = [name for name, _ in model.named_parameters()]
    assert [len({of(name) for name in names}) for of in (block_of, sublayer_of, module_of)] == [
        4 + 3,
        20 + 3,
        32 + 3,
    ]


def count_losses(**options: Any) -> tuple[int, set[str]]:
    """How many losses a step of BlockMeZO reads, and the parameters that some point moves."""
    params, asked, moved = weights(), [], set()
    right = zokern.Master.losses

    def losses(self: Any, plan: Any, points: Any, closure: Any) -> Tensor:
        asked.extend({*points})
        moved.update(plan.names)
        return right(self, plan, points, closure)

    optimizer = zokern.BlockMeZO(list(params.items()), evaluation="master", paired_check=0, **options)
    with patch.object(zokern.Master, "losses", losses):
        zokern.step(optimizer, lambda: loss(params))
    return len(asked), moved


def test_a_step_in_jacobi_order_reads_theta_once() -> None:
    blocks = len({block_of(name) for name in NAMES})
    assert count_losses(stencil="forward", queries=2) == (3 * blocks, {*NAMES})
    assert count_losses(stencil="forward", queries=2, order="jacobi") == (2 * blocks + 1, {*NAMES})
    assert count_losses(queries=2, order="jacobi") == (4 * blocks, {*NAMES})


@pytest.mark.parametrize("evaluation", EVALUATIONS)
@pytest.mark.parametrize("order", ["gauss-seidel", "jacobi"])
@pytest.mark.parametrize("flaw", [math.nan, 1e38])
def test_a_number_that_is_not_finite_in_one_block(order: str, evaluation: str, flaw: float) -> None:
    """A loss of NaN, or finite losses whose coefficient is none in float32.

    In Jacobi order no block moves; in Gauss-Seidel order those before it have."""
    params = weights()
    before = {name: p.detach().clone() for name, p in params.items()}
    third = params[NAMES[3]].detach().clone()
    optimizer = zokern.BlockMeZO(
        list(params.items()), lr=0.1, eps=0.05, order=order, evaluation=evaluation, paired_check=None
    )

    def closure() -> Tensor:
        return loss(params) + torch.where((params[NAMES[3]] - third).sum() > 1e-3, flaw, 0.0)

    assert zokern.step(optimizer, closure).skipped
    moved = [name for name in NAMES if not torch.allclose(before[name], params[name], atol=1e-5)]
    assert moved == ([] if order == "jacobi" else list(NAMES[:3]))


@pytest.mark.parametrize("evaluation", ["master", "scratch"])
@pytest.mark.parametrize("order", ["gauss-seidel", "jacobi"])
def test_a_closure_that_raises_in_one_block(order: str, evaluation: str) -> None:
    """In Gauss-Seidel order the first block has moved, and the step has used its number."""
    params, calls = weights(), []
    optimizer = zokern.BlockMeZO(
        list(params.items()), lr=0.1, eps=0.05, order=order, evaluation=evaluation, paired_check=None
    )
    zokern.step(optimizer, lambda: loss(params))  # which is compared with 'master'
    before = {name: p.detach().clone() for name, p in params.items()}

    def closure() -> Tensor:
        calls.append(True)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return loss(params)

    with pytest.raises(KeyboardInterrupt):
        zokern.step(optimizer, closure)
    moved = {block_of(name) for name in NAMES if not torch.equal(before[name], params[name])}
    assert moved == (set() if order == "jacobi" else {block_of(NAMES[0])})
    assert optimizer.steps == 1 + len(moved)


def test_what_a_coefficient_of_inf_would_do_if_blocks_moved_one_by_one() -> None:
    with (
        patch("zokern.estimator.blocks._together", lambda estimates: list(estimates)),
        pytest.raises(AssertionError),
    ):
        test_a_number_that_is_not_finite_in_one_block("jacobi", "master", 1e38)


def layers_of_run(steps: int, **options: Any) -> list[set[str]]:
    """The layers that each step of LeZO moves; every other parameter of a layer has its bits."""
    params = weights()
    optimizer = zokern.LeZO(list(params.items()), lr=0.1, evaluation="master", **options)
    found = []
    for _ in range(steps):
        before = {name: p.detach().clone() for name, p in params.items()}
        zokern.step(optimizer, lambda: loss(params))
        moved = {name for name, p in params.items() if not same_bits(p, before[name])}
        assert {NAMES[0], NAMES[-1]} <= moved, "a parameter of no layer stayed"
        layers = {layer_of(name) for name in moved} - {None}
        assert moved == {name for name in NAMES if layer_of(name) in {None, *layers}}, (
            "a part of a layer moved"
        )
        found.append(layers)
    return found


def test_a_random_share_of_the_layers_moves() -> None:
    found = layers_of_run(24, sparsity=0.5, seed=3)
    assert {len(layers) for layers in found} == {2} and len(set(map(frozenset, found))) >= 4
    counts = [sum(f"layers.{i}" in layers for layers in found) for i in range(4)]
    assert min(counts) >= 4, f"of 24 steps with 2 of 4 layers they move {counts}"
    assert layers_of_run(24, sparsity=0.5, seed=3) == found != layers_of_run(24, sparsity=0.5, seed=4)
    assert {len(layers) for layers in layers_of_run(3, sparsity=0.99)} == {1}
    assert {len(layers) for layers in layers_of_run(3, sparsity=0.0)} == {4}


def test_the_layers_of_a_step_do_not_depend_on_the_others_that_are_trained() -> None:
    """A layer's word is a function of its name: one that is frozen takes none with it."""
    params = weights()
    optimizer = zokern.LeZO(list(params.items()), sparsity=0.5, seed=3)
    before = [set(optimizer.estimator.chosen(replace(optimizer.plan(), step=s))) for s in range(20)]
    for name in NAMES:
        params[name].requires_grad_(layer_of(name) != "layers.1")
    after = [set(optimizer.estimator.chosen(replace(optimizer.plan(), step=s))) for s in range(20)]
    for one, two in zip(before, after):
        assert {n for n in one if layer_of(n) != "layers.1"} <= two


def test_parts_that_a_step_does_not_name_are_forgotten() -> None:
    """They hold copies of weights: a run whose layers are drawn anew keeps those of two steps, one in blocks
    keeps all of its own."""
    params = weights()
    optimizer = zokern.LeZO(list(params.items()), sparsity=0.5, evaluation="master")
    for _ in range(12):
        zokern.step(optimizer, lambda: loss(params))
        assert len(optimizer.work.scopes) == 1
    parts = zokern.BlockMeZO(list(params.items()), evaluation="master")
    zokern.step(parts, lambda: loss(params))
    kept = {scope: part for scope, ((part, _),) in parts.work.scopes.items()}
    zokern.step(parts, lambda: loss(params))
    assert len(kept) == 6 and all(parts.work.scopes[scope][0][0] is part for scope, part in kept.items())


BAD = {
    "order": (lambda: zokern.Blockwise(order="sor"),
        r"order is 'sor'; expected one of \['gauss-seidel', 'jacobi'\]"),
    "block": (lambda: zokern.Blockwise(block="model"), "block is 'model'; expected one of"),
    "sparsity": (lambda: zokern.Layers(sparsity=1.0), "sparsity is 1.0"),
    "norm": (lambda: zokern.Guided("two"), "norm is 'two'"),
    "rloo": (lambda: zokern.RLOO(Rows(), queries=1), "queries is 1"),
    "clip": (lambda: zokern.Private(clip=0.0), "clip is 0.0"),
    "noise": (lambda: zokern.Private(noise=-1.0), "noise is -1.0"),
    "kind": (lambda: zokern.Private(kind="cauchy"), "kind is 'cauchy'"),
    "batch": (lambda: zokern.Private(batch=0), "batch is 0"),
    "window": (lambda: zokern.AdaMeZO(Rows(), window=0), "length is 0"),
    "of": (lambda: zokern.ZOSignSGD(Rows(), of="weight"),
        r"of is 'weight'; expected one of \['coefficient', 'element'\]"),
    "momentum": (lambda: zokern.ZOMomentum(Rows(), momentum=1.0), "momentum is 1.0"),
}  # fmt: skip


@pytest.mark.parametrize("which", BAD)
def test_bad_arguments_are_refused_by_name(which: str) -> None:
    make, message = BAD[which]
    with pytest.raises(ValueError, match=message):
        make()
