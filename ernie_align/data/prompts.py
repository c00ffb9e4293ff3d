"""Rows -> prompts for a policy to answer, with the columns that rewards may read."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from ernie_align.data.collate import BaseEncoder, example_features
from ernie_align.data.messages import drop_oldest_exchange
from ernie_align.data.render import Renderer
from ernie_align.data.row import Row, RowDropped, RowFault


class PromptEncoder(BaseEncoder):
    """Encode rows for a stage in which the model answers: one example per row, with the prompt only.

    The final answer of a row, if any, is left out of the prompt and becomes column `answer`, unless the row has one.
    max_length: tokens of the prompt, image tokens included; cut: drop the oldest exchanges of a longer one, never one
    with an image; domain_column: column that every row must have; reward_columns: reward -> columns that it reads.
    """

    def __init__(
        self,
        renderer: Renderer,
        *,
        domain_column: str | None = None,
        reward_columns: Mapping[str, Sequence[str]] | None = None,
        **limits: Any,
    ):
        super().__init__(renderer, **limits)
        self.domain_column = domain_column
        self.reward_columns = reward_columns or {}

    def features(self) -> dict[str, Any]:
        """Return the columns of an example. prompt and columns are JSON, because sources differ in what they contain.

        opened: the generation prompt opens the model's thinking block.
        """
        return example_features("input_ids", "labels", prompt="string", columns="string", opened="bool")

    def __call__(self, row: Row) -> list[dict[str, Any]]:
        """Return the example of the row's prompt. Raises RowFault and RowDropped."""
        columns = dict(row.columns)
        if row.responses:
            what = "a preference row, but this stage lets the model answer"
            raise RowFault(what, "put its file under upo.pairs_data")
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
                raise RowFault("no question before the answer", "give the row a prompt")
            row = Row(messages=prompt, images=row.images, tools=row.tools, thinking=row.thinking)
        self._check_columns(columns)
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

    def _check_columns(self, columns: Mapping[str, Any]) -> None:
        fix = f"add the column; the row has {', '.join(columns) or 'no other columns'}"
        if self.domain_column is not None and not isinstance(columns.get(self.domain_column), str):
            raise RowFault(f"no text in column {self.domain_column}, which upo.domain_column names", fix)
        present = {"images", *(name for name, value in columns.items() if value is not None)}  # images may be none
        if self.reward_columns and not any(present.issuperset(names) for names in self.reward_columns.values()):
            reads = "; ".join(f"{reward} reads {', '.join(names)}" for reward, names in self.reward_columns.items())
            raise RowFault(f"no reward can score the row: {reads}", fix)


def _as_json(columns: dict[str, Any]) -> str:
    for name, value in columns.items():
        try:
            json.dumps(value)
        except TypeError:
            what = f"column {name} contains {type(value).__name__}, which cannot be passed to a reward"
            raise RowFault(what, "make it text, numbers or lists, or drop it") from None
    return json.dumps(columns)
