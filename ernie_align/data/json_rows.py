"""Rows of JSON and JSONL files: where each one stands, and one of them read. Nothing is held but places."""

from __future__ import annotations

import json
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from ernie_align.data.row import RowFault
from ernie_align.errors import DataError

MAX_ROW_BYTES = 256 << 20  # one row; its images as base64 included
MAX_LIST_BYTES = 1 << 30  # a .json list is read whole to find its rows
_PIECE = 1 << 20
_SPACE = " \t\r\n"


class Place(NamedTuple):
    """A row: number of its file, its line counted from 1, its first byte, and its bytes."""

    file: int
    line: int
    start: int
    size: int


def places(files: list[str]) -> Iterator[Place]:
    """Every row of the files, in order. Raises DataError where a .json file is no list of rows."""
    for number, file in enumerate(files):
        yield from _of_list(file, number) if file.endswith(".json") else _of_lines(file, number)


def columns(found: Iterator[Place]) -> dict[str, array[int]]:
    """The places as columns: 32 bytes a row."""
    lists = {name: array("q") for name in Place._fields}
    for place in found:
        for column, value in zip(lists.values(), place, strict=True):
            column.append(value)
    return lists


def read(file: str, place: Place) -> dict[str, Any]:
    """One row. Raises RowFault where it is no JSON object, or one that readers of JSON would not agree about."""
    if place.size > MAX_ROW_BYTES:
        what = f"a row of {place.size:,} bytes is over {MAX_ROW_BYTES:,}"
        raise RowFault(what, "end each row with a line break; keep images in files of their own", kind="a huge row")
    try:
        with Path(file).open("rb") as rows:
            rows.seek(place.start)
            data = rows.read(place.size)
        text = data.decode("utf-8-sig" if place.start == 0 else "utf-8")
        row = json.loads(text, object_pairs_hook=_distinct, parse_constant=_refuse)
        if "\\u" in text:
            json.dumps(row, ensure_ascii=False).encode()
    except RowFault:
        raise
    except UnicodeDecodeError as error:
        what = f"not UTF-8: byte {data[error.start]:#04x} at character {error.start + 1}"
        raise RowFault(what, "save the file as UTF-8", kind="not UTF-8") from None
    except UnicodeEncodeError:
        fix = "write the other half, or drop it"
        raise RowFault("half a character: a surrogate without its pair", fix, kind="a lone surrogate") from None
    except RecursionError:
        raise RowFault("nested too deep to be read", "flatten or drop the row", kind="nested too deep") from None
    except OSError as error:
        raise RowFault(f"cannot be read: {error.strerror}", "restore the file", kind="cannot be read") from None
    except ValueError as error:
        raise RowFault(f"not JSON: {error}", "mend or drop the line", kind="not JSON") from None
    if not isinstance(row, dict):
        raise RowFault("a row is a JSON object", "mend or drop the line", kind="not an object")
    return row


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise RowFault(f"key {twice[:60]!r} stands twice", "keep one of the two", kind="a key twice")
    return made


def _refuse(name: str) -> Any:
    raise RowFault(f"{name} is no JSON", "write a number, or null", kind="not JSON")


def _of_lines(file: str, number: int) -> Iterator[Place]:
    """Lines that are not blank. Of a long line only a piece is held at a time."""
    with Path(file).open("rb") as pieces:
        line, start, size, blank = 1, 0, 0, True
        while piece := pieces.readline(_PIECE):
            size += len(piece)
            blank = blank and not piece.strip()
            if piece.endswith(b"\n"):
                if not blank:
                    yield Place(number, line, start, size)
                line, start, size, blank = line + 1, start + size, 0, True
        if not blank:
            yield Place(number, line, start, size)


def _of_list(file: str, number: int) -> Iterator[Place]:
    """Members of a list, or values that stand behind one another. The text is held while its rows are found."""
    path = Path(file)
    if path.stat().st_size > MAX_LIST_BYTES:
        what = f"a list of {path.stat().st_size:,} bytes is over {MAX_LIST_BYTES:,}"
        raise DataError.at(file, what, fix="write it as .jsonl, one row a line")
    try:
        text = path.read_bytes().decode()
    except UnicodeDecodeError as error:
        raise DataError.at(file, f"not UTF-8: byte {error.start}", fix="save the file as UTF-8") from None
    decode = json.JSONDecoder().raw_decode
    at = _behind_space(text, 1 if text.startswith("\ufeff") else 0)
    listed = text.startswith("[", at)
    at = _behind_space(text, at + listed)
    line, read_to, offset = 1, 0, 0  # lines and bytes before read_to, a character
    while at < len(text) and not (listed and text[at] == "]"):
        try:
            _, end = decode(text, at)
        except RecursionError:
            raise _broken(file, text, at, "nested too deep to be read") from None
        except json.JSONDecodeError as error:
            raise _broken(file, text, error.pos, error.msg) from None
        except ValueError as error:
            raise _broken(file, text, at, str(error)) from None
        before = text[read_to:at]
        line, offset = line + before.count("\n"), offset + len(before.encode())
        yield Place(number, line, offset, len(text[at:end].encode()))
        line, offset, read_to = line + text.count("\n", at, end), offset + len(text[at:end].encode()), end
        at = _behind_space(text, end)
        if listed:
            if text.startswith("]", at):
                break
            if not text.startswith(",", at):
                raise _broken(file, text, at, "a comma or the list's end is missing")
            at = _behind_space(text, at + 1)
            if text.startswith("]", at):
                raise _broken(file, text, at, "a comma without a row behind it")
    if listed and not text.startswith("]", at):
        raise _broken(file, text, at, "the list has no end")
    if listed and _behind_space(text, at + 1) < len(text):
        raise _broken(file, text, at + 1, "text behind the list")


def _behind_space(text: str, at: int) -> int:
    while at < len(text) and text[at] in _SPACE:
        at += 1
    return at


def _broken(file: str, text: str, at: int, what: str) -> DataError:
    line, column = text.count("\n", 0, at) + 1, at - (text.rfind("\n", 0, at) + 1) + 1
    return DataError.at(f"{file}:{line}", f"not JSON: {what} (column {column})", fix="mend the file")
