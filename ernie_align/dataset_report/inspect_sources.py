"""Inspect sources: every row, in several processes, keeping only counts and two hashes per row in memory."""

from __future__ import annotations

import copy
import hashlib
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from ernie_align.data import media
from ernie_align.data.load import Encoder, SourceStats
from ernie_align.data.row import Message, Row, RowDropped, RowFault
from ernie_align.data.sources import Source
from ernie_align.dataset_report.source_report import SourceReport
from ernie_align.errors import AlignError, DataError
from ernie_align.recipe import DataBlock, SourceBlock

_BATCH = 128  # rows that a worker gets at a time

# First code point of each range, and its script; "" is digits, signs and spaces.
_RANGES = (
    (0x0000, ""), (0x0041, "Latin"), (0x005B, ""), (0x0061, "Latin"), (0x007B, ""), (0x00C0, "Latin"), (0x0250, ""),
    (0x0370, "Greek"), (0x0400, "Cyrillic"), (0x0530, "Armenian"), (0x0590, "Hebrew"), (0x0600, "Arabic"),
    (0x0780, "other"), (0x0900, "Devanagari"), (0x0980, "Bengali"), (0x0A00, "other"), (0x0B80, "Tamil"),
    (0x0C00, "other"), (0x0E00, "Thai"), (0x0E80, "other"), (0x10A0, "Georgian"), (0x1100, "Hangul"), (0x1200, "other"),
    (0x1E00, "Latin"), (0x1F00, "Greek"), (0x2000, ""), (0x2E80, "Han"), (0x3000, ""), (0x3040, "Kana"),
    (0x3100, "Han"), (0x3130, "Hangul"), (0x3190, "Han"), (0xA4D0, "other"), (0xAC00, "Hangul"), (0xD7B0, ""),
    (0xF900, "Han"), (0xFB00, "other"), (0xFE00, ""), (0xFF66, "Kana"), (0xFFA0, ""), (0x10000, "other"), (0x1D000, ""),
    (0x20000, "Han"), (0x32000, ""),
)  # fmt: skip
_FIRST = np.array([first for first, _ in _RANGES], dtype=np.uint32)
_NAMES = tuple(dict.fromkeys(name for _, name in _RANGES))
_NUMBERS = np.array([_NAMES.index(name) for _, name in _RANGES])


@dataclass(frozen=True)
class SourceSpec:
    """A source to read. part: train, eval, or the stage's own name; encode: the stage's encoder."""

    part: str
    block: SourceBlock
    encode: Encoder


@dataclass(frozen=True)
class DatasetReport:
    """Reports of all sources of a recipe. seconds: wall-clock time; workers: processes that read."""

    sources: list[SourceReport]
    max_length: int
    has_vision: bool
    seconds: float
    workers: int

    @property
    def sound(self) -> bool:
        """No source and no row would stop training."""
        return all(source.sound for source in self.sources)

    def as_json(self) -> dict[str, Any]:
        """Return the whole report."""
        return {
            "sound": self.sound,
            "max_length": self.max_length,
            "has_vision": self.has_vision,
            "seconds": round(self.seconds, 3),
            "workers": self.workers,
            "sources": [source.as_json() for source in self.sources],
        }


def inspect_sources(
    specs: Sequence[SourceSpec],
    data: DataBlock,
    *,
    has_vision: bool,
    workers: int | None = None,
    tick: Callable[[str, int, int], None] = lambda name, done, total: None,
) -> DatasetReport:
    """Read every row of every source. Faulty rows and sources are reported and do not stop the inspection.

    workers: processes, by default one per core; tick: called with (source, rows read, rows) now and then.
    Raises DataError if a worker is killed.
    """
    began = time.monotonic()
    if workers is None or workers < 1:  # as many as there are cores that this process may use
        workers = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    reports = [_inspect_source(spec, data, workers, tick) for spec in specs]
    _count_duplicates(reports)
    return DatasetReport(reports, data.max_length, has_vision, time.monotonic() - began, workers)


def _inspect_source(
    spec: SourceSpec, data: DataBlock, workers: int, tick: Callable[[str, int, int], None]
) -> SourceReport:
    report = SourceReport(spec.part, SourceStats(spec.block.name), spec.encode.max_length)
    try:
        source = Source(spec.block, data)
    except AlignError as error:
        report.unreadable += error.faults
        return report
    report.count.format = source.format
    total = len(source.rows)
    tick(source.name, 0, total)
    for batch in _inspect_batches(RowInspector(source, spec.encode, spec.part), total, workers):
        report.merge(batch)
        tick(source.name, report.count.rows, total)
    return report


def _inspect_batches(inspector: RowInspector, total: int, workers: int) -> Iterator[SourceReport]:
    """Yield the report of each batch of rows, in order."""
    batches = [(start, min(start + _BATCH, total)) for start in range(0, total, _BATCH)]
    workers = min(workers, len(batches))
    if workers < 2:
        yield from (inspector.inspect(*batch) for batch in batches)
        return
    # fork where that is safe, so that tokenizer and row places are shared and scripts need no __main__ guard
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else None)
    with ProcessPoolExecutor(workers, mp_context=context, initializer=_set_up_worker, initargs=(inspector,)) as pool:
        try:
            yield from pool.map(_inspect_in_worker, *zip(*batches, strict=True))
        except BrokenProcessPool:
            what = "a worker was killed, most likely because memory ran out"
            raise DataError.at(inspector.source.name, what, fix="use fewer --workers") from None
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


_inspector: RowInspector | None = None  # of a worker process


def _set_up_worker(inspector: RowInspector) -> None:
    global _inspector
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes run in parallel already
    _inspector = inspector


def _inspect_in_worker(start: int, stop: int) -> SourceReport:
    assert _inspector is not None
    return _inspector.inspect(start, stop)


def _count_duplicates(reports: Sequence[SourceReport]) -> None:
    """Count repeated prompts and rows within each source, and held-out prompts that are also trained on."""
    trained = [_valid_hashes(report.prompts) for report in reports if report.part == "train"]
    all_trained = np.concatenate(trained) if trained else np.zeros(0, dtype=np.uint64)
    for report in reports:
        report.duplicate_prompts, report.duplicate_rows = (
            len(hashes) - len(np.unique(hashes)) for hashes in map(_valid_hashes, (report.prompts, report.rows))
        )
        if report.part != "train":
            report.also_in_train = int(np.isin(_valid_hashes(report.prompts), all_trained).sum())


def _valid_hashes(hashes: Any) -> np.ndarray:
    values = np.frombuffer(hashes, dtype=np.uint64) if len(hashes) else np.zeros(0, dtype=np.uint64)
    return values[values != 0]


class RowInspector:
    """Inspects rows of one source with the code that prepares them for training.

    A row beyond max_length is measured whole, then dropped or cut as in training.
    """

    def __init__(self, source: Source, encode: Encoder, part: str = "train"):
        self.source = source
        self.encode = encode
        self.part = part
        self.encode_whole = copy.copy(encode)
        self.encode_whole.max_length = sys.maxsize

    def inspect(self, start: int, stop: int) -> SourceReport:
        """Return the report of rows start to stop - 1."""
        report = SourceReport(self.part, SourceStats(self.source.name), self.encode.max_length)
        columns = self.source.rows[start:stop]
        for place in range(stop - start):
            self._inspect_row(start + place, {name: column[place] for name, column in columns.items()}, report)
        return report

    def _inspect_row(self, number: int, raw: dict[str, Any], report: SourceReport) -> None:
        name = partial(self.source.row_name, number, raw)
        prompt_hash = row_hash = 0
        try:
            row = self.source.row(self.source.read(raw))
            prompt_hash, row_hash = _hash_row(row)
            _add_text_statistics(row, report)
            examples = self.encode_whole(row)
            sizes = [media.load_image(image).size for image in row.images]
            longest = max(map(_count_tokens, examples))
            report.add_length(longest, sum(example["length"] for example in examples))
            self._add_images(sizes, report)
            if longest > self.encode.max_length:
                examples = self.encode(row)
            report.count.add_kept(examples)
        except RowDropped as dropped:
            report.count.add_dropped(dropped.reason, name)
        except RowFault as fault:
            report.add_fault(fault.kind, name, fault.what, fault.fix)
        except AlignError as error:  # the chat template cannot render the row
            fault = error.faults[0]
            report.add_fault(f"{fault.where}: {fault.what}", name, f"{fault.where}: {fault.what}", fault.fix)
        report.prompts.append(prompt_hash)
        report.rows.append(row_hash)

    def _add_images(self, sizes: list[tuple[int, int]], report: SourceReport) -> None:
        report.images_in_row.add(len(sizes))
        vision = self.encode.renderer.vision
        for width, height in sizes:
            report.widths.add(width)
            report.heights.add(height)
            report.aspects.add(round(100 * max(width, height) / min(width, height)))
            report.image_tokens.add(vision.tokens(vision.grid(height, width)))


def _count_tokens(example: dict[str, Any]) -> int:
    """Return the length that max_length limits: of a pair, the prompt with the longer answer."""
    if "input_ids" in example:
        return len(example["input_ids"])
    names = ("chosen_ids", "rejected_ids", "completion_ids")
    return len(example["prompt_ids"]) + max(len(example[name]) for name in names if name in example)


def _add_text_statistics(row: Row, report: SourceReport) -> None:
    """Count scripts and reasoning of a row in canonical form."""
    messages = [*row.messages, *(message for response in row.responses for message in response.messages)]
    texts = [*(row.plain or ()), *(response.text for response in row.responses if response.text)]
    answers = [message for message in messages if message["role"] == "assistant"]
    report.answered += bool(answers) or bool(row.plain and (row.plain[1].strip() or row.responses))
    has_reasoning = any(str(message.get("reasoning_content") or "").strip() for message in answers)
    report.thinking += has_reasoning or any(
        "<think>" in text and text.split("<think>")[1].strip() for text in texts[1:]
    )
    letters = letters_by_script("\n".join([*texts, *map(_text_of, messages)]))
    for script, number in letters.items():
        report.letters[script] = report.letters.get(script, 0) + number
    main = max(letters, key=letters.__getitem__, default="none")
    report.written[main] = report.written.get(main, 0) + 1


def letters_by_script(text: str) -> dict[str, int]:
    """Count the letters of each script in a text; other characters are left out."""
    points = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype=np.uint32)
    counts = np.bincount(_NUMBERS[np.searchsorted(_FIRST, points, side="right") - 1], minlength=len(_NAMES))
    return {name: int(number) for name, number in zip(_NAMES, counts, strict=True) if name and number}


def _text_of(message: Message) -> str:
    content = message.get("content") or ""
    text = content if isinstance(content, str) else "".join(part.get("text", "") for part in content)
    return f"{message.get('reasoning_content') or ''}\n{text}"


def _hash_row(row: Row) -> tuple[int, int]:
    """Return hashes of the prompt with its images, and of the whole row; never 0, which marks an unreadable row."""
    images = [image["path"] or hashlib.blake2b(image["bytes"], digest_size=16).hexdigest() for image in row.images]
    ends_in_answer = not row.responses and row.messages and row.messages[-1]["role"] == "assistant"
    question = row.plain[0] if row.plain else row.messages[:-1] if ends_in_answer else row.messages
    answers = [*(row.plain or ())[1:], *(row.messages[-1:] if ends_in_answer else ())]
    answers += [[response.rank, response.text, response.messages] for response in row.responses]
    prompt = [question, images, row.tools]
    return _hash(prompt), _hash([prompt, answers])


def _hash(values: Any) -> int:
    data = json.dumps(values, sort_keys=True, default=str).encode()
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "big") or 1
