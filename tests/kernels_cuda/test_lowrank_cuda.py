"""csrc/lowrank.cu on the host: compiled by g++ through cuda_shim, where a warp's matrix product is computed
from its fragments.

With factors that are small integers every sum is exact, so the conformance suite holds bit for bit: rows,
columns, ranks, edges, shards, strides, rounding. With random factors the bound of lowrank_bound.py holds.
What only nvcc sees: test_lowrank_sass.py.
"""

from __future__ import annotations

import conformance
import host
import lowrank_bound
import pytest
import torch
from cuda_backends import OnHost
from mistakes import LOWRANK

from zokern.backends import Batch, Outer, Span, pack_lowrank


@pytest.mark.parametrize("check", conformance.LOWRANK)
def test_exact_sums_are_the_reference(on_host, check) -> None:
    with conformance.small_integers():
        conformance.LOWRANK[check](OnHost(on_host), "cpu", "quick" if check == "lowrank_large" else "full")


def test_wide_loads_of_any_factors_are_rejected(on_host, monkeypatch) -> None:
    """A GPU that loads two floats from an odd place loses its context."""
    monkeypatch.setattr(pack_lowrank, "lies_on", lambda *_: True)
    with conformance.small_integers(), pytest.raises(RuntimeError, match="misaligned address"):
        conformance.LOWRANK["lowrank_offset"](OnHost(on_host), "cpu", "quick")


@pytest.mark.parametrize("dtype", conformance.DTYPES, ids=str)
@pytest.mark.parametrize("rank", [1, 8, 16, 17, 32, 33, 64, 100, 128])
def test_bound(on_host, rank, dtype) -> None:
    share = lowrank_bound.share(OnHost(on_host), "cpu", (70, 104), rank, dtype)
    print(f"rank {rank} {dtype}: {100 * share:.1f} % of the bound")
    assert 0 < share <= 1


@pytest.mark.parametrize("blocks", [1, 3, 1000])
def test_grid_changes_nothing(on_host, blocks) -> None:
    with conformance.small_integers():
        for check in ("lowrank_ranks", "lowrank_rows", "lowrank_pitch"):
            conformance.LOWRANK[check](OnHost(on_host, blocks), "cpu", "quick")


def test_order_changes_nothing(on_host, monkeypatch) -> None:
    monkeypatch.setenv("ZO_SHIM_ORDER", "1")
    with conformance.small_integers():
        for check in ("lowrank_ranks", "lowrank_shapes", "lowrank_arithmetic"):
            conformance.LOWRANK[check](OnHost(on_host), "cpu", "quick")


def matrix(
    backend, m: int, n: int, rank: int, dtype: torch.dtype, **options
) -> tuple[torch.Tensor, torch.Tensor]:
    """An aligned matrix with integer factors, by a backend and by the reference."""
    generator = torch.Generator().manual_seed(m + n + rank)
    with conformance.small_integers():
        left, right = conformance.factors_of(generator, m, n, rank)
    start = conformance.weights((m, n), dtype, generator)
    results = []
    for one in (backend, conformance.Reference()):
        theta = start.clone()
        one.lowrank_(Batch([theta], [Span(3)]), Outer([left], [right], [0.25], options.get("decay", 1.0)))
        results.append(theta)
    return results[0], results[1]


@pytest.mark.parametrize("dtype", conformance.DTYPES, ids=str)
def test_tiles_of_whole_matrices(on_host, dtype) -> None:
    """Several tiles down and across, ragged in both directions, in every padded rank, both kernels. One block
    takes all of them, one after the other."""
    for m, n, rank in (
        (1, 8, 16),
        (130, 264, 5),
        (257, 40, 32),
        (15, 528, 33),
        (40, 296, 64),
        (17, 256, 128),
        (9, 24, 128),
        (130, 264, 100),
        (65, 16, 128),
    ):
        for decay in (1.0, 0.5):
            got, expected = matrix(OnHost(on_host, 1), m, n, rank, dtype, decay=decay)
            conformance.equal(got, expected, f"{m} x {n}, rank {rank}, decay {decay}")


def problems(backend) -> str | None:
    """The first check that rejects a backend."""
    with conformance.small_integers():
        for check in conformance.LOWRANK:
            if problem := conformance.run(backend, "cpu", "quick", [check])[check]:
                return f"{check}: {problem}"
    for dtype in conformance.DTYPES:
        for m, n, rank in ((130, 264, 5), (15, 528, 33), (130, 40, 128)):
            got, expected = matrix(backend, m, n, rank, dtype)
            if not torch.equal(got.nan_to_num(), expected.nan_to_num()):
                return f"{m} x {n} of rank {rank}, {dtype}"
        if (share := lowrank_bound.share(backend, "cpu", (70, 104), 16, dtype)) > 1:
            return f"{share:.1f} times the bound"
    return None


@pytest.mark.parametrize("mistake", [name for name, *_ in LOWRANK])
def test_wrong_kernel_is_rejected(on_host, monkeypatch, mistake) -> None:
    host.choose(monkeypatch, LOWRANK, mistake)
    found = problems(OnHost(on_host, 1))
    print(f"{mistake}: {found}")
    assert found is not None, f"nothing rejects {mistake!r}"


def test_wrong_kernels_are_right_otherwise(on_host, monkeypatch) -> None:
    monkeypatch.setenv("ZO_SHIM_MISTAKE", "0")
    assert problems(OnHost(on_host, 1)) is None


def test_a_rank_too_high_is_refused(on_host) -> None:
    theta, left, right = torch.zeros(2, 3), torch.ones(2, 129), torch.ones(3, 129)
    with pytest.raises(ValueError, match=r"ranks are \[129\].*1 to 128.*cpu"):
        OnHost(on_host).lowrank_(Batch([theta], [Span(0)]), Outer([left], [right], [1.0]))
    assert not theta.any()
