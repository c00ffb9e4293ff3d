"""Runs and evaluations -> one HTML page that needs nothing beside itself."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from ernie_align.dataset_report import DatasetReport
from ernie_align.report import charts
from ernie_align.report.comparison import kept, number, rates, rates_side_by_side, span
from ernie_align.report.dataset_report import section
from ernie_align.report.folders import Evaluated, Run, read
from ernie_align.report.text import visible

# Title -> keys of metrics.jsonl that are drawn together; a prefix ends in a slash.
_CURVES = {
    "Loss": ("loss", "eval_loss", "nll_loss"),
    "Share of tokens predicted right": ("mean_token_accuracy", "eval_mean_token_accuracy"),
    "Rewards": ("reward", "rewards/", "eval_reward", "domains/"),
    "Held-out pairs": ("held_out/", "eval_rewards/"),
    "Distance from the reference": ("kl",),
    "Tokens sent to other experts than the reference's": ("routing/", "eval_routing/"),
    "Length of completions, tokens": ("completions/mean_length",),
    "Seconds of a step, and of waiting for data": ("step_seconds", "data_seconds"),
}


def write_page(folders: Sequence[str | Path], path: str | Path) -> None:
    """One page about all folders, whole or not at all.

    Raises DataError where a folder holds neither a run nor an evaluation.
    """
    _write(page([part for folder in folders for part in read(Path(folder))]), Path(path))


def write_dataset_page(examination: DatasetReport, path: str | Path) -> None:
    """A page about the rows of a recipe, whole or not at all."""
    found = section(examination)
    _write(_rendered("the rows of a recipe", [found, *found["sources"]], [found]), Path(path))


def _write(text: str, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


def page(parts: Sequence[Run | Evaluated]) -> str:
    """The page. It is XML as well as HTML: every tag is closed."""
    sections = [
        _run(part, mark=f"r{place}") if isinstance(part, Run) else _evaluated(part, mark=f"e{place}")
        for place, part in enumerate(parts)
    ]
    return _rendered(", ".join(dict.fromkeys(part.name for part in parts)), sections, sections)


def _rendered(title: str, drawn: Sequence[dict[str, Any]], sections: Sequence[dict[str, Any]]) -> str:
    """drawn: everything that holds charts."""
    from jinja2 import Environment, StrictUndefined
    from markupsafe import Markup

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["visible"] = visible
    template = environment.from_string(files("ernie_align.report").joinpath("page.html.jinja").read_text("utf-8"))
    for holder in drawn:
        for figure in holder["charts"]:
            figure["svg"] = Markup(figure["svg"])
    return template.render(title=title, sections=sections)


# -- runs -------------------------------------------------------------------------------------------------------------


def _run(run: Run, *, mark: str) -> dict[str, Any]:
    total = sum(part["parameters"] for part in run.coverage)
    return {
        "kind": "run",
        "name": run.name,
        "recipe": run.recipe,
        "coverage": run.coverage,
        "trainable": sum(part["trainable"] for part in run.coverage),
        "parameters": total,
        "sources": run.sources,
        "preview": run.preview,
        "text_unchanged": run.facts.get("text_unchanged"),
        "environment": run.facts.get("environment", {}),
        "charts": [
            {"title": title, "svg": charts.curves(series, label=f"{mark}-{place}"), "note": ""}
            for place, (title, series) in enumerate(_series(run.metrics).items())
        ],
        "completions": run.completions,
        "rewards": [name for name in (run.completions or [{}])[0] if name.startswith("reward/")],
        "step": run.step,
    }


def _series(metrics: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, list[tuple[float, float]]]]:
    """Title -> key -> points, of everything that was logged twice or more."""
    logged: dict[str, list[tuple[float, float]]] = {}
    for line in metrics:
        for key, value in line.items():
            if isinstance(value, (int, float)) and "step" in line:
                logged.setdefault(key, []).append((line["step"], float(value)))
    found: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for title, wanted in _CURVES.items():
        keys = [key for key in logged if any(_is(key, want) for want in wanted)]
        drawn = {key: charts.finite(logged[key]) for key in keys if len(charts.finite(logged[key])) > 1}
        if drawn:
            found[title] = drawn
    return found


def _is(key: str, want: str) -> bool:
    """`rewards/` is every key of one level below it: a reward's own counts are another thing."""
    return key == want or (want.endswith("/") and key.startswith(want) and key.count("/") == 1)


# -- evaluations ------------------------------------------------------------------------------------------------------


def _evaluated(evaluated: Evaluated, *, mark: str) -> dict[str, Any]:
    report = evaluated.report
    shown = [
        row | {"images": [inlined for image in row["images"] if (inlined := _inlined(evaluated.folder / image))]}
        for row in report["shown"]
    ]
    return {
        "kind": "evaluation",
        "name": evaluated.name,
        "names": [checkpoint["name"] for checkpoint in report["checkpoints"]],
        "checkpoints": report["checkpoints"],
        "figures": _figures(report),
        "kept": [(checkpoint["name"], kept(checkpoint)) for checkpoint in report["checkpoints"][1:]],
        "requirements": report["requirements"],
        "unused": _unused(report),
        "charts": [*_whiskers(report, mark), *_routing(report, mark)],
        "changed": _changed(report, shown),
        "samples": [shown[place] for place in report["samples"]],
        "plan": report["plan"],
        "environment": report["environment"],
    }


def _inlined(path: Path) -> str | None:
    if not path.is_file():
        return None
    return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode("ascii")


def _figures(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One line for each data set, kind and measure: every checkpoint's figure, and its difference from the first."""
    moved = {(one["checkpoint"], one["data"], one["kind"], one["measure"]): one for one in report["differences"]}
    own = {
        checkpoint["name"]: {(one["data"], one["kind"], one["measure"]): one for one in checkpoint["figures"]}
        for checkpoint in report["checkpoints"]
    }
    lines = []
    for data, kind, measure in next(iter(own.values())):
        rate, cells = measure in rates(report), []
        for name, figures in own.items():
            figure, change = figures.get((data, kind, measure)), moved.get((name, data, kind, measure))
            cells.append(
                {
                    "value": number(figure["value"], rate=rate) if figure else "-",
                    "span": span(figure["interval"], rate=rate) if figure else "",
                    "difference": number(change["difference"], rate=rate, signed=True) if change else "",
                    "difference_span": span(change["interval"], rate=rate, signed=True) if change else "",
                    "clear": bool(change) and (change["interval"][0] > 0 or change["interval"][1] < 0),
                    "counts": f"{change['wins']} won, {change['losses']} lost" if change else "",
                }
            )
        count = next(iter(own.values()))[data, kind, measure]["n"]
        lines.append({"data": data, "kind": kind, "measure": measure, "n": count, "cells": cells})
    return lines


def _whiskers(report: Mapping[str, Any], mark: str) -> list[dict[str, Any]]:
    """A chart of the rates."""
    rows, series = rates_side_by_side(report)
    if not rows:
        return []
    svg = charts.whiskers(rows, series, label=f"{mark}-rates", percent=True)
    return [{"title": "Rates, with their 95 % intervals", "svg": svg, "note": ""}]


def _routing(report: Mapping[str, Any], mark: str) -> list[dict[str, Any]]:
    found = []
    routed = [checkpoint for checkpoint in report["checkpoints"] if checkpoint["routing"]]
    for place, checkpoint in enumerate(routed):
        svg = charts.expert_load(checkpoint["routing"]["layers"], label=f"{mark}-load-{place}")
        note = f"{checkpoint['routing']['rows']} prompts; red: no token of theirs chose the expert"
        found.append({"title": f"Load of each expert: {checkpoint['name']}", "svg": svg, "note": note})
    flips = {
        f"{checkpoint['name']}, {pool}": [
            (layer["layer"], 100 * layer["flipped"])
            for layer in checkpoint["routing"]["layers"]
            if layer["pool"] == pool and layer["flipped"] is not None
        ]
        for checkpoint in routed
        for pool in ("text", "vision")
    }
    drawn = {name: points for name, points in flips.items() if points}
    if drawn:
        title = f"Tokens sent to other experts than in {report['checkpoints'][0]['name']}, %"
        found.append({"title": title, "svg": charts.curves(drawn, label=f"{mark}-flips", x="layer"), "note": ""})
    return found


def _unused(report: Mapping[str, Any]) -> list[tuple[str, str, int, int]]:
    """(checkpoint, pool, experts that no token chose, experts), over all layers."""
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


def _changed(report: Mapping[str, Any], shown: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Of each checkpoint: the rows that got worse, then better."""
    found = []
    for name in dict.fromkeys(change["checkpoint"] for change in report["changed"]):
        own = [change for change in report["changed"] if change["checkpoint"] == name]
        for title, rows in (
            ("worse", [change for change in own if change["gain"] < 0]),
            ("better", [change for change in own if change["gain"] > 0]),
        ):
            if rows:
                measure = ", ".join(dict.fromkeys(change["measure"] for change in rows))
                found.append(
                    {
                        "checkpoint": name,
                        "title": title,
                        "measure": measure,
                        "rows": [shown[change["row"]] for change in rows],
                    }
                )
    return found
