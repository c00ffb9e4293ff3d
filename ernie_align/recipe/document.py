"""A YAML file as plain values, with the place of every key and value in it."""

from __future__ import annotations

import errno
import pathlib
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import yaml

from ernie_align.errors import Fault, RecipeError, find_secret, is_secret_key

Path = tuple[str | int, ...]
COMMAND_LINE = "command line"
MAX_BYTES = 4 << 20  # of a recipe, or of a file that one names
MAX_DEPTH = 50
MAX_VALUES = 20_000
_TOO_MUCH = f"over {MAX_VALUES:,} values, or nested over {MAX_DEPTH} deep, once its aliases are written out"

# The scalars of YAML 1.2's core schema. PyYAML speaks 1.1, where 1e-4 is text, `no` is false and 010 is eight:
# three ways to train something else than what was written.
_SCALARS = (
    (re.compile(r"~|null|Null|NULL|"), lambda text: None),
    (re.compile(r"true|True|TRUE|false|False|FALSE"), lambda text: text.lower() == "true"),
    (re.compile(r"[-+]?[0-9]{1,4000}"), int),
    (re.compile(r"0o[0-7]+|0x[0-9a-fA-F]+"), lambda text: int(text, 0)),
    (re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?"), float),
    (re.compile(r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)"), lambda text: float(text.replace(".", ""))),
)


def read_text_file(path: pathlib.Path) -> str:
    """Of a file that a recipe names. Raises OSError or ValueError; never waits for a pipe, never reads a device."""
    if path.exists() and not path.is_file():
        raise OSError(errno.EINVAL, "no file")
    with path.open("rb") as file:
        data = file.read(MAX_BYTES + 1)
    if len(data) > MAX_BYTES:
        raise ValueError(f"over {MAX_BYTES:,} bytes")
    return data.decode("utf-8-sig")


def scalar(text: str) -> Any:
    """The value that unquoted `text` has in YAML 1.2."""
    for pattern, convert in _SCALARS:
        if pattern.fullmatch(text):
            return convert(text)
    return text


@dataclass
class Document:
    """Plain values and, for each path, where its key and its value stand (`file:line:column`)."""

    name: str
    values: Any = None
    text: str = ""
    keys: dict[Path, str] = field(default_factory=dict)
    places: dict[Path, str] = field(default_factory=dict)

    def place(self, path: Path, *, of_key: bool = False) -> str:
        """Of the value (or the key) at `path`, or of the nearest thing around it that the file holds."""
        for end in range(len(path), -1, -1):
            here = path[:end]
            found = (self.keys if of_key else self.places).get(here) or self.places.get(here)
            if found:
                return found
        return self.name

    def address(self, path: Path, *, of_key: bool = False) -> str:
        """`file:line:column  dotted.key`, or `command line: dotted.key`: what an error begins with."""
        place = self.place(path, of_key=of_key)
        return f"{place}: {dotted(path)}" if place == COMMAND_LINE else f"{place}  {dotted(path)}".rstrip()


def parse_document(text: str, name: str) -> Document:
    """YAML text -> Document. Tags, merges and repeated keys are refused: a recipe is plain data.

    Raises RecipeError with every such fault.
    """
    document = Document(name, text=text)
    try:
        _judge_depth(text, name)
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"{name}:{mark.line + 1}:{mark.column + 1}" if mark else name
        raise RecipeError.at(where, f"not YAML: {error.problem or error.context}", fix="mend the YAML") from None
    except (yaml.YAMLError, ValueError) as error:  # ValueError: of a date or a character that is none
        reason = str(error).splitlines()[0]
        raise RecipeError.at(name, f"not YAML: {reason}", fix="mend the YAML") from None
    faults: list[Fault] = []
    document.values = {} if root is None else _walk(root, (), document, faults)
    if faults:
        raise RecipeError(*faults)
    return document


def _judge_depth(text: str, name: str) -> None:
    """Before anything is built of the text, which takes a call for each level. Raises RecipeError."""
    depth = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > MAX_DEPTH:
            where = f"{name}:{event.start_mark.line + 1}:{event.start_mark.column + 1}"
            raise RecipeError.at(where, f"nested over {MAX_DEPTH} deep", fix="a recipe is a few levels deep")


def _walk(node: yaml.Node, path: Path, document: Document, faults: list[Fault]) -> Any:
    place = f"{document.name}:{node.start_mark.line + 1}:{node.start_mark.column + 1}"
    if len(document.places) >= MAX_VALUES or len(path) > MAX_DEPTH:  # an alias may stand for itself, or for thousands
        if not faults or faults[-1].what != _TOO_MUCH:
            faults.append(Fault(place, _TOO_MUCH, fix="drop the aliases"))
        return None
    document.places[path] = place
    if isinstance(node, yaml.MappingNode):
        mapping: dict[str, Any] = {}
        for key_node, value_node in node.value:
            at = f"{document.name}:{key_node.start_mark.line + 1}:{key_node.start_mark.column + 1}"
            key = key_node.value if isinstance(key_node, yaml.ScalarNode) else None
            if key is None or not _is_text(key):
                faults.append(Fault(at, "a key must be plain text"))
                continue
            if key in mapping:
                faults.append(
                    Fault(f"{at}  {dotted((*path, key))}", "this key stands twice", fix="keep one of the two")
                )
                continue
            document.keys[(*path, key)] = at
            mapping[key] = _walk(value_node, (*path, key), document, faults)
        return mapping
    if isinstance(node, yaml.SequenceNode):
        return [_walk(child, (*path, index), document, faults) for index, child in enumerate(node.value)]
    written_tag = document.text[node.start_mark.index :].startswith("!")
    if written_tag:
        faults.append(Fault(f"{place}  {dotted(path)}", f"tag {node.tag}", fix="a recipe is plain data: drop the tag"))
        return None
    if not _is_text(node.value):
        faults.append(Fault(f"{place}  {dotted(path)}", "a NUL or half a character", fix="write text"))
        return None
    return scalar(node.value) if node.style is None else node.value


def _is_text(value: str) -> bool:
    """Something that a path and a file can hold."""
    return "\0" not in value and not any("\ud800" <= letter <= "\udfff" for letter in value)


def dotted(path: Path) -> str:
    """("data", "train", 0, "path") -> "data.train[0].path"."""
    text = ""
    for step in path:
        text += f"[{step}]" if isinstance(step, int) else f".{step}" if text else step
    return text


def apply_overrides(document: Document, overrides: list[str]) -> None:
    """`key=value` pairs onto the document, in order; each is reported as `command line`. Raises RecipeError."""
    faults = []
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not key:
            faults.append(Fault(COMMAND_LINE, f"{override!r} is no override", fix="write key=value"))
            continue
        try:
            value = parse_document(text, f"{COMMAND_LINE}: {key}")
        except RecipeError as error:
            faults.extend(error.faults)
            continue
        if text.strip() == "":
            value.values = None
        path = tuple(int(step) if step.isdigit() else step for step in re.sub(r"\[(\d+)\]", r".\1", key).split("."))
        fault = _put(document, path, value)
        if fault:
            faults.append(fault)
    if faults:
        raise RecipeError(*faults)


def _put(document: Document, path: Path, value: Document) -> Fault | None:
    where = f"{COMMAND_LINE}: {dotted(path)}"
    target = document.values
    for depth, step in enumerate(path[:-1]):
        if isinstance(target, list) and isinstance(step, int) and step < len(target):
            target = target[step]
        elif isinstance(target, dict):
            if target.get(step) is None:
                target[step] = {}
                document.keys[path[: depth + 1]] = document.places[path[: depth + 1]] = COMMAND_LINE
            target = target[step]
        else:
            return Fault(where, f"{dotted(path[: depth + 1])} is not in the recipe")
    last = path[-1]
    if isinstance(target, list) and not (isinstance(last, int) and last < len(target)):
        return Fault(where, f"{dotted(path[:-1])} has {len(target)} entries, counted from 0")
    if not isinstance(target, (dict, list)):
        return Fault(where, f"{dotted(path[:-1])} holds no keys")
    target[last] = value.values
    for known in (document.places, document.keys):
        for old in [old for old in known if old[: len(path)] == path]:
            del known[old]
    document.places.update({(*path, *below): COMMAND_LINE for below in value.places})
    document.keys.update({(*path, *below): COMMAND_LINE for below in ((), *value.keys)})
    return None


_WHY = "a recipe is copied into the run directory, and from there to wherever runs are shared"
_FIX = "drop it, and withdraw it where it is valid; a judge's key is named by api_key_env, the hub's is HF_TOKEN"


def refuse_secrets(document: Document) -> None:
    """Raises RecipeError with the place of each secret in values and comments, and shows none of them."""
    faults = []
    for path, key, value in _leaves(document.values, (), ""):
        if not isinstance(value, str) or not value:
            continue
        what = find_secret(value) or ("a secret, by the name of its key" if is_secret_key(key) else None)
        if what is not None:
            faults.append(Fault(document.address(path), what, why=_WHY, fix=_FIX))
    for number, line in enumerate(document.text.splitlines(), start=1):
        if "#" in line and (what := find_secret(line[line.index("#") :])):
            faults.append(Fault(f"{document.name}:{number}", f"{what}, in a comment", why=_WHY, fix=_FIX))
    if faults:
        raise RecipeError(*faults)


def _leaves(value: Any, path: Path, key: str) -> Iterator[tuple[Path, str, Any]]:
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from _leaves(inner, (*path, name), str(name))
    elif isinstance(value, list):
        for number, inner in enumerate(value):
            yield from _leaves(inner, (*path, number), key)
    else:
        yield path, key, value
