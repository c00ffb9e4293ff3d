"""What a checkpoint said to each row, kept line by line, so that a stopped evaluation goes on from the rows done."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from ernie_align.data import media
from ernie_align.data.row import RowFault
from ernie_align.errors import DataError, RunError
from ernie_align.evaluation.questions import Question
from ernie_align.recipe.evaluation import GenerationBlock

Key = tuple[str, int, int]  # way, row, sample


class ResponseCache:
    """rows.jsonl of one checkpoint: a first line that says what was asked, then one line per row and sample.

    Only what the model said or computed is kept; scores are derived from it, so that other metrics ask it nothing anew.
    path: None keeps the lines in memory alone.
    """

    def __init__(self, path: Path | None, *, fingerprint: str, checkpoint: str):
        self.path = path
        self.fingerprint = fingerprint
        self.lines: dict[Key, dict[str, Any]] = {}
        self.found = 0
        if path is None:
            return
        if path.exists():
            self._read(path)
        if not path.exists():  # nothing there, or not even a whole first line
            path.parent.mkdir(parents=True, exist_ok=True)
            self._append([{"fingerprint": fingerprint, "checkpoint": checkpoint}])

    def _read(self, path: Path) -> None:
        """Take over whole lines; a line that a crash cut off is taken off the file."""
        content = path.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        head, *lines = [json.loads(line) for line in whole.splitlines()] or [None]
        if head is None:
            path.unlink()
            return
        if head.get("fingerprint") != self.fingerprint:
            what = "holds answers of another checkpoint, to other rows, or drawn in another way"
            raise RunError.at(str(path), what, fix="name a new folder with --out, or remove this file")
        if len(whole) < len(content):
            with path.open("r+b") as file:
                file.truncate(len(whole))
        self.lines = {_key(line): line for line in lines}
        self.found = len(self.lines)

    def done(self, way: str, keys: Iterable[tuple[int, int]]) -> bool:
        """Whether every one of these rows and samples is there already."""
        return all((way, row, sample) in self.lines for row, sample in keys)

    def keep(self, lines: Sequence[dict[str, Any]]) -> None:
        """Add what is not there yet. lines: each with way, row and sample."""
        new = {_key(line): line for line in lines if _key(line) not in self.lines}
        self.lines |= new
        if self.path is not None:
            self._append(list(new.values()))

    def _append(self, lines: Sequence[dict[str, Any]]) -> None:
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(text)

    def of(self, way: str, row: int, samples: int = 1) -> list[dict[str, Any]]:
        """The lines of one row, sample by sample."""
        return [self.lines[way, row, sample] for sample in range(samples)]


def _key(line: dict[str, Any]) -> Key:
    return line["way"], line["row"], line["sample"]


def fingerprint(weights: str, dtype: str, questions: Sequence[Question], generation: GenerationBlock) -> str:
    """Of everything an answer depends on: weights, rows with their images, and how answers are drawn.

    The size of a batch is left out: it moves a logit by no more than rounding does.
    """
    digest = hashlib.sha256(f"{weights} {dtype}".encode())
    drawn = generation.model_dump(exclude={"batch_size"})
    digest.update(json.dumps(drawn, sort_keys=True).encode())
    for question in questions:
        row = question.row
        said = [row.messages, row.plain, row.tools, row.thinking, [vars(ending) for ending in row.responses]]
        digest.update(json.dumps([said, question.columns.get("answer")], default=str, sort_keys=True).encode())
        for image in row.images:
            try:
                digest.update(media.read_image_bytes(image))
            except RowFault as fault:
                raise DataError.at(question.place, fault.what, fix=fault.fix) from None
    return digest.hexdigest()
