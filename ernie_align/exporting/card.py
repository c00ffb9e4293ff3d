"""The model card of an export: what it is, what it was made from, and how to serve it."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path
from typing import Any

from ernie_align.exporting.origin import Origin

_PIPELINES = {"vl_moe": "image-text-to-text", "moe": "text-generation", "dense": "text-generation"}
_OF_THE_CLOCK = ("runtime", "per_second", "epoch", "num_tokens")


def card(origin: Origin, facts: dict[str, Any], *, name: str) -> str:
    """The card as Markdown. facts: of export.json; name: of the folder."""
    from jinja2 import Environment, StrictUndefined

    from ernie_align.models.architecture import model_family

    template = files("ernie_align.exporting").joinpath("card.md.jinja").read_text(encoding="utf-8")
    environment = Environment(
        undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
    )
    run = origin.run_file("run.json") or {}
    recipe = origin.run / "recipe.resolved.yaml" if origin.run is not None else None
    family = model_family(origin.base.read_json("config.json"), where=origin.base.name)
    base = facts["base"]
    return environment.from_string(template).render(
        name=name,
        facts=facts,
        base=base,
        base_on_hub=base if base is not None and "/" in base and not Path(base).exists() else None,
        has_vision=family == "vl_moe",
        pipeline=_PIPELINES[family],
        stage=origin.recipe.stage if origin.recipe is not None else None,
        recipe=recipe.read_text(encoding="utf-8").strip() if recipe is not None and recipe.is_file() else None,
        coverage=[row for row in origin.run_file("coverage.json") or [] if row["trained_tensors"]],
        sources=origin.run_file("data.json") or [],
        metrics={
            key: value
            for key, value in (run.get("metrics") or {}).items()
            if origin.is_final and isinstance(value, (int, float)) and not key.endswith(_OF_THE_CLOCK)
        },
        environment=run.get("environment") or {},
    )
