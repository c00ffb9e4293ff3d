"""Sources -> encoded examples: judged row by row, counted, kept in Arrow, mixed by weight."""

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

MAX_NAMED_ROWS = 20  # faulty or dropped ones that are named, for each reason
_SHUFFLE_BUFFER = 1000  # rows of a stream that are shuffled among each other


class Encoder(Protocol):
    """A stage's way from a canonical row to its examples, all with the same columns.

    Among them are those that are counted: `length`, `trained`, `vision_tokens`, `reasoning_left_out`, `cut`
    and `media`.
    max_length: tokens beyond which a row is dropped or cut; renderer: what it renders by.
    """

    max_length: int
    renderer: Renderer

    def features(self) -> dict[str, Any]:
        """Name of each column -> its `datasets` feature."""

    def __call__(self, row: Row) -> list[dict[str, Any]]:
        """The examples of a row. Raises RowFault and RowDropped."""


@dataclass
class SourceStats:
    """What became of one source's rows.

    trained: tokens with a label; without_images: examples that show none; reasoning_left_out: answers whose reasoning
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

    def keep(self, examples: list[dict[str, Any]]) -> None:
        """Count one kept row and the examples it gave."""
        self.rows += 1
        self.kept += 1
        self.examples += len(examples)
        for example in examples:
            self.tokens += example["length"]
            self.trained += example["trained"]
            self.vision_tokens += example["vision_tokens"]
            self.reasoning_left_out += example["reasoning_left_out"]
            self.cut += example["cut"]
            self.images += len(example["media"])
            self.without_images += not example["media"]

    def drop(self, reason: str, row_name: Callable[[], str]) -> None:
        """Count one dropped row; row_name is asked for the first ones only."""
        self.rows += 1
        self.dropped[reason] = self.dropped.get(reason, 0) + 1
        named = self.dropped_rows.setdefault(reason, [])
        if len(named) < MAX_NAMED_ROWS:
            named.append(row_name())


def encode_source(
    source: Source, encode: Encoder, *, number: int = 0, cache: Path | None = None, workers: int | None = None
) -> tuple[Dataset | IterableDataset, SourceStats]:
    """Encode every row of a source, each of its images opened and decoded once.

    number: of the source, kept with each example in column `rows` as [number, row]; cache: file for the result, which
    is otherwise kept in memory; workers: processes that share the work.
    A sound row that does not fit is dropped and counted. Raises DataError naming every faulty row (up to 20), or the
    source if nothing is left.
    """
    from datasets import Features, Value
    from datasets.features import List

    count = SourceStats(source.name, source.format)
    if source.streaming:
        return _stream(source, encode, number, count), count
    added = {
        "rows": List(Value("int64")),
        "dropped": Value("string"),
        "fault": Value("string"),
        "fix": Value("string"),
    }
    features = Features({**encode.features(), **added})

    def judge_batch(batch: dict[str, list[Any]], indices: list[int]) -> dict[str, list[Any]]:
        out: dict[str, list[Any]] = {name: [] for name in features}
        for position, index in enumerate(indices):
            verdict = _judge(source, {key: column[position] for key, column in batch.items()}, encode)
            for example in verdict.examples or [{}]:
                made = {**example, "rows": [number, index], **verdict._asdict()}
                for name, column in out.items():
                    column.append(made.get(name))
        return out

    judged = source.rows.map(
        judge_batch,
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
    return _sound(judged, source, count).remove_columns(["dropped", "fault", "fix"]), count


def encode_sample(source: Source, encode: Encoder) -> tuple[list[dict[str, Any]], SourceStats]:
    """The examples of every row of a source and their count, in memory: for a sample. Raises DataError as prepare."""
    count = SourceStats(source.name, source.format)
    examples: list[dict[str, Any]] = []
    faults: list[tuple[int, str, str]] = []
    for number, values in enumerate(source.rows):
        verdict = _judge(source, values, encode)
        if verdict.fault is not None:
            faults.append((number, verdict.fault, verdict.fix))
        elif verdict.dropped is not None:
            count.drop(verdict.dropped, partial(source.row_name, number))
        else:
            count.keep(verdict.examples)
            examples += verdict.examples
    _raise(source, faults, count)
    return examples, count


def mix_sources(datasets: list[Any], blocks: list[SourceBlock], *, seed: int, streaming: bool = False) -> Any:
    """Sources -> one data set. A source of weight w gives each of its examples w times per epoch.

    The part after the point is a random choice of examples by `seed`. Streams are interleaved in proportion to their
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
        whole, part = int(block.weight), block.weight - int(block.weight)
        chosen = list(range(len(dataset))) * whole
        chosen += sorted(random.Random(seed + number).sample(range(len(dataset)), round(part * len(dataset))))
        weighted.append(dataset if block.weight == 1 else dataset.select(chosen))
    mixed = weighted[0] if len(weighted) == 1 else concatenate_datasets(weighted)
    if len(mixed) == 0:
        raise DataError.at(blocks[0].where("weight"), "the weights leave no example", fix="raise them")
    return mixed


class _Verdict(NamedTuple):
    """On one row: examples, or the reason it is dropped, or its fault with the next move."""

    examples: list[dict[str, Any]]
    dropped: str | None = None
    fault: str | None = None
    fix: str | None = None


def _judge(source: Source, values: dict[str, Any], encode: Encoder) -> _Verdict:
    try:
        row = source.row(source.read(values))
        examples = encode(row)
        for image in row.images:  # a broken image is found now, not an hour into the run
            media.load_image(image)
    except RowDropped as dropped:
        return _Verdict([], dropped=dropped.reason)
    except RowFault as fault:
        return _Verdict([], fault=fault.what, fix=fault.fix)
    except ModelError as error:  # of the chat template, which says where it is; this says for which row
        return _Verdict([], fault=f"{error.faults[0].where}: {error.faults[0].what}", fix=error.faults[0].fix)
    return _Verdict(examples)


def _sound(judged: Dataset, source: Source, count: SourceStats) -> Dataset:
    """Raise for faulty rows, count the dropped ones, and keep the rest."""
    import pyarrow.compute as pc

    table = judged.with_format("arrow")[:]
    numbers = pc.list_element(table["rows"], 1)
    faulty = pc.indices_nonzero(pc.is_valid(table["fault"])).to_pylist()
    for place in pc.indices_nonzero(pc.is_valid(table["dropped"])).to_pylist():
        count.drop(table["dropped"][place].as_py(), partial(source.row_name, numbers[place].as_py()))
    kept = pc.indices_nonzero(pc.and_(pc.is_null(table["fault"]), pc.is_null(table["dropped"])))
    count.kept = len(pc.unique(numbers.take(kept)))
    count.rows += count.kept
    _raise(source, ((numbers[i].as_py(), table["fault"][i].as_py(), table["fix"][i].as_py()) for i in faulty), count)
    count.examples = len(kept)
    count.tokens, count.trained, count.vision_tokens, count.reasoning_left_out, count.cut = (
        pc.sum(table[name]).as_py() for name in ("length", "trained", "vision_tokens", "reasoning_left_out", "cut")
    )
    images = pc.list_value_length(table["media"])
    count.images, count.without_images = pc.sum(images).as_py(), pc.sum(pc.equal(images, 0)).as_py()
    return judged if len(kept) == len(judged) else judged.select(kept.to_pylist())


def _raise(source: Source, faults: Iterable[tuple[int, str, str]], count: SourceStats) -> None:
    """DataError for faulty rows, or for a source of which nothing is left."""
    faults = list(faults)
    if faults:
        named = [Fault(source.row_name(number), what, fix=fix) for number, what, fix in faults[:MAX_NAMED_ROWS]]
        more = len(faults) - MAX_NAMED_ROWS
        raise DataError(*named, *([Fault(source.name, f"{more} more rows are faulty")] if more > 0 else []))
    if not count.kept:
        reasons = ", ".join(f"{reason}: {number}" for reason, number in count.dropped.items())
        what = f"every row was dropped ({reasons})" if reasons else "no rows"
        raise DataError.at(source.block.where("path"), f"{source.name}: {what}", fix="name a source with rows that fit")


def _stream(source: Source, encode: Encoder, number: int, count: SourceStats) -> IterableDataset:
    """The same judgement row by row, as the rows are asked for; the first faulty row stops the run."""
    from datasets import IterableDataset

    def examples() -> Iterator[dict[str, Any]]:
        for index, values in enumerate(source.rows):
            verdict = _judge(source, values, encode)
            if verdict.fault is not None:
                raise DataError.at(source.row_name(index, values), verdict.fault, fix=verdict.fix or "")
            if verdict.dropped is not None:
                count.drop(verdict.dropped, partial(source.row_name, index, values))
                continue
            count.keep(verdict.examples)
            for example in verdict.examples:
                yield {**example, "rows": [number, index]}

    return IterableDataset.from_generator(examples)
