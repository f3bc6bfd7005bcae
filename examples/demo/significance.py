"""Is the rise beyond chance? Intervals of shares, and a test for two answers to the same rows."""

from __future__ import annotations

import math


def wilson(successes: int, trials: int, z: float = 1.959964) -> tuple[float, float]:
    """Wilson's score interval of a share: the p with |p_hat - p| = z sqrt(p (1 - p) / n). Wilson 1927."""
    if not 0 <= successes <= trials or trials < 1:
        raise ValueError(f"wilson: {successes} of {trials}; expected 0 <= successes <= trials, trials >= 1")
    share, weight = successes / trials, z * z / trials
    middle = (share + weight / 2) / (1 + weight)
    half = z * math.sqrt(share * (1 - share) / trials + weight / trials / 4) / (1 + weight)
    return max(middle - half, 0.0), min(middle + half, 1.0)


def mcnemar(righted: int, wronged: int) -> float:
    """P(X >= righted), X ~ Binomial(righted + wronged, 1/2): other rows say nothing. McNemar 1947, exact."""
    n = righted + wronged
    return sum(math.comb(n, k) for k in range(righted, n + 1)) / 2**n


def rise_interval(righted: int, wronged: int, trials: int, z: float = 1.959964) -> tuple[float, float]:
    """Interval of a difference of paired shares:
    Wald's, half a row added to each of four cells. Agresti and Min 2005."""
    b, c, n = righted + 0.5, wronged + 0.5, trials + 2
    half = z * math.sqrt(b + c - (b - c) ** 2 / n) / n
    return (b - c) / n - half, (b - c) / n + half
