"""Factors of z in the verbs: the CPU with each instruction set, wrong versions, what is refused; Triton and
CUDA have files of their own."""

from __future__ import annotations

import conformance_scaled
import pytest
import torch
from wrong.scaled import BACKENDS

from zokern import backends
from zokern.backends import Batch, Noise, Outer, Span, Terms, Update
from zokern.backends.reference import Reference
from zokern.directions import resolve

NOISE = Noise(resolve("normal"), 3, [(1, 0)])


@pytest.mark.parametrize("check", conformance_scaled.CHECKS)
def test_cpu_is_the_reference(cpu, check: str) -> None:
    conformance_scaled.CHECKS[check](cpu, "cpu", "full")


@pytest.mark.parametrize("kind", BACKENDS, ids=lambda kind: kind.__name__)
def test_wrong_backend_is_rejected(kind) -> None:
    verdicts = conformance_scaled.run(kind(), scale="quick", only=kind.rejected_by)
    print(verdicts)
    assert verdicts and all(problem and "AssertionError" in problem for problem in verdicts.values()), (
        verdicts
    )


@pytest.mark.parametrize("check", conformance_scaled.CHECKS)
def test_reference_passes(check: str) -> None:
    """Otherwise the rejections above would mean nothing."""
    assert conformance_scaled.run(Reference(), scale="quick", only=[check]) == {check: None}


def test_every_check_rejects_something() -> None:
    assert {check for kind in BACKENDS for check in kind.rejected_by} == set(conformance_scaled.CHECKS)


def test_a_mask_keeps_what_it_drops() -> None:
    """z' = z s in float32: elements of a factor 0 keep their bits,
    and those of a factor 1 move as without factors."""
    mask = torch.rand(500, generator=torch.Generator().manual_seed(2)) < 0.25
    for backend in map(backends.get, ("reference", "cpu")):
        start = torch.linspace(-1, 1, 500).bfloat16()
        masked, plain = start.clone(), start.clone()
        for theta, scales in ((masked, [mask]), (plain, None)):
            backend.axpy_(Batch([theta], [Span(7)], scales=scales), NOISE, Terms(torch.tensor([0.1])))
        assert torch.equal(masked, torch.where(mask, plain, start)) and not torch.equal(plain, start)


W = torch.zeros(6, 8)
BAD = [
    ([torch.ones(6, 7)], "scales\\[0\\] is torch.float32\\[6, 7\\]"),
    ([torch.ones(48)], "scales\\[0\\] is torch.float32\\[48\\]"),
    ([torch.ones(8, 6).t()], "with strides"),
    ([torch.ones(6, 8, dtype=torch.float64)], "torch.float64"),
    ([torch.ones(6, 8, dtype=torch.uint8)], "expected a contiguous bfloat16 or bool or float32\\[6, 8\\]"),
    ([torch.ones(6, 8, device="meta")], "meta"),
    ([], "scales has 0 members for 1 tensors"),
]


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize(("scales", "message"), BAD)
def test_refuses_and_writes_nothing(backend: str, scales, message: str) -> None:
    """A kernel would read another type, or past an end."""
    verbs, batch, one = backends.get(backend), Batch([W], [Span(1)], scales=scales), torch.ones(1)
    for call in (
        lambda: verbs.draw(batch, NOISE),
        lambda: verbs.axpy_(batch, NOISE, Terms(one)),
        lambda: verbs.perturb(batch, NOISE, [1.0], [[torch.empty(6, 8)]]),
        lambda: verbs.update_(batch, NOISE, Update(one, "sign", torch.ones(2), [])),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    assert not W.any()


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_lowrank_refuses_by_name(backend: str) -> None:
    factors = Outer([torch.ones(6, 1)], [torch.ones(8, 1)], [1.0])
    with pytest.raises(ValueError, match="lowrank_: scales is given"):
        backends.get(backend).lowrank_(Batch([W], [Span(1)], scales=[torch.ones(6, 8)]), factors)
