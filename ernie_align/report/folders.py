"""Folders of runs and evaluations, read for a page: whatever is there, and nothing that is not."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ernie_align.errors import DataError

_SHOWN_COMPLETIONS = 12


@dataclass(frozen=True)
class Run:
    """A run directory. metrics: the lines of metrics.jsonl; completions: of its last kept rollout, and its step."""

    name: str
    recipe: str = ""
    coverage: list[dict[str, Any]] = field(default_factory=list)
    sources: list[dict[str, Any]] = field(default_factory=list)
    preview: str = ""
    metrics: list[dict[str, Any]] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)
    completions: list[dict[str, Any]] = field(default_factory=list)
    step: int = 0


@dataclass(frozen=True)
class Evaluated:
    """A folder that eval wrote. folder: its images' paths begin there."""

    name: str
    folder: Path
    report: dict[str, Any]


def read(folder: Path) -> list[Run | Evaluated]:
    """A run with the evaluations inside it, or an evaluation. Raises DataError where the folder is neither."""
    found: list[Run | Evaluated] = []
    if (folder / "run.json").is_file():
        found.append(_run(folder))
    reports = [folder / "report.json", *sorted(folder.glob("*/report.json"))]
    found += [_evaluated(path) for path in reports if path.is_file()]
    if not found:
        what = f"{folder} holds neither run.json nor report.json" if folder.is_dir() else f"no such folder: {folder}"
        raise DataError.at(str(folder), what, fix="name a run directory, or a folder that eval wrote with --out")
    return found


def read_metric(folder: str | Path, key: str) -> list[tuple[int, float]]:
    """(step, value) of everything that a run logged under `key`, in its metrics.jsonl.

    Raises DataError where the folder is no run, or logged nothing of that name.
    """
    lines = _metrics(Path(folder))
    points = [(line["step"], line[key]) for line in lines if key in line]
    if not points:
        known = sorted({name for line in lines for name in line})
        what = f"nothing was logged as {key}"
        raise DataError.at(str(folder), what, fix=f"it has {', '.join(known)}" if known else "name a run directory")
    return points


def _evaluated(path: Path) -> Evaluated:
    report = _json(path)
    if "checkpoints" not in report:
        raise DataError.at(str(path), "not a report of eval", fix="write it anew with ernie-align eval --out")
    return Evaluated(path.parent.name, path.parent, report)


def _run(folder: Path) -> Run:
    completions, step = _completions(folder / "completions")
    return Run(
        folder.name,
        _text(folder / "recipe.yaml"),
        _json(folder / "coverage.json", []),
        _json(folder / "data.json", []),
        _text(folder / "preview.txt"),
        _metrics(folder),
        _json(folder / "run.json"),
        completions,
        step,
    )


def _metrics(folder: Path) -> list[dict[str, Any]]:
    lines = _text(folder / "metrics.jsonl").splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]  # the last one may be cut off


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
    """Some of the newest table, spread evenly over it."""
    tables = sorted(folder.glob("step-*.parquet"))
    if not tables:
        return [], 0
    from pyarrow import parquet

    rows = parquet.read_table(tables[-1]).to_pylist()
    count = min(_SHOWN_COMPLETIONS, len(rows))
    return [rows[place * len(rows) // count] for place in range(count)], int(tables[-1].stem.removeprefix("step-"))
