"""Aligns Baidu's open ERNIE 4.5 models after pre-training."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["check", "check_data", "evaluate", "export", "load_model", "load_recipe", "plan", "run", "selfcheck"]

if TYPE_CHECKING:
    from ernie_align.evaluation import evaluate
    from ernie_align.exporting import export
    from ernie_align.models.load import load_model
    from ernie_align.planning import Plan
    from ernie_align.runs import RunResult, Setup, check_data, load_recipe
    from ernie_align.runs.selfcheck import Check

_HOMES = {
    "evaluate": "ernie_align.evaluation",
    "check_data": "ernie_align.runs",
    "export": "ernie_align.exporting",
    "load_model": "ernie_align.models.load",
    "load_recipe": "ernie_align.runs",
}


def check(recipe: Any, *, overrides: Iterable[str] = (), rows: int = 100) -> Setup:
    """Judge a recipe and the first `rows` rows of each source, and show what would be trained. Loads no weights.

    recipe: a Recipe, or what load_recipe takes. Raises AlignError for the first of them that is unsound.
    """
    from ernie_align.data.preview import preview_example
    from ernie_align.recipe import Recipe
    from ernie_align.report.console import Terminal
    from ernie_align.runs import load_recipe, sample_data, set_up

    checked = recipe if isinstance(recipe, Recipe) else load_recipe(recipe, overrides=overrides)
    terminal = Terminal()
    setup = set_up(checked)
    for note in setup.notes:
        terminal.log(note)
    terminal.parameter_summary(setup.parameter_summary)
    examples, counts = sample_data(setup, rows)
    terminal.sources(counts)
    terminal.preview(preview_example(examples[0], setup.renderer))
    lines = setup.stage.batching_summary(setup.recipe, [example["length"] for example in examples])
    for line in (*lines, *setup.stage.preflight(setup.recipe, setup.architecture, examples[0])):
        terminal.log(line)
    judged = sum(count.rows for count in counts)
    terminal.log(f"the recipe is sound, and so are the {judged} rows that were judged (rows: {rows} of each source)")
    return setup


def run(recipe: Any, *, resume: bool = False, tp_size: int = 1, ep_size: int = 1) -> RunResult:
    """Train what a recipe says, into its run.dir, and tell about it on the terminal or in the notebook.

    recipe: a Recipe, or what load_recipe takes; resume: go on from the newest whole checkpoint in run.dir;
    tp_size, ep_size: processes over which matrices are cut, and experts dealt out (docs/scale/distributed.md).
    """
    from ernie_align.models.distributed.layout import ParallelLayout
    from ernie_align.recipe import Recipe
    from ernie_align.report.console import Terminal, quiet_libraries
    from ernie_align.runs import load_recipe, run
    from ernie_align.runs.distributed import init_distributed_state

    quiet_libraries()
    checked = recipe if isinstance(recipe, Recipe) else load_recipe(recipe)
    parallel = ParallelLayout(tp_size, ep_size) if (tp_size, ep_size) != (1, 1) else None
    terminal = Terminal(speaks=init_distributed_state(checked).is_main_process)
    return run(checked, resume=resume, parallel=parallel, reporter=terminal)


def plan(recipe: Any, *, overrides: Iterable[str] = (), **hardware: Any) -> Plan:
    """What a recipe needs in memory and time; imports no torch and loads no weights.

    recipe: a Recipe, or what load_recipe takes; hardware: gpu, gpus, strategy, ... of planning.plan.
    """
    from ernie_align.models.checkpoint_files import CheckpointFiles
    from ernie_align.planning import plan
    from ernie_align.recipe import Recipe
    from ernie_align.runs import load_recipe, resolve_adapter_base

    checked = recipe if isinstance(recipe, Recipe) else load_recipe(recipe, overrides=overrides)
    if CheckpointFiles(checked.model.name).is_folder:  # a run or an adapter is nothing that the hub is asked about
        checked, _ = resolve_adapter_base(checked)
    return plan(checked, **hardware)


def selfcheck(recipe: Any, *, overrides: Iterable[str] = (), **how: Any) -> list[Check]:
    """Whether a recipe routes, resumes, repeats and spreads on this machine, by a few of its own steps.

    recipe: a Recipe, or what load_recipe takes; how: steps, processes and say of runs.selfcheck.
    """
    from ernie_align.recipe import Recipe
    from ernie_align.report.console import quiet_libraries
    from ernie_align.runs import load_recipe
    from ernie_align.runs.selfcheck import selfcheck

    quiet_libraries()
    checked = recipe if isinstance(recipe, Recipe) else load_recipe(recipe, overrides=overrides)
    return selfcheck(checked, **how)


def __getattr__(name: str) -> Any:  # the public names, imported when they are asked for
    if name in _HOMES:
        from importlib import import_module

        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'ernie_align' has no attribute {name!r}")
