"""Commands that create a new folder: export, tiny."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer


def export(
    source: Annotated[
        str, typer.Argument(help="A run, its final folder, one of its checkpoints, an adapter or a model.")
    ],
    to: Annotated[Path, typer.Option(help="New folder; it appears after the export has been verified.")],
    what: Annotated[
        Literal["merged", "adapter"], typer.Option(help="The whole model, or only the adapter.")
    ] = "merged",
    shard_size: Annotated[str, typer.Option(help="Maximum size of a weight file.")] = "5GB",
    accumulate: Annotated[
        Literal["float32", "native"],
        typer.Option(help="float32: add the adapter in float32 and round once; native: merge as PEFT does."),
    ] = "float32",
    dtype: Annotated[
        Literal["auto", "bfloat16", "float32"],
        typer.Option(help="Dtype of the merged weights; auto: the base model's."),
    ] = "auto",
    bound: Annotated[
        float | None,
        typer.Option(help="Largest accepted difference of outputs; default: 1e-5 in float32, KL 0.01 in bfloat16."),
    ] = None,
    push: Annotated[
        str | None, typer.Option(help="Afterwards upload the folder to this hub repository, owner/name.")
    ] = None,
) -> None:
    """Merge an adapter into its model, compare the outputs of both, and write a folder that inference engines load."""
    import ernie_align
    from ernie_align.report.console import Terminal, quiet_libraries

    quiet_libraries()
    ernie_align.export(
        source,
        to=to,
        what=what,
        shard_size=shard_size,
        accumulate=accumulate,
        dtype=dtype,
        bound=bound,
        push=push,
        log=Terminal().log,
    )


def tiny(
    kind: Annotated[
        Literal["vl_moe", "moe", "dense", "digits"],
        typer.Argument(help="Family of a checkpoint, or the handwritten-digits task."),
    ],
    folder: Annotated[Path, typer.Argument(help="New folder.")],
    preset: Annotated[
        Literal["tiny", "mini"], typer.Option(help="Size: tiny trains on a laptop, mini is for benchmarks.")
    ] = "tiny",
    seed: Annotated[int, typer.Option(help="Seed for weights and rows.")] = 0,
) -> None:
    """Create a tiny checkpoint of a real model class with random weights, or the handwritten-digits task. Offline."""
    from ernie_align.report.console import quiet_libraries
    from ernie_align.tiny import make_checkpoint, make_digits

    if kind == "digits":
        make_digits(folder, seed=seed)
    else:
        quiet_libraries()
        make_checkpoint(kind, folder, preset=preset, seed=seed)
    typer.echo(f"created {folder}")
