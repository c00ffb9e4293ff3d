"""One source of rows: files or a hub data set, with its format and a name for each row."""

from __future__ import annotations

import glob
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ernie_align.data import json_rows
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
        place = json_rows.Place(*(raw[name] for name in json_rows.Place._fields))
        return json_rows.read_row(self.files[place.file], place)

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
        return (place._asdict() for place in islice(json_rows.find_rows(self.files), self.limit))


def _find_json_rows(files: list[str], limit: int | None, *, streaming: bool, sample: bool) -> Any:
    """Return a data set of places; for a sample a list, because importing `datasets` takes a second."""
    if streaming:
        return _JsonStream(files, limit)
    if sample:
        return list(_JsonStream(files, limit))
    import numpy as np
    from datasets import Dataset

    columns = json_rows.as_columns(islice(json_rows.find_rows(files), limit))
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
