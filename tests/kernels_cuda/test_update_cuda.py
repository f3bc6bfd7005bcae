"""csrc/update.cu on the host, compiled by g++ through cuda_shim, bit for bit the reference; and on a GPU
where there is one."""

from __future__ import annotations

import conformance_update
import host
import pytest
import torch
from cuda_backends import OnHost
from mistakes import UPDATE

from zokern.backends import Batch, Noise, Span, Update
from zokern.directions import resolve


@pytest.mark.parametrize("check", conformance_update.CHECKS)
def test_host_is_the_reference(on_host, check: str) -> None:
    conformance_update.CHECKS[check](
        OnHost(on_host), "cpu", "quick" if check in ("update_large", "update_sizes") else "full"
    )


@pytest.mark.parametrize("blocks", [1, 5, 1000])
def test_grid_changes_nothing(on_host, blocks: int) -> None:
    for check in ("update_sizes", "update_strides"):
        conformance_update.CHECKS[check](OnHost(on_host, blocks), "cpu", "quick")


def test_order_and_parts_change_nothing(on_host, monkeypatch) -> None:
    """Threads last to first, on a device so large that 16 blocks share a chunk."""
    monkeypatch.setenv("ZO_SHIM_ORDER", "1")
    monkeypatch.setenv("ZO_SHIM_PROCESSORS", "148")
    for check in ("update_sizes", "update_strides", "update_roundings", "update_large"):
        conformance_update.CHECKS[check](OnHost(on_host), "cpu", "quick")


def test_a_repeated_call_reads_new_numbers_and_uploads_nothing(on_host) -> None:
    """What a captured CUDA graph replays: the same tables, and scalars, coefficients and clock that were
    changed where they lie."""
    backend, thetas = OnHost(on_host), [torch.ones(40), torch.ones(3, 5)]
    states = [[torch.zeros(t.shape) for t in thetas] for _ in range(2)]
    scalars, coeffs, clock = (
        torch.tensor(conformance_update.USUAL["adam"]),
        torch.ones(2),
        torch.zeros(1, dtype=torch.int64),
    )
    results = []
    for _ in range(3):
        backend.update_(
            Batch(thetas, [Span(1), Span(2)]),
            Noise(resolve("normal"), 5, [(0, 0), (0, 1)], clock),
            Update(coeffs, "adam", scalars, states),
        )
        results.append(thetas[0].clone())
        scalars[0], scalars[1], coeffs[0] = 1.0, 0.0, 3.0  # no decay and no move any more
        clock += 1
    assert backend.tables.built == 2  # the list, and the names of its two terms
    assert (
        not torch.equal(results[0], torch.ones(40))
        and torch.equal(results[1], results[0])
        and torch.equal(results[2], results[0])
    )


@pytest.mark.parametrize("mistake", [name for name, *_ in UPDATE])
def test_wrong_kernel_is_rejected(on_host, monkeypatch, mistake: str) -> None:
    host.choose(monkeypatch, UPDATE, mistake)
    for check in conformance_update.CHECKS:  # until one rejects it
        problem = conformance_update.run(OnHost(on_host), "cpu", "quick", [check])[check]
        if problem:
            print(f"{mistake}: {check}: {problem}")
            assert "AssertionError" in problem
            return
    raise AssertionError(f"no check rejects {mistake!r}")
