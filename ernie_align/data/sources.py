"""One source of rows: files or a hub data set, read through `datasets`, with its format and a name for each row."""

from __future__ import annotations

import glob
import json
from array import array
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ernie_align.data.formats import canonical, detect
from ernie_align.data.row import Row, RowFault
from ernie_align.errors import DataError
from ernie_align.recipe import DataBlock, SourceBlock

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

_LOADERS = {".json": "json", ".jsonl": "json", ".parquet": "parquet", ".csv": "csv", ".tsv": "csv"}


class Source:
    """One source of the recipe: its rows, its format, and names for both.

    streaming: rows are read as they are asked for; sample: only so many rows, the first ones, are wanted.
    """

    def __init__(self, block: SourceBlock, data: DataBlock, *, streaming: bool = False, sample: int | None = None):
        self.block = block
        self.name = block.name
        self.streaming = streaming
        if sample is not None:
            self.rows: Any = _sample(block, min(sample, block.limit or sample))
        else:
            self.rows = _open(block, streaming)
        folder = Path(block.path).parent if block.path else None
        self.root = Path(data.media_root) if data.media_root else folder
        self.format = block.format or (data.format if data.format != "auto" else self._detect())

    def _detect(self) -> str:
        first = next(iter(self.rows), None)
        if first is None:
            raise DataError.at(self.block.where("path"), f"{self.name} is empty", fix="name a source with rows")
        try:
            return detect({key: value for key, value in first.items() if value is not None})
        except RowFault as fault:
            raise DataError.at(self.row_name(0), fault.what, fix=fault.fix) from None

    def row(self, values: dict[str, Any]) -> Row:
        """The canonical form of a row as it was read. Raises RowFault."""
        present = {key: value for key, value in values.items() if value is not None}
        return canonical(present, self.format, self.root)

    @cached_property
    def _lines(self) -> array[int]:
        """Line of each row of a JSONL file, counted from 1: blank lines are not rows."""
        with Path(self.block.path).open(encoding="utf-8", errors="replace") as lines:
            return array("q", (number for number, line in enumerate(lines, start=1) if line.strip()))

    def row_name(self, number: int) -> str:
        """Where a row stands: `file:line` for JSONL, `file row N` (counted from 0) elsewhere."""
        path = self.block.path
        if path and path.endswith(".jsonl") and not glob.has_magic(path):
            return f"{path}:{self._lines[number]}"
        return f"{self.name} row {number}"


def canonical_rows(source: Source) -> Iterator[Row]:
    """Every row of a source, in order. Raises DataError at the first that is not sound."""
    for number, values in enumerate(source.rows):
        try:
            yield source.row(values)
        except RowFault as fault:
            raise DataError.at(source.row_name(number), fault.what, fix=fault.fix) from None


def _open(block: SourceBlock, streaming: bool) -> Dataset | IterableDataset:
    from datasets import Image, load_dataset
    from datasets.features import List

    where = block.where("path" if block.path else "dataset")
    try:
        if block.path is not None:
            files = _files(block, where)
            options = {"delimiter": "\t"} if files[0].endswith(".tsv") else {}
            rows = load_dataset(
                _LOADERS[Path(files[0]).suffix], data_files=files, split="train", streaming=streaming, **options
            )
        else:
            rows = load_dataset(block.dataset, block.config, split=block.split, streaming=streaming)
    except DataError:
        raise
    except Exception as error:  # `datasets` raises many kinds for an unreadable file
        for file in _files(block, where) if block.path else ():
            _find_broken_json(file)
        reason = str(error.__cause__ or error).splitlines()[0]
        raise DataError.at(where, f"{block.name} cannot be read: {reason}") from error
    for name, feature in (rows.features or {}).items():  # images stay bytes until a batch needs them
        if isinstance(feature, Image):
            rows = rows.cast_column(name, Image(decode=False))
        elif isinstance(getattr(feature, "feature", None), Image):
            rows = rows.cast_column(name, List(Image(decode=False)))
    if block.limit is not None:
        rows = rows.take(block.limit) if streaming else rows.select(range(min(block.limit, len(rows))))
    return rows


def _sample(block: SourceBlock, limit: int) -> Any:
    """The first rows. Of a JSONL file they are read directly: `datasets` takes a second to import."""
    if block.path is None or glob.has_magic(block.path) or not block.path.endswith(".jsonl"):
        return _open(block.model_copy(update={"limit": limit}), streaming=False)
    (file,) = _files(block, block.where("path"))
    rows: list[dict[str, Any]] = []
    with Path(file).open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            if len(rows) == limit:
                break
            if line.strip():
                rows.append(_json_row(line, f"{file}:{number}"))
    return rows


def _json_row(line: str, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise DataError.at(where, f"not JSON: {error}", fix="mend or drop the line") from None
    if not isinstance(row, dict):
        raise DataError.at(where, "a row is a JSON object", fix="mend or drop the line")
    return row


def _files(block: SourceBlock, where: str) -> list[str]:
    files = sorted(glob.glob(block.path)) if glob.has_magic(block.path) else [block.path]
    missing = [file for file in files if not Path(file).is_file()]
    if missing or not files:
        raise DataError.at(where, f"no such file: {missing[0] if missing else block.path}", fix="check the path")
    kinds = {Path(file).suffix for file in files}
    if len(kinds) > 1 or not kinds <= _LOADERS.keys():
        what = f"{', '.join(sorted(kinds))} cannot be read as one source"
        raise DataError.at(where, what, fix=f"name files of one kind: {', '.join(_LOADERS)}")
    empty = [file for file in files if Path(file).stat().st_size == 0]
    if empty:
        raise DataError.at(where, f"{empty[0]} is empty", fix="name a source with rows")
    return files


def _find_broken_json(file: str) -> None:
    """Raise DataError at the line that is no JSON object, if there is one: `datasets` does not say which."""
    path = Path(file)
    if path.suffix == ".json":
        text = path.read_text(encoding="utf-8", errors="replace")
        try:
            json.loads(text)
            return
        except ValueError as error:
            if text.lstrip().startswith("["):
                at = f"{file}:{getattr(error, 'lineno', 1)}"
                raise DataError.at(at, f"not JSON: {error}", fix="mend the file") from None
    elif path.suffix != ".jsonl":
        return
    with path.open(encoding="utf-8", errors="replace") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                _json_row(line, f"{file}:{number}")
