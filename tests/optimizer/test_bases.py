"""Momentum knows the basis that it belongs to: a matrix that was frozen while bases changed goes on as it
would have, saved or not."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import zokern
from zokern import group
from zokern.backends import Span, get
from zokern.directions import Diagonal, Lazy, Matrix, Normal, Subspace
from zokern.group import Group
from zokern.modules import Tree
from zokern.plan import Plan
from zokern.rule import basis_of, renew

CPU = torch.device("cpu")
INTERVAL = 3
DIRECTIONS = {
    "subspace": Subspace(4, INTERVAL, reshape="none"),
    "lazy": Lazy(2, INTERVAL),
    "diagonal": Diagonal(3),
}


class Run:
    """Two matrices and their momentum, stepped by hand; updates wait, and are taken out after every step."""

    def __init__(self, name: str) -> None:
        self.direction, self.rule = DIRECTIONS[name], zokern.Momentum(0.9)
        self.tensors = [torch.zeros(14, 10), torch.zeros(11, 10)]
        self.states: dict[Tensor, dict] = {tensor: {} for tensor in self.tensors}
        self.forget()

    def forget(self) -> None:
        """What is not in the saved state: matrices without bases."""
        rank = self.direction.rank
        self.matrices = [
            Matrix(name, i, *t.shape, rank, CPU) for i, (name, t) in enumerate(zip("ab", self.tensors))
        ]

    def step(self, step: int, active: list[int]) -> list[Tensor]:
        members = (
            [self.tensors[i] for i in active],
            [Span(i) for i in active],
            [self.matrices[i] for i in active],
        )
        group = Group(
            [m.name for m in members[2]], members[0], members[1], None, 1e-3, {}, get("cpu"), members[2]
        )
        plan = Plan([group], Normal(), 3, step, "nearest", Tree([]), self.direction, words=(0,))
        renew(self.rule, self.direction, group, self.states, 3, step)
        self.rule.update(plan, group, [0.5], 0.1, 1.0, self.states, defer=True)
        found = [m.pending for m in members[2] if m.pending is not None]
        for matrix in members[2]:
            matrix.pending = None
        return found

    def saved(self) -> Any:
        return [copy.deepcopy(self.states[tensor]) for tensor in self.tensors]

    def load(self, state: Any) -> None:
        self.states = dict(zip(self.tensors, copy.deepcopy(state)))
        self.forget()


FROZEN = [[0, 1]] * 2 + [[0]] * 6 + [[0, 1]] * 3  # the second matrix sleeps over the bases of steps 3 and 6


@pytest.mark.parametrize("at", range(1, len(FROZEN)))
@pytest.mark.parametrize("name", DIRECTIONS)
def test_resumed_at_any_step(name: str, at: int) -> None:
    through, resumed = Run(name), Run(name)
    for step, active in enumerate(FROZEN):
        wanted = through.step(step, active)
        if step == at:
            resumed.load(resumed.saved())
        found = resumed.step(step, active)
        assert all(map(torch.equal, wanted, found)), f"step {step}"
    for one, other in zip(through.saved(), resumed.saved()):
        assert one["basis"] == other["basis"] and torch.equal(one["momentum"], other["momentum"])


def test_a_state_that_does_not_say_its_basis_is_rejected() -> None:
    """As it was: the basis of the last step was taken for
    that of a momentum which had slept. Without sleep it is."""

    class Silent(Run):
        def saved(self) -> Any:
            return [
                {key: value for key, value in state.items() if key != "basis"} for state in super().saved()
            ]

    def run(pattern: list[list[int]]) -> Iterator[bool]:
        through, resumed = Run("subspace"), Silent("subspace")
        for step, active in enumerate(pattern):
            wanted = through.step(step, active)
            if step == 8:
                resumed.load(resumed.saved())
            yield all(map(torch.equal, wanted, resumed.step(step, active)))

    assert all(run([[0, 1]] * len(FROZEN)))
    assert not all(run(FROZEN))


def test_rules_say_what_their_state_belongs_to() -> None:
    tensor = torch.zeros(2)
    states: dict[Tensor, dict] = {tensor: {"momentum": torch.zeros(1), "basis": 6}}
    assert basis_of(zokern.Momentum(), states, tensor) == 6 and basis_of(zokern.Sgd(), states, tensor) is None
    assert (
        basis_of(zokern.Momentum(), {}, tensor) is None
        and basis_of(zokern.Momentum(), {tensor: {}}, tensor) is None
    )
    assert basis_of(zokern.Momentum(), {tensor: {"momentum": torch.zeros(1)}}, tensor) == -1

    class Own(zokern.Rule):
        """A rule of the user's, without a basis."""

    assert basis_of(Own(), states, tensor) is None


# P-GAP, whose bases come from measured losses ---------------------------------------------------------------


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.a, self.b = nn.Linear(10, 14, bias=False), nn.Linear(14, 6, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.tanh(self.a(x)))


def pgap(model: Model) -> zokern.PGAP:
    return zokern.PGAP(
        model,
        lr=1e-2,
        eps=1e-2,
        rank=3,
        interval=INTERVAL,
        probes=3,
        norm="unit",
        rule=zokern.Momentum(0.9),
        defer=False,
        evaluation="scratch",
    )


def stepped(optimizer: zokern.PGAP, model: Model, steps: range) -> None:
    x = torch.linspace(-1, 1, 50).view(5, 10)
    for step in steps:
        model.b.weight.requires_grad_(1 in FROZEN[step])
        zokern.step(optimizer, lambda: model(x).square().mean())


@pytest.mark.parametrize("at", [2, 4, 7, 8, 9, 10])
def test_pgap_resumed_at_any_step(at: int) -> None:
    model = Model()
    through = pgap(model)
    stepped(through, model, range(at))
    other = Model()
    other.load_state_dict(model.state_dict())
    state = copy.deepcopy(through.state_dict())
    if 2 < at < 9:
        assert 0 in state["zokern"]["state"]["direction"], (
            "the basis that the frozen matrix' momentum belongs to"
        )
    resumed = pgap(other)
    resumed.load_state_dict(state)
    stepped(through, model, range(at, len(FROZEN)))
    stepped(resumed, other, range(at, len(FROZEN)))
    assert torch.equal(model.a.weight, other.a.weight) and torch.equal(model.b.weight, other.b.weight)
    assert set(through.factored.state) <= {0, 3, 6, 9}


def test_pgap_without_the_former_probes_is_rejected() -> None:
    """As it was saved before: then the basis is not known, and this is said."""
    model = Model()
    optimizer = pgap(model)
    stepped(optimizer, model, range(7))
    state = copy.deepcopy(optimizer.state_dict())
    del state["zokern"]["state"]["direction"][0]
    resumed = pgap(model.requires_grad_())
    resumed.load_state_dict(state)
    with pytest.raises(
        RuntimeError, match="'b.weight' belongs to the basis of step 0, whose probes are not known"
    ):
        stepped(resumed, model, range(7, len(FROZEN)))


def test_pgap_forgets_bases_that_nothing_belongs_to() -> None:
    model = Model()
    optimizer = pgap(model)
    stepped(optimizer, model, range(len(FROZEN)))
    assert set(optimizer.factored.state) == {9}


def walk(name: str) -> list[Tensor]:
    """Returns the weights after steps of three queries, and the losses that were read."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(12, 10, bias=False), nn.Tanh(), nn.Linear(10, 12, bias=False))
    optimizer = zokern.MeZO(model, lr=1e-2, eps=1e-2, queries=3, direction=DIRECTIONS[name])
    x = torch.linspace(-1, 1, 60).view(5, 12)
    steps = [zokern.step(optimizer, lambda: model(x).square().mean()) for _ in range(4)]
    optimizer.flush()
    losses = torch.tensor([result.losses for result in steps], dtype=torch.float64)
    return [losses, *(p.detach().clone() for p in model.parameters())]


def check_memory_of_draws(name: str, monkeypatch) -> None:
    found = walk(name)
    monkeypatch.setattr(group._Stream, "_lent", staticmethod(group._Stream._memory))
    assert all(map(torch.equal, found, walk(name)))


@pytest.mark.parametrize("name", DIRECTIONS)
def test_memory_of_draws_that_stays_changes_nothing(name: str, monkeypatch) -> None:
    check_memory_of_draws(name, monkeypatch)


@pytest.mark.parametrize("name", ["subspace", "lazy"])
def test_memory_that_two_draws_share_is_rejected(name: str, monkeypatch) -> None:
    """As where a group forgets its draws before the step is over."""
    right = group._Stream._lent

    def shared(stream: Any, matrices: Any, shapes: Any) -> list[Tensor]:
        memo = stream.group.memo
        memo.setdefault("spare", []).extend(memo.pop("lent", ()))
        return right(stream, matrices, shapes)

    monkeypatch.setattr(group._Stream, "_lent", shared)
    with pytest.raises((AssertionError, zokern.evaluation.NotRepeatable)):
        check_memory_of_draws(name, monkeypatch)
