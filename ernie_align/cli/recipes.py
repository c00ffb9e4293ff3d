"""Verbs that look at a recipe, its data and its keys without training: check, plan, selfcheck, data doctor, schema."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from ernie_align.cli.arguments import Overrides, RecipePath
from ernie_align.runs import load_recipe
from ernie_align.stages import STAGES


def check(
    recipe: RecipePath,
    overrides: Overrides = None,
    rows: Annotated[int, typer.Option(min=1, help="Judge so many rows of each source, the first ones.")] = 100,
) -> None:
    """Judge a recipe and its data, and show what would be trained. Loads no weights."""
    import ernie_align

    ernie_align.check(recipe, overrides=overrides or (), rows=rows)


def plan(
    recipe: RecipePath,
    overrides: Overrides = None,
    gpu: Annotated[str, typer.Option(help="80GB, or a name such as H100.")] = "80GB",
    gpus: Annotated[int, typer.Option(min=1)] = 1,
    strategy: Annotated[str, typer.Option(help="How several GPUs share: ddp, fsdp, ep, zero2, zero3.")] = "ddp",
    base_bits: Annotated[int | None, typer.Option(help="Of a frozen base: 16, 8, 4 or 2. A calculation only.")] = None,
    vision_share: Annotated[float, typer.Option(min=0, max=1, help="Share of a row that is image tokens.")] = 0.5,
    trained_share: Annotated[float, typer.Option(min=0, max=1, help="Share of a row that is trained.")] = 1.0,
    context: Annotated[int | None, typer.Option(min=1, help="One more context for the calculator.")] = None,
    efficiency: Annotated[float, typer.Option(min=0.01, max=1, help="Share of the GPU's peak that is reached.")] = 0.35,
    sweep: Annotated[str | None, typer.Option(help="key=v1,v2: one line for each value instead.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Say what a recipe needs, whether it fits, and what to change if not. Loads neither torch nor weights."""
    import ernie_align
    from ernie_align.planning.text import fit_summary, format_gb, format_plan, format_table

    for option, value, known in (
        ("--strategy", strategy, ("ddp", "fsdp", "ep", "zero2", "zero3")),
        ("--base-bits", base_bits, (None, 16, 8, 4, 2)),
    ):
        if value not in known:
            raise typer.BadParameter(f"choose from {', '.join(map(str, filter(None, known)))}", param_hint=option)
    key, _, values = (sweep or "").partition("=")
    if sweep is not None and not (key and values):
        raise typer.BadParameter("write key=v1,v2", param_hint="--sweep")
    settings = {
        "gpu": gpu,
        "gpus": gpus,
        "strategy": strategy,
        "base_bits": base_bits,
        "vision_share": vision_share,
        "trained_share": trained_share,
        "context": context,
        "efficiency": efficiency,
    }
    found = {}
    for value in values.split(",") if sweep else [""]:
        extra = [f"{key}={value}"] if sweep else []
        found[value] = ernie_align.plan(recipe, overrides=[*(overrides or ()), *extra], **settings)
    if as_json:
        plain = {value: one.as_json() for value, one in found.items()}
        typer.echo(json.dumps(plain if sweep else plain[""], indent=2))
    elif sweep:
        rows = [
            (value, format_gb(one.memory.peak), f"{one.work.seconds:.3g}", fit_summary(one))
            for value, one in found.items()
        ]
        typer.echo(format_table((key, "GB", "s a step", ""), rows))
    else:
        typer.echo(format_plan(found[""]))


def selfcheck(
    recipe: RecipePath,
    overrides: Overrides = None,
    steps: Annotated[int, typer.Option(min=2, help="Steps of each run; more find more.")] = 4,
    processes: Annotated[
        int | None, typer.Option(min=1, help="Compare so many with one; otherwise one per accelerator.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Take a few steps of a recipe several ways: does it route, resume and repeat here? Exit code 4 if not."""
    from dataclasses import asdict

    import ernie_align
    from ernie_align.report.console import Terminal, checks_table

    terminal = Terminal()
    log = (lambda line: typer.echo(line, err=True)) if as_json else terminal.log
    checks = ernie_align.selfcheck(recipe, overrides=overrides or (), steps=steps, processes=processes, log=log)
    if as_json:
        typer.echo(json.dumps([asdict(check) for check in checks], indent=2))
    else:
        terminal.console.print(checks_table((check.name, check.verdict, check.what) for check in checks))
    if any(check.verdict == "fail" for check in checks):
        raise typer.Exit(4)


def doctor(
    recipe: RecipePath,
    overrides: Overrides = None,
    workers: Annotated[int | None, typer.Option(min=1, help="Processes that read; one for each core if left out.")] = (
        None
    ),
    as_json: Annotated[Path | None, typer.Option("--json", help="Write everything that was found as JSON.")] = None,
    out: Annotated[Path | None, typer.Option(help="Write a page with plots.")] = None,
) -> None:
    """Read every row of every source of a recipe, measure and judge it. Loads no weights.

    Exit code 0: training would not stop at any row; 5: it would, and every such row was found; others as everywhere.
    """
    import ernie_align
    from ernie_align.report.console import Terminal, quiet_libraries
    from ernie_align.report.dataset_report import tables

    quiet_libraries()
    terminal = Terminal()
    checked = load_recipe(recipe, overrides=overrides or ())
    with terminal.counting() as tick:
        found = ernie_align.check_data(checked, workers=workers, tick=tick)
    for part in tables(found):
        terminal.console.print(part)
    if as_json is not None:
        as_json.write_text(json.dumps(found.as_json(), indent=2), encoding="utf-8")
        terminal.log(f"written: {as_json}")
    if out is not None:
        from ernie_align.report.page import write_dataset_page

        write_dataset_page(found, out)
        terminal.log(f"written: {out}")
    if not found.sound:
        raise typer.Exit(5)


def schema(
    markdown: Annotated[bool, typer.Option("--markdown", help="A page that names every key, for people.")] = False,
) -> None:
    """Print the JSON schema of recipes, for editors."""
    from ernie_align.recipe.schema_docs import json_schema, reference_page

    recipes = {name: stage.recipe for name, stage in STAGES.items()}
    typer.echo(reference_page(recipes) if markdown else json.dumps(json_schema(recipes), indent=2))
