"""The keys of TRL's config classes, read from their source, so that a recipe is validated without importing torch."""

from __future__ import annotations

import ast
import functools
import importlib.util
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal, Union

from pydantic import BaseModel, ConfigDict, create_model

# A config class and its base classes, base first, as (package, file, class).
TRAINING_ARGUMENTS = ("transformers", "training_args.py", "TrainingArguments")
BASE_CONFIG = ("trl", "trainer/base_config.py", "_BaseConfig")
SFT_CONFIG = (TRAINING_ARGUMENTS, BASE_CONFIG, ("trl", "trainer/sft_config.py", "SFTConfig"))
DPO_CONFIG = (TRAINING_ARGUMENTS, BASE_CONFIG, ("trl", "trainer/dpo_config.py", "DPOConfig"))
KTO_CONFIG = (TRAINING_ARGUMENTS, BASE_CONFIG, ("trl", "trainer/kto_config.py", "KTOConfig"))
GRPO_CONFIG = (TRAINING_ARGUMENTS, BASE_CONFIG, ("trl", "trainer/grpo_config.py", "GRPOConfig"))

_PLAIN = {"int": int, "float": float, "bool": bool, "str": str, "dict": dict, "list": list}
_ENUM_FILES = (("transformers", "training_args.py"), ("transformers", "trainer_utils.py"))


@functools.cache
def training_model(
    lineage: tuple[tuple[str, str, str], ...], reserved: frozenset[str] = frozenset()
) -> type[BaseModel]:
    """Return a strict pydantic model with one optional field per key of a config class, except those in `reserved`.

    lineage: the classes whose fields make up the config, base first, each as (package, file, class name).
    """
    annotations: dict[str, ast.expr] = {}
    for package, file, name in lineage:
        annotations.update(_field_annotations(package, file, name))
    # every key may be left out; None reaches TRL only if the user wrote null
    fields: dict[str, Any] = {
        key: (_type(annotation, or_none=True), None) for key, annotation in annotations.items() if key not in reserved
    }
    return create_model(
        lineage[-1][2], __config__=ConfigDict(extra="forbid", strict=True, allow_inf_nan=False), **fields
    )


@functools.cache
def _module(package: str, file: str) -> ast.Module:
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise ImportError(f"{package} is not installed")
    return ast.parse((Path(spec.submodule_search_locations[0]) / file).read_text(encoding="utf-8"))


def _classes(package: str, file: str) -> Iterable[ast.ClassDef]:
    return (node for node in _module(package, file).body if isinstance(node, ast.ClassDef))


def _field_annotations(package: str, file: str, name: str) -> dict[str, ast.expr]:
    for node in _classes(package, file):
        if node.name == name:
            return {
                item.target.id: item.annotation
                for item in node.body
                if isinstance(item, ast.AnnAssign)
                and isinstance(item.target, ast.Name)
                and not item.target.id.startswith("_")
                and not ast.unparse(item.annotation).startswith("ClassVar")
            }
    raise ImportError(f"{package}/{file} has no class {name}: this version of {package} is not supported")


@functools.cache
def _enum_values(name: str) -> tuple[str, ...]:
    for package, file in _ENUM_FILES:
        for node in _classes(package, file):
            if node.name == name:
                values = (item.value for item in node.body if isinstance(item, ast.Assign))
                return tuple(v.value for v in values if isinstance(v, ast.Constant) and isinstance(v.value, str))
    return ()


def _members(annotation: ast.expr) -> list[ast.expr]:
    if isinstance(annotation, ast.BinOp) and isinstance(annotation.op, ast.BitOr):
        return [*_members(annotation.left), *_members(annotation.right)]
    return [annotation]


def _type(annotation: ast.expr, *, or_none: bool = False) -> Any:
    """Return the Python type of an annotation: the values of an enum, Any if it cannot be read (TRL validates it)."""
    members = _members(annotation)
    enums = [values for member in members if isinstance(member, ast.Name) and (values := _enum_values(member.id))]
    types: list[Any] = [type(None)] if or_none else []
    for member in members:
        if isinstance(member, ast.Constant) and member.value is None:
            types.append(type(None))
        elif isinstance(member, ast.Name) and member.id in _PLAIN:
            if not (enums and member.id == "str"):  # `SchedulerType | str` means the name of a scheduler
                types.append(_PLAIN[member.id])
        elif isinstance(member, ast.Name) and _enum_values(member.id):
            types.append(Literal[_enum_values(member.id)])
        elif isinstance(member, ast.Subscript) and isinstance(member.value, ast.Name):
            types.append(_subscript(member))
        else:
            return Any
    # flat and sorted: typing caches unions, and returns the first of two that differ in order only
    return Union[tuple(sorted(types, key=str))] if types else Any  # noqa: UP007 (built at runtime)


def _subscript(member: ast.Subscript) -> Any:
    inner = member.slice
    if member.value.id == "Literal":
        return Literal[tuple(ast.literal_eval(inner) if isinstance(inner, ast.Tuple) else [ast.literal_eval(inner)])]
    if member.value.id == "list":
        return list[_type(inner)]
    if member.value.id == "dict":
        return dict[str, Any]
    return Any
