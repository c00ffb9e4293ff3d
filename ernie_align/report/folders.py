"""Read run directories and evaluation reports; files that do not exist are skipped."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ernie_align.errors import DataError, did_you_mean

_SHOWN_COMPLETIONS = 12


@dataclass(frozen=True)
class Run:
    """A run directory. metrics: the lines of metrics.jsonl; completions, step: of the last saved rollout."""

    name: str
    recipe: str
    coverage: list[dict[str, Any]]
    sources: list[dict[str, Any]]
    preview: str
    metrics: list[dict[str, Any]]
    facts: dict[str, Any]
    completions: list[dict[str, Any]]
    step: int


@dataclass(frozen=True)
class EvaluationReport:
    """A report of eval. folder: its image paths are relative to this folder."""

    name: str
    folder: Path
    report: dict[str, Any]


def read(path: Path) -> list[Run | EvaluationReport]:
    """Read a run directory with the evaluations in it, or an evaluation: its folder or its .json file.

    Raises DataError for anything else.
    """
    if path.is_file():
        return [_evaluation(path)]
    parts: list[Run | EvaluationReport] = [_run(path)] if (path / "run.json").is_file() else []
    reports = [path / "report.json", *sorted(path.glob("*/report.json"))]
    parts += [_evaluation(report) for report in reports if report.is_file()]
    if not parts:
        what = "contains neither run.json nor report.json" if path.is_dir() else "no such file or folder"
        raise DataError.at(str(path), what, fix="name a run directory, or the --out of ernie-align eval")
    return parts


def read_metric(folder: str | Path, key: str) -> list[tuple[int, float]]:
    """Return (step, value) for every value of `key` in a run's metrics.jsonl.

    Raises DataError if the folder is not a run directory, or if the run did not log `key`.
    """
    lines = _metrics(Path(folder))
    points = [(line["step"], line[key]) for line in lines if key in line]
    if not points:
        logged = sorted({name for line in lines for name in line})
        fix = did_you_mean(key, logged) if logged else "name a run directory"
        raise DataError.at(str(folder), f"the run did not log {key}", fix=fix)
    return points


def _evaluation(path: Path) -> EvaluationReport:
    report = _json(path)
    if not isinstance(report, dict) or "checkpoints" not in report:
        raise DataError.at(str(path), "not a report of ernie-align eval", fix="write one with ernie-align eval --out")
    return EvaluationReport(path.parent.name if path.stem == "report" else path.stem, path.parent, report)


def _run(folder: Path) -> Run:
    completions, step = _completions(folder / "completions")
    return Run(
        folder.name,
        _text(folder / "recipe.yaml"),
        _json(folder / "coverage.json", []),
        _json(folder / "data.json", []),
        _text(folder / "preview.txt"),
        _metrics(folder),
        {"text_unchanged": None, "environment": {}} | _json(folder / "run.json"),
        completions,
        step,
    )


def _metrics(folder: Path) -> list[dict[str, Any]]:
    lines = _text(folder / "metrics.jsonl").splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]  # the last one may be incomplete


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8") if path.is_file() else ""


def _json(path: Path, absent: Any = None) -> Any:
    if not path.is_file():
        return absent
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError.at(str(path), f"not JSON: {error}", fix="restore the file") from None


def _completions(folder: Path) -> tuple[list[dict[str, Any]], int]:
    """Read some rows of the newest table, evenly spaced, and its step."""
    tables = sorted(folder.glob("step-*.parquet"))
    if not tables:
        return [], 0
    from pyarrow import parquet

    rows = parquet.read_table(tables[-1]).to_pylist()
    count = min(_SHOWN_COMPLETIONS, len(rows))
    return [rows[place * len(rows) // count] for place in range(count)], int(tables[-1].stem.removeprefix("step-"))
