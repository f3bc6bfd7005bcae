"""Warnings point at the line of the user that the step was called from."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from unittest.mock import patch

import models
import pytest
import torch

import zokern
from zokern import backends, first_step, result
from zokern.evaluation import auto

IDS = models.batch()


def dead_update(step: Callable) -> None:
    model = models.tiny(torch.bfloat16)
    step(zokern.MeZO(model, lr=1e-9, eps=1e-2, force=True), lambda: models.next_token_loss(model(IDS), IDS))


def other_evaluation(step: Callable) -> None:
    """A loss that is a Python number is no loss of all sides:
    'auto' goes on with another way after the first step."""
    model = models.tiny()
    optimizer = zokern.MeZO(model, lr=0.0, eps=1e-3)
    for _ in range(2):
        step(optimizer, lambda: models.next_token_loss(model(IDS), IDS).item())


def statistics(step: Callable) -> None:
    model, x = torch.nn.BatchNorm1d(4), torch.randn(8, 4)
    step(zokern.MeZO(model, lr=0.0, eps=1e-3), lambda: model(x)[0].square().sum())


def swallowed(step: Callable) -> None:
    model, x = torch.nn.LayerNorm(64, dtype=torch.bfloat16), torch.randn(4, 64)
    step(
        zokern.MeZO(model, lr=0.0, eps=1e-3, evaluation="master"),
        lambda: model(x.bfloat16()).float()[:, :9].sum(),
    )


def slow_backend(step: Callable) -> None:
    model = models.tiny()
    backends.default.cache_clear()
    with patch.object(
        backends, "why_off", lambda name, device=None: None if name == "reference" else "not built"
    ):
        step(zokern.MeZO(model, lr=0.0, eps=1e-3), lambda: models.next_token_loss(model(IDS), IDS))
    backends.default.cache_clear()


WAYS: dict[str, Callable] = {
    "zokern.step": zokern.step,
    "optimizer.step": lambda opt, closure: opt.step(closure),
}


def check(cause: Callable, way: Callable) -> None:
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        cause(way)
    files = [w.filename for w in found if w.category is RuntimeWarning]
    assert files == [__file__], files


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
@pytest.mark.parametrize(
    "cause", [dead_update, other_evaluation, statistics, swallowed, slow_backend], ids=lambda f: f.__name__
)
def test_warnings_point_at_the_user(cause: Callable, way: Callable) -> None:
    check(cause, way)


def test_a_fixed_level_is_rejected() -> None:
    def fixed(message: str) -> None:
        warnings.warn(message, RuntimeWarning, stacklevel=6)

    for module, cause in (
        (result, dead_update),
        (auto, other_evaluation),
        (result, swallowed),
        (first_step, statistics),
    ):
        with patch.object(module, "warn", fixed), pytest.raises(AssertionError):
            for way in WAYS.values():
                check(cause, way)
