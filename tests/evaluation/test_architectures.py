"""Architectures of many kinds: every evaluation reads the losses of hand-written weights, or refuses by name.

Which pairs are refused is written nowhere:
'master' and 'auto' read all of them, and the faster ways a good share.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import pytest
import readings
import torch
from architectures import ARCHITECTURES
from readings import EXPLICIT, check_refusal, check_weights, clones, optimizer, trained, write
from torch import Tensor, nn

import zokern

pytestmark = pytest.mark.usefixtures("one_thread")

METHODS: dict[str, dict[str, Any]] = {"MeZO": {}, "SubZero": dict(reshape="none")}
EPS, STEPS, SHARE = 1e-2, 2, 0.6
NEVER_REFUSE = ("master", "auto")


class Right(NamedTuple):
    """The losses of a step at +eps and -eps, and what rounding does to them."""

    losses: tuple[float, float]
    rounding: float

    @property
    def coefficient(self) -> float:
        return (self.losses[0] - self.losses[1]) / (2 * EPS)


@functools.cache
def model(name: str) -> tuple[nn.Module, Callable[[], Tensor], dict[str, Tensor]]:
    """The oracle's own model, called once before: nothing is left to be computed at a first call."""
    net, loss = ARCHITECTURES[name]()
    with torch.no_grad():
        loss()
    return net, loss, clones(net)


def jittered(theta: Mapping[str, Tensor], seed: int) -> dict[str, Tensor]:
    """Each weight up or down by one unit in its last place."""
    g = torch.Generator().manual_seed(seed)
    return {
        n: w * (1 + 2.0**-23 * (torch.randint(0, 2, w.shape, generator=g) * 2 - 1)) for n, w in theta.items()
    }


@functools.cache
def right(name: str, method: str, step: int) -> Right:
    """theta + a z in the weights, read, and put back. Rounding is what a last bit of every weight does."""
    net, loss, theta = model(name)
    z, losses, rounding = readings.direction(method, {}), [], 0.0
    with torch.no_grad():
        for amount in (EPS, -EPS):
            write(net, theta, amount, z, 0, step, 0)
            here, moved = float(loss()), clones(net)
            for seed in (0, 1):
                write(net, jittered(moved, seed), 0.0, z)
                rounding = max(rounding, abs(float(loss()) - here))
            losses.append(here)
    write(net, theta, 0.0, z)
    return Right((losses[0], losses[1]), 4 * rounding + 16 * 2.0**-24 * abs(losses[0]))


def wrong(got: zokern.StepResult, want: Right) -> str | None:
    """What is wrong with a step, if anything: a loss beyond rounding, or c beyond that over eps."""
    bound = want.rounding / EPS
    if abs(got.coefficients[0] - want.coefficient) > bound:
        return f"coefficient {got.coefficients[0]}, right {want.coefficient} +- {bound:.2g}"
    if max(abs(a - b) for a, b in zip(got.losses[0], want.losses)) > want.rounding:
        return f"losses {got.losses[0]}, right {want.losses} +- {want.rounding:.2g}"
    return None


@functools.cache
def outcome(name: str, way: str) -> str:
    """'read' or 'refused'. Raises for a wrong reading, a nameless refusal, or changed weights."""
    refused = 0
    for method, options in METHODS.items():
        net, loss = ARCHITECTURES[name]()
        start, buffers = clones(net), {n: b.clone() for n, b in net.named_buffers()}
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                opt = optimizer(method, net, way, lr=0.0, eps=EPS, **options)
                for step in range(STEPS):
                    said = wrong(zokern.step(opt, loss), right(name, method, step))
                    assert said is None, f"{name}, {method} under {way}, step {step}: {said}"
            except readings.REFUSALS as error:
                check_refusal(error)
                assert way not in NEVER_REFUSE, f"{way} refused {name}: {error}"
                refused += 1
        assert len(readings.fallbacks(caught)) <= 1, readings.fallbacks(caught)
        check_weights(net, start, way, 2 * STEPS)
        moved = [n for n, b in net.named_buffers() if n not in buffers or not torch.equal(b, buffers[n])]
        assert not moved, f"{name} under {way}: buffers {moved} changed"
    return "refused" if refused else "read"


@pytest.mark.parametrize("way", ["auto", *EXPLICIT])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_an_architecture_is_read_right_or_refused_by_name(name: str, way: str) -> None:
    outcome(name, way)


@pytest.mark.parametrize("way", ["paired", "scratch"])
def test_most_architectures_are_read(way: str) -> None:
    """A way that refuses everything would pass the test above."""
    outcomes = {}
    for name in ARCHITECTURES:
        try:
            outcomes[name] = outcome(name, way)
        except AssertionError:
            outcomes[name] = "wrong"
    refused = [name for name, found in outcomes.items() if found != "read"]
    print(f"{way} reads {len(outcomes) - len(refused)} of {len(outcomes)}; not {refused}")
    assert len(refused) <= (1 - SHARE) * len(outcomes), refused


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_comparison_rejects(name: str) -> None:
    """The bound sees a side left out, the wrong step's z, and one parameter that does not move."""
    net, loss, theta = model(name)
    for method in METHODS:
        want, other = right(name, method, 0), right(name, method, 1)
        assert sum(p.numel() for p in net.parameters()) < 200_000
        assert abs(want.coefficient) > 4 * want.rounding / EPS, (want.coefficient, want.rounding / EPS)
        assert abs(want.coefficient - other.coefficient) > want.rounding / EPS
    z, want = readings.direction("MeZO", {}), right(name, "MeZO", 0)
    largest = max(trained(net), key=lambda n: trained(net)[n].numel())
    losses = []
    for amount in (EPS, -EPS):
        write(net, theta, amount, lambda n, *where: z(n, *where) * (n != largest), 0, 0, 0)
        with torch.no_grad():
            losses.append(float(loss()))
    write(net, theta, 0.0, z)
    assert abs((losses[0] - losses[1]) / (2 * EPS) - want.coefficient) > want.rounding / EPS, largest
