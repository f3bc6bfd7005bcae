"""A part that several optimizers are given: each run is the run with a part of its own."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
from models import same_bits
from torch import Tensor, nn
from torch.nn import functional as F

import zokern
from zokern import directions
from zokern.methods.pgap import Probed

pytestmark = pytest.mark.usefixtures("one_thread")

X = torch.randn(32, 8, generator=torch.Generator().manual_seed(1))


def net() -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 1))


def loss(model: nn.Module) -> Tensor:
    return F.mse_loss(model(X), X[:, :1] * 0.5)


ESTIMATORS: dict[str, Callable[[], zokern.Estimator]] = {
    "Spsa": lambda: zokern.Spsa(2, "forward"), "Kernel": zokern.Kernel, "Spread": zokern.Spread,
    "Sign": zokern.Sign, "Ranked": zokern.Ranked, "LeaveOneOut": zokern.LeaveOneOut,
    "Conservative": zokern.Conservative, "Guided": zokern.Guided, "Bayesian": zokern.Bayesian,
    "Anchored": lambda: zokern.Anchored(interval=3), "Blockwise": lambda: zokern.Blockwise(zokern.Guided()),
    "Layers": zokern.Layers, "ForwardGradient": zokern.ForwardGradient,
    "Mixed": lambda: zokern.Mixed(0.5, zokern.Bayesian()),
    "Split": lambda: zokern.Split(["2.weight", "2.bias"], zokern.Guided()),
}  # fmt: skip
DIRECTIONS: dict[str, Callable] = {
    "Masked": lambda: zokern.Masked(keep=0.25), "Lazy": lambda: directions.Lazy(rank=2, interval=3),
    "Subspace": lambda: directions.Subspace(rank=2, interval=3),
    "Diagonal": lambda: directions.Diagonal(rank=2),
    "Probed": lambda: Probed(probes=2, rank=2, interval=3),
}  # fmt: skip
RULES: dict[str, Callable[[], zokern.Rule]] = {
    "Sgd": zokern.Sgd, "Momentum": zokern.Momentum, "Adam": zokern.Adam, "SignSgd": zokern.SignSgd,
    "WindowMomentum": zokern.WindowMomentum, "WindowAdam": zokern.WindowAdam, "Averaged": zokern.Averaged,
    "Cone": zokern.Cone, "Projected": lambda: zokern.Projected(interval=2, iterations=2),
}  # fmt: skip
EVALUATIONS: dict[str, Callable] = {
    "Auto": zokern.Auto, "Paired": zokern.Paired, "Scratch": zokern.Scratch, "Master": zokern.Master,
    "InPlace": zokern.InPlace,
}  # fmt: skip
PARTS = {
    **{("estimator", name): make for name, make in ESTIMATORS.items()},
    **{("direction", name): make for name, make in DIRECTIONS.items()},
    **{("rule", name): make for name, make in RULES.items()},
    **{("evaluation", name): make for name, make in EVALUATIONS.items()},
}


def runs(kind: str, *parts: object) -> list[list[Tensor]]:
    """The weights of runs of 5 steps that alternate, one with each part."""
    models = [net() for _ in parts]
    options = {"lr": 1e-2, "seed": 3, "evaluation": "master"}
    if isinstance(parts[0], zokern.ForwardGradient):
        options["evaluation"] = "jvp"
    if kind == "evaluation":  # whose choices show in what is deferred
        options |= {"direction": directions.Subspace(rank=2, interval=4)}
    optimizers = [zokern.MeZO(model, **{**options, kind: part}) for model, part in zip(models, parts)]
    for _ in range(5):
        for model, optimizer in zip(models, optimizers):
            zokern.step(optimizer, lambda model=model: loss(model))
    for optimizer in optimizers:
        optimizer.flush()
    return [[p.detach().clone() for p in model.parameters()] for model in models]


def check_shared(kind: str, make: Callable[[], object]) -> None:
    """One part for run after run, and for runs that alternate."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        (right,), shared = runs(kind, make()), make()
        found = [*runs(kind, shared), *runs(kind, shared), *runs(kind, shared, shared)]
    for number, weights in enumerate(found):
        assert all(map(same_bits, weights, right)), f"run {number} is another one"
    start = list(net().parameters())
    assert not any(map(same_bits, right, start))


@pytest.mark.parametrize(("kind", "name"), PARTS)
def test_a_shared_part_changes_no_run(kind: str, name: str) -> None:
    check_shared(kind, PARTS[kind, name])


def itself(part: type) -> type:
    """A class whose objects are given on with what earlier runs left in them."""
    return type("Itself", (part,), {"fresh": lambda self: self})


def shallow(part: type) -> type:
    """A class whose copies share what runs write."""

    def fresh(self):
        copied = object.__new__(type(self))
        vars(copied).update(vars(self), state=self.state)
        return copied

    return type("Shallow", (part,), {"fresh": fresh})


WRONG = [
    ("estimator", itself(zokern.Guided)), ("estimator", itself(zokern.Bayesian)),
    ("estimator", shallow(zokern.Guided)), ("estimator", shallow(zokern.Bayesian)),
    ("evaluation", itself(zokern.Auto)),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "wrong"), WRONG, ids=str)
def test_check_rejects_parts_that_keep_what_runs_leave(kind: str, wrong: type) -> None:
    with pytest.raises(AssertionError, match="is another one"):
        check_shared(kind, wrong)


def test_check_rejects_an_inner_estimator_that_is_shared() -> None:
    class Around(zokern.Blockwise):
        def begin(self) -> None:
            pass

    with pytest.raises(AssertionError, match="is another one"):
        check_shared("estimator", lambda: Around(zokern.Guided()))


# Trust ------------------------------------------------------------------------------------------------------


def check_trust(make: Callable[[], zokern.Scratch]) -> None:
    """A closure that reads a view made before the step is refused, whatever the evaluation has read."""
    shared, other, model = make(), net(), net()
    for _ in range(2):
        zokern.step(zokern.MeZO(other, evaluation=shared), lambda: loss(other))
    view, before = model[0].weight.detach(), [p.detach().clone() for p in model.parameters()]

    def misread() -> Tensor:
        hidden = torch.tanh(F.linear(X, view, model[0].bias))
        return F.mse_loss(model[2](hidden), X[:, :1] * 0.5)

    with pytest.raises(zokern.Refused, match="cannot follow"):
        zokern.step(zokern.MeZO(model, eps=1e-2, evaluation=shared), misread)
    assert all(map(same_bits, model.parameters(), before))


@pytest.mark.parametrize("evaluation", [zokern.Scratch, zokern.Paired])
def test_a_shared_evaluation_is_compared_in_each_run(evaluation: type) -> None:
    check_trust(evaluation)


@pytest.mark.parametrize("evaluation", [zokern.Scratch, zokern.Paired])
def test_check_rejects_an_evaluation_that_is_trusted_once(evaluation: type) -> None:
    with pytest.raises(pytest.fail.Exception, match="DID NOT RAISE"):
        check_trust(itself(evaluation))


def test_a_given_object_stays_as_it_was() -> None:
    """What a run learns is in the optimizer's own part."""
    guided, model = zokern.Guided(), net()
    optimizer = zokern.MeZO(model, estimator=guided)
    zokern.step(optimizer, lambda: loss(model))
    assert guided.state == {} and optimizer.estimator.state["best"][0] == 0
    assert optimizer.estimator is not guided and type(optimizer.estimator) is zokern.Guided
