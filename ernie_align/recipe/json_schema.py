"""The JSON schema of recipes: what an editor completes and underlines."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic.json_schema import models_json_schema

from ernie_align.recipe.schema import Recipe


def json_schema(recipes: Mapping[str, type[Recipe]]) -> dict[str, Any]:
    """One schema for the recipes of all stages, with each stage's training keys spelled out."""
    models = [(recipe, "validation") for recipe in recipes.values()]
    _, schema = models_json_schema(models)
    definitions = schema["$defs"]
    for recipe in recipes.values():
        training = recipe.training_model().model_json_schema(
            ref_template=f"#/$defs/{recipe.__name__}Training/$defs/{{model}}"
        )
        for values in training["properties"].values():
            values.pop("default", None)  # null there means only that the key may be left out
        definitions[f"{recipe.__name__}Training"] = training
        own = definitions[recipe.__name__]["properties"]
        own["training"] = {
            "$ref": f"#/$defs/{recipe.__name__}Training",
            "description": own["training"]["description"],
        }
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "ernie-align recipe",
        "oneOf": [{"$ref": f"#/$defs/{recipe.__name__}"} for recipe in recipes.values()],
        "$defs": definitions,
    }
