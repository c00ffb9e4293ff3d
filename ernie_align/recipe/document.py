"""A YAML file as plain values, with the position of every key and value. A file that contains a secret is rejected."""

from __future__ import annotations

import errno
import io
import pathlib
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.composer import MaxDepthExceededError
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from ernie_align.errors import Fault, RecipeError, find_secrets

Path = tuple[str | int, ...]
COMMAND_LINE = "command line"
MAX_BYTES = 4 << 20  # of a recipe, or of a file that a recipe names
MAX_DEPTH = 50
MAX_VALUES = 20_000
_TOO_LARGE = f"more than {MAX_VALUES:,} values, or nested more than {MAX_DEPTH} levels deep, with its aliases expanded"

# The scalars of YAML 1.2's core schema. ruamel.yaml's own resolver also reads 1_0 and 0b1 as numbers and 2026-01-01 as
# a date: silent conversions of what the user wrote as text.
_SCALARS = (
    (re.compile(r"~|null|Null|NULL|"), lambda text: None),
    (re.compile(r"true|True|TRUE|false|False|FALSE"), lambda text: text.lower() == "true"),
    (re.compile(r"[-+]?[0-9]{1,4000}"), int),
    (re.compile(r"0o[0-7]+|0x[0-9a-fA-F]+"), lambda text: int(text, 0)),
    (re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?"), float),
    (re.compile(r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)"), lambda text: float(text.replace(".", ""))),
)
_TAG = re.compile(r"(&\S+\s+)?!")

_SECRET_WHY = "a recipe is copied into the run directory, and from there to wherever runs are shared"
_SECRET_FIX = "remove it and revoke it; name a judge's key by api_key_env, and set the hub's token as HF_TOKEN"


def read_text_file(path: pathlib.Path) -> str:
    """Read a file that a recipe names. Never waits for a pipe and never reads a device.

    Raises OSError, or ValueError for a file that is too large or not UTF-8.
    """
    if path.exists() and not path.is_file():
        raise OSError(errno.EINVAL, "not a regular file")
    return read_limited(path)


def read_limited(path: pathlib.Path) -> str:
    """Read at most MAX_BYTES of UTF-8 text. Raises OSError, or ValueError if there is more or other text."""
    with path.open("rb") as file:
        data = file.read(MAX_BYTES + 1)
    if len(data) > MAX_BYTES:
        raise ValueError(f"over {MAX_BYTES:,} bytes")
    return data.decode("utf-8-sig")


def scalar(text: str) -> Any:
    """Return the value that unquoted `text` has in YAML 1.2."""
    for pattern, convert in _SCALARS:
        if pattern.fullmatch(text):
            return convert(text)
    return text


@dataclass
class Document:
    """Plain values and, for each path, the position of its key and of its value (`file:line:column`)."""

    name: str
    values: Any = None
    text: str = ""
    keys: dict[Path, str] = field(default_factory=dict)
    places: dict[Path, str] = field(default_factory=dict)

    def place(self, path: Path, *, of_key: bool = False) -> str:
        """Return the position of the value (or key) at `path`, or of the nearest parent that is in the file."""
        for end in range(len(path), -1, -1):
            parent = path[:end]
            place = (self.keys if of_key else self.places).get(parent) or self.places.get(parent)
            if place:
                return place
        return self.name

    def address(self, path: Path, *, of_key: bool = False) -> str:
        """Return `file:line:column  dotted.key`, or `command line: dotted.key`, with which an error begins."""
        place = self.place(path, of_key=of_key)
        return f"{place}: {dotted(path)}" if place == COMMAND_LINE else f"{place}  {dotted(path)}".rstrip()

    def addresses(self) -> dict[Path, str]:
        """Return the address of every value in the document."""
        return {path: self.address(path) for path in self.places}


def parse_document(text: str, name: str) -> Document:
    """Parse YAML text. Rejects tags, merge keys and duplicate keys: a recipe is plain data.

    Raises RecipeError with every such fault.
    """
    yaml = YAML(typ="safe", pure=True)
    yaml.max_depth = MAX_DEPTH + 1  # of mappings and lists, and a value in the innermost
    try:
        root = yaml.compose(text)
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f"{name}:{mark.line + 1}:{mark.column + 1}" if mark else name
        if isinstance(error, MaxDepthExceededError):
            what = f"nested more than {MAX_DEPTH} levels deep"
            raise RecipeError.at(place, what, fix="a recipe is a few levels deep") from None
        what = f"invalid YAML: {error.problem or error.context}"
        raise RecipeError.at(place, what, fix="correct the YAML syntax") from None
    except (YAMLError, ValueError) as error:  # ValueError: an escape or a character that does not exist
        reason = str(error).splitlines()[0]
        raise RecipeError.at(name, f"invalid YAML: {reason}", fix="correct the YAML syntax") from None
    document = Document(name, text=text)
    faults: list[Fault] = []
    document.values = {} if root is None else _construct(root, (), document, faults)
    if faults:
        raise RecipeError(*faults)
    return document


def _construct(node: Node, path: Path, document: Document, faults: list[Fault]) -> Any:
    """Return the node's plain value and record its position. ruamel.yaml's constructors stop at the first fault."""
    place = f"{document.name}:{node.start_mark.line + 1}:{node.start_mark.column + 1}"
    if len(document.places) >= MAX_VALUES or len(path) > MAX_DEPTH:  # an alias may contain itself, or thousands
        if not faults or faults[-1].what != _TOO_LARGE:
            faults.append(Fault(place, _TOO_LARGE, fix="remove the aliases"))
        return None
    document.places[path] = place
    if _TAG.match(document.text, node.start_mark.index):
        what = f"the YAML tag {node.tag} is not allowed"
        faults.append(Fault(f"{place}  {dotted(path)}", what, fix="a recipe is plain data: remove the tag"))
        return None
    if isinstance(node, MappingNode):
        mapping: dict[str, Any] = {}
        for key_node, value_node in node.value:
            key_place = f"{document.name}:{key_node.start_mark.line + 1}:{key_node.start_mark.column + 1}"
            key = key_node.value if isinstance(key_node, ScalarNode) else None
            if key is None or not _is_valid_text(key):
                faults.append(Fault(key_place, "a key must be plain text"))
            elif key in mapping:
                where = f"{key_place}  {dotted((*path, key))}"
                faults.append(Fault(where, "duplicate key", fix="keep one of the two"))
            else:
                document.keys[(*path, key)] = key_place
                mapping[key] = _construct(value_node, (*path, key), document, faults)
        return mapping
    if isinstance(node, SequenceNode):
        return [_construct(child, (*path, index), document, faults) for index, child in enumerate(node.value)]
    if not _is_valid_text(node.value):
        what = "the text contains a NUL or an unpaired surrogate"
        faults.append(Fault(f"{place}  {dotted(path)}", what, fix="write plain text"))
        return None
    return scalar(node.value) if node.style is None else node.value


def _is_valid_text(value: str) -> bool:
    """Return True if paths and files can hold the text."""
    return "\0" not in value and not any("\ud800" <= letter <= "\udfff" for letter in value)


def dotted(path: Path) -> str:
    """Join a path: ("data", "train", 0, "path") -> "data.train[0].path"."""
    text = ""
    for step in path:
        text += f"[{step}]" if isinstance(step, int) else f".{step}" if text else step
    return text


def dump_yaml(values: Any) -> str:
    """Write plain values as YAML that readers of versions 1.1 and 1.2 read alike: `'no'` quoted, 1e-5 as 1.0e-05."""
    yaml = YAML(typ="safe", pure=True)
    yaml.version = (1, 1)
    yaml.default_flow_style = False
    yaml.sort_base_mapping_type_on_output = False
    yaml.width = 120
    stream = io.StringIO()
    yaml.dump(values, stream)
    return stream.getvalue().removeprefix("%YAML 1.1\n---\n")


def apply_overrides(document: Document, overrides: list[str]) -> None:
    """Apply `key=value` pairs to the document, in order; their place is `command line`. Raises RecipeError."""
    faults = []
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not key:
            faults.append(Fault(COMMAND_LINE, f"{override!r} is not an override", fix="write key=value"))
            continue
        try:
            value = parse_document(text, f"{COMMAND_LINE}: {key}")
        except RecipeError as error:
            faults.extend(error.faults)
            continue
        if text.strip() == "":
            value.values = None
        path = tuple(int(step) if step.isdigit() else step for step in re.sub(r"\[(\d+)\]", r".\1", key).split("."))
        fault = _set_value(document, path, value)
        if fault:
            faults.append(fault)
    if faults:
        raise RecipeError(*faults)


def _set_value(document: Document, path: Path, value: Document) -> Fault | None:
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
        return Fault(where, f"{dotted(path[:-1])} is a single value and has no keys")
    target[last] = value.values
    for known in (document.places, document.keys):
        for old in [old for old in known if old[: len(path)] == path]:
            del known[old]
    document.places.update({(*path, *below): COMMAND_LINE for below in value.places})
    document.keys.update({(*path, *below): COMMAND_LINE for below in ((), *value.keys)})
    return None


def reject_secrets(document: Document) -> None:
    """Raise RecipeError with the place of each secret in values and comments, without showing any of them."""
    leaves = [leaf for leaf in _leaves(document.values, (), "") if isinstance(leaf[2], str)]
    lines = enumerate(document.text.splitlines(), start=1)
    comments = [(f"{document.name}:{number}", line[line.index("#") :]) for number, line in lines if "#" in line]
    entries = [(document.address(path), key, value, "") for path, key, value in leaves]
    entries += [(where, "", comment, ", in a comment") for where, comment in comments]
    secrets = find_secrets([(key, text) for _, key, text, _ in entries])
    faults = [
        Fault(where, secret + note, why=_SECRET_WHY, fix=_SECRET_FIX)
        for (where, _, _, note), secret in zip(entries, secrets, strict=True)
        if secret is not None
    ]
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
