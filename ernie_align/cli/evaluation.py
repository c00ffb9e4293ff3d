"""Verbs that ask checkpoints, and show what came of it: eval, report, generate."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def evaluate_(
    checkpoints: Annotated[
        list[str],
        typer.Argument(help="Models, adapters or checkpoints of runs."),
    ],
    plan: Annotated[Path | None, typer.Option(help="What to ask and measure: a YAML file as in recipes/eval.")] = None,
    data: Annotated[
        list[Path] | None, typer.Option(help="Instead of a plan, a file of rows with known answers; several are fine.")
    ] = None,
    baseline: Annotated[
        str | None,
        typer.Option(
            help="Compare every other checkpoint with this one. Default: an adapter with its base model if that is "
            "listed, any other checkpoint with the first one."
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            help="A folder for the report and every answer; what is there is not asked again. Or a .json file."
        ),
    ] = None,
    require: Annotated[
        list[str] | None,
        typer.Option(help="measure>=number or measure@data/kind>=number; exit code 4 where one is missed."),
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
    from ernie_align.evaluation import evaluate, load_eval_config, make_eval_config
    from ernie_align.report.comparison import evaluation_tables
    from ernie_align.report.console import Terminal, quiet_libraries

    asked = {"--plan": plan, "--data": data, "--harness": harness}
    if sum(bool(given) for given in asked.values()) != 1:
        raise typer.BadParameter(f"give one of {', '.join(asked)}")
    quiet_libraries()
    terminal = Terminal()
    if harness:
        return _harness(checkpoints, harness, include_path, limit, out)
    if plan is not None:
        judged = load_eval_config(plan)
        judged = judged.updated(require=[*judged.require, *(require or [])])
    else:
        judged = make_eval_config(
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
        evaluation = evaluate(checkpoints, config=judged, baseline=baseline, out=out, tick=tick)
    for result in evaluation.results:
        speed = f"{result.new_responses / result.seconds:.1f} per second" if result.new_responses else "all were cached"
        terminal.log(f"{result.checkpoint}: {result.new_responses} responses in {result.seconds:.1f} s, {speed}")
    for table in evaluation_tables(evaluation):
        terminal.console.print(table)
    if out is not None:
        terminal.log(f"written: {out if out.suffix == '.json' else out / 'report.json'}")
    if not evaluation.passed:
        raise typer.Exit(4)


def _harness(
    checkpoints: list[str], tasks: str, include_path: Path | None, limit: int | None, out: Path | None
) -> None:
    from ernie_align.evaluation.harness import run_tasks, write_results
    from ernie_align.report.comparison import harness_table
    from ernie_align.report.console import Terminal

    terminal = Terminal()
    results = {
        checkpoint: run_tasks(checkpoint, tasks.split(","), include_path=include_path, limit=limit)
        for checkpoint in checkpoints
    }
    terminal.console.print(harness_table(results))
    if out is not None:
        terminal.log(f"written: {write_results(out, results)}")


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
    from ernie_align.report.console import quiet_libraries

    if (prompt is None) == (not chat):
        raise typer.BadParameter("give --prompt for one question, or --chat")
    quiet_libraries()
    sampling = Sampling(max_new_tokens, temperature, top_p, seed)
    talk = Chat(load_model(checkpoint, dtype="auto"), system=system, sampling=sampling, thinking=thinking)
    for path in image or ():
        talk.attach(path)
    if chat:
        talk.loop()
    else:
        typer.echo(talk.ask(prompt))
