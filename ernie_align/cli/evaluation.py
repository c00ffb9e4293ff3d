"""Commands that query checkpoints and report on them: eval, report, generate."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def evaluate_(
    checkpoints: Annotated[
        list[str],
        typer.Argument(help="Models, adapters or checkpoints of runs."),
    ],
    config: Annotated[
        Path | None, typer.Option(help="Evaluation config: a YAML file with data and metrics, as in recipes/eval.")
    ] = None,
    data: Annotated[
        list[Path] | None, typer.Option(help="Instead of --config, a file of rows with known answers; repeatable.")
    ] = None,
    harness: Annotated[
        str | None, typer.Option(help="Instead of --config, text tasks of lm-eval, separated by commas.")
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
        typer.Option(help="Folder for the report and all responses, which a rerun reuses; or a .json file."),
    ] = None,
    require: Annotated[
        list[str] | None,
        typer.Option(help="metric>=number or metric@data/kind>=number; exit code 4 if it is missed. Repeatable."),
    ] = None,
    metrics: Annotated[
        str, typer.Option(help="With --data, separated by commas: exact_match, perplexity, preference, ...")
    ] = "exact_match",
    batch_size: Annotated[int, typer.Option(min=1, help="Answers generated at once.")] = 64,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Maximum tokens of an answer.")] = 256,
    thinking: Annotated[
        bool, typer.Option("--thinking/--no-thinking", help="Answer with reasoning, if the chat template has it.")
    ] = False,
    media_root: Annotated[
        str | None, typer.Option(help="Folder of the images; default: the folder of the data file.")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Use only the first rows of each file.")] = None,
    include_path: Annotated[
        Path | None, typer.Option(help="With --harness, a folder of your own lm-eval task files.")
    ] = None,
    plan: Annotated[str | None, typer.Option(hidden=True)] = None,  # the old name of --config, for one release
) -> None:
    """Evaluate checkpoints on rows with known answers: metrics, differences and drift, with 95 % intervals."""
    from ernie_align.evaluation import evaluate, load_eval_config, make_eval_config
    from ernie_align.report.comparison import evaluation_tables
    from ernie_align.report.console import Terminal, quiet_libraries

    if plan is not None:
        raise typer.BadParameter("this option is now called --config", param_hint="--plan")
    inputs = {"--config": config, "--data": data, "--harness": harness}
    if sum(bool(value) for value in inputs.values()) != 1:
        raise typer.BadParameter(f"give exactly one of {', '.join(inputs)}")
    quiet_libraries()
    terminal = Terminal()
    if harness:
        return _harness(checkpoints, harness, include_path, limit, out)
    if config is not None:
        loaded = load_eval_config(config)
        loaded = loaded.updated(require=[*loaded.require, *(require or [])])
    else:
        loaded = make_eval_config(
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
        evaluation = evaluate(checkpoints, config=loaded, baseline=baseline, out=out, tick=tick)
    for result in evaluation.results:
        new, seconds = result.new_responses, result.seconds
        rate = f"{new / seconds:.1f} per second" if new else "all were cached"
        terminal.log(f"{result.checkpoint}: {new} new responses in {seconds:.1f} s, {rate}")
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
    folders: Annotated[list[Path], typer.Argument(help="Run directories, or what eval wrote to --out.")],
    out: Annotated[
        Path | None, typer.Option(help="HTML file; default: report.html in the folder, or FILE.html for FILE.json.")
    ] = None,
) -> None:
    """Write one self-contained HTML page about runs and evaluations."""
    from ernie_align.report.page import write_page

    if out is None and len(folders) > 1:
        raise typer.BadParameter("required for several folders", param_hint="--out")
    default = folders[0].with_suffix(".html") if folders[0].is_file() else folders[0] / "report.html"
    page = out or default
    write_page(folders, page)
    typer.echo(f"written: {page}")


def generate(
    checkpoint: Annotated[str, typer.Argument(help="A model or an adapter.")],
    prompt: Annotated[str | None, typer.Option(help="Question to answer.")] = None,
    image: Annotated[list[Path] | None, typer.Option(help="Image before the question; repeatable.")] = None,
    system: Annotated[str | None, typer.Option(help="System prompt.")] = None,
    thinking: Annotated[
        bool, typer.Option("--thinking/--no-thinking", help="Answer with reasoning, if the chat template has it.")
    ] = False,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Maximum tokens of an answer.")] = 256,
    temperature: Annotated[float, typer.Option(min=0, help="Sampling temperature; 0 is greedy.")] = 0.0,
    top_p: Annotated[float, typer.Option(min=0, max=1, help="Nucleus sampling: cumulative probability.")] = 1.0,
    seed: Annotated[int, typer.Option(min=0, help="Seed for sampling at a temperature above 0.")] = 0,
    chat: Annotated[bool, typer.Option("--chat", help="Chat in the terminal; /help lists the commands.")] = False,
) -> None:
    """Ask a checkpoint one question, or chat with it."""
    from ernie_align.evaluation import Sampling
    from ernie_align.evaluation.chat import Chat
    from ernie_align.models.load import load_model
    from ernie_align.report.console import quiet_libraries

    if (prompt is None) == (not chat):
        raise typer.BadParameter("give either --prompt for one question, or --chat")
    quiet_libraries()
    sampling = Sampling(max_new_tokens, temperature, top_p, seed)
    session = Chat(load_model(checkpoint, dtype="auto"), system=system, sampling=sampling, thinking=thinking)
    for path in image or ():
        session.attach(path)
    if chat:
        session.loop()
    else:
        typer.echo(session.ask(prompt))
