"""The command line: one verb per stage, plus check, eval, generate, tiny and schema."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, get_args

import typer

from ernie_align.errors import AlignError, RecipeError, RunError
from ernie_align.runs import load_recipe, set_up
from ernie_align.stages import STAGES, Stage

app = typer.Typer(
    help="Align Baidu's open ERNIE 4.5 models after pre-training.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

RecipePath = Annotated[Path, typer.Argument(metavar="RECIPE", help="A YAML file; recipes/ holds examples.")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY=VALUE]...", help="Override keys of the recipe: training.max_steps=300"),
]


def _add_stage(stage: Stage) -> None:
    @app.command(stage.name, help=stage.help, rich_help_panel="Train")
    def train(
        recipe: RecipePath,
        overrides: Overrides = None,
        resume: Annotated[
            bool, typer.Option("--resume", help="Go on from the newest whole checkpoint in run.dir.")
        ] = False,
    ) -> None:
        import ernie_align

        checked = load_recipe(recipe, overrides=overrides or (), stage=stage.name)
        ernie_align.run(checked, resume=resume)


for _stage in STAGES.values():
    _add_stage(_stage)


@app.command(rich_help_panel="Look")
def check(
    recipe: RecipePath,
    overrides: Overrides = None,
    rows: Annotated[int, typer.Option(min=1, help="Judge so many rows of each source, the first ones.")] = 100,
) -> None:
    """Judge a recipe and its data, and show what would be trained. Loads no weights."""
    from ernie_align.data.preview import preview
    from ernie_align.report.console import Terminal
    from ernie_align.runs import sample_data

    checked = load_recipe(recipe, overrides=overrides or ())
    terminal = Terminal()
    setup = set_up(checked)
    for note in setup.notes:
        terminal.say(note)
    terminal.coverage(setup.coverage)
    example, counts = sample_data(setup, rows)
    terminal.sources(counts)
    terminal.preview(preview(example, setup.renderer))
    for line in setup.stage.tried(setup.recipe, setup.anatomy, example):
        terminal.say(line)
    judged = sum(count.rows for count in counts)
    terminal.say(f"{recipe}: the recipe is sound, and so are the {judged} rows that were judged (--rows for more)")


@app.command("eval", rich_help_panel="Look")
def evaluate_(
    checkpoints: Annotated[list[str], typer.Argument(help="Models, adapters or checkpoints, to be compared.")],
    data: Annotated[list[Path], typer.Option(help="File of rows with known answers; may be given several times.")],
    out: Annotated[Path | None, typer.Option(help="Write the report here, as JSON.")] = None,
    batch_size: Annotated[int, typer.Option(min=1)] = 64,
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 256,
    thinking: Annotated[bool, typer.Option("--thinking/--no-thinking")] = False,
    media_root: Annotated[str | None, typer.Option(help="Folder of the images, if not the data's own.")] = None,
    metrics: Annotated[
        str, typer.Option(help="exact_match of greedy answers; preference: is the chosen answer more likely?")
    ] = "exact_match",
    limit: Annotated[int | None, typer.Option(min=1, help="Rows of each file.")] = None,
) -> None:
    """Ask checkpoints questions with known answers: figures per kind of question, with a 95 % interval."""
    from ernie_align.evaluation import Metric, evaluate, write_reports
    from ernie_align.report.comparison import comparison, short_name
    from ernie_align.report.console import Terminal, hush

    if metrics not in get_args(Metric):
        raise typer.BadParameter(f"choose from {', '.join(get_args(Metric))}", param_hint="--metrics")
    hush()
    terminal = Terminal()
    reports = []
    for checkpoint in checkpoints:
        with terminal.counting(short_name(checkpoint)) as tick:
            report = evaluate(
                checkpoint,
                data,
                batch_size=batch_size,
                max_new_tokens=max_new_tokens,
                thinking=thinking,
                media_root=media_root,
                metrics=metrics,
                limit=limit,
                tick=tick,
            )
        terminal.say(f"{checkpoint}: {len(report.rows)} rows in {report.seconds:.1f} s")
        reports.append(report)
    terminal.console.print(comparison(reports))
    if out is not None:
        write_reports(out, reports)
        terminal.say(f"written: {out}")


@app.command(rich_help_panel="Look")
def generate(
    checkpoint: Annotated[str, typer.Argument(help="A model or an adapter.")],
    prompt: Annotated[str, typer.Option(help="The question.")],
    image: Annotated[
        list[Path] | None, typer.Option(help="Shown before the question; may be given several times.")
    ] = None,
    system: Annotated[str | None, typer.Option(help="The system prompt.")] = None,
    thinking: Annotated[bool, typer.Option("--thinking/--no-thinking")] = False,
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 256,
    temperature: Annotated[float, typer.Option(min=0, help="0 is greedy.")] = 0.0,
    top_p: Annotated[float, typer.Option(min=0, max=1)] = 1.0,
) -> None:
    """Ask a checkpoint one question."""
    from ernie_align.data.formats import canonical
    from ernie_align.data.row import RowFault
    from ernie_align.errors import DataError
    from ernie_align.evaluation import Sampling, answer
    from ernie_align.models.load import load_model
    from ernie_align.report.console import hush

    hush()
    messages = [{"role": "system", "content": system}] if system else []
    parts = [*({"type": "image"} for _ in image or ()), {"type": "text", "text": prompt}]
    messages.append({"role": "user", "content": parts})
    sampling = Sampling(max_new_tokens, temperature, top_p)
    try:
        row = canonical({"messages": messages, "images": [str(path) for path in image or ()]}, "messages")
        bundle = load_model(checkpoint, dtype="auto")
        typer.echo(answer(bundle, row, sampling=sampling, thinking=thinking))
    except RowFault as fault:
        raise DataError.at("command line", fault.what, fix=fault.fix) from None


@app.command(rich_help_panel="Make")
def tiny(
    kind: Annotated[str, typer.Argument(help="vl_moe, moe or dense: a checkpoint; digits: the handwritten digits.")],
    folder: Annotated[Path, typer.Argument(help="A new folder.")],
    preset: Annotated[str, typer.Option(help="tiny trains on a laptop; mini is for benchmarks.")] = "tiny",
    seed: Annotated[int, typer.Option()] = 0,
) -> None:
    """Make a tiny real checkpoint with random weights, or the handwritten-digits task. Offline."""
    from ernie_align.report.console import hush
    from ernie_align.tiny import PRESETS, make_checkpoint, make_digits

    kinds = ("vl_moe", "moe", "dense", "digits")
    if kind not in kinds:
        raise typer.BadParameter(f"choose from {', '.join(kinds)}", param_hint="KIND")
    if preset not in PRESETS:
        raise typer.BadParameter(f"choose from {', '.join(PRESETS)}", param_hint="--preset")
    if kind == "digits":
        make_digits(folder, seed=seed)
    else:
        hush()
        make_checkpoint(kind, folder, preset=preset, seed=seed)
    typer.echo(f"made {folder}")


@app.command(rich_help_panel="Look")
def schema() -> None:
    """Print the JSON schema of recipes, for editors."""
    from ernie_align.recipe.json_schema import json_schema

    typer.echo(json.dumps(json_schema({name: stage.recipe for name, stage in STAGES.items()}), indent=2))


def main() -> None:
    """Run the command line; an error a user can mend is told without a traceback."""
    try:
        app()
    except AlignError as error:
        typer.echo(str(error), err=True)
        sys.exit(2 if isinstance(error, RecipeError) else 3 if isinstance(error, RunError) else 1)
