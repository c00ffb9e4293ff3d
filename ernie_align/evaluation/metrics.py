"""Measures of answers: pure functions."""

from __future__ import annotations

import math

_Z95 = 1.959963984540054  # the normal distribution's 97.5 % quantile


def exact_match(answer: str, expected: str) -> bool:
    """Equal but for white space around them."""
    return answer.strip() == expected.strip()


def wilson_interval(successes: int, trials: int) -> tuple[float, float]:
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
