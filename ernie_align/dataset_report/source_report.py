"""Report of one source: counts and histograms that can be merged, without any rows."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

from ernie_align.data.load import MAX_NAMED_ROWS, SourceStats
from ernie_align.errors import Fault

_BITS = 7  # leading bits of a value that its bin keeps: bins of width 1 up to 127, then 2, 4, ...
_MAX_KINDS = 200  # of faults, before the rest is counted together
_IMAGE_FAULTS = (  # beginnings of the fault kinds of data.media
    "a missing image",
    "a broken image",
    "an empty image",
    "an unreadable image",
    "a file that is not an image",
    "an image outside",
    "an image path",
    "an image that is not",
    "an image of ",
    "a huge image",
    "a URL",
    "an aspect ratio",
)
LIMITS = tuple(2**power for power in range(9, 18))  # tokens


@dataclass
class Histogram:
    """Counts of whole numbers >= 0 by the lower edge of their bin, which is at most 1/64 of the value wide.

    count, total, least and most are exact.
    """

    bins: dict[int, int] = field(default_factory=dict)
    count: int = 0
    total: int = 0
    least: int = 0
    most: int = 0

    def add(self, value: int) -> None:
        """Count one value."""
        shift = max(0, value.bit_length() - _BITS)
        self.merge(Histogram({value >> shift << shift: 1}, 1, value, value, value))

    def merge(self, other: Histogram) -> None:
        """Add the counts of another histogram."""
        if not other.count:
            return
        _add_counts(self.bins, other.bins.items())
        self.least = min(self.least, other.least) if self.count else other.least
        self.most = max(self.most, other.most)
        self.count += other.count
        self.total += other.total

    def quantile(self, share: float) -> int:
        """Return the lower edge of the bin of the quantile, which is at most 1/64 below it."""
        rank, below = share * self.count, 0
        for edge in sorted(self.bins):
            below += self.bins[edge]
            if below >= rank:
                return max(edge, self.least)
        return 0

    def as_json(self) -> dict[str, Any]:
        """Return statistics, and bins as [lower edge, count]."""
        return {
            "count": self.count,
            "least": self.least,
            "mean": round(self.total / max(1, self.count), 3),
            "most": self.most,
            "quantiles": {f"{100 * share:g}": self.quantile(share) for share in (0.05, 0.25, 0.5, 0.75, 0.95, 0.99)},
            "bins": [[edge, self.bins[edge]] for edge in sorted(self.bins)],
        }


@dataclass
class FaultKind:
    """Faulty rows of one kind: their number, and (row, what, fix) of the first of them."""

    rows: int = 0
    named: list[tuple[str, str, str]] = field(default_factory=list)


@dataclass
class SourceReport:
    """Statistics and faults of one source.

    part: train, eval, or the stage's own name; max_length: of its encoder; unreadable: faults of the source as a
    whole; faults: kind -> its rows; count: dropped rows, tokens and images, as training counts them;
    lengths: tokens of a row's longest example, image tokens included; over: limit -> [rows, tokens] beyond it;
    widths, heights: of images in pixels; aspects: long side / short side * 100;
    answered, thinking: rows with an answer, and with reasoning in it; letters: script -> letters; written: script ->
    rows that have most of their letters in it; prompts, rows: an 8-byte hash per row, 0 for an unreadable one.
    """

    part: str
    count: SourceStats
    max_length: int
    unreadable: list[Fault] = field(default_factory=list)
    faults: dict[str, FaultKind] = field(default_factory=dict)
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

    def add_fault(self, kind: str, row_name: Callable[[], str], what: str, fix: str) -> None:
        """Count a faulty row; the first rows of each kind are named."""
        self.count.rows += 1
        faults = self._faults_of_kind(kind)
        faults.rows += 1
        if len(faults.named) < MAX_NAMED_ROWS:
            faults.named.append((row_name(), what, fix))

    def _faults_of_kind(self, kind: str) -> FaultKind:
        if kind not in self.faults and len(self.faults) >= _MAX_KINDS:
            kind = "other faults"
        return self.faults.setdefault(kind, FaultKind())

    def add_length(self, longest: int, tokens: int) -> None:
        """Count a row's length, and the cost of each limit below it."""
        self.lengths.add(longest)
        for limit in {*LIMITS, self.max_length}:
            self._add_cost(limit, *((1, tokens) if longest > limit else (0, 0)))

    def _add_cost(self, limit: int, rows: int, tokens: int) -> None:
        cost = self.over.setdefault(limit, [0, 0])
        cost[0] += rows
        cost[1] += tokens

    def merge(self, other: SourceReport) -> None:
        """Add the report of the rows that follow these."""
        for name, value in vars(other.count).items():
            if isinstance(value, int):
                setattr(self.count, name, getattr(self.count, name) + value)
        _add_counts(self.count.dropped, other.count.dropped.items())
        for reason, names in other.count.dropped_rows.items():
            _extend_named(self.count.dropped_rows.setdefault(reason, []), names)
        for kind, faults in other.faults.items():
            mine = self._faults_of_kind(kind)
            mine.rows += faults.rows
            _extend_named(mine.named, faults.named)
        for limit, cost in other.over.items():
            self._add_cost(limit, *cost)
        for name in ("lengths", "images_in_row", "widths", "heights", "aspects", "image_tokens"):
            getattr(self, name).merge(getattr(other, name))
        for name in ("letters", "written"):
            _add_counts(getattr(self, name), getattr(other, name).items())
        self.answered += other.answered
        self.thinking += other.thinking
        self.prompts.extend(other.prompts)
        self.rows.extend(other.rows)

    @property
    def faulty(self) -> int:
        """Number of rows that would stop training."""
        return sum(faults.rows for faults in self.faults.values())

    @property
    def sound(self) -> bool:
        """The source is readable, has no faulty row, and has rows left to train on."""
        return not self.unreadable and not self.faulty and self.count.kept > 0

    def _count_reasons(self, *words: str) -> int:
        """Count the rows that are faulty or dropped for a reason with one of these words."""
        reasons = [(kind, faults.rows) for kind, faults in self.faults.items()] + list(self.count.dropped.items())
        return sum(rows for reason, rows in reasons if any(word in reason for word in words))

    @property
    def empty_answers(self) -> int:
        """Number of rows with an empty answer."""
        return self._count_reasons("an empty answer", "an empty completion")

    @property
    def equal_sides(self) -> int:
        """Number of pairs whose chosen answer equals the rejected one."""
        return self._count_reasons("chosen equals rejected")

    @property
    def bad_images(self) -> int:
        """Number of rows with an image that is missing, broken or outside the allowed folders."""
        return self._count_reasons(*_IMAGE_FAULTS)

    @property
    def unplaced_images(self) -> int:
        """Number of rows with more or fewer placeholders than images."""
        return self._count_reasons("image parts and images differ")

    def as_json(self) -> dict[str, Any]:
        """Return everything but the hashes."""
        plain = {
            name: value.as_json() if isinstance(value, Histogram) else value
            for name, value in vars(self).items()
            if name not in ("prompts", "rows", "count", "faults", "unreadable")
        }
        derived = ("empty_answers", "equal_sides", "bad_images", "unplaced_images", "faulty", "sound")
        return {
            "name": self.count.name,
            **plain,
            **{name: getattr(self, name) for name in derived},
            "over": {str(limit): {"rows": cost[0], "tokens": cost[1]} for limit, cost in sorted(self.over.items())},
            "count": asdict(self.count),
            "unreadable": [asdict(fault) for fault in self.unreadable],
            "faults": {
                kind: {
                    "rows": faults.rows,
                    "named": [dict(zip(("row", "what", "fix"), named, strict=True)) for named in faults.named],
                }
                for kind, faults in self.faults.items()
            },
        }


def _extend_named(named: list[Any], others: list[Any]) -> None:
    named += others[: MAX_NAMED_ROWS - len(named)]


def _add_counts(counts: dict[Any, int], others: Iterable[tuple[Any, int]]) -> None:
    for name, number in others:
        counts[name] = counts.get(name, 0) + number
