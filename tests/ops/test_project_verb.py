"""The public verb `project`, and the verbs that take its control. Bits: tests/backends/test_project.py."""

from __future__ import annotations

import math

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import zokern
from zokern.backends import PROJECTED

SPSA = (0.5, -0.5)
BACKENDS = ("cpu", "reference")


@pytest.mark.parametrize("backend", BACKENDS)
def test_projected_gradient(backend: str) -> None:
    """Algorithm 1 of Malladi et al. 2023, with micro-batches, several draws, a clip and a decay."""
    c, w, a, control = zokern.project([2.5, 2.0], SPSA, eps=1e-3, lr=1e-2, weight_decay=0.1, backend=backend)
    assert c.dtype == w.dtype == torch.float64 and a.dtype == control.dtype == torch.float32
    assert c.item() == pytest.approx(250.0) and w.item() == -c.item() and a.item() == pytest.approx(-2.5)
    assert control.tolist() == [pytest.approx(0.999), 1.0, 1.0]
    losses = torch.tensor([[3.0, 1.0, 2.0], [4.0, 1.0, 0.0]], dtype=torch.bfloat16)
    both = [[1.0, -1.0, 0.0], [0.0, 1.0, -1.0]]
    found = zokern.project(losses, both, eps=1.0, lr=1.0, clip=2.0, maximize=True, backend=backend)
    assert found.coefficients.tolist() == [2.0, 0.0] and found.weights.tolist() == [1.0, 0.0]
    assert zokern.project(losses, both, eps=1, lr=1, count=5, backend=backend).weights.tolist() == [-0.5, 0.0]
    told = zokern.project(torch.tensor([4.0, -2.0]), eps=1.0, lr=0.5, backend=backend)  # no weights
    assert told.coefficients.tolist() == [4.0, -2.0] and told.amounts.tolist() == [-1.0, 0.5]


def test_numbers_on_the_device() -> None:
    """Losses as a closure returns them, and an lr that a scheduler writes."""
    lr = torch.tensor(0.5)
    given = [[torch.tensor(2.0), torch.tensor(1.0, dtype=torch.float64)], [torch.tensor([4.0]), 1.0]]
    for _ in range(2):
        found = zokern.project(given, SPSA, eps=torch.tensor(1.0), lr=lr)
        assert found.amounts.item() == -lr.item()
        lr.mul_(0.5)
    grown = torch.tensor([2.0, 1.0], requires_grad=True)
    assert not zokern.project(grown * 2, SPSA, eps=1.0, lr=1.0).weights.requires_grad


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_step_with_no_value_on_the_host(backend: str) -> None:
    """axpy_, update_ and lowrank_ under a control: a step, one that is not finite, and one of zeros."""
    for losses, finite, moves in (([2.5, 2.0], True, True), ([math.nan, 2.0], False, False),
                                  ([2.0, 2.0], True, False)):  # fmt: skip
        found = zokern.project(losses, SPSA, eps=1e-3, lr=1e-3, weight_decay=0.5 if moves else 0.0,
                               backend=backend)  # fmt: skip
        names = dict(seed=3, who="w", draws=[(7, 0)], backend=backend)
        mine, right = torch.ones(40), torch.ones(40)
        zokern.axpy_(mine, "normal", **names, coeffs=found.amounts, control=found.control)
        if moves:
            zokern.axpy_(right, "normal", **names, coeffs=found.amounts, decay=found.control[0].item())
        assert torch.equal(mine, right) and torch.equal(mine, torch.ones(40)) is not moves
        (theta, m), (other, n) = ([torch.ones(40), torch.ones(40)] for _ in range(2))
        names |= dict(rule="momentum", scalars=(0.9, 1e-3, 0.9, 0.1), coeffs=found.weights.float())
        zokern.update_(theta, "normal", states=[m], **names, control=found.control)
        if finite:
            zokern.update_(other, "normal", states=[n], **names)
        assert (
            torch.equal(theta, other) and torch.equal(m, n) and torch.equal(m, torch.ones(40)) is not finite
        )
        u, v = torch.randn(5, 2), torch.randn(8, 2)
        mine, right = torch.ones(5, 8), torch.ones(5, 8)
        count = zokern.lowrank_(mine, u, v, decay=0.3, control=found.control, backend=backend)
        if moves:
            zokern.lowrank_(right, u, v, decay=found.control[0].item(), backend=backend)
        assert torch.equal(mine, right) and count.item() == 0
    x, clock = torch.ones(5, 8).bfloat16(), torch.tensor([4])
    zokern.lowrank_(x, u, v, who="w", rounding="stochastic", step=3, clock=clock, backend=backend)
    y = torch.ones(5, 8).bfloat16()
    zokern.lowrank_(y, u, v, who="w", rounding="stochastic", step=7, backend=backend)
    assert torch.equal(x, y)


@pytest.mark.parametrize("backend", BACKENDS)
def test_operations_pass_opcheck(backend: str) -> None:
    losses, scalars = torch.rand(2, 3).double(), torch.ones(len(PROJECTED)).double()
    for weights in (torch.rand(4, 3).double(), None):
        given = dict(losses=losses, weights=weights, scalars=scalars, backend=backend)
        torch.library.opcheck(torch.ops.zokern.project, (), given)
    control = torch.tensor([0.9, 1.0, 1.0])
    given = dict(tensors=[torch.ones(9)], direction="normal", seed=1, who=[1], steps=[0], draws=[0],
                 first=[0], coeffs=torch.ones(1), rounding="nearest", residuals=[], clock=None,
                 backend=backend)  # fmt: skip
    torch.library.opcheck(torch.ops.zokern.axpy_, (), given | dict(decay=[1.0], each=0, control=control))
    rule = dict(rule="momentum", states=[torch.ones(9)], scalars=torch.ones(4), control=control)
    torch.library.opcheck(torch.ops.zokern.update_, (), given | rule)


def test_compiled() -> None:
    """A graph breaks nothing, and tensors without values have the shapes of a call."""

    def step(theta, losses):
        found = zokern.project(losses, SPSA, eps=1e-3, lr=1e-3, weight_decay=0.1)
        zokern.axpy_(theta, "normal", seed=3, who="w", draws=[(7, 0)], coeffs=found.amounts,
                     control=found.control)  # fmt: skip
        return found.control

    for losses in (torch.tensor([2.5, 2.0]), torch.tensor([math.inf, 2.0])):
        mine, right = torch.ones(40), torch.ones(40)
        told = torch.compile(step, backend="eager")(mine, losses)
        assert torch.equal(told, step(right, losses)) and torch.equal(mine, right)
    with FakeTensorMode():
        found = zokern.project(torch.empty(2, 3), torch.empty(4, 3).double(), eps=1.0, lr=1.0)
        assert [(t.shape, t.dtype) for t in found] == [((4,), torch.float64)] * 2 + [
            ((4,), torch.float32),
            ((3,), torch.float32),
        ]


GOOD = dict(losses=[1.0, 2.0], weights=SPSA, eps=1e-3, lr=1e-3)
AXPY = dict(seed=0, who="w", draws=[(0, 0)], coeffs=[1.0])
BAD = [
    (lambda: zokern.project(**GOOD | dict(losses=torch.tensor([1, 2]))), "losses is torch.int64"),
    (lambda: zokern.project(**GOOD | dict(losses=[])), r"losses is \[\]; expected a tensor, or rows"),
    (lambda: zokern.project(**GOOD | dict(losses="ab")), "losses is 'ab'"),
    (lambda: zokern.project(**GOOD | dict(losses=torch.ones(1, 1, 2))), r"float32\[1, 1, 2\]; expected"),
    (lambda: zokern.project(**GOOD | dict(losses=[[1.0, 2.0], [1.0]])), "rows of as many numbers each"),
    (lambda: zokern.project(**GOOD | dict(losses=[torch.ones(2), 1.0])), "rows of as many numbers each"),
    (lambda: zokern.project(**GOOD | dict(weights=[1.0])), "weights has 1 columns for 2 losses"),
    (lambda: zokern.project(**GOOD | dict(weights=[1.0, math.inf])), "weights is .*inf"),
    (lambda: zokern.project(**GOOD | dict(weights=torch.ones(2, device="meta"))), "weights is on meta"),
    (lambda: zokern.project(**GOOD | dict(eps=0.0)), "project: eps is 0.0; expected a finite number > 0"),
    (lambda: zokern.project(**GOOD | dict(lr=-1.0)), "project: lr is -1.0; expected a finite number >= 0"),
    (lambda: zokern.project(**GOOD | dict(lr=torch.ones(2))), r"lr is torch.float32\[2\] on cpu"),
    (lambda: zokern.project(**GOOD | dict(weight_decay=math.nan)), "weight_decay is nan"),
    (lambda: zokern.project(**GOOD | dict(clip=-1.0)), "clip is -1.0"),
    (lambda: zokern.project(**GOOD | dict(count=0)), "count is 0"),
    (lambda: zokern.project(**GOOD | dict(maximize=1)), "maximize is 1"),
    (lambda: zokern.axpy_(torch.ones(3), "normal", **AXPY, control=torch.ones(2)), r"control is .*\[2\]"),
    (lambda: zokern.axpy_(torch.ones(3), "normal", **AXPY, each=True, control=torch.ones(3)), "each is True"),
    (lambda: zokern.lowrank_(torch.ones(3, 2), torch.ones(3, 1), torch.ones(2, 1),
        control=torch.ones(3).double()), "lowrank_: control is torch.float64"),
    (lambda: zokern.lowrank_(torch.ones(3, 2), torch.ones(3, 1), torch.ones(2, 1), clock=torch.ones(1)),
        "lowrank_: clock is torch.float32"),
]  # fmt: skip


@pytest.mark.parametrize(("wrong", "message"), BAD)
def test_wrong_arguments_are_refused(wrong, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        wrong()
