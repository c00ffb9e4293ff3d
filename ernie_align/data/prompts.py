"""Rows -> prompts that a policy answers, with everything a reward may want to know about them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from ernie_align.data.collate import shared_features
from ernie_align.data.messages import drop_oldest_exchange
from ernie_align.data.render import Renderer
from ernie_align.data.row import Row, RowDropped, RowFault


class PromptEncoder:
    """Rows for a stage that lets the model answer: one example per row, of its prompt alone.

    A row that ends in an answer is asked for one; the known answer is then column `answer`, unless the row has a column
    of that name.
    max_length: tokens of the prompt, image tokens included; cut: drop the oldest exchanges of a longer one, never one
    with an image; domain_column: column that every row has, if one is named; judged_by: columns that each reward reads.
    """

    def __init__(
        self,
        renderer: Renderer,
        *,
        max_length: int,
        cut: bool = False,
        domain_column: str | None = None,
        reward_columns: Mapping[str, Sequence[str]] | None = None,
    ):
        self.renderer = renderer
        self.max_length = max_length
        self.cut = cut
        self.domain_column = domain_column
        self.reward_columns = reward_columns or {}

    def features(self) -> dict[str, Any]:
        """Columns of an example. prompt and columns are JSON: rows of different sources hold different things.

        opened: the generation prompt begins the model's reasoning.
        """
        from datasets import Value
        from datasets.features import List

        ids = {"input_ids": List(Value("int32")), "labels": List(Value("int32"))}
        return {**ids, "prompt": Value("string"), "columns": Value("string"), "opened": Value("bool")} | (
            shared_features()
        )

    def __call__(self, row: Row) -> list[dict[str, Any]]:
        """The row's prompt. Raises RowFault and RowDropped."""
        columns = dict(row.columns)
        if row.responses:
            raise RowFault("a preference row: this stage asks for an answer", "name it under upo.pairs_data")
        if row.plain is not None:
            prompt: Any = row.plain[0]
            if row.plain[1]:
                columns.setdefault("answer", row.plain[1])
        else:
            prompt = row.messages
            if prompt[-1]["role"] == "assistant":
                columns.setdefault("answer", prompt[-1]["content"])
                prompt = prompt[:-1]
            if not prompt or prompt[-1]["role"] == "assistant":
                raise RowFault("no question: nothing stands before the answer", "give the row a prompt")
            row = Row(messages=prompt, images=row.images, tools=row.tools, thinking=row.thinking)
        self._check(columns)
        example, cut = self.renderer.prompt(row), False
        while len(example.input_ids) > self.max_length:
            shorter = drop_oldest_exchange(row.messages) if self.cut else None
            if shorter is None:
                raise RowDropped(f"over data.max_length {self.max_length}")
            row.messages, cut = shorter, True
            example = self.renderer.prompt(row)
        return [
            vars(example)
            | {
                "prompt": json.dumps(prompt if row.plain is not None else row.messages),
                "columns": _as_json(columns),
                "opened": self.renderer.opens_thinking(row),
                "length": len(example.input_ids),
                "trained": 0,
                "cut": cut,
            }
        ]

    def _check(self, columns: Mapping[str, Any]) -> None:
        has = f"the row has {', '.join(columns) or 'no columns of its own'}"
        if self.domain_column is not None and not isinstance(columns.get(self.domain_column), str):
            raise RowFault(f"no text in column {self.domain_column}, which upo.domain_column names", has)
        wanted = self.reward_columns
        given = {"images", *(name for name, value in columns.items() if value is not None)}  # of a row without: none
        if wanted and not any(given.issuperset(names) for names in wanted.values()):
            reads = "; ".join(f"{reward} reads {', '.join(names)}" for reward, names in wanted.items())
            raise RowFault(f"no reward can judge it: {reads}", has)


def _as_json(columns: dict[str, Any]) -> str:
    for name, value in columns.items():
        try:
            json.dumps(value)
        except TypeError:
            what = f"column {name} holds {type(value).__name__}, which a reward cannot be handed"
            raise RowFault(what, "make it text, numbers or lists, or drop it") from None
    return json.dumps(columns)
