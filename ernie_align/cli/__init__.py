"""The command line: one verb per stage, and check, plan, selfcheck, eval, report, generate, export, tiny, schema."""

from __future__ import annotations

import sys

import typer

from ernie_align.cli import evaluation, making, recipes
from ernie_align.cli.training import train
from ernie_align.errors import AlignError, Interrupted, RecipeError, RunError
from ernie_align.runs.launch import EXIT_STOPPED, report_exit_code
from ernie_align.stages import STAGES

app = typer.Typer(
    help="Align Baidu's open ERNIE 4.5 models after pre-training.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
_data = typer.Typer(help="Look at rows.", no_args_is_help=True)
_data.command("doctor")(recipes.doctor)

# In the order of --help, by panel.
_TRAIN = {name: (train(stage), stage.help) for name, stage in STAGES.items()}
_LOOK = {
    "check": recipes.check,
    "plan": recipes.plan,
    "selfcheck": recipes.selfcheck,
    "eval": evaluation.evaluate_,
    "report": evaluation.report,
    "generate": evaluation.generate,
    "schema": recipes.schema,
}
_MAKE = {"export": making.export, "tiny": making.tiny}

for _name, (_verb, _help) in _TRAIN.items():
    app.command(_name, help=_help, rich_help_panel="Train")(_verb)
for _panel, _verbs in (("Look", _LOOK), ("Make", _MAKE)):
    for _name, _verb in _verbs.items():
        app.command(_name, rich_help_panel=_panel)(_verb)
app.add_typer(_data, name="data", rich_help_panel="Look")

# 4 is a missed requirement of eval, or a check that failed. 75 is sysexits' EX_TEMPFAIL, "try again": a bare 143 is
# also what a process leaves that was killed and saved nothing.
_EXIT_CODES = {Interrupted: EXIT_STOPPED, RecipeError: 2, RunError: 3, AlignError: 1}


def main() -> None:
    """Run the command line; an error a user can mend is told without a traceback."""
    report_exit_code()
    try:
        app()
    except AlignError as error:
        typer.echo(str(error), err=True)
        code = next(code for kind, code in _EXIT_CODES.items() if isinstance(error, kind))
        sys.exit(report_exit_code(code))
