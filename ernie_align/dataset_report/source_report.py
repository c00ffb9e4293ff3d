"""What was found in one source: counts that are added to one another, never rows."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

from ernie_align.data.load import MAX_NAMED_ROWS, SourceStats
from ernie_align.errors import Fault

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


_REASONS = 200  # that are told apart
_OF_IMAGES = (  # kinds that data.media tells
    "a missing image",
    "a broken image",
    "an empty image",
    "an unreadable image",
    "a file that is no image",
    "an image outside",
    "an image path",
    "an image that is no",
    "an image of ",
    "a huge image",
    "a URL",
    "an aspect ratio",
)
LIMITS = tuple(2**power for power in range(9, 18))  # tokens


@dataclass
class Reason:
    """Faulty rows of one kind: how many, and (row, what, fix) of the first of them."""

    rows: int = 0
    named: list[tuple[str, str, str]] = field(default_factory=list)


@dataclass
class SourceReport:
    """Of one source.

    part: train, eval, or what the stage calls it; max_length: of its encoder; unreadable: faults of the source as a
    whole; faults: kind -> its rows; dropped rows, tokens and images stand in `count`, as training counts them.
    lengths: tokens of a row's longest example, image tokens included; over: limit -> [rows, tokens] beyond it;
    sides: width and height of each image in pixels; aspects: of long side to short, times 100;
    answered, thinking: rows with an answer, and with reasoning in one; letters, written: script -> letters, and rows
    that have most of theirs in it; prompts, rows: one hash of 8 bytes for each row.
    """

    part: str
    count: SourceStats
    max_length: int
    unreadable: list[Fault] = field(default_factory=list)
    faults: dict[str, Reason] = field(default_factory=dict)
    lengths: Histogram = field(default_factory=Histogram)
    over: dict[int, list[int]] = field(default_factory=dict)
    images_in_row: Histogram = field(default_factory=Histogram)
    widths: Histogram = field(default_factory=Histogram)
    heights: Histogram = field(default_factory=Histogram)
    aspects: Histogram = field(default_factory=Histogram)
    image_tokens: Histogram = field(default_factory=Histogram)
    answered: int = 0
    thinking: int = 0
    letters: dict[str, int] = field(default_factory=dict)
    written: dict[str, int] = field(default_factory=dict)
    prompts: array[int] = field(default_factory=lambda: array("Q"))
    rows: array[int] = field(default_factory=lambda: array("Q"))
    duplicate_prompts: int = 0
    duplicate_rows: int = 0
    also_in_train: int | None = None

    def fault(self, kind: str, row_name: Callable[[], str], what: str, fix: str) -> None:
        """Count one faulty row; the first of each kind are named."""
        self.count.rows += 1
        reason = self._reason(kind)
        reason.rows += 1
        if len(reason.named) < MAX_NAMED_ROWS:
            reason.named.append((row_name(), what, fix))

    def _reason(self, kind: str) -> Reason:
        if kind not in self.faults and len(self.faults) >= _REASONS:
            kind = "other faults"
        return self.faults.setdefault(kind, Reason())

    def long(self, longest: int, tokens: int) -> None:
        """Count a row's length, and what limits below it would cost."""
        self.lengths.add(longest)
        for limit in {*LIMITS, self.max_length}:
            cost = self.over.setdefault(limit, [0, 0])
            if longest > limit:
                cost[0] += 1
                cost[1] += tokens

    def merge(self, other: SourceReport) -> None:
        """Add what was found in the rows behind these."""
        _merge_counts(self.count, other.count)
        for kind, reason in other.faults.items():
            own = self._reason(kind)
            own.rows += reason.rows
            own.named += reason.named[: MAX_NAMED_ROWS - len(own.named)]
        for limit, (rows, tokens) in other.over.items():
            cost = self.over.setdefault(limit, [0, 0])
            cost[0] += rows
            cost[1] += tokens
        for name in ("lengths", "images_in_row", "widths", "heights", "aspects", "image_tokens"):
            getattr(self, name).merge(getattr(other, name))
        for name in ("letters", "written"):
            _add(getattr(self, name), getattr(other, name).items())
        self.answered += other.answered
        self.thinking += other.thinking
        self.prompts.extend(other.prompts)
        self.rows.extend(other.rows)

    @property
    def faulty(self) -> int:
        """Rows that training would stop at."""
        return sum(reason.rows for reason in self.faults.values())

    @property
    def sound(self) -> bool:
        """It can be read, no row is faulty, and something is left to train on."""
        return not self.unreadable and not self.faulty and self.count.kept > 0

    def told(self, *words: str) -> int:
        """Rows that are faulty or dropped for a reason with one of these words."""
        reasons = [(kind, reason.rows) for kind, reason in self.faults.items()] + list(self.count.dropped.items())
        return sum(rows for kind, rows in reasons if any(word in kind for word in words))

    @property
    def empty_answers(self) -> int:
        """Rows with an answer of nothing."""
        return self.told("an empty answer", "an empty completion")

    @property
    def equal_sides(self) -> int:
        """Pairs whose chosen answer is the rejected one."""
        return self.told("chosen equals rejected")

    @property
    def bad_images(self) -> int:
        """Rows with an image that is missing, broken or out of reach."""
        return self.told(*_OF_IMAGES)

    @property
    def unplaced_images(self) -> int:
        """Rows whose placeholders and images differ in number."""
        return self.told("image parts and images differ")

    def as_json(self) -> dict[str, Any]:
        """Everything but the hashes."""
        plain = {
            name: value.as_json() if isinstance(value, Histogram) else value
            for name, value in vars(self).items()
            if name not in ("prompts", "rows", "count", "faults", "unreadable")
        }
        named = ("empty_answers", "equal_sides", "bad_images", "unplaced_images", "faulty", "sound")
        return {
            "name": self.count.name,
            **plain,
            **{name: getattr(self, name) for name in named},
            "over": {str(limit): {"rows": cost[0], "tokens": cost[1]} for limit, cost in sorted(self.over.items())},
            "count": asdict(self.count),
            "unreadable": [asdict(fault) for fault in self.unreadable],
            "faults": {
                kind: {
                    "rows": reason.rows,
                    "named": [dict(zip(("row", "what", "fix"), named, strict=True)) for named in reason.named],
                }
                for kind, reason in self.faults.items()
            },
        }


def _merge_counts(into: SourceStats, other: SourceStats) -> None:
    for name, value in vars(other).items():
        if isinstance(value, int):
            setattr(into, name, getattr(into, name) + value)
    _add(into.dropped, other.dropped.items())
    for reason, rows in other.dropped_rows.items():
        own = into.dropped_rows.setdefault(reason, [])
        own += rows[: MAX_NAMED_ROWS - len(own)]


def _add(counts: dict[str, int], others: Iterable[tuple[str, int]]) -> None:
    for name, number in others:
        counts[name] = counts.get(name, 0) + number
