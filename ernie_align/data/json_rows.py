"""Rows of JSON and JSONL files: the place of each row, and reading one of them. Only places are kept in memory."""

from __future__ import annotations

import json
from array import array
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from ernie_align.data.row import RowFault
from ernie_align.errors import DataError

MAX_ROW_BYTES = 256 << 20  # one row, its images as base64 included
MAX_LIST_BYTES = 1 << 30  # a .json list is read whole to find its rows
_CHUNK = 1 << 20
_SPACE = " \t\r\n"


class Place(NamedTuple):
    """Place of a row: number of its file, its line counted from 1, its first byte, and its size in bytes."""

    file: int
    line: int
    start: int
    size: int


def find_rows(files: list[str]) -> Iterator[Place]:
    """Yield the place of every row, in order. Raises DataError if a .json file is not a list of rows."""
    for number, file in enumerate(files):
        yield from _find_list_members(file, number) if file.endswith(".json") else _find_lines(file, number)


def as_columns(places: Iterable[Place]) -> dict[str, array[int]]:
    """Return the places as columns: 32 bytes per row."""
    lists = {name: array("q") for name in Place._fields}
    for place in places:
        for column, value in zip(lists.values(), place, strict=True):
            column.append(value)
    return lists


def read_row(file: str, place: Place, *, max_bytes: int = MAX_ROW_BYTES) -> dict[str, Any]:
    """Return one row. Raises RowFault if it is not a JSON object, or one that JSON readers would read differently."""
    if place.size > max_bytes:
        what = f"a row of {place.size:,} bytes is over the limit of {max_bytes:,}"
        raise RowFault(what, "end each row with a line break; keep images in separate files", kind="a huge row")
    try:
        with Path(file).open("rb") as rows:
            rows.seek(place.start)
            data = rows.read(place.size)
        text = data.decode("utf-8-sig" if place.start == 0 else "utf-8")
        row = json.loads(text, object_pairs_hook=_refuse_duplicates, parse_constant=_refuse_constant)
        if "\\u" in text:
            json.dumps(row, ensure_ascii=False).encode()
    except RowFault:
        raise
    except UnicodeDecodeError as error:
        what = f"not UTF-8: byte {data[error.start]:#04x} at character {error.start + 1}"
        raise RowFault(what, "save the file as UTF-8", kind="not UTF-8") from None
    except UnicodeEncodeError:
        raise RowFault("a lone surrogate: half of a character", "write both halves, or drop it") from None
    except RecursionError:
        raise RowFault("nested too deeply", "flatten or drop the row") from None
    except OSError as error:
        raise RowFault(f"cannot be read: {error.strerror}", "restore the file", kind="cannot be read") from None
    except ValueError as error:
        raise RowFault(f"not JSON: {error}", "fix or drop the line", kind="not JSON") from None
    if not isinstance(row, dict):
        raise RowFault("the row is not a JSON object", 'write each row as {"column": value, ...}')
    return row


def _refuse_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) < len(pairs):
        names = [name for name, _ in pairs]
        duplicate = next(name for name in names if names.count(name) > 1)
        raise RowFault(f"duplicate key {duplicate[:60]!r}", "keep one of the two", kind="a duplicate key")
    return result


def _refuse_constant(name: str) -> Any:
    raise RowFault(f"{name} is not valid JSON", "write a number, or null", kind="not JSON")


def _find_lines(file: str, number: int) -> Iterator[Place]:
    """Yield the places of lines that are not blank, holding at most one chunk of a long line in memory."""
    with Path(file).open("rb") as chunks:
        line, start, size, blank = 1, 0, 0, True
        while chunk := chunks.readline(_CHUNK):
            size += len(chunk)
            blank = blank and not chunk.strip()
            if chunk.endswith(b"\n"):
                if not blank:
                    yield Place(number, line, start, size)
                line, start, size, blank = line + 1, start + size, 0, True
        if not blank:
            yield Place(number, line, start, size)


def _find_list_members(file: str, number: int) -> Iterator[Place]:
    """Yield the places of a list's members, or of concatenated values. Holds the text of the file meanwhile."""
    path = Path(file)
    if path.stat().st_size > MAX_LIST_BYTES:
        what = f"a list of {path.stat().st_size:,} bytes is over the limit of {MAX_LIST_BYTES:,}"
        raise DataError.at(file, what, fix="write it as .jsonl, one row per line")
    try:
        text = path.read_bytes().decode()
    except UnicodeDecodeError as error:
        raise DataError.at(file, f"not UTF-8: byte {error.start}", fix="save the file as UTF-8") from None
    decode = json.JSONDecoder().raw_decode
    at = _skip_space(text, 1 if text.startswith("\ufeff") else 0)
    listed = text.startswith("[", at)
    at = _skip_space(text, at + listed)
    line, read_to, offset = 1, 0, 0  # line and byte offset of the character read_to
    while at < len(text) and not (listed and text[at] == "]"):
        try:
            _, end = decode(text, at)
        except RecursionError:
            raise _parse_error(file, text, at, "nested too deeply") from None
        except json.JSONDecodeError as error:
            raise _parse_error(file, text, error.pos, error.msg) from None
        except ValueError as error:
            raise _parse_error(file, text, at, str(error)) from None
        before = text[read_to:at]
        line, offset = line + before.count("\n"), offset + len(before.encode())
        yield Place(number, line, offset, len(text[at:end].encode()))
        line, offset, read_to = line + text.count("\n", at, end), offset + len(text[at:end].encode()), end
        at = _skip_space(text, end)
        if listed:
            if text.startswith("]", at):
                break
            if not text.startswith(",", at):
                raise _parse_error(file, text, at, "a comma or the end of the list is missing")
            at = _skip_space(text, at + 1)
            if text.startswith("]", at):
                raise _parse_error(file, text, at, "a comma without a row after it")
    if listed and not text.startswith("]", at):
        raise _parse_error(file, text, at, "the list is not closed")
    if listed and _skip_space(text, at + 1) < len(text):
        raise _parse_error(file, text, at + 1, "text after the list")


def _skip_space(text: str, at: int) -> int:
    while at < len(text) and text[at] in _SPACE:
        at += 1
    return at


def _parse_error(file: str, text: str, at: int, what: str) -> DataError:
    line, column = text.count("\n", 0, at) + 1, at - (text.rfind("\n", 0, at) + 1) + 1
    return DataError.at(f"{file}:{line}", f"not JSON: {what} (column {column})", fix="fix the file")
