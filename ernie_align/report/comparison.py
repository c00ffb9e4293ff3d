"""An evaluation report as tables on the terminal, and the formats of its numbers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.table import Table

from ernie_align.evaluation import Evaluation
from ernie_align.report.console import make_table, markup

Report = Mapping[str, Any]  # report.json
Key = tuple[str, str, str]  # data set, kind, metric


def evaluation_tables(evaluation: Evaluation) -> list[Table]:
    """Return the results, for several checkpoints also differences and drift from the baselines, and requirements."""
    report = evaluation.report
    tables = [_figures_table(report)]
    if len(report["checkpoints"]) > 1:
        tables += [_differences_table(report), _drift_table(report)]
    return [*tables, *([_requirements_table(report)] if report["requirements"] else [])]


def baselines(report: Report) -> dict[str, str]:
    """Return checkpoint -> its baseline, without checkpoints that have none.

    Reports written before baselines were recorded compare every checkpoint with the first.
    """
    first = report["checkpoints"][0]["name"]
    names = {one["name"]: one.get("baseline", first) for one in report["checkpoints"]}
    return {name: base for name, base in names.items() if base is not None and base != name}


def percentages(report: Report) -> set[str]:
    """Return the metrics that are shown as percentages."""
    return {metric["name"] for metric in report["measures"] if metric["rate"]}


def figures_by_key(report: Report) -> dict[str, dict[Key, dict[str, Any]]]:
    """Return checkpoint -> (data set, kind, metric) -> its result."""
    return {
        checkpoint["name"]: {(one["data"], one["kind"], one["measure"]): one for one in checkpoint["figures"]}
        for checkpoint in report["checkpoints"]
    }


def percentage_series(report: Report) -> tuple[list[str], dict[str, list[tuple[float, float, float] | None]]]:
    """Return the labels of all percentages, and checkpoint -> (value, low, high) of each, or None."""
    figures = figures_by_key(report)
    keys = [key for key in next(iter(figures.values())) if key[2] in percentages(report)]
    series = {
        name: [(own[key]["value"], *own[key]["interval"]) if key in own else None for key in keys]
        for name, own in figures.items()
    }
    several = len({metric for _, _, metric in keys}) > 1
    return [f"{data}: {kind}" + (f", {metric}" if several else "") for data, kind, metric in keys], series


def format_number(value: float, *, percent: bool, signed: bool = False) -> str:
    """Format 0.937 as 93.7 % if percent, otherwise with four significant digits."""
    sign = "+" if signed else ""
    if percent:
        return f"{100 * value:{sign}.1f} %"
    return f"{value:{sign},.0f}" if abs(value) >= 1000 else f"{value:{sign}.4g}"


def format_interval(interval: list[float], *, percent: bool, signed: bool = False) -> str:
    """Format an interval as [91.3, 95.5]."""
    low, high = (format_number(end, percent=percent, signed=signed).removesuffix(" %") for end in interval)
    return f"[{low}, {high}]"


def _figures_table(report: Report) -> Table:
    figures = figures_by_key(report)
    title = "results with 95 % confidence intervals"
    table = make_table(title, "data", "kind", "metric", "n", numbers=map(markup, figures))
    first = next(iter(figures.values()))
    previous: tuple[str | None, str | None] = None, None
    for (data, kind, metric), one in first.items():
        percent = metric in percentages(report)
        if previous[0] not in (None, data):
            table.add_section()
        cells = []
        for own in figures.values():
            figure = own.get((data, kind, metric))
            cells.append(_with_interval(figure["value"], figure["interval"], percent=percent) if figure else "-")
        repeats = (data if previous[0] != data else "", kind if previous != (data, kind) else "")
        table.add_row(*map(markup, (*repeats, metric, one["n"], *cells)))
        previous = (data, kind)
    return table


def _with_interval(value: float, interval: list[float], **how: bool) -> str:
    return f"{format_number(value, **how)} {format_interval(interval, **how)}"


def _differences_table(report: Report) -> Table:
    """Differences over all kinds together; the page shows every kind."""
    names = ("difference", "won", "lost", "tied")
    title = "differences, paired by row"
    table = make_table(title, "checkpoint", "baseline", "data", "metric", "n", numbers=names)
    last = {(one["checkpoint"], one["data"], one["measure"]): one for one in report["differences"]}  # `all` comes last
    for one in last.values():
        percent = one["measure"] in percentages(report)
        difference = _with_interval(one["difference"], one["interval"], percent=percent, signed=True)
        cells = (one["checkpoint"], baselines(report)[one["checkpoint"]], one["data"], one["measure"], one["n"])
        table.add_row(*map(markup, (*cells, difference, one["wins"], one["losses"], one["ties"])))
    return table


def _drift_table(report: Report) -> Table:
    names = ("text: same next token", "KL, nats per token", "tokens routed differently: text", "vision")
    table = make_table("drift from the baseline", "checkpoint", "baseline", numbers=names)
    for checkpoint in report["checkpoints"]:
        if base := baselines(report).get(checkpoint["name"]):
            table.add_row(*map(markup, (checkpoint["name"], base, *drift_cells(checkpoint))))
    return table


def drift_cells(checkpoint: Mapping[str, Any]) -> list[str]:
    """Return agreement on text, KL, and the share of rerouted tokens of both pools, `-` where nothing was measured."""
    text, flips = checkpoint["text"], (checkpoint["routing"] or {}).get("flipped") or {}
    rerouted = [format_number(flips[pool], percent=True) if pool in flips else "-" for pool in ("text", "vision")]
    if text is None:
        return ["different tokenization", "-", *rerouted]
    if text["bit_identical"]:
        return ["bit-identical logits", "0", *rerouted]
    agreement = _with_interval(text["agreement"], text["agreement_interval"], percent=True)
    return [agreement, f"{text['kl']:.4g} {format_interval(text['kl_interval'], percent=False)}", *rerouted]


def _requirements_table(report: Report) -> Table:
    table = make_table("requirements", "requirement", "checkpoint", "data", "kind", "value", "")
    for line in report["requirements"]:
        value = "not measured" if line["value"] is None else f"{line['value']:.4g}"
        verdict = "[green]met[/green]" if line["passed"] else "[bold red]MISSED[/bold red]"
        cells = (line["requirement"], line["checkpoint"], line["data"] or "", line["kind"] or "", value)
        table.add_row(*map(markup, cells), verdict)
    return table


def harness_table(results: Mapping[str, list[dict[str, Any]]]) -> Table:
    """Return lm-eval's values with their standard errors, one column per checkpoint."""
    table = make_table("lm-eval, with standard errors", "task", "metric", numbers=map(markup, results))
    by_key = [{(line["task"], line["metric"], line["filter"]): line for line in lines} for lines in results.values()]
    for task, metric, filtered in by_key[0]:
        cells = []
        for lines in by_key:
            line = lines[task, metric, filtered]
            cells.append(f"{line['value']:.4f}" + (f" ± {line['stderr']:.4f}" if line["stderr"] is not None else ""))
        table.add_row(markup(task), markup(metric if filtered == "none" else f"{metric}, {filtered}"), *cells)
    return table
