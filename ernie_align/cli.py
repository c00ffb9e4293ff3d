"""The command line: one verb per stage, and check, plan, selfcheck, eval, report, generate, export, tiny, schema."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from ernie_align.errors import AlignError, Interrupted, RecipeError, RunError
from ernie_align.runs import load_recipe
from ernie_align.runs.launch import launch as start_processes
from ernie_align.runs.launch import tell_launcher
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
        launch: Annotated[
            str | None,
            typer.Option(metavar="PROFILE", help="Run on several processes: a name or file of recipes/accelerate."),
        ] = None,
        processes: Annotated[int | None, typer.Option(min=1, help="Of --launch; otherwise the profile's.")] = None,
    ) -> None:
        import ernie_align

        checked = load_recipe(recipe, overrides=overrides or (), stage=stage.name)
        if launch is not None:
            arguments = [stage.name, str(recipe), *(overrides or ()), *(["--resume"] if resume else [])]
            raise typer.Exit(start_processes(launch, processes, arguments))
        if processes is not None:
            raise typer.BadParameter("say how they share the work with --launch", param_hint="--processes")
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
    import ernie_align

    ernie_align.check(recipe, overrides=overrides or (), rows=rows)


@app.command(rich_help_panel="Look")
def plan(
    recipe: RecipePath,
    overrides: Overrides = None,
    gpu: Annotated[str, typer.Option(help="80GB, or a name such as H100.")] = "80GB",
    gpus: Annotated[int, typer.Option(min=1)] = 1,
    strategy: Annotated[str, typer.Option(help="How several GPUs share the work: ddp, fsdp, zero2, zero3.")] = "ddp",
    base_bits: Annotated[int | None, typer.Option(help="Of a frozen base: 16, 8, 4 or 2. A calculation only.")] = None,
    vision_share: Annotated[float, typer.Option(min=0, max=1, help="Share of a row that is image tokens.")] = 0.5,
    context: Annotated[int | None, typer.Option(min=1, help="One more context for the calculator.")] = None,
    efficiency: Annotated[float, typer.Option(min=0.01, max=1, help="Share of the GPU's peak that is reached.")] = 0.35,
    sweep: Annotated[str | None, typer.Option(help="key=v1,v2: one line for each value instead.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Say what a recipe needs, whether it fits, and what to change if not. Loads neither torch nor weights."""
    import ernie_align
    from ernie_align.planning.text import as_text, gb, table, verdict

    for option, value, known in (
        ("--strategy", strategy, ("ddp", "fsdp", "zero2", "zero3")),
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
        rows = [(value, gb(one.memory.peak), f"{one.work.seconds:.3g}", verdict(one)) for value, one in found.items()]
        typer.echo(table((key, "GB", "s a step", ""), rows))
    else:
        typer.echo(as_text(found[""]))


@app.command(rich_help_panel="Look")
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
    from ernie_align.report.console import Terminal, verdicts

    terminal = Terminal()
    say = (lambda line: typer.echo(line, err=True)) if as_json else terminal.say
    checks = ernie_align.selfcheck(recipe, overrides=overrides or (), steps=steps, processes=processes, say=say)
    if as_json:
        typer.echo(json.dumps([asdict(check) for check in checks], indent=2))
    else:
        terminal.console.print(verdicts((check.name, check.verdict, check.what) for check in checks))
    if any(check.verdict == "fail" for check in checks):
        raise typer.Exit(4)


@app.command("eval", rich_help_panel="Look")
def evaluate_(
    checkpoints: Annotated[
        list[str],
        typer.Argument(help="Models, adapters or checkpoints; the first is what the others are compared with."),
    ],
    plan: Annotated[Path | None, typer.Option(help="What to ask and measure: a YAML file as in recipes/eval.")] = None,
    data: Annotated[
        list[Path] | None, typer.Option(help="Instead of a plan, a file of rows with known answers; several are fine.")
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            help="A folder for the report and every answer; what is there is not asked again. Or a .json file."
        ),
    ] = None,
    require: Annotated[
        list[str] | None, typer.Option(help="measure[@data][/kind]>=number; exit code 4 where one is missed.")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1)] = 64,
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 256,
    thinking: Annotated[bool, typer.Option("--thinking/--no-thinking")] = False,
    media_root: Annotated[str | None, typer.Option(help="Folder of the images, if not the data's own.")] = None,
    metrics: Annotated[str, typer.Option(help="Names, with commas: exact_match, perplexity, preference, ...")] = (
        "exact_match"
    ),
    limit: Annotated[int | None, typer.Option(min=1, help="Rows of each file.")] = None,
    harness: Annotated[str | None, typer.Option(help="Tasks of lm-eval, with commas, instead of a plan; text.")] = None,
    include_path: Annotated[Path | None, typer.Option(help="Folder of your own lm-eval task files.")] = None,
) -> None:
    """Ask checkpoints questions with known answers: figures, differences and what was kept, with 95 % intervals."""
    from ernie_align.evaluation import evaluate, load_plan, short_plan
    from ernie_align.report.comparison import tables
    from ernie_align.report.console import Terminal, hush

    asked = {"--plan": plan, "--data": data, "--harness": harness}
    if sum(bool(given) for given in asked.values()) != 1:
        raise typer.BadParameter(f"give one of {', '.join(asked)}")
    hush()
    terminal = Terminal()
    if harness:
        return _harness(checkpoints, harness, include_path, limit, out)
    if plan is not None:
        judged = load_plan(plan)
        judged = judged.updated(require=[*judged.require, *(require or [])])
    else:
        judged = short_plan(
            data,
            metrics=metrics.split(","),
            media_root=media_root,
            limit=limit,
            require=require or [],
            batch_size=batch_size,
            max_new_tokens=max_new_tokens,
            thinking=thinking,
        )
    with terminal.counting() as tick:
        evaluation = evaluate(checkpoints, plan=judged, out=out, tick=tick)
    for result in evaluation.results:
        pace = f"{result.asked / result.seconds:.1f} a second" if result.asked else "every one was there already"
        terminal.say(f"{result.checkpoint}: {result.asked} answers in {result.seconds:.1f} s, {pace}")
    for table in tables(evaluation):
        terminal.console.print(table)
    if out is not None:
        terminal.say(f"written: {out if out.suffix == '.json' else out / 'report.json'}")
    if not evaluation.passed:
        raise typer.Exit(4)


def _harness(
    checkpoints: list[str], tasks: str, include_path: Path | None, limit: int | None, out: Path | None
) -> None:
    from ernie_align.evaluation.harness import run_tasks, written
    from ernie_align.report.comparison import harness_table
    from ernie_align.report.console import Terminal

    terminal = Terminal()
    results = {
        checkpoint: run_tasks(checkpoint, tasks.split(","), include_path=include_path, limit=limit)
        for checkpoint in checkpoints
    }
    terminal.console.print(harness_table(results))
    if out is not None:
        terminal.say(f"written: {written(out, results)}")


@app.command(rich_help_panel="Look")
def report(
    folders: Annotated[list[Path], typer.Argument(help="Run directories, or folders that eval wrote.")],
    out: Annotated[Path | None, typer.Option(help="The page; otherwise report.html in the one folder.")] = None,
) -> None:
    """Write one HTML page about runs and evaluations. It needs nothing beside itself, and no network."""
    from ernie_align.report.page import write_page

    if out is None and len(folders) > 1:
        raise typer.BadParameter("several folders: name the page", param_hint="--out")
    page = out or folders[0] / "report.html"
    write_page(folders, page)
    typer.echo(f"written: {page}")


data_app = typer.Typer(help="Look at rows.", no_args_is_help=True)
app.add_typer(data_app, name="data", rich_help_panel="Look")


@data_app.command()
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
    from ernie_align.report.checkup import tables
    from ernie_align.report.console import Terminal, hush

    hush()
    terminal = Terminal()
    checked = load_recipe(recipe, overrides=overrides or ())
    with terminal.reading() as tick:
        found = ernie_align.examine(checked, workers=workers, tick=tick)
    for part in tables(found):
        terminal.console.print(part)
    if as_json is not None:
        as_json.write_text(json.dumps(found.as_json(), indent=2), encoding="utf-8")
        terminal.say(f"written: {as_json}")
    if out is not None:
        from ernie_align.report.page import write_checkup

        write_checkup(found, out)
        terminal.say(f"written: {out}")
    if not found.sound:
        raise typer.Exit(5)


@app.command(rich_help_panel="Look")
def generate(
    checkpoint: Annotated[str, typer.Argument(help="A model or an adapter.")],
    prompt: Annotated[str | None, typer.Option(help="The question.")] = None,
    image: Annotated[
        list[Path] | None, typer.Option(help="Shown before the question; may be given several times.")
    ] = None,
    system: Annotated[str | None, typer.Option(help="The system prompt.")] = None,
    thinking: Annotated[bool, typer.Option("--thinking/--no-thinking")] = False,
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 256,
    temperature: Annotated[float, typer.Option(min=0, help="0 is greedy.")] = 0.0,
    top_p: Annotated[float, typer.Option(min=0, max=1)] = 1.0,
    seed: Annotated[int, typer.Option(min=0, help="Of what is drawn at a temperature over 0.")] = 0,
    chat: Annotated[bool, typer.Option("--chat", help="Go on talking: /help tells the commands.")] = False,
) -> None:
    """Ask a checkpoint one question, or talk to it."""
    from ernie_align.evaluation import Sampling
    from ernie_align.evaluation.chat import Chat
    from ernie_align.models.load import load_model
    from ernie_align.report.console import hush

    if (prompt is None) == (not chat):
        raise typer.BadParameter("give --prompt for one question, or --chat")
    hush()
    sampling = Sampling(max_new_tokens, temperature, top_p, seed)
    talk = Chat(load_model(checkpoint, dtype="auto"), system=system, sampling=sampling, thinking=thinking)
    for path in image or ():
        talk.attach(path)
    if chat:
        talk.loop()
    else:
        typer.echo(talk.ask(prompt))


@app.command(rich_help_panel="Make")
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
    from ernie_align.report.console import Terminal, hush

    for option, value, known in (
        ("--what", what, ("merged", "adapter")),
        ("--accumulate", accumulate, ("float32", "native")),
        ("--dtype", dtype, ("auto", "bfloat16", "float32")),
    ):
        if value not in known:
            raise typer.BadParameter(f"choose from {', '.join(known)}", param_hint=option)
    hush()
    ernie_align.export(
        source,
        to=to,
        what=what,
        shard_size=shard_size,
        accumulate=accumulate,
        dtype=dtype,
        bound=bound,
        push=push,
        say=Terminal().say,
    )


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
def schema(
    markdown: Annotated[bool, typer.Option("--markdown", help="A page that names every key, for people.")] = False,
) -> None:
    """Print the JSON schema of recipes, for editors."""
    from ernie_align.recipe.json_schema import json_schema
    from ernie_align.recipe.reference import reference

    recipes = {name: stage.recipe for name, stage in STAGES.items()}
    typer.echo(reference(recipes) if markdown else json.dumps(json_schema(recipes), indent=2))


# 4 is a missed requirement of eval, or a check that failed. 75 is sysexits' EX_TEMPFAIL, "try again": a bare 143 is
# also what a process leaves that was killed and saved nothing.
_EXIT_CODES = {Interrupted: 75, RecipeError: 2, RunError: 3, AlignError: 1}


def main() -> None:
    """Run the command line; an error a user can mend is told without a traceback."""
    tell_launcher()
    try:
        app()
    except AlignError as error:
        typer.echo(str(error), err=True)
        code = next(code for kind, code in _EXIT_CODES.items() if isinstance(error, kind))
        tell_launcher(code)
        sys.exit(code)
