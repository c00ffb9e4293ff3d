"""The command of each stage."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from typing import Annotated

import typer

from ernie_align.cli.recipes import Overrides, RecipePath
from ernie_align.stages import Stage


def train_command(stage: Stage) -> Callable[..., None]:
    """Return the command that trains a stage."""

    def command(
        recipe: RecipePath,
        overrides: Overrides = None,
        resume: Annotated[
            bool, typer.Option("--resume", help="Continue from the newest complete checkpoint in run.dir.")
        ] = False,
        launch: Annotated[
            str | None,
            typer.Option(metavar="PROFILE", help="Train on several processes: ddp, fsdp2, ep, ..., or a config file."),
        ] = None,
        processes: Annotated[
            int | None, typer.Option(min=1, help="Number of processes for --launch; default: the profile's.")
        ] = None,
        launcher: Annotated[
            str | None,
            typer.Option(metavar="OPTIONS", help="More options of accelerate launch for --launch, in one string."),
        ] = None,
        tp_size: Annotated[int, typer.Option(min=1, help="Tensor parallelism: processes that split each matrix.")] = 1,
        ep_size: Annotated[int, typer.Option(min=1, help="Expert parallelism: processes that split the experts.")] = 1,
    ) -> None:
        import ernie_align
        from ernie_align.runs.launch import launch as start_processes
        from ernie_align.runs.launch import report_exit_code

        report_exit_code()  # tells a launcher, if there is one, that this process has started
        loaded = ernie_align.load_recipe(recipe, overrides=overrides or (), stage=stage.name)
        if launch is not None:
            arguments = [stage.name, str(recipe), *(overrides or ()), *(["--resume"] if resume else [])]
            sizes = {"--tp-size": tp_size, "--ep-size": ep_size}
            arguments += [word for name, size in sizes.items() if size > 1 for word in (name, str(size))]
            raise typer.Exit(start_processes(launch, processes, arguments, shlex.split(launcher or "")))
        for option, value in (("--processes", processes), ("--launcher", launcher)):
            if value is not None:
                raise typer.BadParameter("needs --launch PROFILE", param_hint=option)
        ernie_align.run(loaded, resume=resume, tp_size=tp_size, ep_size=ep_size)

    return command
