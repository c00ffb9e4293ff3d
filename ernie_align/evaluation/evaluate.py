"""Evaluate checkpoints on the same questions, compare each with its baseline, and write one report."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from ernie_align.checkpoints import atomic_path, write_atomically
from ernie_align.data import media
from ernie_align.data.render import renderer_of
from ernie_align.errors import ModelError, RecipeError
from ernie_align.evaluation import compare, runner
from ernie_align.evaluation.drift import TextSnapshot, compare_text, load_held_out_text, take_text_snapshot
from ernie_align.evaluation.intervals import scipy_stats
from ernie_align.evaluation.metrics import Metric, build_metrics
from ernie_align.evaluation.questions import Question, load_questions
from ernie_align.evaluation.requirements import Requirement, check_requirements, parse_requirements
from ernie_align.evaluation.response_cache import ResponseCache, fingerprint
from ernie_align.evaluation.routing import RoutingSnapshot, describe, first_of_each, take_routing_snapshot
from ernie_align.evaluation.runner import CheckpointResult, Figure, Groups, Requests
from ernie_align.models.checkpoint_files import CheckpointFiles
from ernie_align.models.load import environment, load_model
from ernie_align.recipe.evaluation import EvalConfig
from ernie_align.recipe.load import load_block

VERSION = 1  # of report.json; report.schema.json describes it
LONGEST_SIDE = 224  # pixels of a thumbnail
SMALLEST = 96  # pixels: a smaller image is enlarged by whole factors, so that it can be seen
Tick = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Evaluation:
    """report: the content of report.json; results: one per checkpoint; rows: one record per question."""

    report: dict[str, Any]
    results: list[CheckpointResult] = field(repr=False)
    rows: list[dict[str, Any]] = field(repr=False)

    @property
    def figures(self) -> tuple[Figure, ...]:
        """The results of the last checkpoint."""
        return self.results[-1].figures

    @property
    def passed(self) -> bool:
        """True if every requirement is met."""
        return all(line["passed"] for line in self.report["requirements"])


@dataclass(frozen=True)
class _Job:
    """The inputs that all checkpoints share. folder: for response caches, if any."""

    config: EvalConfig
    questions: list[Question]
    metrics: list[Metric]
    requests: Requests
    groups: Groups
    folder: Path | None
    dtype: str
    tick: Tick


@dataclass(frozen=True)
class _Snapshot:
    """The part of a model's behavior that is compared with its baseline besides answers."""

    text: TextSnapshot
    routing: RoutingSnapshot | None


def load_eval_config(source: str | Path | Mapping[str, Any]) -> EvalConfig:
    """Load a YAML file or a mapping as a frozen config. Raises RecipeError with every fault and its place."""
    return load_block(source, EvalConfig, name="eval config")


def make_eval_config(
    data: str | Path | Iterable[str | Path],
    *,
    metrics: str | Sequence[str | Mapping[str, Any]] = "exact_match",
    format: str = "auto",
    media_root: str | None = None,
    limit: int | None = None,
    require: Sequence[str] = (),
    **generation: Any,
) -> EvalConfig:
    """Make a config from files, metric names and keys of `generation`. Raises RecipeError."""
    files = [str(data)] if isinstance(data, (str, Path)) else [str(file) for file in data]
    names = [metrics] if isinstance(metrics, str) else metrics
    shared = {"format": format, "media_root": media_root, "limit": limit}
    return load_eval_config(
        {
            "data": [{"path": file, **{key: value for key, value in shared.items() if value}} for file in files],
            "metrics": [{"name": name} if isinstance(name, str) else dict(name) for name in names],
            "generation": generation,
            "require": list(require),
        }
    )


def evaluate(
    checkpoints: str | Path | Sequence[str | Path],
    data: str | Path | Iterable[str | Path] | None = None,
    *,
    config: EvalConfig | str | Path | Mapping[str, Any] | None = None,
    baseline: str | Path | None = None,
    out: str | Path | None = None,
    dtype: str = "auto",
    tick: Tick = lambda name, done, total: None,
    **options: Any,
) -> Evaluation:
    """Evaluate checkpoints (models, adapters, checkpoints of runs) on the same questions.

    data, options: arguments of make_eval_config; config: instead, an EvalConfig, its file, or a mapping;
    baseline: the checkpoint that every other one is compared with; it is added if `checkpoints` does not contain it. By
    default an adapter is compared with its base model if that is in `checkpoints`, and any other checkpoint with the
    first one.
    out: a folder for report.json, scores.jsonl, thumbnails and the responses, from which an interrupted evaluation
    resumes; or a .json file for the report, with its thumbnails in a folder next to it. tick: called with a
    checkpoint's name, the responses done and their total.
    Raises RecipeError for an invalid config, DataError for rows without what the metrics read, RunError if `out`
    contains other responses, ModelError if a checkpoint does not load or route.
    """
    if (config is None) == (data is None):
        what = "neither data nor config" if config is None else "both data and config"
        raise RecipeError.at("evaluate", f"got {what}", fix="pass one of them")
    scipy_stats()  # raises if it is not installed, before a model is loaded
    if config is None:
        config = make_eval_config(data, **options)
    elif not isinstance(config, EvalConfig):
        config = load_eval_config(config)
    folder = None if out is None or str(out).endswith(".json") else Path(out)
    listed = [checkpoints] if isinstance(checkpoints, (str, Path)) else list(checkpoints)
    names, baseline_name = _name_checkpoints([str(one) for one in listed], baseline and str(baseline))
    metrics = build_metrics(config, cache=folder / "verdicts" if folder else None)
    questions = [question for block in config.data for question in load_questions(block)]
    requests = runner.plan_requests(questions, metrics)
    groups = runner.group_questions(questions)
    requirements = parse_requirements(
        config.require,
        metrics=[metric.name for metric in metrics],
        kinds={data: [kind for other, kind in groups if other == data] for data, _ in groups},
        several=len(names) > 1,
        where=config.where("require"),
    )
    baselines = choose_baselines(names, baseline_name)
    job = _Job(config, questions, metrics, requests, groups, folder, dtype, tick)
    results, drift = _run_all(job, names, baselines)
    rows = compare.row_records(questions, results, metrics)
    thumbnails = None
    if out is not None:
        path = folder / "report.json" if folder else Path(out)
        thumbnails = folder / "images" if folder else path.with_name(f"{path.stem}_images")
    report = _report(job, results, drift, baselines, requirements, thumbnails)
    if folder is not None:
        lines = "".join(json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in rows)
        write_atomically(folder / "scores.jsonl", lines)
    if out is not None:
        write_atomically(path, json.dumps(report, indent=1, ensure_ascii=False, default=str) + "\n")
    return Evaluation(report, results, rows)


def _name_checkpoints(checkpoints: list[str], baseline: str | None) -> tuple[dict[str, str], str | None]:
    """Return unique short name -> checkpoint, and the baseline's short name. An unlisted baseline comes first.

    baseline: a checkpoint or a short name.
    """
    names = _short_names(checkpoints)
    if baseline is None or baseline in names:
        return names, baseline
    listed = [name for name, checkpoint in names.items() if _location(checkpoint) == _location(baseline)]
    if listed:
        return names, listed[0]
    names = _short_names([baseline, *checkpoints])
    return names, next(iter(names))


def _short_names(checkpoints: Sequence[str]) -> dict[str, str]:
    """Return unique short name -> checkpoint: digits-sft for runs/demo/digits-sft/final."""
    names: dict[str, str] = {}
    for checkpoint in checkpoints:
        path = Path(checkpoint)
        short = path.parent.name if path.name == "final" else path.name
        candidates = (short if number == 1 else f"{short}_{number}" for number in range(1, len(checkpoints) + 1))
        names[next(name for name in candidates if name not in names)] = checkpoint
    return names


def _location(checkpoint: str) -> str:
    """Return the absolute path of a folder, so that it can be compared; a hub name unchanged."""
    return str(Path(checkpoint).resolve()) if Path(checkpoint).exists() else checkpoint


def choose_baselines(checkpoints: Mapping[str, str], baseline: str | None = None) -> dict[str, str | None]:
    """Return the name of each checkpoint's baseline, None for a checkpoint that is compared with nothing.

    checkpoints: name -> checkpoint; baseline: the baseline of all others. Without it, an adapter is compared with its
    base model if that is listed, and any other checkpoint with the first one that is not such an adapter.
    """
    if baseline is not None:
        return {name: None if name == baseline else baseline for name in checkpoints}
    by_location = {_location(checkpoint): name for name, checkpoint in reversed(checkpoints.items())}
    bases = {}
    for name, checkpoint in checkpoints.items():
        files = CheckpointFiles(checkpoint)
        base = _adapter_base(files) if files.is_folder and files.is_adapter else None
        bases[name] = by_location.get(_location(base.name)) if base else None
    first = next((name for name, base in bases.items() if base is None), None)
    return {name: base or (None if name == first else first) for name, base in bases.items()}


def _adapter_base(adapter: CheckpointFiles) -> CheckpointFiles:
    config = adapter.read_json("adapter_config.json")
    return CheckpointFiles(config.get("base_model_name_or_path") or "", config.get("revision"))


def _run_all(
    job: _Job, names: Mapping[str, str], baselines: Mapping[str, str | None]
) -> tuple[list[CheckpointResult], dict[str, dict[str, Any]]]:
    """Run every checkpoint, each after its baseline. Return the results in the order of `names`, and their drift."""

    def depth(name: str) -> int:
        return 0 if baselines[name] is None else 1 + depth(baselines[name])

    results: dict[str, CheckpointResult] = {}
    drift: dict[str, dict[str, Any]] = {}
    snapshots: dict[str, _Snapshot] = {}  # of baselines only: log-probs of a large vocabulary take memory
    for name in sorted(names, key=depth):
        results[name], snapshot = _run(job, names[name], name, compared=len(names) > 1)
        drift[name] = _drift(snapshots.get(baselines[name]), snapshot)
        if name in baselines.values():
            snapshots[name] = snapshot
    return [results[name] for name in names], drift


def _run(job: _Job, checkpoint: str, name: str, *, compared: bool) -> tuple[CheckpointResult, _Snapshot | None]:
    """Run one checkpoint; its model is freed on return, before the next one is loaded."""
    config, questions = job.config, job.questions
    key = fingerprint(_weights_hash(checkpoint), job.dtype, questions, config.generation)
    path = job.folder / name / "rows.jsonl" if job.folder else None
    cache = ResponseCache(path, fingerprint=key, checkpoint=checkpoint)
    bundle = load_model(checkpoint, dtype=job.dtype)
    runner.to_accelerator(bundle.model)
    renderer = renderer_of(bundle, thinking=config.generation.thinking)
    start = time.monotonic()
    new = runner.collect_responses(
        bundle, renderer, questions, job.requests, config.generation, cache, partial(job.tick, name)
    )
    seconds = round(time.monotonic() - start, 3)
    outcomes = runner.outcomes_from_cache(cache, job.requests, len(questions), config.generation.samples)
    table = runner.score_outcomes(questions, outcomes, job.metrics)
    figures = runner.compute_figures(table, job.groups, job.metrics)
    result = CheckpointResult(checkpoint, name, figures, table, outcomes, seconds, new)
    if not compared:
        return result, None
    renderer = renderer_of(bundle)
    text = take_text_snapshot(bundle, renderer, load_held_out_text(config.retention), tokens=config.retention.tokens)
    routed = first_of_each(questions, config.retention.routed_rows)
    return result, _Snapshot(text, take_routing_snapshot(bundle, renderer, routed))


def _weights_hash(checkpoint: str) -> str:
    files = CheckpointFiles(checkpoint)
    if not files.is_adapter:
        return files.fingerprint()
    if not files.is_folder:
        raise ModelError.at(checkpoint, "an adapter on the hub", fix="download it, and name its folder")
    return _adapter_base(files).fingerprint(adapter=checkpoint)


def _drift(baseline: _Snapshot | None, snapshot: _Snapshot | None) -> dict[str, Any]:
    if snapshot is None:
        return {"text": None, "routing": None}
    return {
        "text": compare_text(baseline.text, snapshot.text) if baseline else None,
        "routing": describe(snapshot.routing, baseline.routing if baseline else None) if snapshot.routing else None,
    }


def _report(
    job: _Job,
    results: Sequence[CheckpointResult],
    drift: Mapping[str, Mapping[str, Any]],
    baselines: Mapping[str, str | None],
    requirements: Sequence[Requirement],
    thumbnails: Path | None,
) -> dict[str, Any]:
    """Build the content of report.json. thumbnails: folder for small copies of the shown images."""
    by_name = {result.name: result for result in results}
    pairs = [(result, by_name[base]) for result in results if (base := baselines[result.name])]
    changes = compare.most_changed(job.questions, pairs, job.metrics)
    samples = compare.sample_rows(job.questions)
    numbers = sorted({*samples, *(change["row"] for change in changes)})
    place = {number: position for position, number in enumerate(numbers)}
    shown = compare.row_records(job.questions, results, job.metrics, numbers)
    if thumbnails is not None:
        for record, number in zip(shown, numbers, strict=True):
            images = job.questions[number].row.images
            record["images"] = [f"{thumbnails.name}/{save_thumbnail(image, thumbnails)}" for image in images]
    figures = {result.name: result.figures for result in results}
    return {
        "version": VERSION,
        "plan": job.config.model_dump(mode="json"),
        "environment": environment(),
        "measures": [
            {"name": metric.name, "better": metric.better, "rate": _is_percentage(metric, results)}
            for metric in job.metrics
        ],
        "checkpoints": [
            {
                "name": result.name,
                "checkpoint": result.checkpoint,
                "baseline": baselines[result.name],
                "seconds": result.seconds,
                "asked": result.new_responses,
                "figures": [figure.to_json() for figure in result.figures],
                **drift[result.name],
            }
            for result in results
        ],
        "differences": compare.compute_differences(pairs, job.groups, job.metrics),
        "requirements": check_requirements(requirements, figures, drift, baselines),
        "shown": shown,
        "samples": [place[number] for number in samples],
        "changed": [change | {"row": place[change["row"]]} for change in changes],
    }


def _is_percentage(metric: Metric, results: Sequence[CheckpointResult]) -> bool:
    """Return True if the score of every row lies in 0..1."""
    parts = [part for result in results for part in result.table[metric.name] if part is not None]
    return not metric.is_log and all(weight == 1 and 0 <= value <= 1 for value, weight in parts)


def save_thumbnail(image: dict[str, Any], folder: Path) -> str:
    """Write a small PNG of an image into a folder and return its file name. Equal images share one file."""
    from PIL import Image

    picture = media.load_image(image)
    if max(picture.size) > LONGEST_SIDE:
        picture.thumbnail((LONGEST_SIDE, LONGEST_SIDE))
    elif factor := SMALLEST // max(picture.size):
        picture = picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.NEAREST)
    name = f"{hashlib.sha256(picture.tobytes() + repr(picture.size).encode()).hexdigest()[:16]}.png"
    if not (folder / name).exists():
        with atomic_path(folder / name) as path:
            picture.save(path, format="PNG")
    return name
