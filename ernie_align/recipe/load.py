"""Validate YAML and overrides: a frozen recipe, or every fault in them at once, each with its place."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from ernie_align.errors import Fault, RecipeError, did_you_mean
from ernie_align.recipe.document import (
    Document,
    apply_overrides,
    dotted,
    dump_yaml,
    parse_document,
    read_limited,
    reject_secrets,
)
from ernie_align.recipe.schema import Block, Recipe

B = TypeVar("B", bound=Block)

# pydantic's error type -> the type that the key needs
_EXPECTED = {
    "string_type": "text",
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "bool_type": "true or false",
    "list_type": "a list",
    "dict_type": "a mapping",
    "model_type": "a mapping",
    "model_attributes_type": "a mapping",
}


def load_recipe(
    source: str | Path | Mapping[str, Any],
    *,
    stages: Mapping[str, type[Recipe]],
    overrides: Iterable[str] = (),
    stage: str | None = None,
) -> Recipe:
    """Read and validate a recipe.

    source: path of a YAML file, or the same as a mapping; stages: stage name -> its recipe class; overrides:
    `key=value` texts, validated like the file; stage: the stage that the caller expects (the CLI command).
    Raises RecipeError with every fault.
    """
    overrides = list(overrides)
    document = _read_document(source, "recipe", overrides, fix="begin with stage:")
    cls = _recipe_class(document, stages, stage)
    recipe, faults = _validate(document, cls)
    if faults:
        raise RecipeError(*faults)
    _record_places(recipe, document)
    recipe._given = document.text + "".join(f"# command line: {override}\n" for override in overrides)
    return recipe


def load_block(source: str | Path | Mapping[str, Any], cls: type[B], *, name: str) -> B:
    """Read and validate a file that is not a recipe, in the same way.

    name: the kind of file, for errors about a mapping. Raises RecipeError with every fault.
    """
    document = _read_document(source, name)
    try:
        block = cls.model_validate(document.values)
    except ValidationError as error:
        raise RecipeError(*sorted(_faults(error, document, cls, ()), key=_in_file_order)) from None
    _record_places(block, document)
    return block


def to_yaml(recipe: Block) -> str:
    """Return the resolved recipe: every key, defaults filled in."""
    return dump_yaml(recipe.model_dump(mode="json"))


def differences(old: str, new: str) -> list[tuple[str, Any, Any]]:
    """Compare two resolved recipes: (dotted key, value in old, value in new), with None for a missing key."""
    before, after = (_flatten(parse_document(text, "recipe").values) for text in (old, new))
    keys = dict.fromkeys([*before, *after])
    return [(key, before.get(key), after.get(key)) for key in keys if before.get(key) != after.get(key)]


def _flatten(values: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(values, dict) and values:
        pairs = values.items()
        return {key: leaf for name, value in pairs for key, leaf in _flatten(value, f"{prefix}{name}.").items()}
    return {prefix.rstrip("."): values}


def _read_document(
    source: str | Path | Mapping[str, Any], name: str, overrides: list[str] | None = None, *, fix: str = ""
) -> Document:
    """Read a mapping of keys without secrets. name: the kind of document, which is also the place in a mapping."""
    if isinstance(source, Mapping):
        document = parse_document(json.dumps(source), name)  # JSON is YAML, and the positions in it mean nothing
        document.places = dict.fromkeys(document.places, name)
        document.keys = dict.fromkeys(document.keys, name)
        document.text = dump_yaml(document.values)
    else:
        document = _read_file(Path(source))
    if not isinstance(document.values, dict):
        raise RecipeError.at(document.place(()), f"a {name} is a mapping of keys", fix=fix)
    apply_overrides(document, overrides or [])
    reject_secrets(document)
    return document


def _read_file(path: Path) -> Document:
    try:
        text = read_limited(path)
    except FileNotFoundError:
        fix = "give the path of a YAML file; `ernie-align recipes` lists the shipped ones"
        raise RecipeError.at(str(path), "no such recipe", fix=fix) from None
    except (OSError, ValueError) as error:  # ValueError: too large, not UTF-8, or a path with a NUL
        raise RecipeError.at(str(path), f"cannot be read: {error}", fix="give the path of a YAML file") from None
    return parse_document(text, str(path))


def _recipe_class(document: Document, stages: Mapping[str, type[Recipe]], expected: str | None) -> type[Recipe]:
    stage = document.values.get("stage")
    where = document.address(("stage",))
    if stage is None:
        raise RecipeError.at(where, "required key is missing", fix=f"write stage: {expected or ' or '.join(stages)}")
    if not isinstance(stage, str) or stage not in stages:
        raise RecipeError.at(where, f"unknown stage {_show(stage)}", fix=did_you_mean(str(stage), stages))
    if expected is not None and stage != expected:
        raise RecipeError.at(where, f"this is a {stage} recipe", fix=f"run ernie-align {stage}, not {expected}")
    return stages[stage]


def _validate(document: Document, cls: type[Recipe]) -> tuple[Recipe | None, list[Fault]]:
    faults: list[Fault] = []
    training = document.values.get("training")
    if isinstance(training, dict):
        reserved = cls.reserved_training_keys()
        for key in [key for key in training if key in reserved]:
            where = document.address(("training", key), of_key=True)
            faults.append(Fault(where, "this key is not set under training", fix=reserved[key]))
        allowed = {key: value for key, value in training.items() if key not in reserved}
        try:
            cls.training_model().model_validate(allowed)
        except ValidationError as error:
            faults += _faults(error, document, cls.training_model(), ("training",))
    recipe = None
    try:
        recipe = cls.model_validate(document.values)
    except ValidationError as error:
        faults = _faults(error, document, cls, ()) + faults
    return recipe, sorted(faults, key=_in_file_order)


def _in_file_order(fault: Fault) -> tuple:
    return tuple(int(part) if part.isdigit() else 0 for part in fault.where.split("  ")[0].split(":")[-2:])


def _faults(error: ValidationError, document: Document, cls: type[BaseModel], prefix: tuple) -> list[Fault]:
    faults: dict[tuple, Fault] = {}
    expected: dict[tuple, list[str]] = {}
    for item in error.errors(include_url=False):
        path = _document_path(item, document, prefix)
        if item["type"] in _EXPECTED:  # pydantic reports one error per member of a union: they become one fault
            expected.setdefault(path, []).append(_EXPECTED[item["type"]])
            what = f"expected {' or '.join(dict.fromkeys(expected[path]))}, got {_show(item['input'])}"
            faults[path] = Fault(document.address(path), what)
        elif path not in expected:
            faults[(*path, len(faults))] = _fault(item, path, document, _parent_block(path[len(prefix) :], cls))
    return list(faults.values())


def _document_path(item: dict[str, Any], document: Document, prefix: tuple) -> tuple:
    """Return the path of the error in the document: pydantic's location without the tags of unions."""
    path, value = [], document.values
    loc = (*prefix, *item["loc"])
    for number, step in enumerate(loc):
        if (isinstance(value, dict) and step in value) or (isinstance(value, list) and isinstance(step, int)):
            path.append(step)
            value = value[step]
        elif item["type"] == "missing" and number == len(loc) - 1:
            path.append(step)
    return tuple(path)


def _parent_block(path: tuple, cls: type[BaseModel]) -> type[BaseModel]:
    """Return the block that has the last step of `path` as a key."""
    for step in path[:-1]:
        known = cls.model_fields.get(step) if isinstance(step, str) else None
        cls = (_block_of(known.annotation) if known is not None else None) or cls
    return cls


def _fault(item: dict[str, Any], path: tuple, document: Document, parent: type[BaseModel]) -> Fault:
    kind, context = item["type"], item.get("ctx", {})
    key, value = path[-1] if path else "", item.get("input")
    if kind == "align":
        path = (*path, context["at"]) if context["at"] else path
        return Fault(document.address(path), context["what"], context["why"], context["fix"])
    where = document.address(path, of_key=kind in ("extra_forbidden", "missing"))
    if kind == "extra_forbidden":
        other_stage = getattr(parent, "keys_of_other_stages", {}).get(key)
        if other_stage:
            return Fault(where, "not a key of this stage", fix=other_stage)
        all_keys = "ernie-align schema --markdown lists every key"
        return Fault(where, "unknown key", fix=did_you_mean(str(key), parent.model_fields, otherwise=all_keys))
    if kind == "missing":
        return Fault(where, "required key is missing", fix=f"add {dotted(path)}:")
    if kind in ("literal_error", "enum"):
        choices = [choice.strip("'") for choice in str(context.get("expected", "")).replace(" or ", ", ").split(", ")]
        return Fault(where, f"invalid value {_show(value)}", fix=did_you_mean(str(value), choices))
    return Fault(where, f"invalid value {_show(value)}: {item['msg'][0].lower()}{item['msg'][1:]}")


def _block_of(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next(filter(None, map(_block_of, getattr(annotation, "__args__", ()))), None)


def _show(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _record_places(block: Block, document: Document) -> None:
    """Record in each block the positions of its keys, so that later errors can quote them."""
    addresses = document.addresses()
    waiting: list[tuple[Block, tuple]] = [(block, ())]
    while waiting:
        block, path = waiting.pop()
        block._places[""] = addresses.get(path) or document.address(path) if path else document.name
        for name in type(block).model_fields:
            key_path = (*path, name)
            if key_path in addresses:
                block._places[name] = addresses[key_path]
            value = getattr(block, name)
            if isinstance(value, list | dict):
                pairs = enumerate(value) if isinstance(value, list) else value.items()
                waiting += [(child, (*key_path, step)) for step, child in pairs if isinstance(child, Block)]
            elif isinstance(value, Block):
                waiting.append((value, key_path))
