"""A verb for each stage."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from typing import Annotated

import typer

from ernie_align.cli.arguments import Overrides, RecipePath
from ernie_align.runs import load_recipe
from ernie_align.runs.launch import launch as start_processes
from ernie_align.stages import Stage


def train(stage: Stage) -> Callable[..., None]:
    """The verb of a stage."""

    def verb(
        recipe: RecipePath,
        overrides: Overrides = None,
        resume: Annotated[
            bool, typer.Option("--resume", help="Go on from the newest whole checkpoint in run.dir.")
        ] = False,
        launch: Annotated[
            str | None,
            typer.Option(metavar="PROFILE", help="Run on several processes: a name or file of recipes/accelerate."),
        ] = None,
        processes: Annotated[int | None, typer.Option(min=1, help="Of --launch; otherwise the profile's.")] = None,
        launcher: Annotated[
            str | None,
            typer.Option(metavar="WORDS", help="Of --launch: options of accelerate launch, before the profile's."),
        ] = None,
        tp_size: Annotated[int, typer.Option(min=1, help="Processes over which each matrix is cut.")] = 1,
        ep_size: Annotated[int, typer.Option(min=1, help="Processes over which the experts are dealt out.")] = 1,
    ) -> None:
        import ernie_align

        checked = load_recipe(recipe, overrides=overrides or (), stage=stage.name)
        if launch is not None:
            arguments = [stage.name, str(recipe), *(overrides or ()), *(["--resume"] if resume else [])]
            sizes = {"--tp-size": tp_size, "--ep-size": ep_size}
            arguments += [word for name, size in sizes.items() if size > 1 for word in (name, str(size))]
            raise typer.Exit(start_processes(launch, processes, arguments, shlex.split(launcher or "")))
        if processes is not None:
            raise typer.BadParameter("say how they share the work with --launch", param_hint="--processes")
        if launcher is not None:
            raise typer.BadParameter("say what it launches with --launch", param_hint="--launcher")
        ernie_align.run(checked, resume=resume, tp_size=tp_size, ep_size=ep_size)

    return verb
