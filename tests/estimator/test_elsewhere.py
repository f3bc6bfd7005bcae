"""Losses at other weights than the parameters hold:
read right under every evaluation, and put back to the bit."""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import pytest
import torch
from models import at_use, batch, changed, next_token_loss, same_bits, snapshot, tiny
from torch import Tensor

import zokern
from zokern.estimator import Base, Estimate, Oracle
from zokern.evaluation import THETA, Point

pytestmark = pytest.mark.usefixtures("one_thread")

IDS = batch()
EVALUATIONS = ("master", "paired", "scratch", "inplace", "auto", "scratch, at use", "paired, at use")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Elsewhere(zokern.Spsa):
    """Reads L(values) and L(values + eps z), and moves nothing; values are float32, by name."""

    def __init__(self, values: dict[str, Tensor]) -> None:
        super().__init__()
        self._values, self.found = values, []

    def write(self, group, states, factor: float) -> None:
        for i, name in enumerate(group.names):
            group.put(i, factor * self._values[name])

    def __call__(self, oracle, plan) -> Iterator[Estimate]:
        with oracle.at(Base(self.write, 1.0)):
            losses = oracle.losses([THETA, Point(((plan.draw(0), 1.0),))])
        self.found.append(losses.tolist())
        nothing = torch.zeros(len(plan.groups), 1, dtype=torch.float64)
        yield Estimate((plan.draw(0),), nothing, losses.unsqueeze(0))


def made(name: str) -> Any:
    """An evaluation; 'at use' has no memory for copies of the matrices,
    which are made at their use or beside the product."""
    kinds = {"scratch, at use": zokern.Scratch, "paired, at use": zokern.Paired}
    return at_use(kinds[name](check=False)) if name in kinds else name


def far(model) -> dict[str, Tensor]:
    """Weights so far from the model's that a mixture of the two shows in the loss."""
    generator = torch.Generator().manual_seed(5)
    return {
        n: p.detach().float() + 0.3 * torch.randn(p.shape, generator=generator)
        for n, p in model.named_parameters()
    }


def kept(optimizer) -> dict[str, Tensor]:
    """Copies of the low bits, by name."""
    named = {n: p for group in optimizer.param_groups for n, p in zip(group["param_names"], group["params"])}
    return {
        n: optimizer.state[p]["residual"].clone()
        for n, p in named.items()
        if "residual" in optimizer.state[p]
    }


def check_reading(
    evaluation: str, dtype: torch.dtype = torch.float32, tied: bool = False, rounding: str = "nearest"
) -> None:
    model = tiny(dtype, tied=tied, width=48 if "at use" in evaluation else 12)
    optimizer = zokern.MeZO(model, lr=1e-3, eps=1e-2, seed=3, evaluation=made(evaluation), rounding=rounding)
    for _ in range(2):  # low bits that are not zero, and a way that auto has chosen
        zokern.step(optimizer, lambda: next_token_loss(model(IDS), IDS))
    values = far(model)
    optimizer.estimator = Elsewhere(values)
    before, low = snapshot(model), kept(optimizer)
    assert rounding != "residual" or any(bits.any() for bits in low.values())
    zokern.step(optimizer, lambda: next_token_loss(model(IDS), IDS))
    assert not changed(model, before), "weights are not as they were"
    after = kept(optimizer)
    assert all(torch.equal(bits, after[n]) for n, bits in low.items()), "low bits are not as they were"
    there = copy.deepcopy(model)
    wide = rounding == "residual"  # low bits make the values exact
    there = there.float() if wide else there
    rounded = {n: v if wide else v.to(dtype) for n, v in values.items()}
    with torch.no_grad():
        for move, got in zip((0.0, 1e-2), optimizer.estimator.found[0]):
            for n, p in there.named_parameters():
                z = zokern.draw("normal", tuple(p.shape), seed=3, who=n, step=2)
                p.copy_(rounded[n].float() + move * z)
            want = float(next_token_loss(there(IDS), IDS))
            # products in 16 bits, and small tensors perturbed in float32
            bound = 2e-6 if dtype == torch.float32 else 2e-2
            assert abs(got - want) <= bound * want, f"at {move} z: {got}, not {want}"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("evaluation", EVALUATIONS)
def test_losses_are_those_of_other_weights(evaluation: str, dtype: torch.dtype) -> None:
    check_reading(evaluation, dtype)


@pytest.mark.parametrize("evaluation", EVALUATIONS)
def test_low_bits_and_ties_are_respected(evaluation: str) -> None:
    check_reading(evaluation, torch.bfloat16, tied=True, rounding="residual")


class Forgets(Oracle):
    """Leaves the other weights in place."""

    @contextmanager
    def at(self, base, plan=None):
        for group in self.plan.groups:
            base.write(group, self.states, base.argument)
        yield


class Halves(Oracle):
    """Puts the weights back, and their low bits not."""

    @contextmanager
    def at(self, base, plan=None):
        low = [t for group in self.plan.groups for t in group.residuals or ()]
        with super().at(base, plan):
            yield
            written = [t.clone() for t in low]
        for tensor, copied in zip(low, written):
            tensor.copy_(copied)


class Nowhere(Oracle):
    """Reads around theta all the same."""

    @contextmanager
    def at(self, base, plan=None):
        yield


class Careless(Oracle):
    """Puts back where nothing was raised."""

    @contextmanager
    def at(self, base, plan=None):
        thetas = [t for group in self.plan.groups for t in group.theta]
        kept = [t.clone() for t in thetas]
        for group in self.plan.groups:
            base.write(group, self.states, base.argument)
        yield
        for tensor, copied in zip(thetas, kept):
            tensor.copy_(copied)


def instead(kind: type) -> Any:
    return patch.object(sys.modules["zokern.step"], "Oracle", kind)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [(Forgets, "weights are not"), (Halves, "low bits are not"), (Nowhere, "z: .*, not")],
)
def test_a_wrong_oracle_is_rejected(wrong: type, message: str) -> None:
    with instead(wrong), pytest.raises(AssertionError, match=message):
        check_reading("master", torch.bfloat16, rounding="residual")


def check_exception(evaluation: str, where: str) -> None:
    """An exception in the closure, or while the other weights are written, changes no bit."""
    model = tiny(torch.bfloat16)
    optimizer = zokern.MeZO(model, lr=1e-2, eps=1e-2, evaluation=evaluation, rounding="residual")
    for _ in range(2):
        zokern.step(optimizer, lambda: next_token_loss(model(IDS), IDS))
    optimizer.estimator = estimator = Elsewhere(far(model))
    before, low = snapshot(model), kept(optimizer)
    if where == "write":
        estimator._values.pop("head.weight")

    def closure() -> Tensor:
        if where == "closure":
            raise ArithmeticError("here")
        return next_token_loss(model(IDS), IDS)

    with pytest.raises((ArithmeticError, KeyError)):
        zokern.step(optimizer, closure)
    assert not changed(model, before), "weights are not as they were"
    assert all(torch.equal(bits, kept(optimizer)[n]) for n, bits in low.items()), (
        "low bits are not as they were"
    )


@pytest.mark.parametrize("where", ["closure", "write"])
@pytest.mark.parametrize("evaluation", ["master", "paired", "scratch", "inplace"])
def test_an_exception_changes_no_bit(evaluation: str, where: str) -> None:
    check_exception(evaluation, where)


@pytest.mark.parametrize("where", ["closure", "write"])
def test_an_oracle_that_forgets_exceptions_is_rejected(where: str) -> None:
    with instead(Careless), pytest.raises(AssertionError, match="not as they were"):
        check_exception("master", where)


@pytest.mark.parametrize("evaluation", EVALUATIONS)
def test_the_first_step_reads_again_where_it_read(evaluation: str) -> None:
    """Its check of the closure compares readings at one base;
    a closure that does not repeat is found there too."""
    model = tiny()
    optimizer = zokern.MeZO(
        model, lr=0.0, eps=1e-3, evaluation=made(evaluation), estimator=Elsewhere(far(model))
    )
    zokern.step(optimizer, lambda: next_token_loss(model(IDS), IDS))
    optimizer = zokern.MeZO(
        model, lr=0.0, eps=1e-3, evaluation=made(evaluation), estimator=Elsewhere(far(model))
    )
    count = iter(range(100))
    with pytest.raises(RuntimeError, match="for the same weights"):
        zokern.step(optimizer, lambda: next_token_loss(model(IDS), IDS) * (1.0 + next(count)))


class AtTheta(Oracle):
    """Reads again around theta."""

    def again(self):
        points, _, plan, _, closure = self.asked
        return tuple(self._read(plan, [points[0], THETA], closure).tolist())


def test_a_check_at_another_base_is_rejected() -> None:
    with instead(AtTheta), pytest.raises(RuntimeError, match="for the same weights"):
        test_the_first_step_reads_again_where_it_read("master")


def test_bases_nest() -> None:
    """The inner one stands in for the outer one, which comes back."""
    model = tiny()
    seen = []

    class Nested(Elsewhere):
        def __call__(self, oracle, plan):
            with oracle.at(Base(self.write, 1.0)):
                outer = oracle.losses([THETA])
                with oracle.at(Base(self.write, 0.5)):
                    inner = oracle.losses([THETA])
                seen.extend([float(outer), float(inner), float(oracle.losses([THETA]))])
            yield from zokern.Spsa.__call__(self, oracle, plan)

    before = snapshot(model)
    zokern.step(
        zokern.MeZO(model, lr=0.0, estimator=Nested(far(model)), evaluation="master"),
        lambda: next_token_loss(model(IDS), IDS),
    )
    assert seen[0] == seen[2] != seen[1] and not changed(model, before)


def test_updates_that_wait_are_refused() -> None:
    model = tiny()
    optimizer = zokern.SubZero(model, rank=2, interval=50, evaluation="scratch")
    zokern.step(optimizer, lambda: next_token_loss(model(IDS), IDS))
    assert optimizer.pending
    optimizer.estimator = Elsewhere(far(model))
    with pytest.raises(RuntimeError, match="updates wait in the core: build the optimizer with defer=False"):
        zokern.step(optimizer, lambda: next_token_loss(model(IDS), IDS))


@pytest.mark.parametrize("dtype", DTYPES)
def test_put_is_the_inverse_of_read(dtype: torch.dtype) -> None:
    """With low bits for every float32 that is finite, ties and signed zeros included;
    and with the kernels' own halves."""
    p = torch.nn.Parameter(torch.zeros(4, 1024, dtype=dtype))
    rounding = "residual" if dtype == torch.bfloat16 else "nearest"
    optimizer = zokern.MeZO([("w", p)], rounding=rounding, force=True)
    (group,) = optimizer.plan().groups
    bits = torch.randint(-(2**31), 2**31 - 1, (4096,), generator=torch.Generator().manual_seed(1)).int()
    bits[:6] = torch.tensor([0x3F808000, 0x3F818000, -(2**31), 0, 0x7F7F7FFF, 0x00008000]).int()
    values = bits.view(torch.float32)
    values = torch.where(values.isfinite() & (values.abs() < 3e38), values, 1.0).view(4, 1024)
    group.put(0, values)
    if rounding != "residual":
        assert same_bits(p, values.to(dtype))
        return
    assert same_bits(group.read(0), values)
    high, low = p.detach().clone(), group.residuals[0].clone()
    zokern.axpy_(
        p,
        "normal",
        seed=0,
        who="w",
        draws=[(0, 0)],
        coeffs=[0.0],
        rounding="residual",
        residuals=group.residuals[0],
    )
    plain = values.abs() > 0
    assert torch.equal(p[plain], high[plain]) and torch.equal(group.residuals[0][plain], low[plain])
