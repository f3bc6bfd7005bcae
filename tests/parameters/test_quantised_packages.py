"""Frozen bases of quantisation packages under LoRA, each where its packages are installed.

The losses are those of a loop by hand, the adapters learn, and the frozen bytes stay."""

from __future__ import annotations

import copy
import logging
import sys
from pathlib import Path

import pytest
import torch
from quantised import by_hand
from torch import nn

import zokern

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from benchmarks.quantised import BASES, closure_of, copies, load  # noqa: E402

EVALUATIONS = ("auto", "paired", "master", "scratch", "inplace")
MAPPED = {"bitsandbytes int8": "torch.vmap cannot map the closure.*setup_context"}  # what 'paired' refuses
SEED, EPS, LR, STEPS = 0, 1e-2, 3e-2, 4
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:this closure is read by evaluation:RuntimeWarning"),
]
quantised = pytest.mark.parametrize("base", [name for name in BASES if name != "float32"])


@pytest.fixture(autouse=True)
def quiet():
    """bitsandbytes writes a line for each product of 8 bits."""
    logger = logging.getLogger("bitsandbytes")
    level = logger.level
    logger.setLevel(logging.ERROR)
    yield
    logger.setLevel(level)


def made(base: str, kept: dict[str, nn.Module] = {}) -> nn.Module:  # noqa: B006 (made once)
    """A copy of the model of a base, whose first forward has not run."""
    if missing := BASES[base].missing:
        pytest.skip(f"not installed: {', '.join(missing)}")
    if base not in kept:
        kept[base] = load(base)
    return copy.deepcopy(kept[base])


def check(base: str, evaluation: str, lr: float = LR, model: nn.Module | None = None) -> None:
    """Losses of every step, and adapters at the end, against a loop by hand over a twin; frozen bytes."""
    model, twin = model or made(base), made(base)
    loss, right = closure_of(model), closure_of(twin)
    with torch.no_grad():
        right()
    optimizer = zokern.MeZO(model, lr=lr, eps=EPS, seed=SEED, evaluation=evaluation)
    assert all("lora_" in name for name in optimizer.param_groups[0]["param_names"])
    before = []
    # in 16 bits, and where the weights move, losses are rounded elsewhere
    tolerance = 2e-5 if evaluation != "inplace" and BASES[base].dtype == torch.float32 else 2e-3
    for step in range(STEPS):
        result = zokern.step(optimizer, loss)
        before = before or copies(model)
        expected = by_hand(twin, lambda call: closure_of(call)(), step, LR, EPS, SEED)
        exact = evaluation == "master" and step == 0
        allowed = expected if exact else pytest.approx(expected, rel=tolerance)
        assert result.losses[0] == allowed, f"step {step} reads another loss"
    assert all(map(torch.equal, before, copies(model))), "a frozen byte has changed"
    moved = [p for p in model.parameters() if p.requires_grad]
    others = [p for p in twin.parameters() if p.requires_grad]
    scale = sum(float((p - q).square().sum()) for p, q in zip(others, start(base)))
    apart = sum(float((p - q).square().sum()) for p, q in zip(moved, others))
    assert scale > 0 and apart < 0.2 * scale, "the adapters went elsewhere"


def start(base: str) -> list[torch.Tensor]:
    return [p for p in made(base).parameters() if p.requires_grad]


@pytest.mark.parametrize("evaluation", EVALUATIONS)
@quantised
def test_adapters_on_a_base(base: str, evaluation: str) -> None:
    if evaluation == "paired" and base in MAPPED:
        model = made(base)
        with pytest.raises(RuntimeError, match=MAPPED[base]):
            zokern.step(zokern.MeZO(model, lr=LR, evaluation="paired"), closure_of(model))
        return
    check(base, evaluation)


@quantised
def test_adapters_learn(base: str) -> None:
    model = made(base)
    loss = closure_of(model)
    optimizer = zokern.MeZO(model, lr=LR, eps=EPS, seed=SEED)
    with torch.no_grad():
        before = float(loss())
        for _ in range(30):
            zokern.step(optimizer, loss)
        assert float(loss()) < before - 0.02


@quantised
def test_check_rejects_a_step_of_nothing_and_another_base(base: str) -> None:
    with pytest.raises(AssertionError, match="another loss|elsewhere"):
        check(base, "master", lr=0.0)
    other = made(base)
    with torch.no_grad():
        for name, p in other.named_parameters():
            if name.endswith("norm.weight"):
                p.mul_(1.1)
    with pytest.raises(AssertionError, match="reads another loss"):
        check(base, "master", model=other)


def test_a_gguf_base_has_the_numbers_of_its_file() -> None:
    """Q8_0 keeps 8 bits: within half a step of 1/127 of the largest of 32 numbers."""
    model, full = made("GGUF Q8_0"), load("float32")
    right = dict(full.named_parameters())
    apart = {n: p - right[n] for n, p in model.named_parameters() if "lora_" not in n and p.dim() > 1}
    assert apart and any(d.any() for d in apart.values())
    for name, d in apart.items():
        blocks = right[name].reshape(-1, 32).abs().amax(1, keepdim=True)
        assert (d.reshape(-1, 32).abs() <= 0.51 * blocks / 127 + 1e-3 * blocks).all(), name


def test_a_checkpoint_of_a_base_of_4_bits_is_packed_again() -> None:
    """Where bitsandbytes packs weights (AVX-512 with bfloat16), its state_dict unpacks them."""
    model = made("bitsandbytes nf4")
    loss = closure_of(model)
    optimizer = zokern.MeZO(model, lr=0.0, eps=EPS, seed=SEED)
    with torch.no_grad():
        zokern.step(optimizer, loss)
        model.state_dict()
        twin = copy.deepcopy(model)
        expected = float(closure_of(twin)())  # packed by its own forward
        for _ in range(3):
            zokern.step(optimizer, loss)
        assert float(loss()) == expected
