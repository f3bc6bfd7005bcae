"""The conformance suite (tests/support/conformance.py) over the CPU backend, with each instruction set.

Triton's interpreter runs it in test_triton.py, the CUDA sources on the host in test_cuda.py, and a GPU in
`make gpu`. A backend that is off is reported as skipped, with its own reason.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator

import conformance
import pytest
import torch
from guarded import equal

from zokern import backends
from zokern.backends import Batch, Noise, Outer, Span, Terms
from zokern.directions import resolve

# checks that compare the backend with itself or with published answers,
# so they say something about the reference too
INDEPENDENT = (
    "philox_known_answers",
    "shards",
    "order",
    "dtypes_share_z",
    "empty_launch",
    "axpy_one_rounding",
    "axpy_each_is_calls",
    "lowrank_empty",
    "lowrank_shards",
)

INSTRUCTION_SETS = ("avx512", "avx2", "scalar")


@pytest.fixture(scope="module", params=[f"cpu-{isa}" for isa in INSTRUCTION_SETS])
def target(request) -> Iterator[tuple[backends.Backend, str]]:
    """(backend, device), with the instruction set chosen while the tests run."""
    name, _, isa = request.param.partition("-")
    reason = backends.why_off(name)
    if reason is not None:
        pytest.skip(f"backend {name!r} is off: {reason}")
    from zokern import _cpu

    if isa not in _cpu.architectures():
        pytest.skip(f"this machine cannot run {isa}; it runs {_cpu.architectures()}")
    before, threads = _cpu.implementation(), torch.get_num_threads()
    _cpu.select(isa)
    # whatever the environment says: one thread would not notice a chunk that another must do
    torch.set_num_threads(2)
    yield backends.get(name), name
    _cpu.select(before)
    torch.set_num_threads(threads)


@pytest.mark.parametrize("check", conformance.CHECKS)
def test_conformance(target, check: str) -> None:
    backend, device = target
    conformance.CHECKS[check](backend, device, "full")


@pytest.mark.parametrize("check", conformance.LOWRANK)
def test_lowrank(target, check: str) -> None:
    """The sum in the definition's order."""
    backend, device = target
    conformance.LOWRANK[check](backend, device, "full")


@pytest.mark.parametrize("check", INDEPENDENT)
def test_reference(check: str) -> None:
    """Facts that do not need a second implementation."""
    conformance.EVERY[check](backends.get("reference"), "cpu", "full")


@pytest.mark.parametrize("direction", conformance.DIRECTIONS)
def test_two_to_the_26(target, direction: str) -> None:
    """2^26 values from one launch have the digests that the reference left in tests/vectors."""
    backend, device = target
    long = json.loads((conformance.VECTORS / f"{direction}-v1.json").read_text())["long"]
    out = torch.empty(long["count"], device=device)
    backend.draw(
        Batch([out], [Span(long["who"], long["first"])]),
        Noise(resolve(direction), long["seed"], [(long["step"], long["draw"])]),
    )
    digests = [hashlib.sha256(part.numpy()).hexdigest() for part in out.cpu().split(long["piece"])]
    assert out.numel() == 2**26 and digests == long["sha256"]


def test_thread_counts(target) -> None:
    """Any number of threads gives the same bits."""
    backend, device = target
    before = torch.get_num_threads()
    generator = torch.Generator().manual_seed(8)
    start = conformance.weights((500_003,), torch.bfloat16, generator)
    coeffs = torch.tensor([1e-3], device=device)
    left, right = (torch.randn(rows, 9, generator=generator).to(device) for rows in (711, 709))
    results = []
    try:
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            theta, matrix = start.to(device, copy=True), start.to(device, copy=True)
            backend.axpy_(
                Batch([theta], [Span(6, 3)], "stochastic"),
                Noise(resolve("normal"), 1, [(2, 0)]),
                Terms(coeffs, 0.99),
            )
            backend.lowrank_(
                Batch([matrix], [Span(6, 3)], "stochastic"),
                Outer([left], [right], [0.1], 0.99),
                Noise(None, 1, [(2, 0)]),
            )
            results.append((theta.cpu(), matrix.cpu()))
    finally:
        torch.set_num_threads(before)
    for theta, matrix in results[1:]:
        equal(theta, results[0][0], "axpy_ with another number of threads")
        equal(matrix, results[0][1], "lowrank_ with another number of threads")
