"""The JSON schema of recipes: what an editor completes and underlines."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pydantic.json_schema import models_json_schema

from ernie_align.recipe.evaluation import EvalConfig
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


_HEAD = """# Every key

Made by `ernie-align schema --markdown` from the classes that judge recipes; a test says that it is up to date. A
required key has to be given; `-` stands for one that may be left out. Paths start at the working directory.
"""
_TRAINING = """
The keys of TRL's `{config}`, with TRL's names, meanings and defaults; their types are read from the installed version.

| key | type |
|---|---|
{rows}

Not under `training:` in this toolkit, and where to go instead:

| key | instead |
|---|---|
{owned}
"""
_BOUNDS = {"minimum": "≥ {}", "exclusiveMinimum": "> {}", "maximum": "≤ {}", "exclusiveMaximum": "< {}"}


def reference_page(recipes: Mapping[str, type[Recipe]]) -> str:
    """The page: each stage's recipe, the plan of an evaluation, then every block either of them is made of."""
    schema = json_schema(recipes)
    plan = EvalConfig.model_json_schema()
    blocks = {**schema["$defs"], **plan.pop("$defs"), "EvalConfig": plan}
    training = {f"{recipe.__name__}Training": name for name, recipe in recipes.items()}
    tops = [*((recipe.__name__, f"`stage: {name}`") for name, recipe in recipes.items())]
    tops += [("EvalConfig", "Evaluation plans")]
    parts = [_HEAD]
    for name, title in tops:
        parts.append(_block(title, blocks[name], blocks, training))
    seen = {name for name, _ in tops} | training.keys()
    parts += ["## Blocks\n"]
    for name in _reached([name for name, _ in tops], blocks):
        if name not in seen and "properties" in blocks[name]:
            parts.append(_block(_called(name, blocks[name]), blocks[name], blocks, training, level="###"))
    for name, recipe in recipes.items():
        parts.append(_trl(name, recipe, blocks[f"{recipe.__name__}Training"]))
    return "\n".join(parts)


def _reached(names: Sequence[str], blocks: Mapping[str, Any]) -> list[str]:
    """The blocks that those name, and so on, each once, in the order in which a reader meets them."""
    found = dict.fromkeys(names)
    waiting = list(names)
    while waiting:
        for name in _refs(blocks[waiting.pop(0)]):
            if name not in found and "/" not in name:
                found[name] = None
                waiting.append(name)
    return list(found)


def _refs(node: Any) -> Iterator[str]:
    if isinstance(node, Mapping):
        if "$ref" in node:
            yield node["$ref"].removeprefix("#/$defs/")
        for value in node.values():
            yield from _refs(value)
    elif isinstance(node, list):
        for value in node:
            yield from _refs(value)


def _block(
    title: str,
    block: Mapping[str, Any],
    blocks: Mapping[str, Any],
    training: Mapping[str, str],
    *,
    level: str = "##",
) -> str:
    required = block.get("required", [])
    lines = []
    for key, value in block["properties"].items():
        default = "required" if key in required else _default(value.get("default"))
        ref = _ref(value)
        kind = f"[TRL's keys](#training-of-{training[ref]})" if ref in training else _type(value, blocks)
        lines.append(f"| `{key}` | {kind} | {default} | {_cell(_about(value, blocks))} |")
    about = " ".join(block.get("description", "").split())
    return "\n".join(
        [f"{level} {title}\n", f"{about}\n", "| key | type | default | |", "|---|---|---|---|", *lines, ""]
    )


def _about(value: Mapping[str, Any], blocks: Mapping[str, Any]) -> str:
    """A key's description; that of its block where the key has none."""
    if "const" in value:
        return "What this block is"
    if value.get("description"):
        return value["description"]
    named = [ref for ref in _refs(value) if ref in blocks]
    about = blocks[named[0]].get("description", "") if len(named) == 1 else ""
    return " ".join(about.split())


def _ref(value: Mapping[str, Any]) -> str:
    return value.get("$ref", "").removeprefix("#/$defs/")


def _called(name: str, block: Mapping[str, Any]) -> str:
    """A reward or metric goes by the name that a recipe calls it."""
    const = block["properties"].get("name", {}).get("const")
    return f"`{const}`" if const else name


def _type(value: Mapping[str, Any], blocks: Mapping[str, Any]) -> str:
    if "$ref" in value:
        name = _ref(value)
        target = blocks.get(name, {})
        if "properties" not in target:  # an enumeration with a name
            return _type(target, blocks)
        title = _called(name, target)
        return f"[{title}](#{title.strip('`').lower()})"
    for union in ("anyOf", "oneOf"):
        if union in value:
            return " or ".join(dict.fromkeys(_type(one, blocks) for one in value[union] if one.get("type") != "null"))
    if "const" in value:
        return f"`{value['const']}`"
    if "enum" in value:
        return ", ".join(f"`{one}`" for one in value["enum"])
    kind = value.get("type", "anything")
    if kind == "array":
        return f"list of {_type(value.get('items', {}), blocks)}"
    if kind == "object":
        inner = value.get("additionalProperties")
        return f"mapping to {_type(inner, blocks)}" if isinstance(inner, Mapping) and inner else "mapping"
    names = {"string": "text", "integer": "whole number", "number": "number", "boolean": "true or false"}
    bounds = [form.format(f"{value[key]:g}") for key, form in _BOUNDS.items() if key in value]
    return names.get(kind, kind) + (f", {' and '.join(bounds)}" if bounds else "")


def _default(value: Any) -> str:
    if value is None or value == {}:
        return "-"
    return f"`{value}`" if isinstance(value, str) else f"`{json.dumps(value)}`"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def _trl(stage: str, recipe: type[Recipe], training: Mapping[str, Any]) -> str:
    rows = [f"| `{key}` | {_cell(_type(value, {}))} |" for key, value in training["properties"].items()]
    owned = [f"| `{key}` | {_cell(instead)} |" for key, instead in recipe.reserved_training_keys().items()]
    text = _TRAINING.format(config=training["title"], rows="\n".join(rows), owned="\n".join(owned))
    return f"## training: of {stage}\n{text}"
