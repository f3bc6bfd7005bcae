"""Numbers that the host does not know, as on a GPU, lead to the weights that its own numbers lead to."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any
from unittest.mock import patch

import pytest
import torch
from models import batch, next_token_loss, same_bits, snapshot, tiny
from torch import Tensor, nn

import zokern
from zokern.device_numbers import Weights
from zokern.methods import METHODS
from zokern.plan import Plan
from zokern.rule import Cone

pytestmark = pytest.mark.usefixtures("one_thread")

IDS, STEPS = batch(), 12
LATE = {"AdaMeZO": {"window": 3}, "PGAP": {"rank": 4, "interval": 5}}
EXACT = ("BSZO", "ConMeZO", "PGAP", "Addax", "ZOConservative")  # where a step is skipped, too
NAMES = ("AdaMeZO", "MeZOSVRG", *EXACT)


def unknown() -> Any:
    """Nothing that lies in a tensor is known to the host."""
    return patch.object(Plan, "knows", lambda self, values: False)


def trained(make: Callable[[nn.Module], Any], late: bool, skips: tuple[int, ...] = (), **how: Any) -> dict:
    """Returns the weights after some steps; of those in `skips` the losses are NaN."""
    torch.manual_seed(0)
    model = tiny(how.get("dtype", torch.float32))
    model.head.weight.data[0] = -0.0
    optimizer = make(model)
    with unknown() if late else nullcontext():
        for number in range(STEPS):
            before, ids = snapshot(model), (IDS + number) % int(IDS.max() + 1)

            # at 5 all losses are equal, as where a basis of P-GAP is probed
            factor = math.nan if number in skips else float(number != 5)

            def closure(ids: Tensor = ids, factor: float = factor) -> Tensor:
                return next_token_loss(model(ids), ids) * factor

            assert zokern.step(optimizer, closure).skipped == (number in skips)
            if number in skips and how.get("exact", True):
                assert all(same_bits(before[name], p) for name, p in model.named_parameters())
    return snapshot(model)


def check(make: Callable[[nn.Module], Any], skips: tuple[int, ...] = (), **how: Any) -> None:
    one, two = trained(make, False, skips, **how), trained(make, True, skips, **how)
    wrong = [name for name, weight in one.items() if not same_bits(weight, two[name])]
    assert not wrong, f"{wrong} depend on where numbers lie"


def method(name: str, evaluation: str = "master", **options: Any) -> Callable[[nn.Module], Any]:
    options = {"lr": 1e-2, "eps": 1e-2, "evaluation": evaluation, **LATE.get(name, {}), **options}
    return lambda model: METHODS[name](model, **options)


CASES = [(name, way) for name in NAMES for way in ("master", "inplace", "scratch", "paired")]


@pytest.mark.parametrize(("name", "evaluation"), CASES)
def test_the_same_bits(name: str, evaluation: str) -> None:
    check(method(name, evaluation))


@pytest.mark.parametrize("name", NAMES)
def test_the_same_bits_in_16_bits(name: str) -> None:
    options = {"rounding": "residual", "weight_decay": 0.0 if name == "ZOConservative" else 0.1}
    check(method(name, **options), dtype=torch.bfloat16)


@pytest.mark.parametrize("name", EXACT)
def test_a_skipped_step_is_one_too(name: str) -> None:
    check(method(name), (3, 4, 8))


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("name", ["BSZO", "ZOConservative"])
def test_a_move_by_nan_is_none(name: str, late: bool) -> None:
    """Weights that move in place would stay NaN."""
    trained(method(name, "inplace"), late, (4,), exact=False)


@pytest.mark.parametrize("name", ["AdaMeZO", "ConMeZO", "Addax", "ZOConservative"])
def test_without_lr_no_bit_moves(name: str) -> None:
    model, optimizer = tiny(), None
    model.head.weight.data[0] = -0.0
    before = snapshot(model)
    with unknown():
        for number in range(5):
            optimizer = optimizer or method(name, lr=0.0)(model)
            zokern.step(optimizer, lambda number=number: next_token_loss(model(IDS), IDS) * (number != 3))
    assert all(same_bits(before[key], p) for key, p in model.named_parameters())


@pytest.mark.parametrize("name", ["AdaMeZO", "MeZOSVRG"])
def test_a_skipped_step_moves_nothing(name: str) -> None:
    """It takes a place in a window; after an anchor it is another one."""
    trained(method(name), True, (3, 9))


def test_an_anchor_that_is_not_finite_is_not_used() -> None:
    """Up to the next one steps are skipped, where the host does not know."""
    model, found = tiny(), []
    optimizer = method("MeZOSVRG")(model)
    with unknown():
        for number in range(8):
            closure = lambda n=number: next_token_loss(model(IDS), IDS) * (math.nan if n == 4 else 1.0)  # noqa: E731
            found.append(zokern.step(optimizer, closure).skipped)
    assert [number for number, skipped in enumerate(found) if skipped] == [4, 5]


def test_parts_without_an_optimizer_of_torch_read_nothing() -> None:
    split = lambda: zokern.Split(lambda name: name.startswith("head"))  # noqa: E731
    check(lambda m: zokern.MeZO(m, lr=1e-2, estimator=split(), evaluation="master"), (2,))
    check(lambda m: zokern.LOZO(m, lr=1e-2, estimator=zokern.Mixed(0.5), evaluation="master", defer=False))


def test_a_loss_that_is_not_finite_moves_nothing() -> None:
    model = tiny()
    before, optimizer = snapshot(model), zokern.Addax(model, lr=1e-2, evaluation="master")
    closure = lambda: next_token_loss(model(IDS), IDS)  # noqa: E731
    with unknown():
        result = zokern.step(optimizer, closure, first_order=lambda: closure() * torch.inf)
    assert result.skipped and result.first_order_loss == math.inf
    assert all(same_bits(before[name], p) for name, p in model.named_parameters())


@pytest.mark.parametrize("name", ["ConMeZO", "AdaMeZO", "BSZO", "MeZOSVRG", "PGAP"])
def test_a_state_dict_holds_numbers(name: str) -> None:
    """As where the host knows them; a run goes on from it with the same bits."""
    ends = []
    for save in (False, True):
        model = tiny()
        closure = lambda model=model: next_token_loss(model(IDS), IDS)  # noqa: E731
        optimizer = method(name)(model)
        with unknown():
            for number in range(8):
                if save and number == 4:
                    kept = copy.deepcopy(optimizer.state_dict())
                    left = [t for t in leaves(kept) if isinstance(t, Tensor) and t.dtype == torch.float64]
                    assert not left, f"{left} are in device memory"
                    optimizer = method(name)(model)
                    optimizer.load_state_dict(kept)
                zokern.step(optimizer, closure)
        ends.append(snapshot(model))
    assert all(same_bits(ends[0][key], ends[1][key]) for key in ends[0])


def leaves(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return [leaf for one in value.values() for leaf in leaves(one)]
    return [leaf for one in value for leaf in leaves(one)] if isinstance(value, list) else [value]


class Longer(Cone):
    """Forgets that m has another length now, where it is in device memory."""

    captures = gated = shards = True

    def update(self, plan: Any, group: Any, weights: Any, lr: float, decay: float, states: Any, *rest: Any):
        count = super().update(plan, group, weights, lr, decay, states, *rest)
        for tensor in group.tensors:
            if isinstance(states[tensor]["length"], Tensor):
                states[tensor]["length"] = states[tensor]["length"] * 1.01
        return count


WRONG: dict[str, Callable[[], Any]] = {
    "a length of its own": lambda: check(
        lambda m: zokern.MeZO(m, lr=1e-2, rule=Longer(beta=0.5), evaluation="master")
    ),
    "an update that is not gated": lambda: _with(
        patch.object(Weights, "only", lambda self, sound: self),
        test_a_loss_that_is_not_finite_moves_nothing,
    ),
    "moves of -0.0": lambda: _with(
        patch.object(Weights, "control", lambda self, amounts: self.moves),
        lambda: check(lambda m: zokern.MeZO(m, lr=0.0, rule=zokern.WindowMomentum(), evaluation="master")),
    ),
}


def _with(change: Any, test: Callable[[], None]) -> None:
    with change:
        test()


@pytest.mark.parametrize("wrong", WRONG)
def test_check_rejects(wrong: str) -> None:
    with pytest.raises(AssertionError):
        WRONG[wrong]()
