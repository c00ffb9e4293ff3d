"""One source of rows: files or a hub data set, with its format and a name for each row."""

from __future__ import annotations

import glob
import json
from array import array
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ernie_align.data.formats import canonicalize, detect_format
from ernie_align.data.media import MediaAccess
from ernie_align.data.row import Row, RowFault
from ernie_align.errors import DataError
from ernie_align.recipe import DataBlock, SourceBlock

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset


_JSON = (".json", ".jsonl")
_LOADERS = {".parquet": "parquet", ".csv": "csv", ".tsv": "csv"}
_SUFFIXES = (*_JSON, *_LOADERS)
_DETECTION_ROWS = 20  # rows to look at for the format


class Source:
    """One source of the recipe: its rows, its format, and a name for each row.

    rows: raw rows (for JSON the places of the rows, which read() reads); streaming: read rows on demand;
    sample: read only this many rows, the first ones.
    """

    def __init__(self, block: SourceBlock, data: DataBlock, *, streaming: bool = False, sample: int | None = None):
        self.block = block
        self.name = block.name
        self.streaming = streaming
        if sample is not None:
            block = block.model_copy(update={"limit": min(sample, block.limit or sample)})
        where = block.where("path" if block.path else "dataset")
        self.files = _find_files(block, where) if block.path is not None else []
        self.is_json = bool(self.files) and self.files[0].endswith(_JSON)
        if self.is_json:
            self.rows: Any = _find_json_rows(self.files, block.limit, streaming=streaming, sample=sample is not None)
        else:
            self.rows = _load_table(block, self.files, where, streaming)
        folder = Path(block.path).parent if block.path else None
        if folder is not None and glob.has_magic(str(folder)):  # several folders: start at their common parent
            folder = Path(*list(folder.parts)[: next(n for n, part in enumerate(folder.parts) if glob.has_magic(part))])
        root = Path(data.media_root) if data.media_root is not None else folder
        hosts = tuple(data.allow_urls) if isinstance(data.allow_urls, list) else data.allow_urls
        self.media_access = MediaAccess(root, tuple(map(Path, data.media_folders)), hosts)
        self.format = block.format or (data.format if data.format != "auto" else self._detect_format())

    def _detect_format(self) -> str:
        """Return the format of the first readable row; broken rows are reported when all rows are validated."""
        fault = None
        for number, raw in enumerate(islice(iter(self.rows), _DETECTION_ROWS)):
            try:
                return detect_format({key: value for key, value in self.read(raw).items() if value is not None})
            except RowFault as error:
                fault = fault or (number, raw, error)
        if fault is None:
            raise DataError.at(self.block.where("path"), f"{self.name} is empty", fix="name a source with rows")
        number, raw, error = fault
        raise DataError.at(self.row_name(number, raw), error.what, fix=error.fix) from None

    def read(self, raw: dict[str, Any]) -> dict[str, Any]:
        """Return the values of a raw row. Raises RowFault if it is broken."""
        if not self.is_json:
            return raw
        place = Place(*(raw[name] for name in Place._fields))
        return read_row(self.files[place.file], place)

    def row(self, values: dict[str, Any]) -> Row:
        """Return the canonical row of the values. Raises RowFault."""
        present = {key: value for key, value in values.items() if value is not None}
        return canonicalize(present, self.format, self.media_access)

    def row_name(self, number: int, raw: dict[str, Any] | None = None) -> str:
        """Return `file:line` of a JSON row, otherwise `file row N` (from 0). raw: the raw row, to avoid a look-up."""
        if not self.is_json:
            return f"{self.name} row {number}"
        if raw is None:
            rows = self.rows
            raw = rows[number] if hasattr(rows, "__getitem__") else next(islice(iter(rows), number, None))
        return f"{self.files[raw['file']]}:{raw['line']}"


def iter_rows(source: Source) -> Iterator[Row]:
    """Yield every row of a source, in order. Raises DataError at the first faulty one."""
    for number, raw in enumerate(source.rows):
        try:
            yield source.row(source.read(raw))
        except RowFault as fault:
            raise DataError.at(source.row_name(number, raw), fault.what, fix=fault.fix) from None


class _JsonStream:
    """Places of JSON rows, found again by each iteration: none is kept."""

    def __init__(self, files: list[str], limit: int | None):
        self.files, self.limit = files, limit

    def __iter__(self) -> Iterator[dict[str, int]]:
        return (place._asdict() for place in islice(find_rows(self.files), self.limit))


def _find_json_rows(files: list[str], limit: int | None, *, streaming: bool, sample: bool) -> Any:
    """Return a data set of places; for a sample a list, because importing `datasets` takes a second."""
    if streaming:
        return _JsonStream(files, limit)
    if sample:
        return list(_JsonStream(files, limit))
    import numpy as np
    from datasets import Dataset

    columns = as_columns(islice(find_rows(files), limit))
    return Dataset.from_dict({name: np.frombuffer(column, dtype="int64") for name, column in columns.items()})


def _load_table(block: SourceBlock, files: list[str], where: str, streaming: bool) -> Dataset | IterableDataset:
    from datasets import Image, load_dataset
    from datasets.features import List

    try:
        if files:
            options = {"delimiter": "\t"} if files[0].endswith(".tsv") else {}
            rows = load_dataset(
                _LOADERS[Path(files[0]).suffix], data_files=files, split="train", streaming=streaming, **options
            )
        else:
            rows = load_dataset(block.dataset, block.config, split=block.split, streaming=streaming)
    except Exception as error:  # `datasets` raises many kinds for an unreadable file
        reason = (str(error.__cause__ or error).splitlines() or [type(error).__name__])[0]
        raise DataError.at(where, f"{block.name} cannot be read: {reason}") from error
    for name, feature in (rows.features or {}).items():  # keep images as bytes until a batch needs them
        if isinstance(feature, Image):
            rows = rows.cast_column(name, Image(decode=False))
        elif isinstance(getattr(feature, "feature", None), Image):
            rows = rows.cast_column(name, List(Image(decode=False)))
    if block.limit is not None:
        rows = rows.take(block.limit) if streaming else rows.select(range(min(block.limit, len(rows))))
    return rows


def _find_files(block: SourceBlock, where: str) -> list[str]:
    files = sorted(glob.glob(block.path)) if glob.has_magic(block.path) else [block.path]
    missing = [file for file in files if not Path(file).is_file()]
    if missing or not files:
        raise DataError.at(where, f"no such file: {missing[0] if missing else block.path}", fix="check the path")
    kinds = {Path(file).suffix for file in files}
    if (len(kinds) > 1 and not kinds <= {*_JSON}) or not kinds <= {*_SUFFIXES}:
        what = f"{', '.join(sorted(kinds))} cannot be read as one source"
        raise DataError.at(where, what, fix=f"name files of one kind: {', '.join(_SUFFIXES)}")
    empty = [file for file in files if Path(file).stat().st_size == 0]
    if empty:
        raise DataError.at(where, f"{empty[0]} is empty", fix="name a source with rows")
    return files


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
