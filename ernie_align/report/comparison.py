"""Figures of several checkpoints, side by side."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import PurePath

from rich.markup import escape
from rich.table import Table

from ernie_align.evaluation import Report


def comparison(reports: Sequence[Report]) -> Table:
    """One row per file and kind of question, one column per checkpoint: exact match, its 95 % interval, counts."""
    metric = reports[0].settings["metrics"].replace("_", " ")
    table = Table("data", "kind", "n", title=f"{metric}, with its 95 % interval", title_justify="left")
    for report in reports:
        table.add_column(escape(short_name(report.checkpoint)), justify="right")
    by_question = [{(figure.data, figure.kind): figure for figure in report.figures} for report in reports]
    previous = None
    for question, figure in by_question[0].items():
        if previous not in (None, figure.data):
            table.add_section()
        cells = []
        for figures in by_question:
            own = figures[question]
            low, high = own.interval
            cells.append(f"{100 * own.value:.1f} % [{100 * low:.1f}, {100 * high:.1f}]")
        name = PurePath(figure.data).name if figure.data != previous else ""
        table.add_row(escape(name), figure.kind, str(figure.n), *cells)
        previous = figure.data
    return table


def short_name(checkpoint: str) -> str:
    """runs/demo/digits-sft/final -> digits-sft."""
    path = PurePath(checkpoint)
    return path.parent.name if path.name == "final" else path.name
