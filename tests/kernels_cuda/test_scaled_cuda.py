"""Factors of z in csrc/*.cu on the host, compiled by g++ through tests/cuda_shim, bit for bit the
reference."""

from __future__ import annotations

import conformance_scaled
import host
import pytest
import torch
from cuda_backends import OnHost
from mistakes import SCALED

from zokern.backends import Batch, Noise, Span, Terms
from zokern.directions import resolve


@pytest.mark.parametrize("check", conformance_scaled.CHECKS)
def test_host_is_the_reference(on_host, check: str) -> None:
    conformance_scaled.CHECKS[check](OnHost(on_host), "cpu", "full")


@pytest.mark.parametrize("blocks", [1, 5, 1000])
def test_grid_changes_nothing(on_host, blocks: int) -> None:
    for check in ("scaled_sizes", "scaled_places"):
        conformance_scaled.CHECKS[check](OnHost(on_host, blocks), "cpu", "quick")


def test_order_and_parts_change_nothing(on_host, monkeypatch) -> None:
    """Threads last to first, on a device so large that 16 blocks share a chunk."""
    monkeypatch.setenv("ZO_SHIM_ORDER", "1")
    monkeypatch.setenv("ZO_SHIM_PROCESSORS", "148")
    for check in ("scaled_sizes", "scaled_roundings", "scaled_tiles"):
        conformance_scaled.CHECKS[check](OnHost(on_host), "cpu", "quick")


def test_another_scale_is_another_table(on_host) -> None:
    """Factors that lie elsewhere, or of another dtype, are not taken from the table of the call before; the
    same ones upload nothing."""
    backend, noise = OnHost(on_host), Noise(resolve("normal"), 5, [(0, 0)])
    found = []
    halves = torch.full((40,), 0.5)
    for scales in (None, [halves], [halves], [torch.ones(40)], [torch.ones(40, dtype=torch.bool)], None):
        theta = torch.zeros(40)
        held = backend.tables.built
        kept = found[0][0] if found else theta
        kept.zero_()
        backend.axpy_(Batch([kept], [Span(1)], scales=scales), noise, Terms(torch.ones(1)))
        found.append((kept, kept.clone(), backend.tables.built - held))
    z = found[0][1]
    assert [torch.equal(new, z) for _, new, _ in found] == [True, False, False, True, True, True]
    assert torch.equal(found[1][1], z / 2) and [built for *_, built in found] == [1, 1, 0, 1, 1, 0]


@pytest.mark.parametrize("mistake", [name for name, *_ in SCALED])
def test_wrong_kernel_is_rejected(on_host, monkeypatch, mistake: str) -> None:
    host.choose(monkeypatch, SCALED, mistake)
    for check in conformance_scaled.CHECKS:  # until one rejects it
        problem = conformance_scaled.run(OnHost(on_host), "cpu", "quick", [check])[check]
        if problem:
            print(f"{mistake}: {check}: {problem}")
            assert "AssertionError" in problem
            return
    raise AssertionError(f"no check rejects {mistake!r}")
