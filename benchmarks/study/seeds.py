"""Means over seeds: intervals, paired differences, and which of many are told apart from 0."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import NamedTuple, TypeVar

from scipy import optimize, special, stats

Key = TypeVar("Key")
LEVEL = 0.05  # chance of an error: intervals are of 1 - LEVEL
LEAST = 1e-5  # of the median variance: seeds that agree by chance have at least this one


class Mean(NamedTuple):
    """A mean over seeds.

    low, high  its 95 % interval, infinite where no deviation is known
    p          chance that a mean is as far from 0 where the true one is 0, two-sided
    seeds      the values that it is of"""

    value: float
    low: float
    high: float
    p: float
    seeds: tuple[float, ...]


def mean(values: Sequence[float], deviation: float, freedom: float) -> Mean:
    """Returns the mean with Student's interval.

    deviation, freedom  of one value, and its degrees of freedom; 0: not known"""
    value, error = statistics.fmean(values), deviation / math.sqrt(len(values))
    if not freedom:
        return Mean(value, -math.inf, math.inf, 1.0, tuple(values))
    half = float(stats.t.ppf(1 - LEVEL / 2, freedom)) * error
    p = 2 * float(stats.t.sf(abs(value) / error, freedom)) if error else float(not value)
    return Mean(value, value - half, value + half, p, tuple(values))


def of_values(values: Sequence[float]) -> Mean:
    """Returns the mean with Student's interval, from these values alone."""
    known = len(values) > 1
    return mean(values, statistics.stdev(values) if known else 0.0, len(values) - 1)


def prior(variances: Sequence[float], freedoms: Sequence[int]) -> tuple[float, float]:
    """Returns (s0^2, d0): the variance that methods have in common, and how many degrees of freedom it is
    worth for one of them. d0 is infinite where their variances differ by chance alone.

    The logarithms of the variances have mean log s0^2 and variance psi'(d / 2) + psi'(d0 / 2), but for known
    terms. Smyth 2004, "Linear models and empirical Bayes methods", section 6.2."""
    least = LEAST * statistics.median(variances)
    logs = [
        math.log(max(v, least)) - float(special.digamma(d / 2)) + math.log(d / 2)
        for v, d in zip(variances, freedoms)
    ]
    excess = statistics.variance(logs) - statistics.fmean(
        float(special.polygamma(1, d / 2)) for d in freedoms
    )
    if excess <= 2e-6:  # trigamma(1e6), the end of the search below
        return math.exp(statistics.fmean(logs)), math.inf
    half = float(optimize.brentq(lambda x: float(special.polygamma(1, x)) - excess, 1e-6, 1e6))
    return math.exp(statistics.fmean(logs) + float(special.digamma(half)) - math.log(half)), 2 * half


def moderated(values: Mapping[str, Sequence[float]]) -> dict[str, Mean]:
    """Returns the mean of each method. Its variance is between its own and the one in common.

        s^2 = (d0 s0^2 + d v) / (d0 + d),   d0 + d degrees of freedom

    v, d of the method's own seeds. Three seeds alone say little of a variance, and a single variance for all
    would give a method whose seeds scatter the interval of one whose seeds agree. Smyth 2004."""
    several = {name: found for name, found in values.items() if len(found) > 1}
    own = {name: statistics.variance(found) for name, found in several.items()}
    every = sum(len(found) - 1 for found in several.values())
    if len(own) > 1 and statistics.median(own.values()) > 0:
        common, worth = prior([*own.values()], [len(found) - 1 for found in several.values()])
    else:
        common, worth = (statistics.fmean(own.values()) if own else 0.0), 0.0
    result = {}
    for name, found in values.items():
        d, v = len(found) - 1, own.get(name, 0.0)
        if math.isinf(worth):
            variance, freedom = common, float(every)
        else:
            freedom = min(worth + d, every)
            variance = (worth * common + d * v) / (worth + d) if freedom else 0.0
        result[name] = mean(found, math.sqrt(variance), freedom)
    return result


def told_apart(means: Mapping[Key, Mean]) -> set[Key]:
    """Returns those whose mean is told apart from 0, where all of them are looked at: the chance that one is
    named wrongly is at most LEVEL, if their chances are right. Holm 1979."""
    found: set[Key] = set()
    for rank, (name, one) in enumerate(sorted(means.items(), key=lambda item: item[1].p)):
        if one.p > LEVEL / (len(means) - rank):
            break
        found.add(name)
    return found
