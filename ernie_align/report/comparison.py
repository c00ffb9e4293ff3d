"""What an evaluation says on the terminal: figures side by side, differences, retention, requirements."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.markup import escape
from rich.table import Table

from ernie_align.evaluation import Evaluation

Report = Mapping[str, Any]


def tables(evaluation: Evaluation) -> list[Table]:
    """Figures; of several checkpoints also differences and what was kept of text and routing; then requirements."""
    report = evaluation.report
    several = len(report["checkpoints"]) > 1
    found = [_figures(report), *([_differences(report), _kept(report)] if several else [])]
    return [*found, *([_requirements(report)] if report["requirements"] else [])]


def rates(report: Report) -> set[str]:
    """The measures that read as percentages."""
    return {measure["name"] for measure in report["measures"] if measure["rate"]}


def rates_side_by_side(report: Report) -> tuple[list[str], dict[str, list[tuple[float, float, float] | None]]]:
    """Names of the rates, one for each data set and kind, and checkpoint -> of each (value, low, high) or None."""
    own = {
        checkpoint["name"]: {(one["data"], one["kind"], one["measure"]): one for one in checkpoint["figures"]}
        for checkpoint in report["checkpoints"]
    }
    keys = [key for key in next(iter(own.values())) if key[2] in rates(report)]
    series = {
        name: [(figures[key]["value"], *figures[key]["interval"]) if key in figures else None for key in keys]
        for name, figures in own.items()
    }
    several = len({measure for _, _, measure in keys}) > 1
    return [f"{data}: {kind}" + (f", {measure}" if several else "") for data, kind, measure in keys], series


def number(value: float, *, rate: bool, signed: bool = False) -> str:
    """0.937 -> 93.7 % for a rate, else three or four digits that matter."""
    sign = "+" if signed else ""
    if rate:
        return f"{100 * value:{sign}.1f} %"
    return f"{value:{sign},.0f}" if abs(value) >= 1000 else f"{value:{sign}.4g}"


def span(interval: list[float], *, rate: bool, signed: bool = False) -> str:
    """[91.3, 95.5]"""
    low, high = (number(end, rate=rate, signed=signed).removesuffix(" %") for end in interval)
    return f"[{low}, {high}]"


def _figures(report: Report) -> Table:
    table = Table("data", "kind", "measure", "n", title="figures, with their 95 % intervals", title_justify="left")
    for checkpoint in report["checkpoints"]:
        table.add_column(escape(checkpoint["name"]), justify="right")
    own = [
        {(figure["data"], figure["kind"], figure["measure"]): figure for figure in checkpoint["figures"]}
        for checkpoint in report["checkpoints"]
    ]
    previous: tuple[str, str] | None = None
    for data, kind, measure in own[0]:
        rate = measure in rates(report)
        if previous is not None and previous[0] != data:
            table.add_section()
        cells = []
        for figures in own:
            figure = figures.get((data, kind, measure))
            cells.append(
                f"{number(figure['value'], rate=rate)} {span(figure['interval'], rate=rate)}" if figure else "-"
            )
        table.add_row(
            escape(data) if previous is None or previous[0] != data else "",
            escape(kind) if previous != (data, kind) else "",
            escape(measure),
            str(own[0][data, kind, measure]["n"]),
            *map(escape, cells),
        )
        previous = (data, kind)
    return table


def _differences(report: Report) -> Table:
    """Of all kinds together: the page has every one."""
    first = report["checkpoints"][0]["name"]
    title = f"against {escape(first)}, paired by rows"
    table = Table("checkpoint", "data", "measure", "n", title=title, title_justify="left")
    for name in ("difference", "won", "lost", "tied"):
        table.add_column(name, justify="right")
    last = {(one["checkpoint"], one["data"], one["measure"]): one for one in report["differences"]}  # `all` comes last
    for one in last.values():
        rate = one["measure"] in rates(report)
        moved = f"{number(one['difference'], rate=rate, signed=True)} {span(one['interval'], rate=rate, signed=True)}"
        counts = (str(one[key]) for key in ("wins", "losses", "ties"))
        names = (escape(one[key]) for key in ("checkpoint", "data", "measure"))
        table.add_row(*names, str(one["n"]), escape(moved), *counts)
    return table


def _kept(report: Report) -> Table:
    first = escape(report["checkpoints"][0]["name"])
    table = Table("checkpoint", title=f"kept of {first}", title_justify="left")
    for name in ("text: next token agrees", "KL, nats a token", "tokens sent to other experts: text", "vision"):
        table.add_column(name, justify="right")
    for checkpoint in report["checkpoints"][1:]:
        table.add_row(escape(checkpoint["name"]), *map(escape, kept(checkpoint)))
    return table


def kept(checkpoint: Mapping[str, Any]) -> list[str]:
    """Agreement on text, divergence, and flips per pool, `-` where there is none."""
    text, flips = checkpoint["text"], (checkpoint["routing"] or {}).get("flipped") or {}
    moved = [number(flips[pool], rate=True) if pool in flips else "-" for pool in ("text", "vision")]
    if text is None:
        return ["other tokens", "-", *moved]
    if text["bit_identical"]:
        return ["bit-identical logits", "0", *moved]
    agreement = f"{number(text['agreement'], rate=True)} {span(text['agreement_interval'], rate=True)}"
    return [agreement, f"{text['kl']:.4g} {span(text['kl_interval'], rate=False)}", *moved]


def _requirements(report: Report) -> Table:
    table = Table("requirement", "checkpoint", "data", "kind", "value", "", title="requirements", title_justify="left")
    for line in report["requirements"]:
        value = "not measured" if line["value"] is None else f"{line['value']:.4g}"  # as the requirement is written
        verdict = "[green]met[/green]" if line["passed"] else "[bold red]MISSED[/bold red]"
        cells = (line["requirement"], line["checkpoint"], line["data"] or "", line["kind"] or "", value)
        table.add_row(*map(escape, cells), verdict)
    return table


def harness_table(results: Mapping[str, list[dict[str, Any]]]) -> Table:
    """Tasks of lm-eval, one column per checkpoint: each value with its standard error."""
    table = Table("task", "metric", title="lm-eval, with standard errors", title_justify="left")
    for checkpoint in results:
        table.add_column(escape(checkpoint), justify="right")
    own = [{(line["task"], line["metric"], line["filter"]): line for line in lines} for lines in results.values()]
    for task, metric, filtered in own[0]:
        cells = []
        for lines in own:
            line = lines[task, metric, filtered]
            cells.append(f"{line['value']:.4f}" + (f" ± {line['stderr']:.4f}" if line["stderr"] is not None else ""))
        table.add_row(escape(task), escape(metric if filtered == "none" else f"{metric}, {filtered}"), *cells)
    return table
