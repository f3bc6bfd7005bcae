"""What a saved run is: a state is loaded into the recipe that wrote it,
names decide z and not the order in which they came."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import zokern
from zokern import parameters
from zokern.directions import Aligned, Diagonal, Lazy, Rademacher, Subspace
from zokern.optimizer import checkpoint
from zokern.stream import parameter_id


def layers() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 4))


def loss_of(model: nn.Module) -> Callable[[], Tensor]:
    x = torch.linspace(-1, 1, 36).view(3, 12)
    return lambda: model(x).square().mean()


# Recipes ----------------------------------------------------------------------------------------------------

MeZO, SubZero, LOZO, TeZO, PGAP, FZOO = (
    zokern.MeZO,
    zokern.SubZero,
    zokern.LOZO,
    zokern.TeZO,
    zokern.PGAP,
    zokern.FZOO,
)
WIDE = zokern.Stencil("central", (2.0, -2.0), (0.25, -0.25))
ONE_SIDED = zokern.Stencil("three", (1.0, -1.0, 0.0), (0.5, -0.5, 0.0))
OTHER_WEIGHTS = zokern.Stencil("three", (1.0, -1.0, 0.0), (1.0, 0.0, -1.0))
SPREAD: dict[str, Any] = dict(estimator=zokern.Spread(8), direction="rademacher", lr=5e-5, eps=1e-4)


def with_momentum(**numbers: Any) -> dict[str, Any]:
    return {"rule": zokern.Momentum(**numbers)}


def with_adam(**numbers: Any) -> dict[str, Any]:
    return {"rule": zokern.Adam(**numbers)}


PAIRS: dict[str, tuple[Callable, dict, Callable, dict, str]] = {
    "method": (FZOO, {}, MeZO, SPREAD, "method"),
    "method back": (MeZO, SPREAD, FZOO, {}, "method"),
    "ranks": (TeZO, dict(rank={"0.weight": 5}), TeZO, dict(rank={"0.weight": 6}), "direction.ranks"),
    "no ranks": (TeZO, dict(rank={"0.weight": 5}), TeZO, {}, "direction.ranks"),
    "norm": (SubZero, dict(norm="unit"), SubZero, {}, "direction.norm"),
    "norm of LOZO": (LOZO, dict(norm="unit"), LOZO, {}, "direction.norm"),
    "reshape": (SubZero, dict(reshape="all"), SubZero, {}, "direction.reshape"),
    "delta": (PGAP, dict(rank=3, delta=1.0), PGAP, dict(rank=3), "direction.delta"),
    "delta's fall": (PGAP, dict(rank=3, steps=9), PGAP, dict(rank=3), "direction.steps"),
    "sign": (PGAP, dict(rank=3, sign="step"), PGAP, dict(rank=3), "direction.sign"),
    "probes": (PGAP, dict(rank=3, probes=4), PGAP, dict(rank=3, probes=5), "direction.probes"),
    "oversample": (PGAP, dict(rank=3, oversample=2), PGAP, dict(rank=3), "direction.oversample"),
    "power": (PGAP, dict(rank=3, power=2), PGAP, dict(rank=3), "direction.power"),
    "estimator": (MeZO, dict(estimator=zokern.Sign()), MeZO, {}, "estimator.kind"),
    "clip": (MeZO, dict(estimator=zokern.Spsa(clip=1.0)), MeZO, {}, "estimator.clip"),
    "inner": (MeZO, dict(estimator=zokern.Blockwise(zokern.Sign())), MeZO, dict(estimator=zokern.Blockwise()),
        "estimator.inner"),
    "scale": (MeZO, dict(estimator=zokern.Kernel(scale=4.0)), MeZO, dict(estimator=zokern.Kernel()),
        "estimator.scale"),
    "maximize": (MeZO, dict(maximize=True), MeZO, {}, "maximize"),
    "offsets": (MeZO, dict(stencil=WIDE), MeZO, {}, "estimator.stencil"),
    "weights": (MeZO, dict(stencil=ONE_SIDED), MeZO, dict(stencil=OTHER_WEIGHTS), "estimator.stencil"),
    "beta": (MeZO, with_momentum(beta=0.8), MeZO, with_momentum(), "rule.beta"),
    "dampening": (MeZO, with_momentum(dampening=0.0), MeZO, with_momentum(), "rule.dampening"),
    "betas": (MeZO, with_adam(betas=(0.8, 0.99)), MeZO, with_adam(), "rule.betas"),
    "adam's eps": (MeZO, with_adam(eps=1e-6), MeZO, with_adam(), "rule.eps"),
    "correction": (MeZO, with_adam(bias_correction=False), MeZO, with_adam(), "rule.bias_correction"),
    "inside": (TeZO, dict(rule="adam"), TeZO, with_adam(bias_correction=False), "rule.inside"),
    "dense": (MeZO, dict(direction=Lazy(dense=Rademacher())), MeZO, dict(direction=Lazy()), "direction"),
    "queries": (MeZO, dict(queries=2), MeZO, {}, "estimator.queries"),
    "rounding": (MeZO, dict(rounding="stochastic"), MeZO, {}, "rounding"),
    "a factored direction's class": (MeZO, dict(direction=Subspace(4)), MeZO,
        dict(direction=Aligned(4, 2000)), "direction"),
}  # fmt: skip


def through_a_file(state: dict) -> dict:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("which", PAIRS)
def test_another_recipe_is_refused_and_the_same_one_is_not(which: str) -> None:
    one, first, other, second, named = PAIRS[which]
    state = through_a_file(one(layers(), **first).state_dict())
    one(layers(), **copy.deepcopy(first)).load_state_dict(state)
    there = other(layers(), **second)
    with pytest.raises(
        ValueError, match=rf"state_dict was written with {named}=.*and this optimizer has .*recipe"
    ):
        there.load_state_dict(state)
    state["zokern"]["recipe"] = None
    there.load_state_dict(state)


def test_a_recipe_of_fewer_words_is_rejected(monkeypatch) -> None:
    """As it was: without what the parts say of themselves."""
    monkeypatch.setattr(checkpoint, "described", lambda part: {})
    with pytest.raises(pytest.fail.Exception):
        test_another_recipe_is_refused_and_the_same_one_is_not("norm")


class Tilted(Diagonal):
    """A new direction, which checkpoint.py has not heard of."""

    def __init__(self, tilt: Any) -> None:
        super().__init__(4)
        self.tilt = tilt


class Terse(Subspace):
    """One that says itself what it is."""

    def __init__(self, share: float) -> None:
        super().__init__(4)
        self.cache = torch.rand(3)
        self.share = share

    def described(self) -> dict[str, Any]:
        return {"share": self.share}


def test_a_new_part_describes_itself() -> None:
    state = through_a_file(MeZO(layers(), direction=Tilted(torch.tensor([1.0, 2.0]))).state_dict())
    MeZO(layers(), direction=Tilted(torch.tensor([1.0, 2.0]))).load_state_dict(state)
    for tilt in (torch.tensor([1.0, 3.0]), 2, None, {"a": (1, 2)}, Rademacher()):
        with pytest.raises(ValueError, match="direction.tilt"):
            MeZO(layers(), direction=Tilted(tilt)).load_state_dict(state)
    state = MeZO(layers(), direction=Terse(0.5)).state_dict()
    MeZO(layers(), direction=Terse(0.5)).load_state_dict(state)
    with pytest.raises(ValueError, match=r"direction.share=0.5 and this optimizer has 0.25"):
        MeZO(layers(), direction=Terse(0.25)).load_state_dict(state)


def test_a_state_without_the_new_words_is_loaded() -> None:
    """With fewer words than this version writes: direction, rule, rounding, rank and interval."""
    state = PGAP(layers(), rank=3, interval=7, rule=zokern.Momentum()).state_dict()
    state["zokern"]["recipe"] = {
        "direction": "aligned and normal", "rule": "momentum", "rounding": "nearest", "rank": 3,
        "interval": 7,
    }  # fmt: skip
    optimizer = PGAP(layers(), rank=3, interval=7, rule=zokern.Momentum())
    optimizer.load_state_dict(state)
    state["zokern"]["recipe"]["interval"] = 8
    with pytest.raises(ValueError, match="interval=8"):
        optimizer.load_state_dict(state)


def test_a_recipe_is_made_of_plain_values() -> None:
    import numpy as np

    recipe = MeZO(
        layers(),
        rule=zokern.Momentum(np.float64(0.5)),
        estimator=zokern.Spsa(clip=np.float32(2.0)),
        direction=Tilted(np.int64(3)),
    ).state_dict()["zokern"]["recipe"]
    assert recipe["rule.beta"] == 0.5 and recipe["direction.tilt"] == 3

    def leaves(value: Any) -> list[type]:
        if isinstance(value, (dict, list)):
            return [
                kind for one in (value.values() if isinstance(value, dict) else value) for kind in leaves(one)
            ]
        return [type(value)]

    assert set(leaves(recipe)) <= {int, float, str, bool, type(None)}


# Names and ids ----------------------------------------------------------------------------------------------

A, B = "w116065", "w29009"  # of one 32-bit id


def test_the_names_collide() -> None:
    assert parameter_id(A) == parameter_id(B)


def test_ids_are_a_function_of_the_set_of_names() -> None:
    found, salted = parameters.ids([A, B])
    assert found == parameters.ids([B, A])[0] and len(set(found.values())) == 2 and set(salted) == {B}
    later, said = parameters.ids([B, "x"], parameters.ids([A])[0])
    assert {name: later[name] for name in (A, B)} == found and set(said) == {B}
    assert parameters.ids(["x"], found) == ({**found, "x": parameter_id("x")}, {})


def test_a_name_that_would_change_the_id_of_another_is_refused() -> None:
    """w29009 came first and drew the z that is w116065's where both are known:
    no order decides this in silence."""
    with pytest.raises(ValueError, match=rf"{A!r} has the 32-bit id of {B!r}.*when it is built"):
        parameters.ids([A], parameters.ids([B])[0])


def optimizer_of(groups: list[list[str]]) -> zokern.MeZO:
    return zokern.MeZO(
        [{"params": [(name, nn.Parameter(torch.ones(3)))]} for names in groups for name in names]
    )


def test_groups_in_another_order_have_the_same_ids_or_are_refused() -> None:
    found = optimizer_of([[A], [B]]).ids
    assert found == parameters.ids([A, B])[0]
    try:
        other = optimizer_of([[B], [A]]).ids
    except ValueError as error:
        assert "32-bit id" in str(error)
    else:
        assert other == found


# A spread of one loss ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options", [dict(stencil="forward"), dict(stencil=zokern.Stencil("one", (2.0, 0.0), (0.5, -0.5)))]
)
def test_a_spread_of_one_loss_is_refused(options: dict) -> None:
    """It is 0 in every step, and nothing would ever move."""
    model = layers()
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(ValueError, match="queries is 1 with stencil.*no spread"):
        zokern.Spread(1, **options)
    moved = zokern.MeZO(model, estimator=zokern.Spread(2, **options), lr=1e-3)
    assert not zokern.step(moved, loss_of(model)).skipped and not torch.equal(before[0], model[0].weight)
    # two sides are a spread
    zokern.step(zokern.MeZO(model, estimator=zokern.Spread(1, "central"), lr=1e-3), loss_of(model))
