"""Verbs that make a folder to use elsewhere: export, tiny."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def export(
    source: Annotated[str, typer.Argument(help="A run, its final, one of its checkpoints, an adapter or a model.")],
    to: Annotated[Path, typer.Option(help="A new folder, which appears once it is proved.")],
    what: Annotated[str, typer.Option(help="merged: the whole model; adapter: the adapter alone.")] = "merged",
    shard_size: Annotated[str, typer.Option(help="Of the weight files.")] = "5GB",
    accumulate: Annotated[
        str, typer.Option(help="float32: the adapter is added in float32, rounded once; native: as PEFT does.")
    ] = "float32",
    dtype: Annotated[str, typer.Option(help="Of the merged weights; auto: the base's own.")] = "auto",
    bound: Annotated[float | None, typer.Option(help="Refuse beyond this; float32: 1e-5, bfloat16: KL 0.01.")] = None,
    push: Annotated[str | None, typer.Option(help="Then upload it to this hub repository, owner/name.")] = None,
) -> None:
    """Merge an adapter into its model, compare the two, and write a folder that serves."""
    import ernie_align
    from ernie_align.report.console import Terminal, quiet_libraries

    for option, value, known in (
        ("--what", what, ("merged", "adapter")),
        ("--accumulate", accumulate, ("float32", "native")),
        ("--dtype", dtype, ("auto", "bfloat16", "float32")),
    ):
        if value not in known:
            raise typer.BadParameter(f"choose from {', '.join(known)}", param_hint=option)
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
    kind: Annotated[str, typer.Argument(help="vl_moe, moe or dense: a checkpoint; digits: the handwritten digits.")],
    folder: Annotated[Path, typer.Argument(help="A new folder.")],
    preset: Annotated[str, typer.Option(help="tiny trains on a laptop; mini is for benchmarks.")] = "tiny",
    seed: Annotated[int, typer.Option()] = 0,
) -> None:
    """Make a tiny real checkpoint with random weights, or the handwritten-digits task. Offline."""
    from ernie_align.report.console import quiet_libraries
    from ernie_align.tiny import PRESETS, make_checkpoint, make_digits

    kinds = ("vl_moe", "moe", "dense", "digits")
    if kind not in kinds:
        raise typer.BadParameter(f"choose from {', '.join(kinds)}", param_hint="KIND")
    if preset not in PRESETS:
        raise typer.BadParameter(f"choose from {', '.join(PRESETS)}", param_hint="--preset")
    if kind == "digits":
        make_digits(folder, seed=seed)
    else:
        quiet_libraries()
        make_checkpoint(kind, folder, preset=preset, seed=seed)
    typer.echo(f"made {folder}")
