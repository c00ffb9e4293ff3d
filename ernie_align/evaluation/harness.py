"""Run text benchmarks of lm-eval on a model loaded and routed by this toolkit."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ernie_align.checkpoints import write_atomically
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
    """Return {task, metric, filter, value, stderr} for each task and metric; stderr is lm-eval's, or None.

    tasks: names known to lm-eval, or of YAML files in include_path; limit: rows of each task.
    Raises RunError if lm-eval is not installed, DataError for a task that it does not know or cannot read.
    """
    try:
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise RunError.at(
            "--harness", f"lm-eval is not installed: {error}", fix="pip install 'ernie-align[bench]'"
        ) from None
    manager = TaskManager(include_path=str(include_path) if include_path else None, include_defaults=not include_path)
    if include_path and not set(tasks) <= set(manager.all_tasks):  # lm-eval's thousands of tasks are slow to read
        manager = TaskManager(include_path=str(include_path))
    unknown = [task for task in tasks if task not in manager.all_tasks]
    if unknown:
        fix = "name a task of lm-eval, or pass --include-path with the folder of your task's YAML file"
        raise DataError.at("--harness", f"there is no task named {', '.join(unknown)}", fix=fix)
    bundle = load_model(checkpoint, dtype=dtype)
    to_accelerator(bundle.model)
    bundle.model.eval()
    model = HFLM(
        pretrained=bundle.model,
        backend="causal",  # a vision-language model is evaluated on text only
        tokenizer=bundle.tokenizer,
        device=str(next(bundle.model.parameters()).device),
        batch_size=batch_size,
    )
    try:
        output = simple_evaluate(
            model=model, tasks=list(tasks), task_manager=manager, limit=limit, bootstrap_iters=1000, log_samples=False
        )
    except (OSError, ValueError, KeyError) as error:  # missing or unreadable data sets, invalid task files
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise DataError.at("--harness", f"{', '.join(tasks)}: {reason}", fix="check the task's data set") from error
    return [line for task, values in output["results"].items() for line in _flatten(task, values)]


def _flatten(task: str, values: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Combine lm-eval's `acc,none` and `acc_stderr,none` into one line."""
    lines = []
    for key, value in values.items():
        metric, comma, filtered = key.partition(",")
        if comma and not metric.endswith("_stderr") and isinstance(value, (int, float)):
            stderr = values.get(f"{metric}_stderr,{filtered}")
            known = stderr if isinstance(stderr, (int, float)) else None
            lines.append({"task": task, "metric": metric, "filter": filtered, "value": value, "stderr": known})
    return lines


def write_results(out: Path, results: Mapping[str, Sequence[Mapping[str, Any]]]) -> Path:
    """Write results by checkpoint as JSON, into a .json file or as harness.json into a folder, and return the path."""
    path = out if out.suffix == ".json" else out / "harness.json"
    write_atomically(path, json.dumps({"harness": results}, indent=1) + "\n")
    return path
