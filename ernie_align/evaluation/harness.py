"""Text benchmarks through lm-eval, on the model as this toolkit loads and routes it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ernie_align.errors import DataError, RunError
from ernie_align.evaluation.runner import to_accelerator
from ernie_align.models.load import load_model


def run_tasks(
    checkpoint: str,
    tasks: Sequence[str],
    *,
    include_path: Path | None = None,
    limit: int | None = None,
    batch_size: int = 16,
    dtype: str = "auto",
) -> list[dict[str, Any]]:
    """One line for each task and metric: {task, metric, filter, value, stderr}; stderr is lm-eval's, None without one.

    tasks: names that lm-eval knows, or of the YAML files in include_path; limit: rows of each task.
    Raises RunError where lm-eval is not installed, DataError for a task that it does not know or cannot read.
    """
    try:
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise RunError.at(
            "--harness", f"lm-eval is not here: {error}", fix="pip install 'ernie-align[bench]'"
        ) from None
    manager = TaskManager(include_path=str(include_path) if include_path else None, include_defaults=not include_path)
    if include_path and not set(tasks) <= set(manager.all_tasks):  # reading lm-eval's own thousands takes a while
        manager = TaskManager(include_path=str(include_path))
    unknown = [task for task in tasks if task not in manager.all_tasks]
    if unknown:
        fix = "name a task that lm-eval has, or --include-path with the folder of its YAML file"
        raise DataError.at("--harness", f"no task is called {', '.join(unknown)}", fix=fix)
    bundle = load_model(checkpoint, dtype=dtype)
    to_accelerator(bundle.model)
    bundle.model.eval()
    model = HFLM(
        pretrained=bundle.model,
        backend="causal",  # of an architecture that shows images too, only the text is asked
        tokenizer=bundle.tokenizer,
        device=str(next(bundle.model.parameters()).device),
        batch_size=batch_size,
    )
    try:
        found = simple_evaluate(
            model=model, tasks=list(tasks), task_manager=manager, limit=limit, bootstrap_iters=1000, log_samples=False
        )
    except (OSError, ValueError, KeyError) as error:  # data sets that cannot be fetched or read, broken task files
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise DataError.at("--harness", f"{', '.join(tasks)}: {reason}", fix="check the task's data set") from error
    return [line for task, values in found["results"].items() for line in _lines(task, values)]


def _lines(task: str, values: Mapping[str, Any]) -> list[dict[str, Any]]:
    """lm-eval's `acc,none` and `acc_stderr,none` as one line."""
    lines = []
    for key, value in values.items():
        metric, comma, filtered = key.partition(",")
        if comma and not metric.endswith("_stderr") and isinstance(value, (int, float)):
            stderr = values.get(f"{metric}_stderr,{filtered}")
            known = stderr if isinstance(stderr, (int, float)) else None
            lines.append({"task": task, "metric": metric, "filter": filtered, "value": value, "stderr": known})
    return lines


def write_results(out: Path, results: Mapping[str, Sequence[Mapping[str, Any]]]) -> Path:
    """Keep results by checkpoint as JSON: in a .json file, or as harness.json in a folder. Where that is."""
    path = out if out.suffix == ".json" else out / "harness.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(json.dumps({"harness": results}, indent=1) + "\n", encoding="utf-8")
    partial.replace(path)
    return path
