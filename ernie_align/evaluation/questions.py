"""The rows of an evaluation's data sets as questions: each with its place, kind and known answer."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from string import ascii_uppercase
from typing import Any

from ernie_align.data.row import Row, RowFault
from ernie_align.data.sources import Source
from ernie_align.errors import DataError
from ernie_align.recipe import DataBlock, SourceBlock
from ernie_align.recipe.evaluation import ColumnsBlock, DataSetBlock


@dataclass(frozen=True)
class Question:
    """One row of a data set.

    place: its file and line; row: includes the answer if the row ends in one; columns: the values that metrics may
    read, with `answer` if one is known.
    """

    data: str
    place: str
    kind: str
    row: Row
    columns: Mapping[str, Any]

    @cached_property
    def prompt(self) -> Row:
        """The row without its last answer."""
        row = self.row
        if row.plain is not None:
            return replace(row, plain=(row.plain[0], ""))
        ends_in_answer = row.messages and row.messages[-1]["role"] == "assistant"
        return replace(row, messages=row.messages[:-1]) if ends_in_answer else row

    @cached_property
    def with_answer(self) -> Row | None:
        """The row ending in its answer, which comes from the answer column if the row has none of its own.

        Only that last answer is labeled. None for a preference pair or a row without a known answer.
        """
        row, answer = self.row, self.columns.get("answer")
        if row.responses or answer is None:
            return None
        text = str(answer[0] if isinstance(answer, list) else answer)
        if row.plain is not None:
            return row if row.plain[1] else replace(row, plain=(row.plain[0], text))
        *before, last = row.messages
        if last["role"] != "assistant":
            before, last = row.messages, {"role": "assistant", "content": text}
        unlabeled = [turn | {"label": 0} if turn["role"] == "assistant" else turn for turn in before]
        return replace(row, messages=[*unlabeled, {**last, "label": 1}])


def load_questions(block: DataSetBlock) -> Iterator[Question]:
    """Yield every row of a data set, in order. Raises DataError at the first invalid row."""
    source_block = SourceBlock(path=block.path, limit=block.limit)
    source_block._places.update({"path": block.where("path"), "": block.where("path")})
    form = "prompt" if block.columns else block.format
    source = Source(source_block, DataBlock(train=[source_block], format=form, media_root=block.media_root))
    for number, raw in enumerate(source.rows):
        try:
            values = source.read(raw)
            row = source.row(_to_prompt_row(values, block.columns, block.instruction) if block.columns else values)
        except RowFault as fault:
            raise DataError.at(source.row_name(number, raw), fault.what, fix=fault.fix) from None
        kind = row.columns.get(block.kind_column)
        yield Question(
            block.display_name,
            source.row_name(number, raw),
            "all" if kind is None else str(kind),
            row,
            _columns_with_answer(row),
        )


def _columns_with_answer(row: Row) -> dict[str, Any]:
    columns = dict(row.columns)
    last = row.messages[-1] if row.messages else {}
    if columns.get("answer") is None and not row.responses:
        if row.plain is not None and row.plain[1]:
            columns["answer"] = row.plain[1]
        elif last.get("role") == "assistant":
            columns["answer"] = last["content"]
    return columns


def _to_prompt_row(values: Mapping[str, Any], columns: ColumnsBlock, instruction: str | None) -> dict[str, Any]:
    """Convert a benchmark's row to a prompt-only row with `answer` and `options`.

    Raises RowFault if a column is missing.
    """
    names = [columns.question, *([columns.answer] if columns.answer else [])]
    names += [name for name in (columns.options, columns.image) if isinstance(name, str)]
    absent = [name for name in names if name not in values]
    if absent:
        raise RowFault(f"no column {', '.join(absent)}", f"the row has {', '.join(values)}")
    options = _values(values, columns.options)
    if len(options) == 1 and isinstance(options[0], str):
        options = _parse_list(options[0])
    lettered = [f"{letter}. {option}" for letter, option in zip(ascii_uppercase, options, strict=False)]
    question = "\n".join([str(values[columns.question]), *lettered, *([instruction] if instruction else [])])
    reserved = {"images", "image", "prompt"}
    row = {name: value for name, value in values.items() if name not in reserved}
    row |= {"prompt": [{"role": "user", "content": question}]}
    if columns.answer:
        row["answer"] = values[columns.answer]
    if options:
        row["options"] = [str(option) for option in options]
    images = _values(values, columns.image)
    return row | ({"images": images} if images else {})


def _values(values: Mapping[str, Any], names: str | list[str] | None) -> list[Any]:
    """Return the values of one or several columns as one list, without empty ones."""
    columns = [values.get(name) for name in ([names] if isinstance(names, str) else names or [])]
    flat = [one for value in columns for one in (value if isinstance(value, list) else [value])]
    return [one for one in flat if one is not None and one != ""]


def _parse_list(text: str) -> list[Any]:
    try:
        options = json.loads(text)
    except ValueError:
        options = None
    if not isinstance(options, list):
        raise RowFault(f"the options {text[:60]!r} are not a list", "name one column for each option, or write JSON")
    return options
