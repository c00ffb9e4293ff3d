"""The command line: one command per stage, and recipes, check, plan, selfcheck, eval, report, export, ..."""

from __future__ import annotations

import sys

import typer

from ernie_align.cli import evaluation, making, recipes
from ernie_align.cli.training import train_command
from ernie_align.errors import AlignError, Interrupted, RecipeError, RunError
from ernie_align.stages import STAGES

app = typer.Typer(
    help="Align Baidu's open ERNIE 4.5 models after pre-training.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
# name -> command, in the order of --help
_INSPECT = {
    "check": recipes.check,
    "plan": recipes.plan,
    "selfcheck": recipes.selfcheck,
    "eval": evaluation.evaluate_,
    "report": evaluation.report,
    "generate": evaluation.generate,
    "schema": recipes.schema,
}
_CREATE = {"export": making.export, "tiny": making.tiny}

for _name, _stage in STAGES.items():
    app.command(_name, help=_stage.help, rich_help_panel="Train")(train_command(_stage))
app.add_typer(recipes.shipped, name="recipes", rich_help_panel="Train")
for _panel, _commands in (("Inspect", _INSPECT), ("Create", _CREATE)):
    for _name, _command in _commands.items():
        app.command(_name, rich_help_panel=_panel)(_command)
app.add_typer(recipes.data, name="data", rich_help_panel="Inspect")

# 4 is a missed requirement of eval or a failed selfcheck, 5 unusable rows in data check. A stopped run exits with
# EXIT_STOPPED, sysexits' "try again": 143 would not say whether a checkpoint was saved.
_EXIT_CODES = {RecipeError: 2, RunError: 3, AlignError: 1}


def main() -> None:
    """Run the command line. Print errors that the user can fix without a traceback."""
    try:
        app()
    except AlignError as error:
        typer.echo(str(error), err=True)
        from ernie_align.runs.launch import EXIT_STOPPED, report_exit_code

        codes = {Interrupted: EXIT_STOPPED, **_EXIT_CODES}
        sys.exit(report_exit_code(next(code for kind, code in codes.items() if isinstance(error, kind))))
