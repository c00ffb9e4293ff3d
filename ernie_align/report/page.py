"""Write runs and evaluations as one HTML page that needs no other file and no network."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from ernie_align.checkpoints import write_atomically
from ernie_align.dataset_report import DatasetReport
from ernie_align.report import charts
from ernie_align.report.comparison import (
    baselines,
    drift_cells,
    figures_by_key,
    format_interval,
    format_number,
    percentage_series,
    percentages,
)
from ernie_align.report.console import visible
from ernie_align.report.dataset_report import section
from ernie_align.report.folders import EvaluationReport, Run, read

# Title of a chart -> keys of metrics.jsonl in it. A key ending in / means every key one level below.
_CURVES = {
    "Loss": ("loss", "eval_loss", "nll_loss"),
    "Token accuracy": ("mean_token_accuracy", "eval_mean_token_accuracy"),
    "Rewards": ("reward", "rewards/", "eval_reward", "domains/"),
    "Held-out pairs": ("held_out/", "eval_rewards/"),
    "KL from the reference model": ("kl",),
    "Share of tokens routed differently from the reference model": ("routing/", "eval_routing/"),
    "Length of completions, tokens": ("completions/mean_length",),
    "Seconds per step, and of waiting for data": ("step_seconds", "data_seconds"),
}


def write_page(folders: Sequence[str | Path], path: str | Path) -> None:
    """Write one page about run directories and evaluations, atomically.

    Raises DataError if one of `folders` is neither.
    """
    parts = [part for folder in folders for part in read(Path(folder))]
    sections = [
        _run_section(part, label=f"r{place}") if isinstance(part, Run) else _evaluation_section(part, label=f"e{place}")
        for place, part in enumerate(parts)
    ]
    write_atomically(Path(path), _render(", ".join(dict.fromkeys(part.name for part in parts)), sections))


def write_dataset_page(report: DatasetReport, path: str | Path) -> None:
    """Write a page about the rows of a recipe, atomically."""
    write_atomically(Path(path), _render("the rows of a recipe", [section(report)]))


def _render(title: str, sections: Sequence[dict[str, Any]]) -> str:
    """Render the template. The page is valid XML as well as HTML."""
    from jinja2 import Environment, StrictUndefined
    from markupsafe import Markup

    environment = Environment(
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=lambda value: value if isinstance(value, Markup) else visible(value),
    )
    environment.filters["svg"] = Markup
    template = environment.from_string(files("ernie_align.report").joinpath("page.html.jinja").read_text("utf-8"))
    return template.render(title=title, sections=sections)


# -- runs -------------------------------------------------------------------------------------------------------------


def _run_section(run: Run, *, label: str) -> dict[str, Any]:
    return {
        "kind": "run",
        "run": run,
        "charts": [
            {"title": title, "svg": charts.curves(series, label=f"{label}-{place}"), "note": ""}
            for place, (title, series) in enumerate(_series(run.metrics).items())
        ],
        "rewards": [name for name in (run.completions or [{}])[0] if name.startswith("reward/")],
    }


def _series(metrics: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, list[tuple[float, float]]]]:
    """Return chart title -> key -> points, for keys that were logged at least twice."""
    logged: dict[str, list[tuple[float, float]]] = {}
    for line in metrics:
        for key, value in line.items():
            if isinstance(value, (int, float)) and "step" in line:
                logged.setdefault(key, []).append((line["step"], float(value)))
    points = {key: finite for key, values in logged.items() if len(finite := charts.finite(values)) > 1}
    charted = {
        title: {key: points[key] for key in points if any(_matches(key, pattern) for pattern in patterns)}
        for title, patterns in _CURVES.items()
    }
    return {title: series for title, series in charted.items() if series}


def _matches(key: str, pattern: str) -> bool:
    """`rewards/` matches keys one level below it only, because deeper ones count something else."""
    return key == pattern or (pattern.endswith("/") and key.startswith(pattern) and key.count("/") == 1)


# -- evaluations ------------------------------------------------------------------------------------------------------


def _evaluation_section(evaluation: EvaluationReport, *, label: str) -> dict[str, Any]:
    report = evaluation.report
    shown = [
        row | {"images": [url for image in row["images"] if image and (url := _data_url(evaluation.folder / image))]}
        for row in report["shown"]
    ]
    return {
        "kind": "evaluation",
        "name": evaluation.name,
        "report": report,
        "baselines": baselines(report),
        "figures": _figures(report),
        "drift": [(one["name"], drift_cells(one)) for one in report["checkpoints"] if one["name"] in baselines(report)],
        "unused": _unused_experts(report),
        "charts": [*_percentages_chart(report, label), *_routing_charts(report, label)],
        "changed": _changed_rows(report, shown),
        "samples": [shown[place] for place in report["samples"]],
    }


def _data_url(path: Path) -> str | None:
    if not path.is_file():
        return None
    return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode("ascii")


def _figures(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return one row per data set, kind and metric: every checkpoint's value and its difference from its baseline."""
    differences = {(one["checkpoint"], one["data"], one["kind"], one["measure"]): one for one in report["differences"]}
    figures = figures_by_key(report)
    lines = []
    for (data, kind, metric), first in next(iter(figures.values())).items():
        percent, cells = metric in percentages(report), []
        for name, by_key in figures.items():
            figure, change = by_key.get((data, kind, metric)), differences.get((name, data, kind, metric))
            cell = dict.fromkeys(("interval", "difference", "difference_interval", "counts"), "")
            cell |= {"value": "-", "significant": False}
            if figure:
                cell["value"] = format_number(figure["value"], percent=percent)
                cell["interval"] = format_interval(figure["interval"], percent=percent)
            if change:
                low, high = change["interval"]
                cell |= {
                    "difference": format_number(change["difference"], percent=percent, signed=True),
                    "difference_interval": format_interval(change["interval"], percent=percent, signed=True),
                    "significant": low > 0 or high < 0,
                    "counts": f"{change['wins']} won, {change['losses']} lost",
                }
            cells.append(cell)
        lines.append({"data": data, "kind": kind, "metric": metric, "n": first["n"], "cells": cells})
    return lines


def _percentages_chart(report: Mapping[str, Any], label: str) -> list[dict[str, Any]]:
    rows, series = percentage_series(report)
    if not rows:
        return []
    svg = charts.intervals(rows, series, label=f"{label}-rates", percent=True)
    return [{"title": "Percentages with 95 % confidence intervals", "svg": svg, "note": ""}]


def _routing_charts(report: Mapping[str, Any], label: str) -> list[dict[str, Any]]:
    routed = [checkpoint for checkpoint in report["checkpoints"] if checkpoint["routing"]]
    figures = []
    for place, checkpoint in enumerate(routed):
        svg = charts.expert_load(checkpoint["routing"]["layers"], label=f"{label}-load-{place}")
        note = f"{checkpoint['routing']['rows']} prompts; red: an unused expert"
        figures.append({"title": f"Load of each expert: {checkpoint['name']}", "svg": svg, "note": note})
    flips = {
        f"{checkpoint['name']}, {pool}": points
        for checkpoint in routed
        for pool in ("text", "vision")
        if (
            points := [
                (layer["layer"], 100 * layer["flipped"])
                for layer in checkpoint["routing"]["layers"]
                if layer["pool"] == pool and layer["flipped"] is not None
            ]
        )
    }
    if flips:
        svg = charts.curves(flips, label=f"{label}-flips", x="layer")
        figures.append({"title": "Tokens routed differently from the baseline, %", "svg": svg, "note": ""})
    return figures


def _unused_experts(report: Mapping[str, Any]) -> list[tuple[str, str, int, int]]:
    """Return (checkpoint, pool, unused experts, experts), summed over all layers."""
    return [
        (
            checkpoint["name"],
            pool,
            sum(len(layer["unused"]) for layer in layers),
            sum(len(layer["load"]) for layer in layers),
        )
        for checkpoint in report["checkpoints"]
        if checkpoint["routing"]
        for pool in ("text", "vision")
        if (layers := [layer for layer in checkpoint["routing"]["layers"] if layer["pool"] == pool])
    ]


def _changed_rows(report: Mapping[str, Any], shown: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the rows of each checkpoint that got worse, then those that got better."""
    groups: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for change in report["changed"]:
        groups.setdefault((change["checkpoint"], "worse" if change["gain"] < 0 else "better"), []).append(change)
    return [
        {
            "checkpoint": name,
            "title": title,
            "metric": ", ".join(dict.fromkeys(change["measure"] for change in changes)),
            "rows": [shown[change["row"]] for change in changes],
        }
        for (name, title), changes in groups.items()
    ]
