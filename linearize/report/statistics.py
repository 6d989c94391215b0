"""Errors and tests: bootstrap over independent units, exact McNemar for right-or-wrong items. Seeded, so repeatable."""

import math
from collections.abc import Callable

RESAMPLES = 1000


def bootstrap_error(values: list[float], statistic: Callable = lambda mean: mean, seed: int = 0) -> float:
    """Standard error of statistic(mean of values) over resampled units; nan for a single unit."""
    if len(values) < 2:
        return math.nan
    return float(statistic(_resampled_means(values, seed)).std(ddof=1))


def paired_bootstrap(differences: list[float], seed: int = 0) -> float | None:
    """Two-sided p-value that the mean of paired differences is zero; None for fewer than two units."""
    if len(differences) < 2:
        return None
    if all(value == 0 for value in differences):
        return 1.0
    means = _resampled_means(differences, seed)
    below, above = (means <= 0).mean(), (means >= 0).mean()
    return float(min(1.0, max(2 * min(below, above), 1 / RESAMPLES)))


def mcnemar(first: list[float], second: list[float]) -> float:
    """Exact two-sided p-value that two models are right equally often on the same items (0 or 1 each)."""
    only_first = sum(1 for a, b in zip(first, second, strict=True) if a > b)
    only_second = sum(1 for a, b in zip(first, second, strict=True) if b > a)
    n = only_first + only_second
    tail = sum(math.comb(n, i) for i in range(min(only_first, only_second) + 1))
    return min(1.0, 2 * tail / 2**n)


def _resampled_means(values: list[float], seed: int):
    import numpy

    units = numpy.asarray(values, dtype=float)
    generator = numpy.random.default_rng(seed)
    # a block of resamples at a time bounds the memory
    blocks = [
        units[generator.integers(len(units), size=(100, len(units)))].mean(axis=1) for _ in range(RESAMPLES // 100)
    ]
    return numpy.concatenate(blocks)
