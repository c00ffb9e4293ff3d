"""Checkpoints and a plan -> one report: asked, measured, compared, judged, written."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ernie_align.data import media
from ernie_align.data.render import renderer_of
from ernie_align.errors import ModelError, RecipeError
from ernie_align.evaluation import compare, runner
from ernie_align.evaluation.drift import TextSnapshot, compare_text, load_held_out_text, take_text_snapshot
from ernie_align.evaluation.metrics import Metric, build_metrics
from ernie_align.evaluation.questions import Question, load_questions
from ernie_align.evaluation.requirements import Requirement, parse_requirements
from ernie_align.evaluation.requirements import judge as judge_requirements
from ernie_align.evaluation.response_cache import ResponseCache, fingerprint
from ernie_align.evaluation.routing import RoutingSnapshot, describe, first_of_each, take_routing_snapshot
from ernie_align.evaluation.runner import Figure, Result
from ernie_align.models.checkpoint_files import CheckpointFiles
from ernie_align.models.environment import environment
from ernie_align.models.load import load_model
from ernie_align.recipe.evaluation import EvalConfig
from ernie_align.recipe.load import load_block

if TYPE_CHECKING:
    from ernie_align.models.load import Bundle


VERSION = 1  # of report.json; report.schema.json describes it
Tick = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Evaluation:
    """report: what report.json holds; results: one per checkpoint; rows: one record per question."""

    report: dict[str, Any]
    results: list[Result] = field(repr=False)
    rows: list[dict[str, Any]] = field(repr=False)

    @property
    def figures(self) -> tuple[Figure, ...]:
        """Of the last checkpoint: of the only one, where there is one."""
        return self.results[-1].figures

    @property
    def passed(self) -> bool:
        """Whether every requirement is met."""
        return all(line["passed"] for line in self.report["requirements"])


@dataclass(frozen=True)
class _Work:
    """What is the same for every checkpoint. folder: where answers are kept, if anywhere."""

    plan: EvalConfig
    questions: list[Question]
    measures: list[Metric]
    ways: dict[str, list[int]]
    groups: dict[tuple[str, str], list[int]]
    folder: Path | None
    dtype: str
    tick: Tick


@dataclass(frozen=True)
class _Pictures:
    text: TextSnapshot
    routing: RoutingSnapshot | None


def load_eval_config(source: str | Path | Mapping[str, Any]) -> EvalConfig:
    """A YAML file, or a mapping -> a frozen plan. Raises RecipeError with every fault, each with its place."""
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
    """A plan in a line: files, names of metrics, and keys of `generation`. Raises RecipeError."""
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
    plan: EvalConfig | str | Path | Mapping[str, Any] | None = None,
    out: str | Path | None = None,
    dtype: str = "auto",
    tick: Tick = lambda name, done, total: None,
    **flags: Any,
) -> Evaluation:
    """Ask checkpoints (models, adapters, checkpoints of runs) the same questions, and compare them with the first.

    data, flags: a plan in a line, as short_plan takes it; plan: instead, a EvalConfig, its file, or a mapping;
    out: a folder for report.json, scores.jsonl and what each checkpoint said, by which a stopped evaluation goes on; or
    a .json file for the report alone; tick: told a checkpoint's name, the rows done and all of them.
    Raises RecipeError for a faulty plan, DataError for rows that cannot be measured, RunError where `out` holds other
    answers, ModelError where a checkpoint does not load or route.
    """
    if (plan is None) == (data is None):
        raise RecipeError.at("plan", "neither data nor plan" if plan is None else "both data and plan", fix="give one")
    judged = (
        make_eval_config(data, **flags) if plan is None else plan if isinstance(plan, EvalConfig) else load_eval_config(plan)
    )
    folder = None if out is None or str(out).endswith(".json") else Path(out)
    listed = [checkpoints] if isinstance(checkpoints, (str, Path)) else list(checkpoints)
    names = _names([str(checkpoint) for checkpoint in listed])
    measures = build_metrics(judged, cache=folder / "verdicts" if folder else None)
    questions = [question for block in judged.data for question in load_questions(block)]
    ways = runner.wanted(questions, measures)
    groups = runner.groups_of(questions)
    required = parse_requirements(
        judged.require,
        measures=[one.name for one in measures],
        kinds={data: [kind for other, kind in groups if other == data] for data, _ in groups},
        several=len(listed) > 1,
        where=judged.where("require"),
    )
    work = _Work(judged, questions, measures, ways, groups, folder, dtype, tick)
    results, against, first = [], [], None
    for name, checkpoint in names.items():
        result, pictures = _one(work, checkpoint, name, compared=len(names) > 1)
        results.append(result)
        against.append(_against(first, pictures))
        first = first or pictures
    rows = compare.records(questions, results, measures)
    report = _report(judged, measures, questions, groups, results, against, required)
    if folder is not None:
        _show_images(report, questions, folder / "images")
        _write(
            folder / "scores.jsonl", "".join(json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in rows)
        )
        _write(folder / "report.json", _json(report))
    elif out is not None:
        _write(Path(out), _json(report))
    return Evaluation(report, results, rows)


def _names(checkpoints: Sequence[str]) -> dict[str, str]:
    """Short name, different for each -> checkpoint."""
    names: dict[str, str] = {}
    for checkpoint in checkpoints:
        short = runner.name_of(checkpoint)
        free = (short if number == 1 else f"{short}_{number}" for number in range(1, len(checkpoints) + 1))
        names[next(name for name in free if name not in names)] = checkpoint
    return names


def _one(work: _Work, checkpoint: str, name: str, *, compared: bool) -> tuple[Result, _Pictures | None]:
    """Ask, measure, and (compared) look inside one checkpoint; it is let go of before the next one is loaded."""
    plan, questions = work.plan, work.questions
    asked_for = fingerprint(_weights(checkpoint), work.dtype, questions, plan.generation)
    path = work.folder / name / "rows.jsonl" if work.folder else None
    ledger = ResponseCache(path, fingerprint=asked_for, checkpoint=checkpoint)
    bundle = load_model(checkpoint, dtype=work.dtype)
    runner.to_accelerator(bundle.model)
    renderer = renderer_of(bundle, thinking=plan.generation.thinking)
    start = time.monotonic()
    asked = runner.ask(bundle, renderer, questions, work.ways, plan, ledger, partial(work.tick, name))
    seconds = round(time.monotonic() - start, 3)
    outcomes = runner.outcomes_of(ledger, work.ways, len(questions), plan.generation.samples)
    table = runner.table_of(questions, outcomes, work.measures)
    figures = runner.figures_of(table, work.groups, work.measures)
    result = Result(checkpoint, name, figures, table, outcomes, seconds, asked)
    return result, _pictures(bundle, plan, questions) if compared else None


def _weights(checkpoint: str) -> str:
    files = CheckpointFiles(checkpoint)
    if not files.is_adapter:
        return files.fingerprint()
    config = files.read_json("adapter_config.json")
    base = CheckpointFiles(config.get("base_model_name_or_path") or "", config.get("revision"))
    if not files.is_folder:
        raise ModelError.at(checkpoint, "an adapter on the hub", fix="download it, and name its folder")
    return base.fingerprint(adapter=checkpoint)


def _pictures(bundle: Bundle, plan: EvalConfig, questions: Sequence[Question]) -> _Pictures:
    renderer = renderer_of(bundle)
    text = take_text_snapshot(bundle, renderer, load_held_out_text(plan.retention), tokens=plan.retention.tokens)
    asked = first_of_each(questions, plan.retention.routed_rows)
    return _Pictures(text, take_routing_snapshot(bundle, renderer, asked))


def _against(first: _Pictures | None, own: _Pictures | None) -> dict[str, Any]:
    if own is None:
        return {"text": None, "routing": None}
    return {
        "text": compare_text(first.text, own.text) if first else None,
        "routing": describe(own.routing, first.routing if first else None) if own.routing else None,
    }


def _report(
    plan: EvalConfig,
    measures: Sequence[Metric],
    questions: Sequence[Question],
    groups: dict[tuple[str, str], list[int]],
    results: Sequence[Result],
    against: Sequence[Mapping[str, Any]],
    required: Sequence[Requirement],
) -> dict[str, Any]:
    changed = compare.changed(questions, results, measures)
    shown = sorted({*compare.samples(questions), *(change["row"] for change in changed)})
    place = {number: position for position, number in enumerate(shown)}
    figures = {result.name: result.figures for result in results}
    by_name = {result.name: own for result, own in zip(results, against, strict=True)}
    return {
        "version": VERSION,
        "plan": plan.model_dump(mode="json"),
        "environment": environment(),
        "measures": [{"name": one.name, "better": one.better, "rate": _is_rate(one, results)} for one in measures],
        "checkpoints": [
            {
                "name": result.name,
                "checkpoint": result.checkpoint,
                "seconds": result.seconds,
                "asked": result.asked,
                "figures": [asdict(figure) | {"interval": list(figure.interval)} for figure in result.figures],
                **own,
            }
            for result, own in zip(results, against, strict=True)
        ],
        "differences": [
            asdict(one) | {"interval": list(one.interval)} for one in compare.differences(results, groups, measures)
        ],
        "requirements": judge_requirements(required, figures, by_name),
        "shown": compare.records(
            [questions[number] for number in shown], [_only(result, shown) for result in results], measures
        ),
        "samples": [place[number] for number in compare.samples(questions)],
        "changed": [change | {"row": place[change["row"]]} for change in changed],
    }


def _is_rate(one: Metric, results: Sequence[Result]) -> bool:
    """Whether a figure reads as a percentage: nothing outside 0..1 was seen."""
    parts = [part for result in results for part in result.table[one.name] if part is not None]
    return not one.is_log and all(weight == 1 and 0 <= value <= 1 for value, weight in parts)


def _only(result: Result, rows: Sequence[int]) -> Result:
    table = {name: [parts[row] for row in rows] for name, parts in result.table.items()}
    return Result(result.checkpoint, result.name, (), table, [result.outcomes[row] for row in rows])


def _show_images(report: dict[str, Any], questions: Sequence[Question], folder: Path) -> None:
    """Small copies of the images of the shown rows, so that the folder is whole by itself."""
    by_place = {question.place: question for question in questions}
    for row in report["shown"]:
        row["images"] = [f"images/{keep(image, folder)}" for image in by_place[row["row"]].row.images]


def _json(report: Mapping[str, Any]) -> str:
    return json.dumps(report, indent=1, ensure_ascii=False, default=str) + "\n"


def _write(path: Path, text: str) -> None:
    """Whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.partial")
    unfinished.write_text(text, encoding="utf-8")
    unfinished.replace(path)


LONGEST_SIDE = 224  # pixels
SMALLEST = 96  # pixels of the longer side that a tiny image is enlarged to, in whole steps, so that it can be seen


def keep(image: dict[str, Any], folder: Path) -> str:
    """Write a small PNG of an image into the folder; its name there. Equal images are kept once."""
    from PIL import Image

    picture = media.load_image(image)
    if max(picture.size) > LONGEST_SIDE:
        picture.thumbnail((LONGEST_SIDE, LONGEST_SIDE))
    elif times := SMALLEST // max(picture.size):
        picture = picture.resize((picture.width * times, picture.height * times), Image.Resampling.NEAREST)
    name = f"{hashlib.sha256(picture.tobytes() + repr(picture.size).encode()).hexdigest()[:16]}.png"
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / name).exists():
        partial = folder / f".{name}.partial"
        picture.save(partial, format="PNG")
        partial.replace(folder / name)
    return name
