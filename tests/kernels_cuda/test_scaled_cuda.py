"""Factors of z in csrc/*.cu on the host, compiled by g++ through tests/cuda_shim, bit for bit the
reference."""

from __future__ import annotations

import types

import conformance_scaled
import host
import pytest
import torch
from cuda_backends import OnHost

from zokern.backends import Batch, Noise, Span, Terms
from zokern.directions import resolve

# One module is the kernel and holds every mistake: ZO_SHIM_MISTAKE chooses which one it makes, and unset
# makes none.
MISTAKES = [
    ("one factor for a unit", "z[j] = mul_rn(z[j], f[j]);", "z[j] = mul_rn(z[j], f[{wrong} ? 0 : j]);"),
    ("a byte of a mask", "eight >> (8 * j) & 0xffu", "eight >> (8 * ({wrong} ? j & 3 : j)) & 0xffu"),
    ("factors from the first element", "(whole.begin * kUnit - e.first) * bytes()",
        "({wrong} ? 0 : whole.begin * kUnit - e.first) * bytes()"),
    ("bytes of bfloat16", "type == Scale::kBfloat16 ? 2 : 4;",
        "type == Scale::kBfloat16 ? ({wrong} ? 4 : 2) : 4;"),
    ("bfloat16 for float32", "factor_at(e.scale, e.scale_type, at + j)",
        "factor_at(e.scale, {wrong} ? 1 : e.scale_type, at + j)"),
    ("a piece from its first element", "j < low || j >= high ? 0.0f",
        "j < low || j >= high || ({wrong} && j == low) ? 0.0f"),
    ("no factor is 0", "for (int j = 0; j < kUnit; ++j) f[j] = 1.0f;",
        "for (int j = 0; j < kUnit; ++j) f[j] = {wrong} ? 0.0f : 1.0f;"),
    ("factors of a list are not seen", "if (launch.scaled ||", "if ((launch.scaled && !{wrong}) ||"),
    ("the sign of zero", "g < 0.0f ? -1.0f : g;", "g < 0.0f ? -1.0f : {wrong} ? 1.0f : g;"),
]  # fmt: skip


@pytest.fixture(scope="session")
def on_host() -> types.ModuleType:
    return host.mistaken(MISTAKES)


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


@pytest.mark.parametrize("mistake", [name for name, *_ in MISTAKES])
def test_wrong_kernel_is_rejected(on_host, monkeypatch, mistake: str) -> None:
    monkeypatch.setenv("ZO_SHIM_MISTAKE", str(1 + [name for name, *_ in MISTAKES].index(mistake)))
    for check in conformance_scaled.CHECKS:  # until one rejects it
        problem = conformance_scaled.run(OnHost(on_host), "cpu", "quick", [check])[check]
        if problem:
            print(f"{mistake}: {check}: {problem}")
            assert "AssertionError" in problem
            return
    raise AssertionError(f"no check rejects {mistake!r}")
