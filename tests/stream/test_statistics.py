"""A statistical battery over streams that differ in one name each,
with two wrong addressings that it must reject.

96 streams = 4 seeds x 4 parameters x 3 steps x 2 first elements (0 and 2^31), 10^5 values each. Every figure
comes with the bound that a right stream passes: sigmas of a sum below 5 or 5.5, p-values above 10^-6.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import conformance
import header as native
import numpy as np
import pytest
from scipy import stats

pytestmark = pytest.mark.skipif(native.why_off() is not None, reason=str(native.why_off()))

COUNT = 100_000
NAMES = list(itertools.product(range(4), range(4), range(3), (0, 2**31)))  # (seed, who, step, first)


def right(direction: str, seed: int, who: int, step: int, first: int) -> np.ndarray:
    return native.header("-O3", "-march=native").draw(direction, seed, who, step, 0, first, COUNT)


def seed_plus_id(direction: str, seed: int, who: int, step: int, first: int) -> np.ndarray:
    """The names are added up into the key: (1, 0, 0), (0, 1, 0) and (0, 0, 1) are one stream."""
    return right(direction, seed + who + step, 0, 0, first)


def int32_index(direction: str, seed: int, who: int, step: int, first: int) -> np.ndarray:
    """The element number wraps: the second half of a large tensor repeats the first."""
    return right(direction, seed, who, step, first % 2**31)


def streams(address: Callable[..., np.ndarray], direction: str) -> np.ndarray:
    return np.stack([address(direction, *names) for names in NAMES])


def moments(z: np.ndarray) -> dict[str, float]:
    """Sigmas of the first six moments and of the mean square, each from the normal's own variance."""
    expected = (1, 0, 1, 0, 3, 0, 15, 0, 105, 0, 945, 0, 10395)
    x = z.ravel().astype(np.float64)
    power, sigmas = np.ones_like(x), {}
    for k in range(1, 7):
        power *= x
        variance = expected[2 * k] - expected[k] ** 2
        sigmas[f"moment {k}"] = abs(power.mean() - expected[k]) / np.sqrt(variance / x.size)
    return sigmas


def shape(z: np.ndarray) -> dict[str, float]:
    """p-values: KS, chi^2 over 1000 equal bins, Anderson-Darling,
    tails, and the per-stream KS tests taken together."""
    sample = z[:, : 2**20 // len(z)].ravel()
    bins = np.bincount((stats.norm.cdf(sample) * 1000).astype(int), minlength=1000)
    each = [stats.kstest(row[:20_000], stats.norm.cdf).pvalue for row in z]
    u = np.sort(stats.norm.cdf(sample[:100_000].astype(np.float64)))
    n = len(u)
    anderson = -n - np.mean((2 * np.arange(1, n + 1) - 1) * (np.log(u) + np.log1p(-u[::-1])))
    tails = {
        f"tail {t}": 2 * min(stats.poisson.cdf(k, mean), stats.poisson.sf(k - 1, mean))
        for t in (3.5, 4.5)
        for k, mean in [(int((np.abs(z) > t).sum()), 2 * stats.norm.sf(t) * z.size)]
    }
    return {
        "KS": stats.kstest(sample, stats.norm.cdf).pvalue,
        "chi2": stats.chisquare(bins).pvalue,
        "KS of the streams' KS": stats.kstest(each, "uniform").pvalue,
        "Anderson-Darling": 0.0 if anderson > 12 else 1.0,  # p < 1e-6 beyond 12
        **tails,
    }


def between(z: np.ndarray) -> tuple[dict[str, float], dict[str, float]]:
    """Sigmas of the correlation of every two streams and of each with itself shifted;
    p-value of all correlations."""
    n = z.shape[1]
    correlation = (z.astype(np.float64) @ z.T.astype(np.float64))[np.triu_indices(len(z), 1)] / np.sqrt(n)
    power = np.abs(np.fft.rfft(z, 2 * n, axis=1)) ** 2
    shifted = np.fft.irfft(power.sum(0), 2 * n)[1:1025] / np.sqrt(z.size)
    return (
        {"correlation of two streams": np.abs(correlation).max(), "autocorrelation": np.abs(shifted).max()},
        {"all correlations": stats.kstest(correlation, stats.norm.cdf).pvalue},
    )


def repeats(z: np.ndarray) -> int:
    """Blocks whose first two words made equal values, among all blocks of all streams;
    10^-3 expected by chance."""
    blocks = z[:, : COUNT // 8 * 8].reshape(-1, 8).view(np.uint32)
    pair = blocks[:, 0].astype(np.uint64) << np.uint64(32) | blocks[:, 2]
    return pair.size - np.unique(pair).size


def rejections(z: np.ndarray, direction: str) -> list[str]:
    """Which statistics say that these are not independent streams of this direction."""
    sigmas, p = between(z)
    if direction == "normal":
        sigmas |= moments(z)
        p |= shape(z)
    else:
        ones = (z.sum(1) / np.sqrt(z.shape[1])).tolist()
        sigmas |= {"sum of a stream": max(map(abs, ones))}
        p |= {"sums of the streams": stats.kstest(ones, stats.norm.cdf).pvalue}
    limits = {"correlation of two streams": 5.5, "sum of a stream": 5.5, "autocorrelation": 5.5}
    for name, value in sigmas.items():
        print(f"{name}: {value:.2f} sigma")
    for name, value in p.items():
        print(f"{name}: p {value:.3g}")
    found = [
        f"{name}: {value:.1f} sigma" for name, value in sigmas.items() if not value < limits.get(name, 5)
    ]
    found += [f"{name}: p {value:.1e}" for name, value in p.items() if not value > 1e-6]
    if direction == "normal" and repeats(z):
        found.append(f"{repeats(z)} repeated blocks")
    return found


@pytest.mark.parametrize("direction", conformance.DIRECTIONS)
def test_streams_are_independent(direction: str) -> None:
    assert rejections(streams(right, direction), direction) == []


@pytest.mark.parametrize("wrong", [seed_plus_id, int32_index])
@pytest.mark.parametrize("direction", conformance.DIRECTIONS)
def test_wrong_addressing_is_rejected(direction: str, wrong) -> None:
    found = rejections(streams(wrong, direction), direction)
    print(f"{wrong.__name__} rejected by", found)
    assert any("correlation of two streams" in line for line in found), found
    assert direction != "normal" or any("repeated blocks" in line for line in found), found


def test_rounding_bits_know_nothing_of_z() -> None:
    """The bits of stochastic rounding are uniform and uncorrelated with the values they round."""
    header = native.header("-O3", "-march=native")
    bits = header.rounding_bits(1, 2, 3, 0, COUNT).astype(np.float64)
    z = header.draw("normal", 1, 2, 3, 0, 0, COUNT).astype(np.float64)
    assert stats.chisquare(np.bincount((bits // 64).astype(int), minlength=1024)).pvalue > 1e-6
    centred = (bits - 32767.5) / np.sqrt((2.0**32 - 1) / 12)
    for what in (z, np.abs(z) - np.abs(z).mean(), centred[1:]):
        sigma = abs((centred[: len(what)] * what).sum()) / np.sqrt((what**2).sum())
        assert sigma < 5, f"{sigma:.1f} sigma"
