"""YAML and overrides -> a frozen recipe, or every fault in them at once, each with its place."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from ernie_align.errors import Fault, RecipeError
from ernie_align.recipe.document import MAX_BYTES, Document, apply_overrides, dotted, parse_document, refuse_secrets
from ernie_align.recipe.schema import Block, Recipe

B = TypeVar("B", bound=Block)

_WANTED = {
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
    """Read and judge a recipe.

    source: path of a YAML file, or the same as a mapping; stages: stage name -> its recipe class; overrides:
    `key=value` texts, judged like the file; stage: the stage that the caller expects (the CLI verb).
    Raises RecipeError with every fault that was found.
    """
    document = _document(source, "recipe")
    if not isinstance(document.values, dict):
        raise RecipeError.at(document.place(()), "a recipe is a mapping of keys", fix="begin with stage:")
    overrides = list(overrides)
    apply_overrides(document, overrides)
    refuse_secrets(document)
    cls = _recipe_class(document, stages, stage)
    recipe, faults = _judge(document, cls)
    if faults:
        raise RecipeError(*faults)
    _address(recipe, document, ())
    recipe._given = document.text + "".join(f"# command line: {override}\n" for override in overrides)
    return recipe


def load_block(source: str | Path | Mapping[str, Any], cls: type[B], *, name: str) -> B:
    """Read and judge a file of another kind than a recipe, as a recipe is judged.

    name: what the kind is called where the source is a mapping. Raises RecipeError with every fault that was found.
    """
    document = _document(source, name)
    if not isinstance(document.values, dict):
        raise RecipeError.at(document.place(()), f"a {name} is a mapping of keys")
    refuse_secrets(document)
    try:
        block = cls.model_validate(document.values)
    except ValidationError as error:
        raise RecipeError(*sorted(_faults(error, document, cls, ()), key=_in_file_order)) from None
    _address(block, document, ())
    return block


def to_yaml(recipe: Block) -> str:
    """The resolved recipe: every key, defaults filled in."""
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, width=120, allow_unicode=True)


def differences(old: str, new: str) -> list[tuple[str, Any, Any]]:
    """Of two resolved recipes: (dotted key, its value in old, its value in new), None where it is missing."""
    before, after = _flat(yaml.safe_load(old)), _flat(yaml.safe_load(new))
    keys = dict.fromkeys([*before, *after])
    return [(key, before.get(key), after.get(key)) for key in keys if before.get(key) != after.get(key)]


def _flat(values: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(values, dict) and values:
        pairs = values.items()
        return {key: leaf for name, value in pairs for key, leaf in _flat(value, f"{prefix}{name}.").items()}
    return {prefix.rstrip("."): values}


def _document(source: str | Path | Mapping[str, Any], name: str) -> Document:
    if not isinstance(source, Mapping):
        return _read(Path(source))
    document = parse_document(json.dumps(source), name)  # JSON is YAML; places mean nothing here
    document.places = dict.fromkeys(document.places, name)
    document.keys = dict.fromkeys(document.keys, name)
    document.text = yaml.safe_dump(dict(source), sort_keys=False)
    return document


def _read(path: Path) -> Document:
    try:
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
        if len(data) > MAX_BYTES:
            raise RecipeError.at(str(path), f"over {MAX_BYTES:,} bytes", fix="name a YAML file")
        text = data.decode("utf-8-sig")
    except FileNotFoundError:
        raise RecipeError.at(str(path), "no such recipe", fix="name a YAML file; recipes/ holds examples") from None
    except (OSError, ValueError) as error:  # ValueError: no UTF-8, or a path with a NUL
        raise RecipeError.at(str(path), f"cannot be read: {error}") from None
    return parse_document(text, str(path))


def _recipe_class(document: Document, stages: Mapping[str, type[Recipe]], expected: str | None) -> type[Recipe]:
    named = document.values.get("stage")
    where = document.address(("stage",))
    if named is None:
        raise RecipeError.at(where, "no stage is named", fix=f"write stage: {expected or ' or '.join(stages)}")
    if not isinstance(named, str) or named not in stages:
        raise RecipeError.at(where, f"{_show(named)} is no stage", fix=_did_you_mean(str(named), stages))
    if expected is not None and named != expected:
        raise RecipeError.at(where, f"this is a {named} recipe", fix=f"run ernie-align {named}, not {expected}")
    return stages[named]


def _judge(document: Document, cls: type[Recipe]) -> tuple[Recipe | None, list[Fault]]:
    faults: list[Fault] = []
    training = document.values.get("training")
    if isinstance(training, dict):
        owned = cls.reserved_training_keys()
        for key in [key for key in training if key in owned]:
            where = document.address(("training", key), of_key=True)
            faults.append(Fault(where, "not set under training", fix=owned[key]))
        allowed = {key: value for key, value in training.items() if key not in owned}
        try:
            cls.training_model().model_validate(allowed)
        except ValidationError as error:
            faults += _faults(error, document, cls.training_model(), ("training",))
    try:
        recipe = cls.model_validate(document.values)
    except ValidationError as error:
        return None, sorted(_faults(error, document, cls, ()) + faults, key=_in_file_order)
    return recipe, sorted(faults, key=_in_file_order)


def _in_file_order(fault: Fault) -> tuple:
    return tuple(int(part) if part.isdigit() else 0 for part in fault.where.split("  ")[0].split(":")[-2:])


def _faults(error: ValidationError, document: Document, cls: type[BaseModel], prefix: tuple) -> list[Fault]:
    faults: dict[tuple, Fault] = {}
    wanted: dict[tuple, list[str]] = {}
    for item in error.errors(include_url=False):
        path = _path(item, document, prefix)
        if item["type"] in _WANTED:  # one error per member of a union: they become one fault
            wanted.setdefault(path, []).append(_WANTED[item["type"]])
            what = f"{_show(item['input'])} where {' or '.join(dict.fromkeys(wanted[path]))} is wanted"
            faults[path] = Fault(document.address(path), what)
        elif path not in wanted:
            faults[(*path, len(faults))] = _fault(item, path, document, _holder(path[len(prefix) :], cls))
    return list(faults.values())


def _path(item: dict[str, Any], document: Document, prefix: tuple) -> tuple:
    """Where the error is in the document: pydantic's location without the tags of unions."""
    path, value = [], document.values
    loc = (*prefix, *item["loc"])
    for number, step in enumerate(loc):
        if (isinstance(value, dict) and step in value) or (isinstance(value, list) and isinstance(step, int)):
            path.append(step)
            value = value[step]
        elif item["type"] == "missing" and number == len(loc) - 1:
            path.append(step)
    return tuple(path)


def _holder(path: tuple, cls: type[BaseModel]) -> type[BaseModel]:
    """The block whose key is the last step of `path`."""
    for step in path[:-1]:
        known = cls.model_fields.get(step) if isinstance(step, str) else None
        cls = (_block_of(known.annotation) if known is not None else None) or cls
    return cls


def _fault(item: dict[str, Any], path: tuple, document: Document, holder: type[BaseModel]) -> Fault:
    kind, context = item["type"], item.get("ctx", {})
    key, value = path[-1] if path else "", item.get("input")
    if kind == "align":
        path = (*path, context["at"]) if context["at"] else path
        return Fault(document.address(path), context["what"], context["why"], context["fix"])
    where = document.address(path, of_key=kind in ("extra_forbidden", "missing"))
    if kind == "extra_forbidden":
        home = getattr(holder, "keys_of_other_stages", {}).get(key)
        if home:
            return Fault(where, "not a key of this stage", fix=home)
        return Fault(where, "unknown key", fix=_did_you_mean(str(key), holder.model_fields))
    if kind == "missing":
        return Fault(where, "missing", fix=f"add {dotted(path)}:")
    if kind in ("literal_error", "enum"):
        choices = str(context.get("expected", "")).replace(" or ", ", ").split(", ")
        return Fault(
            where,
            f"{_show(value)} is none of its values",
            fix=_did_you_mean(str(value), [c.strip("'") for c in choices]),
        )
    return Fault(where, f"{_show(value)}: {item['msg'][0].lower()}{item['msg'][1:]}")


def _block_of(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    for inner in getattr(annotation, "__args__", ()):
        found = _block_of(inner)
        if found:
            return found
    return None


def _did_you_mean(word: str, choices: Iterable[str]) -> str:
    choices = [choice for choice in choices if choice]
    close = difflib.get_close_matches(word, choices, n=1, cutoff=0.6)
    if close:
        return f"did you mean {close[0]}?"
    return f"choose from {', '.join(choices)}" if len(choices) <= 16 else "see ernie-align schema for the keys"


def _show(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _address(block: Block, document: Document, path: tuple) -> None:
    """Tell each block where its keys stand, so that a later error about one can say so."""
    block._places[""] = document.address(path) if path else document.name
    for name in type(block).model_fields:
        here = (*path, name)
        if here in document.places:
            block._places[name] = document.address(here)
        value = getattr(block, name)
        children = value if isinstance(value, list) else value.values() if isinstance(value, dict) else [value]
        steps = range(len(value)) if isinstance(value, list) else value if isinstance(value, dict) else [None]
        for step, child in zip(steps, children, strict=True):
            if isinstance(child, Block):
                _address(child, document, here if step is None else (*here, step))
