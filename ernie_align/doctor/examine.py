"""Sources -> findings: every row, by several processes, with nothing kept but counts and two hashes a row."""

from __future__ import annotations

import collections
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from typing import Any

import numpy as np

from ernie_align.data.load import Encoder, SourceCount
from ernie_align.data.sources import Source
from ernie_align.doctor.findings import Findings
from ernie_align.doctor.reading import Reader
from ernie_align.errors import AlignError, DataError
from ernie_align.recipe import DataBlock, SourceBlock

_BATCH = 128  # rows that a worker is given at a time
_AHEAD = 4  # batches per worker that are asked for before the first is back


@dataclass(frozen=True)
class Asked:
    """A source to read. part: train, eval, or what the stage calls it; encode: its stage's way to examples."""

    part: str
    block: SourceBlock
    encode: Encoder


@dataclass(frozen=True)
class Examination:
    """Of a recipe: findings of each source; seconds, of the clock; workers: processes that read."""

    sources: list[Findings]
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


def examine_sources(
    asked: Sequence[Asked],
    data: DataBlock,
    *,
    has_vision: bool,
    workers: int | None = None,
    tick: Callable[[str, int, int], None] = lambda name, done, total: None,
) -> Examination:
    """Read every row of every source. A row or a source that is faulty is found, and stops nothing.

    workers: processes, otherwise one for each core; tick: told (source, rows read, rows) now and then.
    Raises DataError where a worker was killed.
    """
    began, workers = time.monotonic(), workers or _cores()
    found = [_source(one, data, workers, tick) for one in asked]
    _duplicates(found)
    return Examination(found, data.max_length, has_vision, time.monotonic() - began, workers)


def _cores() -> int:
    """That this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _source(asked: Asked, data: DataBlock, workers: int, tick: Callable[[str, int, int], None]) -> Findings:
    found = Findings(asked.part, SourceCount(asked.block.name), asked.encode.max_length)
    try:
        source = Source(asked.block, data)
    except AlignError as error:
        found.unreadable += error.faults
        return found
    found.count.format = source.format
    reader, total = Reader(source, asked.encode), len(source.rows)
    tick(source.name, 0, total)
    for part in _parts(reader, found, total, workers):
        found.merge(part)
        tick(source.name, found.count.rows, total)
    return found


def _parts(reader: Reader, found: Findings, total: int, workers: int) -> Iterator[Findings]:
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
        waiting: collections.deque[Future[Findings]] = collections.deque()
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


_reader: Reader | None = None  # of a worker process


def _begin(reader: Reader) -> None:
    global _reader
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # here the processes are what is parallel
    _reader = reader


def _read(start: int, stop: int, empty: tuple[str, str, int]) -> Findings:
    assert _reader is not None
    return _reader.rows(start, stop, _empty(*empty))


def _empty(part: str, name: str, max_length: int) -> Findings:
    return Findings(part, SourceCount(name), max_length)


def _duplicates(found: Sequence[Findings]) -> None:
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
