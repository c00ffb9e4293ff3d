"""Sources -> findings: every row, by several processes, with nothing kept but counts and two hashes a row."""

from __future__ import annotations

import collections
import copy
import hashlib
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from ernie_align.data import media
from ernie_align.data.load import Encoder, SourceStats
from ernie_align.data.row import Message, Row, RowDropped, RowFault
from ernie_align.data.sources import Source
from ernie_align.dataset_report.scripts import letters_by_script
from ernie_align.dataset_report.source_report import SourceReport
from ernie_align.errors import AlignError, DataError
from ernie_align.recipe import DataBlock, SourceBlock

_BATCH = 128  # rows that a worker is given at a time
_AHEAD = 4  # batches per worker that are asked for before the first is back


@dataclass(frozen=True)
class SourceSpec:
    """A source to read. part: train, eval, or what the stage calls it; encode: its stage's way to examples."""

    part: str
    block: SourceBlock
    encode: Encoder


@dataclass(frozen=True)
class DatasetReport:
    """Of a recipe: findings of each source; seconds, of the clock; workers: processes that read."""

    sources: list[SourceReport]
    max_length: int
    has_vision: bool
    seconds: float
    workers: int

    @property
    def sound(self) -> bool:
        """Training would not stop at any row, nor at any source."""
        return all(found.sound for found in self.sources)

    def as_json(self) -> dict[str, Any]:
        """Everything that was found."""
        return {
            "sound": self.sound,
            "max_length": self.max_length,
            "has_vision": self.has_vision,
            "seconds": round(self.seconds, 3),
            "workers": self.workers,
            "sources": [found.as_json() for found in self.sources],
        }


def inspect_sources(
    asked: Sequence[SourceSpec],
    data: DataBlock,
    *,
    has_vision: bool,
    workers: int | None = None,
    tick: Callable[[str, int, int], None] = lambda name, done, total: None,
) -> DatasetReport:
    """Read every row of every source. A row or a source that is faulty is found, and stops nothing.

    workers: processes, otherwise one for each core; tick: told (source, rows read, rows) now and then.
    Raises DataError where a worker was killed.
    """
    began, workers = time.monotonic(), workers or _cores()
    found = [_source(one, data, workers, tick) for one in asked]
    _duplicates(found)
    return DatasetReport(found, data.max_length, has_vision, time.monotonic() - began, workers)


def _cores() -> int:
    """That this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _source(asked: SourceSpec, data: DataBlock, workers: int, tick: Callable[[str, int, int], None]) -> SourceReport:
    found = SourceReport(asked.part, SourceStats(asked.block.name), asked.encode.max_length)
    try:
        source = Source(asked.block, data)
    except AlignError as error:
        found.unreadable += error.faults
        return found
    found.count.format = source.format
    reader, total = RowInspector(source, asked.encode), len(source.rows)
    tick(source.name, 0, total)
    for part in _parts(reader, found, total, workers):
        found.merge(part)
        tick(source.name, found.count.rows, total)
    return found


def _parts(reader: RowInspector, found: SourceReport, total: int, workers: int) -> Iterator[SourceReport]:
    """Findings of one batch of rows after another, in order."""
    empty = (found.part, found.count.name, found.max_length)
    batches = [(start, min(start + _BATCH, total)) for start in range(0, total, _BATCH)]
    workers = min(workers, len(batches))
    if workers < 2:
        for start, stop in batches:
            yield reader.rows(start, stop, _empty(*empty))
        return
    # forked where that is sound, so that tokenizer and places are shared and no script needs a guard
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else None)
    with ProcessPoolExecutor(workers, mp_context=context, initializer=_begin, initargs=(reader,)) as pool:
        waiting: collections.deque[Future[SourceReport]] = collections.deque()
        try:
            for batch in batches:
                waiting.append(pool.submit(_read, *batch, empty))
                if len(waiting) > _AHEAD * workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        except BrokenProcessPool:
            what = "a worker was killed, most likely for want of memory"
            raise DataError.at(found.count.name, what, fix="read with fewer --workers") from None
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


_reader: RowInspector | None = None  # of a worker process


def _begin(reader: RowInspector) -> None:
    global _reader
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # here the processes are what is parallel
    _reader = reader


def _read(start: int, stop: int, empty: tuple[str, str, int]) -> SourceReport:
    assert _reader is not None
    return _reader.rows(start, stop, _empty(*empty))


def _empty(part: str, name: str, max_length: int) -> SourceReport:
    return SourceReport(part, SourceStats(name), max_length)


def _duplicates(found: Sequence[SourceReport]) -> None:
    """Rows whose prompt, or whose everything, stood before in the same source; held-out prompts that are trained on."""
    trained = [_known(one.prompts) for one in found if one.part == "train"]
    everything = np.concatenate(trained) if trained else np.zeros(0, dtype=np.uint64)
    for one in found:
        one.duplicate_prompts, one.duplicate_rows = (
            len(hashes) - len(np.unique(hashes)) for hashes in map(_known, (one.prompts, one.rows))
        )
        if one.part != "train":
            one.also_in_train = int(np.isin(_known(one.prompts), everything).sum())


def _known(hashes: Any) -> np.ndarray:
    values = np.frombuffer(hashes, dtype=np.uint64) if len(hashes) else np.zeros(0, dtype=np.uint64)
    return values[values != 0]


class RowInspector:
    """Reads rows of one source. A row beyond max_length is measured whole, then judged as training would."""

    def __init__(self, source: Source, encode: Encoder):
        self.source = source
        self.encode = encode
        self.encode_whole = copy.copy(encode)
        self.encode_whole.max_length = sys.maxsize

    def rows(self, start: int, stop: int, into: SourceReport) -> SourceReport:
        """Rows start to stop - 1."""
        columns = self.source.rows[start:stop]
        for place in range(stop - start):
            self._row(start + place, {name: column[place] for name, column in columns.items()}, into)
        return into

    def _row(self, number: int, raw: dict[str, Any], into: SourceReport) -> None:
        name = partial(self.source.row_name, number, raw)
        prompt = whole = 0
        try:
            row = self.source.row(self.source.read(raw))
            prompt, whole = _hashes(row)
            _describe(row, into)
            examples = self.encode_whole(row)
            shown = [media.load_image(image).size for image in row.images]
            longest = max(map(_count_tokens, examples))
            into.long(longest, sum(example["length"] for example in examples))
            self._images(shown, into)
            if longest > self.encode.max_length:
                examples = self.encode(row)
            into.count.keep(examples)
        except RowDropped as dropped:
            into.count.drop(dropped.reason, name)
        except RowFault as fault:
            into.fault(fault.kind, name, fault.what, fault.fix)
        except AlignError as error:  # a chat template that cannot render it
            fault = error.faults[0]
            into.fault(f"{fault.where}: {fault.what}", name, f"{fault.where}: {fault.what}", fault.fix)
        into.prompts.append(prompt)
        into.rows.append(whole)

    def _images(self, sizes: list[tuple[int, int]], into: SourceReport) -> None:
        into.images_in_row.add(len(sizes))
        vision = self.encode.renderer.vision
        for width, height in sizes:
            into.widths.add(width)
            into.heights.add(height)
            into.aspects.add(round(100 * max(width, height) / min(width, height)))
            into.image_tokens.add(vision.tokens(vision.grid(height, width)))


def _count_tokens(example: dict[str, Any]) -> int:
    """Return the length that max_length limits: of a pair, the prompt with the longer answer."""
    if "input_ids" in example:
        return len(example["input_ids"])
    names = ("chosen_ids", "rejected_ids", "completion_ids")
    return len(example["prompt_ids"]) + max(len(example[name]) for name in names if name in example)


def _describe(row: Row, into: SourceReport) -> None:
    """Scripts and thinking, of every row that has a canonical form."""
    said = [*row.messages, *(message for ending in row.responses for message in ending.messages)]
    texts = [*(row.plain or ()), *(ending.text for ending in row.responses if ending.text)]
    replies = [message for message in said if message["role"] == "assistant"]
    into.answered += bool(replies) or bool(row.plain and (row.plain[1].strip() or row.responses))
    reasons = any(str(message.get("reasoning_content") or "").strip() for message in replies)
    into.thinking += reasons or any("<think>" in text and text.split("<think>")[1].strip() for text in texts[1:])
    letters = letters_by_script("\n".join([*texts, *map(_text, said)]))
    for script, number in letters.items():
        into.letters[script] = into.letters.get(script, 0) + number
    main = max(letters, key=letters.__getitem__, default="none")
    into.written[main] = into.written.get(main, 0) + 1


def _text(message: Message) -> str:
    content = message.get("content") or ""
    text = content if isinstance(content, str) else "".join(part.get("text", "") for part in content)
    return f"{message.get('reasoning_content') or ''}\n{text}"


def _hashes(row: Row) -> tuple[int, int]:
    """Of the prompt with its images, and of the whole row; never 0, which stands for a row without one."""
    images = [image["path"] or hashlib.blake2b(image["bytes"], digest_size=16).hexdigest() for image in row.images]
    ends_in_answer = not row.responses and row.messages and row.messages[-1]["role"] == "assistant"
    asked = row.plain[0] if row.plain else row.messages[:-1] if ends_in_answer else row.messages
    answers = [*(row.plain or ())[1:], *(row.messages[-1:] if ends_in_answer else ())]
    answers += [[ending.rank, ending.text, ending.messages] for ending in row.responses]
    prompt = [asked, images, row.tools]
    return _hash(prompt), _hash([prompt, answers])


def _hash(values: Any) -> int:
    data = json.dumps(values, sort_keys=True, default=str).encode()
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "big") or 1
