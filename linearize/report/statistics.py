"""Errors and tests: bootstrap and flipped signs over independent units, exact McNemar for right-or-wrong items. Seeded, so
repeatable."""

import math
from collections.abc import Callable

RESAMPLES = 1000
EXACT, FLIPS = 12, 10_000
# of Student's t on one, two and three degrees of freedom, where its expansion is off (Abramowitz and Stegun, table 26.10)
QUANTILES = {1: 12.706, 2: 4.303, 3: 3.182}


def bootstrap_error(values: list[float], statistic: Callable = lambda mean: mean, seed: int = 0) -> float:
    """Standard error of statistic(mean of values) over resampled units; nan for a single unit.

    Resamples spread by sqrt((n - 1) / n) too little, which a few units feel (Efron and Tibshirani 1993, section 5.3).
    """
    n = len(values)
    if n < 2:
        return math.nan
    return float(statistic(_resampled_means(values, seed)).std(ddof=1)) * math.sqrt(n / (n - 1))


def sign_flip_test(differences: list[float], seed: int = 0) -> float | None:
    """Two-sided p-value that paired differences are as likely to be negative as positive (Fisher's randomisation test on
    their mean): every choice of signs up to EXACT units, FLIPS random ones beyond. None for fewer than two units.
    """
    import numpy

    n = len(differences)
    if n < 2:
        return None
    values = numpy.asarray(differences, dtype=float)
    reached = abs(values.sum()) * (1 - 1e-12)
    if n <= EXACT:
        signs = 1 - 2 * (numpy.arange(2**n)[:, None] >> numpy.arange(n) & 1)
        return float((abs(signs @ values) >= reached).mean())
    generator = numpy.random.default_rng(seed)
    # a block of flips at a time bounds the memory
    signs = (1 - 2 * generator.integers(2, size=(100, n), dtype=numpy.int8) for _ in range(FLIPS // 100))
    as_far = sum(int((abs(block @ values) >= reached).sum()) for block in signs)
    return (1 + as_far) / (1 + FLIPS)


def student_quantile(freedom: int) -> float:
    """How many standard errors are 95% of a mean's spread, two-sided, on so many degrees of freedom: Student's t by its
    expansion around the normal one (Abramowitz and Stegun 26.7.5), within .01 of it."""
    if freedom in QUANTILES:
        return QUANTILES[freedom]
    z = 1.959964
    terms = (
        z,
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
    )
    return sum(term / freedom**i for i, term in enumerate(terms))


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
