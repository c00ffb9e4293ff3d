"""Align Baidu's open ERNIE 4.5 models after pre-training."""

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
    from ernie_align.recipe import Recipe
    from ernie_align.runs import RunResult, Setup, check_data, load_recipe
    from ernie_align.runs.selfcheck import Check

_MODULES = {
    "check_data": "ernie_align.runs",
    "evaluate": "ernie_align.evaluation",
    "export": "ernie_align.exporting",
    "load_model": "ernie_align.models.load",
    "load_recipe": "ernie_align.runs",
}


def check(recipe: Any, *, overrides: Iterable[str] = (), rows: int = 100) -> Setup:
    """Validate a recipe and the first `rows` rows of each source, and show what would be trained. Loads no weights.

    recipe: a Recipe, or what load_recipe takes. Raises AlignError at the first thing that is wrong.
    """
    from ernie_align.data.preview import preview_example
    from ernie_align.report.console import Terminal
    from ernie_align.runs import sample_data, set_up

    terminal = Terminal()
    setup = set_up(_load(recipe, overrides))
    for note in setup.notes:
        terminal.log(note)
    terminal.parameter_summary(setup.parameter_summary)
    examples, counts = sample_data(setup, rows)
    terminal.sources(counts)
    terminal.preview(preview_example(examples[0], setup.renderer))
    lines = setup.stage.batching_summary(setup.recipe, [example["length"] for example in examples])
    for line in (*lines, *setup.stage.preflight(setup.recipe, setup.architecture, examples[0])):
        terminal.log(line)
    checked = sum(count.rows for count in counts)
    terminal.log(
        f"the recipe is valid, and so are the {checked} rows that were checked (the first {rows} of each source)"
    )
    return setup


def run(recipe: Any, *, resume: bool = False, tp_size: int = 1, ep_size: int = 1) -> RunResult:
    """Train a recipe into its run.dir, with progress on the terminal or in the notebook.

    recipe: a Recipe, or what load_recipe takes; resume: continue from the newest complete checkpoint in run.dir;
    tp_size, ep_size: processes that split each matrix, and the experts (docs/scale/distributed.md).
    """
    from ernie_align.models.distributed.layout import ParallelLayout
    from ernie_align.report.console import Terminal, quiet_libraries
    from ernie_align.runs import run
    from ernie_align.runs.distributed import init_distributed_state

    quiet_libraries()
    loaded = _load(recipe)
    parallel = ParallelLayout(tp_size, ep_size) if (tp_size, ep_size) != (1, 1) else None
    terminal = Terminal(speaks=init_distributed_state(loaded).is_main_process)
    return run(loaded, resume=resume, parallel=parallel, reporter=terminal)


def plan(recipe: Any, *, overrides: Iterable[str] = (), **hardware: Any) -> Plan:
    """Estimate a recipe's memory and time. Imports no torch and loads no weights.

    recipe: a Recipe, or what load_recipe takes; hardware: gpu, gpus, strategy, ... of planning.plan.
    """
    from ernie_align.models.checkpoint_files import CheckpointFiles
    from ernie_align.planning import plan
    from ernie_align.runs import resolve_adapter_base

    loaded = _load(recipe, overrides)
    if CheckpointFiles(loaded.model.name).is_folder:  # a run or an adapter, whose base model is planned
        loaded, _ = resolve_adapter_base(loaded)
    return plan(loaded, **hardware)


def selfcheck(recipe: Any, *, overrides: Iterable[str] = (), **options: Any) -> list[Check]:
    """Run a few steps of a recipe to check that it routes, resumes, repeats and distributes exactly on this machine.

    recipe: a Recipe, or what load_recipe takes; options: steps, processes and log of runs.selfcheck.
    """
    from ernie_align.report.console import quiet_libraries
    from ernie_align.runs.selfcheck import selfcheck

    quiet_libraries()
    return selfcheck(_load(recipe, overrides), **options)


def _load(recipe: Any, overrides: Iterable[str] = ()) -> Recipe:
    from ernie_align.recipe import Recipe
    from ernie_align.runs import load_recipe

    return recipe if isinstance(recipe, Recipe) else load_recipe(recipe, overrides=overrides)


def __getattr__(name: str) -> Any:  # import a public name when it is first used, so that `import ernie_align` is fast
    if name in _MODULES:
        from importlib import import_module

        return getattr(import_module(_MODULES[name]), name)
    if name == "examine":
        raise AttributeError("ernie_align.examine is now called ernie_align.check_data")
    raise AttributeError(f"module 'ernie_align' has no attribute {name!r}")
