"""What a value of a row has to be before anything is done with it: text, a list, objects."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ernie_align.data.row import RowFault

MAX_MESSAGES = 1000  # of a row: each answer is rendered behind all that was said before it
MAX_TEXT = 1 << 24  # characters of a row's text; about 30 s of tokenizing


def text(value: Any, name: str) -> str:
    """Raises RowFault for anything else."""
    if not isinstance(value, str):
        raise _no(name, value, "text")
    return value


def texts(value: Any, name: str) -> list[str]:
    """Several, or one."""
    return [text(one, name) for one in ([value] if isinstance(value, str) else a_list(value, name))]


def a_list(value: Any, name: str) -> list[Any]:
    """Raises RowFault for anything else."""
    if not isinstance(value, list):
        raise _no(name, value, "a list")
    return value


def an_object(value: Any, name: str) -> Mapping[str, Any]:
    """Raises RowFault for anything else."""
    if not isinstance(value, Mapping):
        raise _no(name, value, "an object")
    return value


def objects(value: Any, name: str) -> list[Mapping[str, Any]]:
    """A list of them."""
    return [an_object(one, name) for one in a_list(value, name)]


def _no(name: str, value: Any, wanted: str) -> RowFault:
    kind = {str: "text", list: "a list", dict: "an object", bool: "true or false", type(None): "null"}
    found = kind.get(type(value), "a number" if isinstance(value, int | float) else type(value).__name__)
    return RowFault(f"{name} is {found} where {wanted} is wanted", "mend or drop the row")
