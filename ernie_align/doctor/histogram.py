"""Counts of whole numbers in bins that are never wider than 1/64 of what they hold: small, and added to one another."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

_BITS = 7  # leading bits that are kept: bins of one up to 127, then of 2, 4, ...


@dataclass
class Histogram:
    """Counts by the lower edge of their bin; count, total, least and most are exact."""

    bins: dict[int, int] = field(default_factory=dict)
    count: int = 0
    total: int = 0
    least: int = 0
    most: int = 0

    def add(self, value: int) -> None:
        """One number, 0 or more."""
        spare = max(0, value.bit_length() - _BITS)
        edge = value >> spare << spare
        self.bins[edge] = self.bins.get(edge, 0) + 1
        self.least = min(self.least, value) if self.count else value
        self.most = max(self.most, value)
        self.count += 1
        self.total += value

    def merge(self, other: Histogram) -> None:
        """Add another's counts."""
        if not other.count:
            return
        for edge, number in other.bins.items():
            self.bins[edge] = self.bins.get(edge, 0) + number
        self.least = min(self.least, other.least) if self.count else other.least
        self.most = max(self.most, other.most)
        self.count += other.count
        self.total += other.total

    @property
    def mean(self) -> float:
        """0.0 of nothing."""
        return self.total / self.count if self.count else 0.0

    def quantile(self, share: float) -> int:
        """The lower edge of the bin that the quantile falls into: at most 1/64 below it."""
        seen, wanted = 0, share * self.count
        for edge in sorted(self.bins):
            seen += self.bins[edge]
            if seen >= wanted:
                return max(edge, self.least)
        return 0

    def as_json(self) -> dict[str, Any]:
        """Figures and bins as [lower edge, count]."""
        return {
            "count": self.count,
            "least": self.least,
            "mean": round(self.mean, 3),
            "most": self.most,
            "quantiles": {f"{100 * share:g}": self.quantile(share) for share in (0.05, 0.25, 0.5, 0.75, 0.95, 0.99)},
            "bins": [[edge, self.bins[edge]] for edge in sorted(self.bins)],
        }
