"""HiZOO: factors that are learned from three losses. Its formula over 20 steps is in
tests/methods/test_methods.py."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import replace
from unittest.mock import patch

import pytest
import torch
from method_check import check_method
from models import batch, next_token_loss, same_bits, tiny

import zokern
from zokern.estimator import Curvature
from zokern.optimizer import ZerothOrder
from zokern.optimizer.scaling import Scaling

IDS = batch()


def steps(optimizer, model, count: int) -> list:
    return [zokern.step(optimizer, lambda: next_token_loss(model(IDS), IDS)) for _ in range(count)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_smooth_0_is_mezo(dtype: torch.dtype) -> None:
    """Bit for bit, with a third loss and 4 bytes of state a weight;
    a step of theta is read once for all queries."""
    mine, other = tiny(dtype), tiny(dtype)
    given = dict(lr=1e-2, eps=2e-2, seed=5, queries=2, rounding="stochastic", evaluation="master")
    found = (
        steps(zokern.HiZOO(mine, smooth=0.0, **given), mine, 3),
        steps(zokern.MeZO(other, **given), other, 3),
    )
    assert all(map(same_bits, mine.parameters(), other.parameters()))
    for a, b in zip(*found):
        assert [sides[:2] for sides in a.losses] == list(b.losses) and a.losses[0][2] == a.losses[1][2]


def test_steep_directions_are_shortened() -> None:
    """On a x^2 / 2 + b y^2 / 2 with a >> b, s of x falls below that of y."""
    theta = torch.nn.Parameter(torch.tensor([1.0, 1.0]))
    optimizer = zokern.HiZOO([("w", theta)], lr=0.0, eps=1e-3, smooth=0.02, queries=4)
    for _ in range(200):
        zokern.step(optimizer, lambda: (theta.double() ** 2 * torch.tensor([50.0, 0.5])).sum())
    scale = optimizer.state[theta]["scale"]
    assert scale.dtype == torch.float32 and scale[0] < 0.5 * scale[1]


def test_lr_0_moves_no_bit_and_learns() -> None:
    model = tiny()
    before = [p.detach().clone() for p in model.parameters()]
    optimizer = zokern.HiZOO(model, lr=0.0, eps=1e-2, smooth=0.1)
    steps(optimizer, model, 2)
    assert all(map(same_bits, model.parameters(), before))
    assert all((optimizer.state[p]["scale"] != 1).any() for p in model.parameters())


@pytest.mark.parametrize("rule", [zokern.Sgd, zokern.Adam])
def test_resumes_to_the_same_bits(rule) -> None:
    whole, first, second = tiny(), tiny(), tiny()
    given = dict(lr=1e-2, eps=1e-2, smooth=0.1)
    steps(zokern.HiZOO(whole, seed=3, rule=rule(), **given), whole, 5)
    optimizer = zokern.HiZOO(first, seed=3, rule=rule(), **given)
    steps(optimizer, first, 2)
    second.load_state_dict(first.state_dict())
    resumed = zokern.HiZOO(second, seed=9, rule=rule(), **given)
    resumed.load_state_dict(optimizer.state_dict())
    steps(resumed, second, 3)
    assert all(map(same_bits, second.parameters(), whole.parameters()))


def test_backends_learn_the_same_bits() -> None:
    ends = []
    for backend in ("cpu", "reference"):
        model = tiny(torch.bfloat16)
        optimizer = zokern.HiZOO(
            model, lr=1e-2, eps=2e-2, smooth=0.1, backend=backend, evaluation="master", rounding="stochastic"
        )
        steps(optimizer, model, 3)
        ends.append([t for p in model.parameters() for t in (p, optimizer.state[p]["scale"])])
    assert all(map(same_bits, *ends))


def test_a_nan_loss_teaches_nothing() -> None:
    model, broken = tiny(), [False]
    optimizer = zokern.HiZOO(model, lr=1e-2, eps=1e-2, smooth=0.1)

    def closure():
        return next_token_loss(model(IDS), IDS) * (float("nan") if broken[0] else 1.0)

    zokern.step(optimizer, closure)
    kept = [optimizer.state[p]["scale"].clone() for p in model.parameters()]
    broken[0] = True
    assert zokern.step(optimizer, closure).skipped
    assert all(same_bits(optimizer.state[p]["scale"], k) for p, k in zip(model.parameters(), kept))


def test_an_estimator_without_curvature_is_refused() -> None:
    model = tiny()
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(ValueError, match="expected zokern.Curvature"):
        steps(zokern.MeZO(model, direction=zokern.directions.Curved(0.1)), model, 1)
    assert all(map(same_bits, model.parameters(), before))


@contextmanager
def along_the_old_factors():
    """The weights move before the factors have learned, which they do when the next step begins."""
    renew, held = Scaling.renew, []

    def late(self, plan):
        while held:
            self.learn(*held.pop())
        return renew(self, plan)

    with patch.object(ZerothOrder, "learn", lambda self, *given: held.append(given)):
        with patch.object(Scaling, "renew", late):
            yield


def estimated(change: Callable):
    right = Curvature.estimate
    return patch.object(Curvature, "estimate", lambda self, *rest: change(right(self, *rest)))


WRONG = {
    "along the old factors": along_the_old_factors,
    "never learned": lambda: patch.object(Scaling, "learn", lambda *_: None),
    "learned twice": lambda: patch.object(
        ZerothOrder,
        "learn",
        lambda self, *given: [self.scaling.learn(*given) for _ in range(2)],
    ),
    "the whole second derivative": lambda: estimated(lambda e: replace(e, curvatures=e.curvatures * 2)),
    "the curvature of the first query": lambda: estimated(
        lambda e: replace(e, curvatures=e.curvatures[:, :1].expand_as(e.curvatures))
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_version_is_rejected(name: str) -> None:
    given = dict(smooth=0.3, eps=2e-2, queries=2, steps=4)
    check_method("HiZOO", **given)
    with WRONG[name](), pytest.raises(AssertionError):
        check_method("HiZOO", **given)
