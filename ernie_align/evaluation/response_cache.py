"""The responses of one checkpoint on disk, one line each, so that an interrupted evaluation resumes."""

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

_KEY = ("way", "row", "sample")  # keys of a line: the request type, the number of the question, the sample


class ResponseCache:
    """rows.jsonl of one checkpoint: a header with the fingerprint of the evaluation, then one line per row and sample.

    Lines hold only what the model generated or computed. Scores are derived from them, so other metrics need no new
    responses. path: None keeps the lines in memory only.
    lines: (request type, question number, sample) -> response.
    """

    def __init__(self, path: Path | None, *, fingerprint: str, checkpoint: str):
        self.path = path
        self.fingerprint = fingerprint
        self.lines: dict[tuple[str, int, int], dict[str, Any]] = {}
        if path is None:
            return
        if path.exists():
            self._read(path)
        if not path.exists():  # also if the file had no complete header
            path.parent.mkdir(parents=True, exist_ok=True)
            self._append([{"fingerprint": fingerprint, "checkpoint": checkpoint}])

    def _read(self, path: Path) -> None:
        """Read the complete lines, and truncate a last line that a crash cut off."""
        content = path.read_bytes()
        complete = content[: content.rfind(b"\n") + 1]
        head, *lines = [json.loads(line) for line in complete.splitlines()] or [None]
        if head is None:
            path.unlink()
            return
        if head.get("fingerprint") != self.fingerprint:
            what = "contains responses of another checkpoint, to other rows, or with other generation settings"
            raise RunError.at(str(path), what, fix="name a new folder with --out, or remove this file")
        if len(complete) < len(content):
            with path.open("r+b") as file:
                file.truncate(len(complete))
        self.lines = {tuple(line.pop(name) for name in _KEY): line for line in lines}

    def has_all(self, request_type: str, numbers: Sequence[int], keys: Iterable[tuple[int, int]]) -> bool:
        """Return True if the responses to all (row, sample) are cached. numbers: row -> number of the question."""
        return all((request_type, numbers[row], sample) in self.lines for row, sample in keys)

    def add(self, request_type: str, responses: Iterable[tuple[int, int, Any]]) -> None:
        """Append (question number, sample, response) for responses that are not cached yet."""
        new = {(request_type, row, sample): response for row, sample, response in responses}
        new = {key: response if isinstance(response, dict) else vars(response) for key, response in new.items()}
        new = {key: response for key, response in new.items() if key not in self.lines}
        self.lines |= new
        if self.path is not None:
            self._append([dict(zip(_KEY, key, strict=True)) | response for key, response in new.items()])

    def _append(self, lines: Sequence[dict[str, Any]]) -> None:
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(text)


def fingerprint(weights: str, dtype: str, questions: Sequence[Question], generation: GenerationBlock) -> str:
    """Hash everything a response depends on: weights, rows with their images, and generation settings.

    The batch size is excluded: it changes a logit by rounding only.
    """
    digest = hashlib.sha256(f"{weights} {dtype}".encode())
    settings = generation.model_dump(exclude={"batch_size"})
    digest.update(json.dumps(settings, sort_keys=True).encode())
    for question in questions:
        row = question.row
        content = [row.messages, row.plain, row.tools, row.thinking, [vars(response) for response in row.responses]]
        digest.update(json.dumps([content, question.columns.get("answer")], default=str, sort_keys=True).encode())
        for image in row.images:
            try:
                digest.update(media.read_image_bytes(image))
            except RowFault as fault:
                raise DataError.at(question.place, fault.what, fix=fault.fix) from None
    return digest.hexdigest()
