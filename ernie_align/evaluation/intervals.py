"""Figures of many rows, each with its 95 % interval: pure functions."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from numpy import ndarray

_Z95 = 1.959963984540054  # the normal distribution's 97.5 % quantile
RESAMPLES = 2000
_AT_ONCE = 1_000_000  # numbers of a block of resamples: memory stays small however many rows there are

Interval = tuple[float, float]
Part = tuple[float, float]  # what a row adds to the sum, and to what the sum is divided by


def wilson_interval(successes: int, trials: int) -> Interval:
    """95 % interval of a success rate by Wilson's score, which stays inside [0, 1] and honest near its ends.

    (p + z²/2n ± z·√(p(1 - p)/n + z²/4n²)) / (1 + z²/n), p = successes / trials, n = trials, z = 1.96
    Wilson (1927), Probable inference, the law of succession, and statistical inference. JASA 22.
    Raises ValueError without trials.
    """
    if trials < 1:
        raise ValueError("an interval needs at least one trial")
    rate, square = successes / trials, _Z95**2
    middle = rate + square / (2 * trials)
    spread = _Z95 * math.sqrt(rate * (1 - rate) / trials + square / (4 * trials**2))
    scale = 1 + square / trials
    return max(0.0, (middle - spread) / scale), min(1.0, (middle + spread) / scale)


def ratio(parts: Sequence[Part]) -> float:
    """Σa / Σb of the rows: a mean where every b is 1."""
    return math.fsum(a for a, _ in parts) / math.fsum(b for _, b in parts)


def is_rate(parts: Sequence[Part]) -> bool:
    """Whether every row is a success or a failure."""
    return all(b == 1 and a in (0, 1) for a, b in parts)


def bootstrap_interval(parts: Sequence[Part], *, seed: int = 0) -> Interval:
    """95 % percentile interval of Σa / Σb over rows drawn with replacement, RESAMPLES times.

    Efron (1979), Bootstrap methods: another look at the jackknife. Ann. Statist. 7. One row has no spread to show.
    """
    return _percentiles(len(parts), lambda rows, table: _ratios(table[0], rows), [parts], seed)


def paired_difference(ours: Sequence[Part], theirs: Sequence[Part], *, of_exp: bool = False, seed: int = 0) -> Interval:
    """95 % percentile interval of ratio(ours) - ratio(theirs), both over the same draw of rows each time.

    of_exp: of exp(ratio(ours)) - exp(ratio(theirs)) instead.
    Pairing takes out what makes a row easy or hard for both. Koehn (2004), Statistical significance tests for machine
    translation evaluation, EMNLP. Raises ValueError where the rows do not match.
    """
    if len(ours) != len(theirs):
        raise ValueError(f"{len(ours)} rows against {len(theirs)}")

    def difference(rows: ndarray, table: list[ndarray]) -> ndarray:
        one, other = (_ratios(parts, rows) for parts in table)
        return _exp(one) - _exp(other) if of_exp else one - other

    return _percentiles(len(ours), difference, [ours, theirs], seed)


def _exp(values: ndarray) -> ndarray:
    import numpy as np

    return np.exp(values)


def _ratios(parts: ndarray, rows: ndarray) -> ndarray:
    return parts[:, 0][rows].sum(axis=1) / parts[:, 1][rows].sum(axis=1)


def _percentiles(
    count: int,
    statistic: Callable[[ndarray, list[ndarray]], ndarray],
    samples: list[Sequence[Part]],
    seed: int,
) -> Interval:
    import numpy as np

    if count < 1:
        raise ValueError("an interval needs at least one row")
    table = [np.asarray(sample, dtype=np.float64) for sample in samples]
    draw, found, left = np.random.default_rng(seed), [], RESAMPLES
    while left:
        block = min(left, max(1, _AT_ONCE // count))
        found.append(statistic(draw.integers(count, size=(block, count)), table))
        left -= block
    low, high = np.percentile(np.concatenate(found), [2.5, 97.5])
    return float(low), float(high)
