"""Moments made from a window of draws against stored ones,
through all that a run goes through; and what is kept of them.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from models import same_bits
from torch import Tensor, nn

import zokern
from zokern.directions import Lazy

pytestmark = pytest.mark.usefixtures("one_thread")

SHAPES = {"layers.0.up": (6, 5), "layers.0.down": (7,), "layers.1.up": (3, 4), "head": ()}
STEPS = 9


def weights(dtype: torch.dtype = torch.float32) -> dict[str, nn.Parameter]:
    generator = torch.Generator().manual_seed(3)
    return {
        name: nn.Parameter(torch.randn(shape, generator=generator).to(dtype))
        for name, shape in SHAPES.items()
    }


def given(params: dict[str, nn.Parameter]) -> Callable[[], float]:
    """Losses that do not depend on the weights, which are read all the same:
    two runs then have the same coefficients."""
    numbers: Iterator[float] = iter(torch.rand(400, generator=torch.Generator().manual_seed(1)).tolist())
    return lambda: 0.0 * float(sum(p.sum() for p in params.values())) + 1.0 + 0.01 * next(numbers)


def run(
    rule: Any, dtype: torch.dtype = torch.float32, save_at: int | None = None, **options: Any
) -> dict[str, nn.Parameter]:
    """A run with another lr, a step that is skipped,
    a parameter that is frozen for a while, and one that joins."""
    params = weights(dtype)
    alone = {"evaluation": zokern.Scratch(check=False), "paired_check": None, "force": True, "eps": 0.05}
    late, first = dict(list(params.items())[3:]), dict(list(params.items())[:3])

    def make() -> Any:
        return zokern.MeZO(
            list(first.items()),
            lr=0.02,
            weight_decay=0.1,
            rule=copy.deepcopy(rule),
            seed=4,
            **alone,
            **options,
        )

    optimizer, closure, joined = make(), given(params), False
    for step in range(STEPS):
        params["layers.0.down"].requires_grad_(step not in (3, 4))
        if step == 5:
            optimizer.add_param_group({"params": list(late.items())})
            joined = True
        for group in optimizer.param_groups:
            group["lr"] = 0.02 if step < 4 else 0.005
        if step == save_at:
            state, optimizer = copy.deepcopy(optimizer.state_dict()), make()
            if joined:
                optimizer.add_param_group({"params": list(late.items())})
            optimizer.load_state_dict(state)
        if step == 6:
            assert zokern.step(optimizer, lambda: math.nan).skipped
        zokern.step(optimizer, closure)
    return params


def as_adam(kind: type, **options: Any) -> Any:
    """The rule whose sums are those of Adam((0.6, 0.8), 1e-3, bias_correction=False)."""
    return kind((0.6, 0.8), 1e-3 / math.sqrt(0.2), STEPS, 0.4 / math.sqrt(0.2), warmup=False, **options)


CASES: dict[str, tuple[Any, Callable[..., Any], type]] = {
    "momentum": (
        zokern.Momentum(0.7, 0.0),
        lambda kind: kind(0.7, STEPS, average=False),
        zokern.WindowMomentum,
    ),
    "adam": (zokern.Adam((0.6, 0.8), 1e-3, bias_correction=False), as_adam, zokern.WindowAdam),
}
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {}, "queries": {"queries": 3}, "blocks": {"estimator": zokern.Blockwise()},
    "layers": {"estimator": zokern.Layers(zokern.Spsa(2), 0.5)}, "rademacher": {"direction": "rademacher"},
}  # fmt: skip


def check(case: str, options: str, kind: type | None = None) -> None:
    stored, make, right = CASES[case]
    one, two = run(stored, **OPTIONS[options]), run(make(kind or right), **OPTIONS[options])
    for name, p in one.items():
        assert (p - two[name]).abs().max() < 2e-6, f"{name} is not where stored moments lead"


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("case", CASES)
def test_a_window_that_holds_the_run_is_stored_moments(case: str, options: str) -> None:
    check(case, options)


def wrong_kinds(right: type) -> dict[str, type]:
    class OldRates(right):  # type: ignore[valid-type,misc]
        """Estimates are remembered with the lr of their step, as if lr did not change."""

        def update(self, plan, group, weights, lr, decay, states, defer):
            return super().update(plan, group, [lr / 0.02 * w for w in weights], 0.02, decay, states, defer)

    class OneForAll(right):  # type: ignore[valid-type,misc]
        """All parameters have the window of the first one, the frozen and the new ones too."""

        def windows(self, plan, group, weights, states):
            for part, window in super().windows(plan, group, weights, states):
                yield part, self.longest(window)

        def longest(self, window):
            self.kept = max(getattr(self, "kept", []), window, key=len)
            return self.kept

    class Late(right):  # type: ignore[valid-type,misc]
        """The newest estimate is left out."""

        def windows(self, plan, group, weights, states):
            for part, window in super().windows(plan, group, weights, states):
                yield part, window[:-1] or window

    return {"rates of then": OldRates, "one window for all": OneForAll, "a step late": Late}


@pytest.mark.parametrize("wrong", ["rates of then", "one window for all", "a step late"])
@pytest.mark.parametrize("case", ["momentum", "adam"])
def test_a_wrong_window_is_rejected(case: str, wrong: str) -> None:
    with pytest.raises(AssertionError, match="not where stored moments lead"):
        check(case, "plain", wrong_kinds(CASES[case][2])[wrong])


RULES = {
    "momentum": lambda: zokern.WindowMomentum(0.8, 3), "adam": lambda: zokern.WindowAdam(length=3, scale=1.0),
    "early": lambda: zokern.WindowAdam(length=3, scale=1.0, warmup=False),
}  # fmt: skip
ROUNDINGS = [
    (torch.float32, "nearest"),
    (torch.bfloat16, "stochastic"),
    (torch.bfloat16, "residual"),
    (torch.float16, "nearest"),
]


@pytest.mark.parametrize(("dtype", "rounding"), ROUNDINGS)
@pytest.mark.parametrize("save_at", [2, 4, 6])
@pytest.mark.parametrize("rule", RULES)
def test_a_resumed_run_has_the_same_bits(rule: str, save_at: int, dtype: torch.dtype, rounding: str) -> None:
    whole = run(RULES[rule](), dtype, rounding=rounding)
    resumed = run(RULES[rule](), dtype, save_at, rounding=rounding)
    assert all(same_bits(whole[name], resumed[name]) for name in SHAPES)


@pytest.mark.parametrize("rule", RULES)
def test_a_window_that_is_not_saved_is_missed(rule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, right = run(RULES[rule]()), torch.optim.Optimizer.state_dict
    monkeypatch.setattr(torch.optim.Optimizer, "state_dict", lambda self: {**right(self), "state": {}})
    resumed = run(RULES[rule](), save_at=4)
    assert not all(same_bits(whole[name], resumed[name]) for name in SHAPES)


@pytest.mark.parametrize(("dtype", "rounding"), ROUNDINGS)
@pytest.mark.parametrize("rule", RULES)
def test_without_lr_no_bit_moves_and_the_window_does(rule: str, dtype: torch.dtype, rounding: str) -> None:
    params = weights(dtype)
    params["head"].data.fill_(-0.0)
    before = {name: p.detach().clone() for name, p in params.items()}
    options = {"evaluation": "master", "paired_check": None, "force": True, "rounding": rounding}
    optimizer = zokern.MeZO(
        list(params.items()), lr=0.0, eps=0.05, weight_decay=0.1, rule=RULES[rule](), **options
    )
    for _ in range(5):
        zokern.step(optimizer, lambda: sum((p.float() - 1.0).square().sum() for p in params.values()))
    assert all(same_bits(before[name], p) for name, p in params.items())
    assert [len(optimizer.state[p]["window"]) for p in params.values()] == [3] * 4


def test_a_window_is_numbers_and_one_list_for_all_parameters() -> None:
    params = weights()
    optimizer = zokern.AdaMeZO(list(params.items()), window=3, queries=2, seed=9, evaluation="master")
    results = [
        zokern.step(optimizer, lambda: sum((p - 1.0).square().sum() for p in params.values()))
        for _ in range(5)
    ]
    windows = [optimizer.state[p]["window"] for p in params.values()]
    assert len({id(window) for window in windows}) == 1 and all(
        set(optimizer.state[p]) == {"window"} for p in params.values()
    )
    want = [[[r.step, k, -c / 2] for k, c in enumerate(r.coefficients)] for r in results[2:]]
    assert windows[0] == want


@pytest.mark.parametrize(
    "window",
    [
        "no list",
        [1],
        [[[0, 0]]],
        [[[0, 0, 1]]],
        [[[0, -1, 1.0]]],
        [[[2**32, 0, 1.0]]],
        [[[0, 0, math.inf]]],
        [[[True, 0, 1.0]]],
    ],
)
def test_another_window_is_refused_by_name(window: Any) -> None:
    params = weights()
    optimizer = zokern.MeZO(list(params.items()), rule=zokern.WindowMomentum(), evaluation="master")
    before = {name: p.detach().clone() for name, p in params.items()}
    optimizer.state[params["layers.1.up"]]["window"] = window
    named = r"state 'window' of parameter 'layers.1.up' is .*expected a list of updates.*del optimizer.state"
    with pytest.raises(ValueError, match=named):
        zokern.step(optimizer, lambda: sum((p - 1.0).square().sum() for p in params.values()))
    assert all(same_bits(before[name], p) for name, p in params.items())


BAD = {
    "beta": (lambda: zokern.WindowMomentum(1.0), "beta is 1.0"),
    "length": (lambda: zokern.WindowMomentum(length=0), "length is 0"),
    "betas": (lambda: zokern.WindowAdam((0.9, 1.0)), "betas is"),
    "scale": (lambda: zokern.WindowAdam(scale=0.0), "scale is 0.0"),
    "eps": (lambda: zokern.WindowAdam(eps=0.0), "adam_eps is 0.0"),
    "warmup": (lambda: zokern.WindowAdam(warmup=1), "warmup is 1"),
    "low rank": (lambda: zokern.AdaMeZO(nn.Linear(4, 4), direction=Lazy(2)),
        "rule is 'window_adam' with direction .* a dense z"),
}  # fmt: skip


@pytest.mark.parametrize("which", BAD)
def test_bad_arguments_are_refused_by_name(which: str) -> None:
    make, message = BAD[which]
    with pytest.raises(ValueError, match=message):
        make()


def gapped(params: dict[str, nn.Parameter]) -> dict[str, nn.Parameter]:
    """The same weights with other numbers between them."""
    found = {}
    for name, p in params.items():
        room = torch.full((*p.shape[:-1], 2 * p.shape[-1]), 9.0) if p.dim() else torch.full((2,), 9.0)
        view = room[..., ::2] if p.dim() else room[0]
        found[name] = nn.Parameter(view.copy_(p.detach()))
    return found


@pytest.mark.parametrize("rule", RULES)
def test_weights_with_gaps_take_the_same_bits(rule: str) -> None:
    ends: list[dict[str, Tensor]] = []
    for make in (dict, gapped):
        params = make(weights())
        optimizer = zokern.MeZO(
            list(params.items()), lr=0.01, rule=RULES[rule](), evaluation="master", paired_check=None
        )
        closure = given(params)
        for _ in range(5):
            zokern.step(optimizer, closure)
        ends.append({name: p.detach() for name, p in params.items()})
    assert any(not t.is_contiguous() for t in ends[1].values())
    assert all(same_bits(ends[0][name], ends[1][name]) for name in SHAPES)
