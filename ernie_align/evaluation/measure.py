"""A checkpoint and rows with known answers -> a report."""

from __future__ import annotations

import json
import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from ernie_align.data.row import Row, RowFault
from ernie_align.data.sources import Source, canonical_rows
from ernie_align.errors import DataError
from ernie_align.evaluation.generate import Sampling, answers, renderer_of
from ernie_align.evaluation.metrics import exact_match, wilson_interval
from ernie_align.evaluation.preference import pair_logps
from ernie_align.models.load import load_model
from ernie_align.recipe import DataBlock, SourceBlock

_THINKING_ENDS = "</think>"
Metric = Literal["exact_match", "preference"]


@dataclass(frozen=True)
class Figure:
    """One metric of one kind of question in one file; kind `all` is all of several.

    value: correct / n; interval: 95 %, by Wilson's score.
    """

    data: str
    kind: str
    metric: Metric
    n: int
    correct: int
    value: float
    interval: tuple[float, float]


@dataclass(frozen=True)
class Report:
    """What was measured of one checkpoint. rows: each with its question's place, expected and given answer."""

    checkpoint: str
    figures: tuple[Figure, ...]
    rows: tuple[dict[str, Any], ...]
    settings: dict[str, Any]
    seconds: float


def write_reports(path: str | Path, reports: Iterable[Report]) -> None:
    """As JSON, `{"reports": [...]}`, whole or not at all."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    content = {"reports": [asdict(report) for report in reports]}
    partial.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    partial.replace(path)


def evaluate(
    checkpoint: str | Path,
    data: str | Path | Iterable[str | Path],
    *,
    out: str | Path | None = None,
    batch_size: int = 64,
    max_new_tokens: int = 256,
    thinking: bool = False,
    media_root: str | None = None,
    format: str = "auto",
    metrics: Metric = "exact_match",
    limit: int | None = None,
    dtype: str = "auto",
    tick: Callable[[int], None] = lambda rows: None,
) -> Report:
    """Ask a checkpoint (a model, an adapter, or a checkpoint of a run) every question of some files.

    metrics: exact_match generates greedily, and compares with the row's `answer` column, else its last assistant turn;
    preference takes rows with chosen and rejected answers, and counts those whose chosen one is more likely. A row's
    `kind` groups the figures.
    out: write the report there as JSON too; thinking: of the chat template, unless a row says otherwise (what follows
    `</think>` is then the answer); limit: rows of each file; tick: told the number of rows done so far.
    Raises ValueError for an unknown metric, DataError for rows without a known answer, ModelError where the checkpoint
    does not load or route.
    """
    if metrics not in get_args(Metric):
        raise ValueError(f"metrics is {metrics!r}: choose from {', '.join(get_args(Metric))}")
    start = time.monotonic()
    files = [str(data)] if isinstance(data, (str, Path)) else [str(file) for file in data]
    read = _pairs if metrics == "preference" else _questions
    questions = [question for file in files for question in read(file, media_root, format, limit)]
    bundle = load_model(str(checkpoint), dtype=dtype)
    _to_accelerator(bundle.model)
    renderer = renderer_of(bundle, thinking=thinking)
    sampling = Sampling(max_new_tokens=max_new_tokens)
    results: list[dict[str, Any] | None] = [None] * len(questions)
    rows = [question.row for question in questions]
    try:
        if metrics == "preference":
            given = ((number, logps) for number, *logps in pair_logps(bundle, renderer, rows, batch_size=batch_size))
        else:
            given = answers(bundle, renderer, rows, sampling=sampling, batch_size=batch_size)
        for done, (number, found) in enumerate(given, start=1):
            results[number] = questions[number].result(found)
            tick(done)
    except RowFault as fault:
        raise DataError.at(", ".join(files), fault.what, fix=fault.fix) from None
    settings = {
        "metrics": metrics,
        "batch_size": batch_size,
        "max_new_tokens": max_new_tokens,
        "thinking": thinking,
        "greedy": True,
    }
    report = Report(
        str(checkpoint), _figures(results, metrics), tuple(results), settings, round(time.monotonic() - start, 3)
    )
    if out is not None:
        write_reports(out, [report])
    return report


@dataclass(frozen=True)
class _Question:
    file: str
    place: str
    row: Row
    expected: str
    kind: str

    def result(self, text: str) -> dict[str, Any]:
        answer = text.rpartition(_THINKING_ENDS)[2]
        return {
            "data": self.file,
            "row": self.place,
            "kind": self.kind,
            "expected": self.expected,
            "answer": text,
            "correct": exact_match(answer, self.expected),
        }


def _questions(file: str, media_root: str | None, format: str, limit: int | None) -> Iterable[_Question]:
    source = _source(file, media_root, format, limit)
    for number, row in enumerate(canonical_rows(source)):
        last = row.messages[-1] if row.messages else {}
        expected = row.columns.get("answer")
        if expected is None:
            expected = row.plain[1] if row.plain else last.get("content") if last.get("role") == "assistant" else None
        if expected is None:
            fix = "give the row an answer column, or an assistant turn at its end"
            raise DataError.at(source.row_name(number), "no answer is known", fix=fix)
        yield _Question(file, source.row_name(number), row, str(expected), str(row.columns.get("kind", "all")))


@dataclass(frozen=True)
class _Pair:
    file: str
    place: str
    row: Row
    kind: str

    def result(self, logps: list[float]) -> dict[str, Any]:
        chosen, rejected = logps
        return {
            "data": self.file,
            "row": self.place,
            "kind": self.kind,
            "chosen_logp": chosen,
            "rejected_logp": rejected,
            "correct": chosen > rejected,
        }


def _pairs(file: str, media_root: str | None, format: str, limit: int | None) -> Iterable[_Pair]:
    source = _source(file, media_root, format, limit)
    for number, row in enumerate(canonical_rows(source)):
        if not row.endings:
            fix = "give the row chosen and rejected, or measure exact_match"
            raise DataError.at(source.row_name(number), "no preference is known", fix=fix)
        yield _Pair(file, source.row_name(number), row, str(row.columns.get("kind", "all")))


def _source(file: str, media_root: str | None, format: str, limit: int | None) -> Source:
    block = SourceBlock(path=file, limit=limit)
    return Source(block, DataBlock(train=[block], format=format, media_root=media_root))


def _figures(results: list[dict[str, Any]], metric: Metric) -> tuple[Figure, ...]:
    groups: dict[tuple[str, str], list[bool]] = defaultdict(list)
    files = list(dict.fromkeys(result["data"] for result in results))  # in the order they were given
    for result in results:
        groups[result["data"], result["kind"]].append(result["correct"])
    for file in files:
        kinds = [right for (data, _), right in groups.items() if data == file]
        if len(kinds) > 1:
            groups[file, "all"] = [correct for right in kinds for correct in right]
    return tuple(
        Figure(
            file, kind, metric, len(right), sum(right), sum(right) / len(right), wilson_interval(sum(right), len(right))
        )
        for (file, kind), right in sorted(
            groups.items(), key=lambda group: (files.index(group[0][0]), group[0][1] == "all", group[0][1])
        )
    )


def _to_accelerator(model: Any) -> None:
    import torch

    if torch.cuda.is_available():
        model.to("cuda")
