"""Ratios over many rows and their 95 % confidence intervals: pure functions."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from ernie_align.errors import RunError

if TYPE_CHECKING:
    from numpy import ndarray

RESAMPLES = 2000
_BATCH_NUMBERS = 1_000_000  # resample in batches of so many numbers, so that memory stays small for any number of rows

Interval = tuple[float, float]
Part = tuple[float, float]  # (numerator, denominator) that one row adds to a ratio


def scipy_stats() -> Any:
    """Return scipy.stats. Raises RunError if scipy is not installed."""
    try:
        from scipy import stats
    except ImportError:
        raise RunError.at("eval", "scipy is not installed", fix="pip install 'ernie-align[eval]'") from None
    return stats


def wilson_interval(successes: int, trials: int) -> Interval:
    """95 % interval of a success rate by Wilson's score: it stays inside [0, 1] and is valid near both ends.

    Wilson (1927), Probable inference, the law of succession, and statistical inference. JASA 22.
    Raises ValueError without trials.
    """
    if trials < 1:
        raise ValueError("an interval needs at least one trial")
    interval = scipy_stats().binomtest(successes, trials).proportion_ci(method="wilson")
    return float(interval.low), float(interval.high)


def ratio(parts: Sequence[Part]) -> float:
    """Return Σ numerators / Σ denominators over the rows: the mean if every denominator is 1."""
    return math.fsum(a for a, _ in parts) / math.fsum(b for _, b in parts)


def is_rate(parts: Sequence[Part]) -> bool:
    """Return True if every row is a success (1) or a failure (0)."""
    return all(b == 1 and a in (0, 1) for a, b in parts)


def bootstrap_interval(parts: Sequence[Part], *, seed: int = 0) -> Interval:
    """95 % percentile interval of ratio(parts) over RESAMPLES draws of rows with replacement.

    Efron (1979), Bootstrap methods: another look at the jackknife. Ann. Statist. 7. One row gives an interval of
    width 0. Raises ValueError without rows.
    """
    return _percentile_interval([parts], _resampled_ratio, seed)


def paired_difference(ours: Sequence[Part], theirs: Sequence[Part], *, of_exp: bool = False, seed: int = 0) -> Interval:
    """95 % percentile interval of ratio(ours) - ratio(theirs), both over the same draws of rows.

    of_exp: of exp(ratio(ours)) - exp(ratio(theirs)) instead.
    Pairing removes the variance of rows that are easy or hard for both. Koehn (2004), Statistical significance tests
    for machine translation evaluation, EMNLP. Raises ValueError if the numbers of rows differ.
    """
    if len(ours) != len(theirs):
        raise ValueError(f"{len(ours)} rows against {len(theirs)}")

    def difference(a: ndarray, b: ndarray, c: ndarray, d: ndarray, axis: int) -> ndarray:
        import numpy as np

        one, other = _resampled_ratio(a, b, axis), _resampled_ratio(c, d, axis)
        return np.exp(one) - np.exp(other) if of_exp else one - other

    return _percentile_interval([ours, theirs], difference, seed)


def _resampled_ratio(numerators: ndarray, denominators: ndarray, axis: int) -> ndarray:
    return numerators.sum(axis) / denominators.sum(axis)


def _percentile_interval(samples: list[Sequence[Part]], statistic: Callable[..., ndarray], seed: int) -> Interval:
    import numpy as np

    count = len(samples[0])
    if count < 1:
        raise ValueError("an interval needs at least one row")
    columns = [column for sample in samples for column in np.asarray(sample, dtype=np.float64).T]
    if count == 1:  # scipy refuses a single row
        value = float(statistic(*columns, axis=0))
        return value, value
    settings = {"n_resamples": RESAMPLES, "batch": max(1, _BATCH_NUMBERS // count), "rng": np.random.default_rng(seed)}
    result = scipy_stats().bootstrap(columns, statistic, paired=True, vectorized=True, method="percentile", **settings)
    return float(result.confidence_interval.low), float(result.confidence_interval.high)
