"""Sources -> encoded examples: every row validated and counted, stored as Arrow, mixed by weight."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from ernie_align.data import media
from ernie_align.data.row import Row, RowDropped, RowFault
from ernie_align.data.sources import Source
from ernie_align.errors import DataError, Fault, ModelError
from ernie_align.recipe import SourceBlock

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

    from ernie_align.data.render import Renderer

MAX_NAMED_ROWS = 20  # faulty or dropped rows that are named, per reason
# statistic of a source -> column of its examples that it is the sum of
_SUMS = {"tokens": "length"} | {name: name for name in ("trained", "vision_tokens", "reasoning_left_out", "cut")}
_SHUFFLE_BUFFER = 1000  # rows of a stream that are shuffled together


class Encoder(Protocol):
    """Converts the canonical rows of a stage to its examples, which all have the same columns.

    The columns `length`, `trained`, `vision_tokens`, `reasoning_left_out`, `cut` and `media` are counted.
    max_length: longer rows are dropped or cut; renderer: the renderer that it uses.
    """

    max_length: int
    renderer: Renderer

    def features(self) -> dict[str, Any]:
        """Return the `datasets` feature of each column."""

    def __call__(self, row: Row) -> list[dict[str, Any]]:
        """Return the examples of a row. Raises RowFault and RowDropped."""


@dataclass
class SourceStats:
    """Statistics of one source.

    trained: tokens with a label; without_images: examples without an image; reasoning_left_out: answers whose reasoning
    is not trained because thinking is off; cut: examples shortened to max_length; dropped: reason -> rows;
    dropped_rows: reason -> names of the first of them.
    """

    name: str
    format: str = ""
    rows: int = 0
    kept: int = 0
    examples: int = 0
    tokens: int = 0
    trained: int = 0
    vision_tokens: int = 0
    images: int = 0
    without_images: int = 0
    reasoning_left_out: int = 0
    cut: int = 0
    dropped: dict[str, int] = field(default_factory=dict)
    dropped_rows: dict[str, list[str]] = field(default_factory=dict)

    def add_kept(self, examples: list[dict[str, Any]]) -> None:
        """Count a kept row and its examples."""
        self.rows += 1
        self.kept += 1
        self.examples += len(examples)
        for example in examples:
            for statistic, column in _SUMS.items():
                setattr(self, statistic, getattr(self, statistic) + example[column])
            self.images += len(example["media"])
            self.without_images += not example["media"]

    def add_dropped(self, reason: str, row_name: Callable[[], str]) -> None:
        """Count a dropped row; row_name is called for the first ones only."""
        self.rows += 1
        self.dropped[reason] = self.dropped.get(reason, 0) + 1
        named = self.dropped_rows.setdefault(reason, [])
        if len(named) < MAX_NAMED_ROWS:
            named.append(row_name())


def encode_source(
    source: Source, encode: Encoder, *, number: int = 0, cache: Path | None = None, workers: int | None = None
) -> tuple[Dataset | IterableDataset, SourceStats]:
    """Encode every row of a source, and decode each of its images once to validate it.

    number: of the source, stored with each example in column `rows` as [number, row]; cache: file of the result, which
    is otherwise kept in memory; workers: processes that share the work.
    Counts and drops valid rows that do not fit. Raises DataError with every faulty row (up to 20), or if no row is
    left.
    """
    from datasets import Features, Value
    from datasets.features import List

    stats = SourceStats(source.name, source.format)
    if source.streaming:
        return _encode_stream(source, encode, number, stats), stats
    outcome_features = {name: Value("string") for name in ("dropped", "fault", "fix")}
    features = Features({**encode.features(), "rows": List(Value("int64")), **outcome_features})

    def encode_batch(batch: dict[str, list[Any]], indices: list[int]) -> dict[str, list[Any]]:
        columns: dict[str, list[Any]] = {name: [] for name in features}
        for position, index in enumerate(indices):
            outcome = _encode_row(source, {key: column[position] for key, column in batch.items()}, encode)
            for example in outcome.examples or [{}]:
                values = {**example, "rows": [number, index], **outcome._asdict()}
                for name, column in columns.items():
                    column.append(values.get(name))
        return columns

    encoded = source.rows.map(
        encode_batch,
        batched=True,
        batch_size=64,
        with_indices=True,
        remove_columns=source.rows.column_names,
        features=features,
        num_proc=workers,
        load_from_cache_file=False,  # images may have changed on disk since
        keep_in_memory=cache is None,
        cache_file_name=str(cache) if cache else None,
        new_fingerprint=f"ernie-align-{number}",
    )
    return _select_kept(encoded, source, stats).remove_columns([*outcome_features]), stats


def encode_sample(source: Source, encode: Encoder) -> tuple[list[dict[str, Any]], SourceStats]:
    """Encode every row of a small source in memory. Raises DataError like encode_source."""
    stats = SourceStats(source.name, source.format)
    examples: list[dict[str, Any]] = []
    faults: list[tuple[int, str, str]] = []
    for number, values in enumerate(source.rows):
        outcome = _encode_row(source, values, encode)
        if outcome.fault is not None:
            faults.append((number, outcome.fault, outcome.fix))
        else:
            outcome.add_to(stats, partial(source.row_name, number))
            examples += outcome.examples
    _raise_faults(source, faults, stats)
    return examples, stats


def mix_sources(datasets: list[Any], blocks: list[SourceBlock], *, seed: int, streaming: bool = False) -> Any:
    """Mix sources to one data set. A source of weight w contributes each of its examples w times per epoch.

    The fractional part of w is a random choice of examples by `seed`. Streams are interleaved in proportion to their
    weights and shuffled within a buffer.
    """
    if streaming:
        from datasets import interleave_datasets

        total = sum(block.weight for block in blocks)
        shares = [block.weight / total for block in blocks]
        mixed = interleave_datasets(datasets, shares, seed=seed, stopping_strategy="all_exhausted")
        return mixed.shuffle(seed=seed, buffer_size=_SHUFFLE_BUFFER)
    from datasets import concatenate_datasets

    weighted = []
    for number, (dataset, block) in enumerate(zip(datasets, blocks, strict=True)):
        repeats, fraction = int(block.weight), block.weight - int(block.weight)
        indices = list(range(len(dataset))) * repeats
        indices += sorted(random.Random(seed + number).sample(range(len(dataset)), round(fraction * len(dataset))))
        weighted.append(dataset if block.weight == 1 else dataset.select(indices))
    mixed = weighted[0] if len(weighted) == 1 else concatenate_datasets(weighted)
    if len(mixed) == 0:
        raise DataError.at(blocks[0].where("weight"), "the weights select no example", fix="raise the weights")
    return mixed


class _Outcome(NamedTuple):
    """Result of encoding one row: its examples, or the reason why it is dropped, or its fault and the next move."""

    examples: list[dict[str, Any]]
    dropped: str | None = None
    fault: str | None = None
    fix: str | None = None

    def add_to(self, stats: SourceStats, row_name: Callable[[], str]) -> None:
        """Add the row, which has no fault, to the statistics of its source."""
        if self.dropped is not None:
            stats.add_dropped(self.dropped, row_name)
        else:
            stats.add_kept(self.examples)


def _encode_row(source: Source, values: dict[str, Any], encode: Encoder) -> _Outcome:
    try:
        row = source.row(source.read(values))
        examples = encode(row)
        for image in row.images:  # find a broken image now, not an hour into the run
            media.load_image(image)
    except RowDropped as dropped:
        return _Outcome([], dropped=dropped.reason)
    except RowFault as fault:
        return _Outcome([], fault=fault.what, fix=fault.fix)
    except ModelError as error:  # the chat template cannot render the row: report it for that row
        return _Outcome([], fault=f"{error.faults[0].where}: {error.faults[0].what}", fix=error.faults[0].fix)
    return _Outcome(examples)


def _select_kept(encoded: Dataset, source: Source, stats: SourceStats) -> Dataset:
    """Raise for faulty rows, count the dropped ones, and return the examples of the others."""
    import pyarrow.compute as pc

    table = encoded.with_format("arrow")[:]
    numbers = pc.list_element(table["rows"], 1)
    faulty = pc.indices_nonzero(pc.is_valid(table["fault"])).to_pylist()
    for place in pc.indices_nonzero(pc.is_valid(table["dropped"])).to_pylist():
        stats.add_dropped(table["dropped"][place].as_py(), partial(source.row_name, numbers[place].as_py()))
    kept = pc.indices_nonzero(pc.and_(pc.is_null(table["fault"]), pc.is_null(table["dropped"])))
    stats.kept = len(pc.unique(numbers.take(kept)))
    stats.rows += stats.kept
    faults = ((numbers[i].as_py(), table["fault"][i].as_py(), table["fix"][i].as_py()) for i in faulty)
    _raise_faults(source, faults, stats)
    stats.examples = len(kept)
    for statistic, column in _SUMS.items():
        setattr(stats, statistic, pc.sum(table[column]).as_py())
    images = pc.list_value_length(table["media"])
    stats.images, stats.without_images = pc.sum(images).as_py(), pc.sum(pc.equal(images, 0)).as_py()
    return encoded if len(kept) == len(encoded) else encoded.select(kept.to_pylist())


def _raise_faults(source: Source, faults: Iterable[tuple[int, str, str]], stats: SourceStats) -> None:
    """Raise DataError for faulty rows, or for a source that has no row left."""
    faults = list(faults)
    if faults:
        named = [Fault(source.row_name(number), what, fix=fix) for number, what, fix in faults[:MAX_NAMED_ROWS]]
        more = len(faults) - MAX_NAMED_ROWS
        raise DataError(*named, *([Fault(source.name, f"{more} more rows are faulty")] if more > 0 else []))
    if not stats.kept:
        reasons = ", ".join(f"{reason}: {number}" for reason, number in stats.dropped.items())
        what = f"every row was dropped ({reasons})" if reasons else "no rows"
        raise DataError.at(source.block.where("path"), f"{source.name}: {what}", fix="name a source with rows that fit")


def _encode_stream(source: Source, encode: Encoder, number: int, stats: SourceStats) -> IterableDataset:
    """Encode rows on demand, validated in the same way; the first faulty row stops the run."""
    from datasets import IterableDataset

    def examples() -> Iterator[dict[str, Any]]:
        for index, values in enumerate(source.rows):
            outcome = _encode_row(source, values, encode)
            if outcome.fault is not None:
                raise DataError.at(source.row_name(index, values), outcome.fault, fix=outcome.fix or "")
            outcome.add_to(stats, partial(source.row_name, index, values))
            yield from ({**example, "rows": [number, index]} for example in outcome.examples)

    return IterableDataset.from_generator(examples)
