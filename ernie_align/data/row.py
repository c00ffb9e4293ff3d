"""The canonical row, which every input format is converted to; and type checks of row values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

_T = TypeVar("_T")
Message = dict[str, Any]

MAX_MESSAGES = 1000  # per row: each answer is rendered after all messages before it
MAX_TEXT = 1 << 24  # characters of text per row; about 30 s of tokenizing


class RowFault(ValueError):
    """A row cannot be used. The reader of the source adds file and row.

    what: the fault; fix: the next move; kind: the name that such faults are counted under, where `what` contains a
    value of the row.
    """

    def __init__(self, what: str, fix: str = "", *, kind: str = ""):
        super().__init__(what, fix)
        self.what, self.fix, self.kind = what, fix, kind or what


class RowDropped(ValueError):
    """A valid row that the recipe excludes (too long). reason: the name that it is counted under."""

    def __init__(self, reason: str):
        super().__init__(reason)
        self.reason = reason


@dataclass
class Response:
    """One of several continuations of a conversation, with its rank: higher is better.

    messages: from the assistant's first turn on; text: replaces them in a row of plain text; fault: what is wrong with
    this response alone.
    """

    rank: float
    messages: list[Message] = field(default_factory=list)
    text: str | None = None
    fault: RowFault | None = None


@dataclass
class Row:
    """One row.

    messages: OpenAI style; `content` is text or a list of `{"type": "text", "text": ...}` and `{"type": "image"}`;
        an assistant message may have `reasoning_content`, `tool_calls` and `label` (0: this turn is not trained).
    images: one reference `{"path": ..., "bytes": ...}` for each image part, in their order.
    plain: (prompt, completion) of a row of plain text; messages is then empty and no chat template is used.
    prompt_length: messages of the prompt in a prompt/completion row; None in other rows.
    responses: of a preference row, whose messages are then the prompt alone.
    thinking: enable_thinking of the chat template for this row; None leaves it to the recipe.
    columns: all other columns of the row, such as `kind`, `answer`, and the `label` of an unpaired preference.
    """

    messages: list[Message] = field(default_factory=list)
    images: list[dict[str, Any]] = field(default_factory=list)
    plain: tuple[str, str] | None = None
    prompt_length: int | None = None
    responses: list[Response] = field(default_factory=list)
    tools: list[dict[str, Any]] | None = None
    thinking: bool | None = None
    columns: dict[str, Any] = field(default_factory=dict)

    @property
    def trained_turns(self) -> list[int]:
        """Positions of the trained messages: assistant turns without label 0."""
        return [
            number
            for number, message in enumerate(self.messages)
            if message["role"] == "assistant" and message.get("label", 1) != 0
        ]


def count_images(messages: list[Message]) -> int:
    """Count the image parts."""
    return sum(
        part.get("type") == "image"
        for message in messages
        if isinstance(message.get("content"), list)
        for part in message["content"]
    )


def expect(value: Any, kind: type[_T], name: str) -> _T:
    """Return the value. Raises RowFault if it is not of that kind: str, list or Mapping."""
    if not isinstance(value, kind):
        names = {str: "text", list: "a list", Mapping: "an object", dict: "an object", bool: "true or false"}
        number = "a number" if isinstance(value, int | float) else type(value).__name__
        actual = "null" if value is None else names.get(type(value), number)
        raise RowFault(f"{name} is {actual}; expected {names[kind]}", "fix or drop the row")
    return value


def expect_texts(value: Any, name: str) -> list[str]:
    """Return a list of strings, or one string as a list. Raises RowFault for anything else."""
    return [expect(one, str, name) for one in ([value] if isinstance(value, str) else expect(value, list, name))]


def expect_objects(value: Any, name: str) -> list[Mapping[str, Any]]:
    """Return the value. Raises RowFault if it is not a list of objects."""
    return [expect(one, Mapping, name) for one in expect(value, list, name)]
