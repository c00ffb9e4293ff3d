"""Commands about recipes and their data that do not train: recipes, check, plan, selfcheck, data check, schema."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Literal

import typer

from ernie_align.stages import STAGES

RecipePath = Annotated[
    Path, typer.Argument(metavar="RECIPE", help="YAML file; `ernie-align recipes` lists the shipped ones.")
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY=VALUE]...", help="Override keys of the recipe: training.max_steps=300"),
]
shipped = typer.Typer(help="List the shipped recipes, or copy one.")
data = typer.Typer(help="Check the rows of a recipe.", no_args_is_help=True)


@shipped.callback(invoke_without_command=True)
def list_recipes(context: typer.Context) -> None:
    """List the shipped recipes; `recipes copy` copies one."""
    from ernie_align.recipe.shipped import shipped_recipes

    if context.invoked_subcommand is None:
        recipes = shipped_recipes()
        width = max(map(len, recipes))
        for name, (_, description) in recipes.items():
            typer.echo(f"{name:{width}}  {description}")
        typer.echo("\nCopy one, with the schema by which editors complete it: ernie-align recipes copy NAME FILE")


@shipped.command("copy")
def copy(
    name: Annotated[str, typer.Argument(help="Name in the list, such as lora/vl_28b.")],
    to: Annotated[Path, typer.Argument(metavar="FILE", help="New YAML file.")],
) -> None:
    """Copy a shipped recipe to a new file, with schema.json next to it. Never overwrites a file."""
    from ernie_align.recipe.shipped import copy_recipe

    for path in copy_recipe(name, to):
        typer.echo(f"written: {path}")


def check(
    recipe: RecipePath,
    overrides: Overrides = None,
    rows: Annotated[int, typer.Option(min=1, help="Validate the first rows of each source, this many.")] = 100,
) -> None:
    """Validate a recipe and its first rows, and show what would be trained. Loads no weights."""
    import ernie_align

    ernie_align.check(recipe, overrides=overrides or (), rows=rows)


def plan(
    recipe: RecipePath,
    overrides: Overrides = None,
    gpu: Annotated[str, typer.Option(help="Memory such as 80GB, or a name such as H100.")] = "80GB",
    gpus: Annotated[int, typer.Option(min=1, help="Number of GPUs.")] = 1,
    strategy: Annotated[
        Literal["ddp", "fsdp", "ep", "zero2", "zero3"], typer.Option(help="Parallelism over the GPUs.")
    ] = "ddp",
    base_bits: Annotated[
        int | None, typer.Option(help="Bits per weight of a frozen base: 16, 8, 4 or 2. An estimate only.")
    ] = None,
    vision_share: Annotated[float, typer.Option(min=0, max=1, help="Share of a row that is image tokens.")] = 0.5,
    trained_share: Annotated[float, typer.Option(min=0, max=1, help="Share of a row that is trained on.")] = 1.0,
    context: Annotated[
        int | None, typer.Option(min=1, help="One more context length for the table of lengths that fit.")
    ] = None,
    efficiency: Annotated[float, typer.Option(min=0.01, max=1, help="Share of the GPU's peak FLOPS reached.")] = 0.35,
    sweep: Annotated[str | None, typer.Option(help="key=v1,v2: print one line for each value of a key.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Estimate a recipe's memory and time, and what to change if it does not fit. Loads neither torch nor weights."""
    import ernie_align
    from ernie_align.planning.text import fit_summary, format_gb, format_plan, format_table

    if base_bits not in (None, 16, 8, 4, 2):
        raise typer.BadParameter("choose from 16, 8, 4, 2", param_hint="--base-bits")
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
    plans = {}
    for value in values.split(",") if sweep else [""]:
        extra = [f"{key}={value}"] if sweep else []
        plans[value] = ernie_align.plan(recipe, overrides=[*(overrides or ()), *extra], **settings)
    if as_json:
        plain = {value: one.as_json() for value, one in plans.items()}
        typer.echo(json.dumps(plain if sweep else plain[""], indent=2))
    elif sweep:
        rows = [
            (value, format_gb(one.memory.peak), f"{one.work.seconds:.3g}", fit_summary(one))
            for value, one in plans.items()
        ]
        typer.echo(format_table((key, "GB", "s a step", ""), rows))
    else:
        typer.echo(format_plan(plans[""]))


def selfcheck(
    recipe: RecipePath,
    overrides: Overrides = None,
    steps: Annotated[int, typer.Option(min=2, help="Steps of each run; more steps find more.")] = 4,
    processes: Annotated[
        int | None,
        typer.Option(min=1, help="Compare this many processes with one; default: one per accelerator."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Run a few steps in several ways: does the recipe route, resume and repeat exactly here? Exit code 4 if not."""
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


@data.command("doctor", hidden=True)  # the old name, for one release
@data.command("check")
def data_check(
    recipe: RecipePath,
    overrides: Overrides = None,
    workers: Annotated[
        int | None, typer.Option(min=1, help="Number of reading processes; default: one per core.")
    ] = None,
    as_json: Annotated[Path | None, typer.Option("--json", help="Write the whole report to this JSON file.")] = None,
    out: Annotated[Path | None, typer.Option(help="Write the report with plots to this HTML file.")] = None,
) -> None:
    """Read and validate every row of every source of a recipe, and report on them. Loads no weights.

    Exit code 0: training would stop at no row; 5: it would, and the report lists every such row; other codes as usual.
    """
    import ernie_align
    from ernie_align.report.console import Terminal, quiet_libraries
    from ernie_align.report.dataset_report import tables

    quiet_libraries()
    terminal = Terminal()
    loaded = ernie_align.load_recipe(recipe, overrides=overrides or ())
    with terminal.counting() as tick:
        report = ernie_align.check_data(loaded, workers=workers, tick=tick)
    for part in tables(report):
        terminal.console.print(part)
    if as_json is not None:
        as_json.write_text(json.dumps(report.as_json(), indent=2), encoding="utf-8")
        terminal.log(f"written: {as_json}")
    if out is not None:
        from ernie_align.report.page import write_dataset_page

        write_dataset_page(report, out)
        terminal.log(f"written: {out}")
    if not report.sound:
        raise typer.Exit(5)


def schema(
    markdown: Annotated[bool, typer.Option("--markdown", help="Print a page that explains every key.")] = False,
) -> None:
    """Print the JSON schema of recipes, for editors."""
    from ernie_align.recipe.schema_docs import json_schema, reference_page

    recipes = {name: stage.recipe for name, stage in STAGES.items()}
    typer.echo(reference_page(recipes) if markdown else json.dumps(json_schema(recipes), indent=2))
