"""How a run takes its folder, and where in it it goes on: one process decides for all."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ernie_align.errors import AlignError, RunError
from ernie_align.models.environment import environment
from ernie_align.models.sharding import Parallel
from ernie_align.recipe import Recipe, to_yaml
from ernie_align.runs.directory import RunDirectory
from ernie_align.runs.pace import examples_a_step
from ernie_align.runs.processes import Processes

if TYPE_CHECKING:
    from ernie_align.runs.train import Reporter


def begin_together(
    directory: RunDirectory,
    recipe: Recipe,
    config: Any,
    reporter: Reporter,
    *,
    resume: bool,
    parallel: Parallel | None,
    processes: Processes,
) -> None:
    """The first process takes the folder. Where it cannot, none goes on to wait for it."""
    fault: AlignError | None = None
    if processes.is_first:
        try:
            _begin(directory, recipe, reporter, resume=resume, examples_a_step=examples_a_step(config, parallel))
        except AlignError as error:
            fault = error
    may_begin = processes.of_first(fault is None)
    if fault is not None:
        raise fault
    if not may_begin:
        raise RunError.at(directory.where, "the first process could not begin", fix="see what it says")
    holder = processes.of_first(directory.holder())
    is_here = directory.is_held_by(holder)
    if processes.any(not is_here):
        what = f"{directory.path} is not the folder that the first process holds ({holder})"
        what = "another process finds no such folder" if is_here else what
        raise RunError.at(directory.where, what, fix="name a folder on a disk that all machines share")


def _begin(directory: RunDirectory, recipe: Recipe, reporter: Reporter, *, resume: bool, examples_a_step: int) -> None:
    resolved = to_yaml(recipe)
    goes_on = directory.begin(resolved, resume=resume, examples_a_step=examples_a_step)
    for name in directory.sweep():
        reporter.say(f"removed {name}: left by a run that was killed")
    if directory.final.exists():
        directory.finish()
    elif not goes_on:
        directory.write("recipe.yaml", recipe.as_given)
        directory.write("recipe.resolved.yaml", resolved)
        directory.note(environment=environment(), examples_a_step=examples_a_step)


def where_to_go_on(directory: RunDirectory, reporter: Reporter, processes: Processes) -> Path | None:
    """The newest whole checkpoint, if there is one. All processes call it."""
    found = directory.newest_whole_checkpoint(hashes=True) if processes.is_first else None
    checkpoint, passed_over = processes.of_first(found)
    for reason in passed_over:
        reporter.say(f"passed over {reason}")
    reporter.say(f"resuming from {checkpoint}" if checkpoint else "no whole checkpoint: beginning at step 0")
    if processes.is_first:
        directory.keep_metrics(_lines_logged(checkpoint) if checkpoint else 0)
    return checkpoint


def _lines_logged(checkpoint: Path) -> int:
    """Trainer remembers every log of the run, and each of them is a line of metrics.jsonl."""
    return len(json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))["log_history"])
