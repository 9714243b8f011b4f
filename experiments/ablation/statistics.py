"""Means that a single run cannot carry, intervals, and differences on equal seeds (Agarwal et al., 2021).

Everything here is scipy's; what is ours is what it is asked for.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import stats

RESAMPLES = 9999
LEVEL = 0.95


@dataclass(frozen=True)
class Interval:
    """A number with its 95 % bootstrap interval (percentiles); None where one run shows no spread."""

    value: float
    low: float | None
    high: float | None


@dataclass(frozen=True)
class Difference:
    """An arm minus the reference on equal seeds."""

    pairs: int
    mean: Interval
    p: float  # two-sided, by flipping the signs of the pairs' differences
    smallest: float  # the p below which so few pairs cannot come
    adjusted: float = float("nan")  # Benjamini and Hochberg, over all comparisons of the table


def iqm(x: NDArray[np.float64], axis: int = -1) -> NDArray[np.float64]:
    """Interquartile mean: of the middle half."""
    return np.asarray(stats.trim_mean(x, 0.25, axis=axis))


def mean_interval(x: Sequence[float]) -> Interval:
    return _interval(np.asarray(x, dtype=float), np.mean)


def iqm_interval(x: Sequence[float]) -> Interval:
    return _interval(np.asarray(x, dtype=float), iqm)


def _interval(x: NDArray[np.float64], statistic: object) -> Interval:
    value = float(statistic(x, axis=-1))  # pyright: ignore[reportCallIssue]
    if len(x) < 2:
        return Interval(value, None, None)
    if np.ptp(x) == 0:
        return Interval(value, value, value)
    found = stats.bootstrap(
        (x,), statistic, n_resamples=RESAMPLES, confidence_level=LEVEL, method="percentile", rng=np.random.default_rng(0)
    )
    return Interval(value, float(found.confidence_interval.low), float(found.confidence_interval.high))


def difference(arm: Sequence[float], reference: Sequence[float]) -> Difference:
    """Paired: the i-th of both are of one seed."""
    d = np.asarray(arm, dtype=float) - np.asarray(reference, dtype=float)
    smallest = min(1.0, 2.0 / 2 ** len(d))
    if not d.any() or len(d) == 1:  # one pair may have either sign
        return Difference(len(d), mean_interval(d.tolist()), 1.0, smallest)
    test = stats.permutation_test(
        (d,), np.mean, permutation_type="samples", n_resamples=RESAMPLES, vectorized=True, rng=np.random.default_rng(0)
    )
    return Difference(len(d), mean_interval(d.tolist()), float(test.pvalue), smallest)


def adjusted(p: Sequence[float]) -> list[float]:
    """p values that keep the false discovery rate over many comparisons (Benjamini and Hochberg, 1995)."""
    return [] if not len(p) else [float(q) for q in stats.false_discovery_control(p)]


def profile(costs: NDArray[np.float64], factors: NDArray[np.float64]) -> NDArray[np.float64]:
    """Performance profile (Dolan and More, 2002). costs: (problems, arms), infinite where unsolved -> (arms, factors).

    The share of problems that an arm solves within each factor of the best arm's cost.
    """
    best = costs.min(axis=1, keepdims=True)
    with np.errstate(invalid="ignore"):
        ratio = np.where(np.isfinite(costs), costs / best, np.inf)  # (problems, arms)
    return (ratio[:, :, None] <= factors).mean(axis=0)  # (arms, factors)


def sign_test(wins: int, losses: int) -> float:
    """Two-sided: how likely so lopsided a count is if each pair were a coin."""
    return 1.0 if wins + losses == 0 else float(stats.binomtest(wins, wins + losses).pvalue)
