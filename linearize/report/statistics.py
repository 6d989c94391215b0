"""Compute errors and tests: bootstrap and sign flips over independent units, exact McNemar for right-or-wrong items.

A unit is what is measured once: a window of text, a row or an item. What draws random numbers is seeded and therefore
repeatable.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy

# resamples of a bootstrap: its error is then within about 2% of its limit
RESAMPLES = 1000
# up to EXACT_UNITS a sign-flip test tries every choice of signs (4,096), beyond that FLIPS random ones
EXACT_UNITS, FLIPS = 12, 10_000
# resamples or flips at a time; bounds the memory
BLOCK = 100
# two-sided 5% quantiles of Student's t for few degrees of freedom, where the expansion below is off
# (Abramowitz and Stegun, table 26.10)
QUANTILES = {1: 12.706, 2: 4.303, 3: 3.182}


def bootstrap_error(
    values: Sequence[float], statistic: Callable[[Any], Any] = lambda mean: mean, seed: int = 0
) -> float:
    """Return the bootstrapped standard error of statistic(mean of the values), NaN for a single unit.

    The bootstrap underestimates the standard error of a mean by the factor sqrt((n - 1) / n), which matters for few
    units. The result is divided by it (Efron and Tibshirani 1993, section 5.3).

    Args:
        values: one value for each of n independent units.
        statistic: a function of the mean, applied to an array of means.
    """
    n = len(values)
    if n < 2:
        return math.nan
    spread = float(statistic(_resampled_means(values, seed)).std(ddof=1))
    return spread * math.sqrt(n / (n - 1))


def sign_flip_test(differences: Sequence[float], seed: int = 0) -> float | None:
    """Return the two-sided p-value of paired differences being as likely negative as positive.

    This is Fisher's randomisation test on their mean: exact for few units, with random signs for many.

    Returns:
        The p-value, None for fewer than two units.
    """
    n = len(differences)
    if n < 2:
        return None
    values = numpy.asarray(differences, dtype=float)
    # a choice of signs counts if its sum is as far from 0, up to rounding
    threshold = abs(values.sum()) * (1 - 1e-12)
    if n <= EXACT_UNITS:
        # the bits of the numbers from 0 to 2^n - 1 are every choice of signs
        bits = numpy.arange(2**n)[:, None] >> numpy.arange(n) & 1
        signs = 1 - 2 * bits
        return float((abs(signs @ values) >= threshold).mean())
    generator = numpy.random.default_rng(seed)
    count = 0
    for _ in range(FLIPS // BLOCK):
        signs = 1 - 2 * generator.integers(2, size=(BLOCK, n), dtype=numpy.int8)
        count += int((abs(signs @ values) >= threshold).sum())
    # the choice that was observed counts as one more
    return (1 + count) / (1 + FLIPS)


def student_quantile(freedom: int) -> float:
    """Return the two-sided 5% quantile of Student's t: half the width of a mean's 95% interval, in standard errors.

    Expands around the normal quantile (Abramowitz and Stegun 26.7.5); accurate to 0.01.

    Args:
        freedom: degrees of freedom.
    """
    if freedom in QUANTILES:
        return QUANTILES[freedom]
    z = 1.959964  # the normal quantile
    terms = (
        z,
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
    )
    return sum(term / freedom**i for i, term in enumerate(terms))


def mcnemar(first: Sequence[float], second: Sequence[float]) -> float:
    """Return the exact two-sided p-value of two models being right equally often on the same items.

    Args:
        first, second: 1 for right and 0 for wrong, for each item.
    """
    only_first = sum(1 for a, b in zip(first, second, strict=True) if a > b)
    only_second = sum(1 for a, b in zip(first, second, strict=True) if b > a)
    n = only_first + only_second
    tail = sum(math.comb(n, i) for i in range(min(only_first, only_second) + 1))
    return min(1.0, 2 * tail / 2**n)


def _resampled_means(values: Sequence[float], seed: int) -> Any:
    """Return the means of RESAMPLES resamples: as many values as there are, drawn with replacement."""
    units = numpy.asarray(values, dtype=float)
    n = len(units)
    generator = numpy.random.default_rng(seed)
    means = []
    for _ in range(RESAMPLES // BLOCK):
        drawn = generator.integers(n, size=(BLOCK, n))
        means.append(units[drawn].mean(axis=1))
    return numpy.concatenate(means)
