"""The canonical row: one conversation with its images, in one spelling whatever format it came in."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

Message = dict[str, Any]


class RowFault(ValueError):
    """A row cannot be used as it is. Who reads the source adds file and row.

    what: the fault; fix: the next move; kind: what such faults are counted as, where `what` names a value of the row.
    """

    def __init__(self, what: str, fix: str = "", *, kind: str = ""):
        super().__init__(what, fix)
        self.what, self.fix, self.kind = what, fix, kind or what


class RowDropped(ValueError):
    """A sound row that the recipe does not want (too long). reason: how it is counted."""

    def __init__(self, reason: str):
        super().__init__(reason)
        self.reason = reason


@dataclass
class Response:
    """One of several ways a conversation may go on, and how good it is: higher is better.

    messages: from the assistant's first turn on; text: instead of them in a row without turns; fault: what is wrong
    with this side alone.
    """

    rank: float
    messages: list[Message] = field(default_factory=list)
    text: str | None = None
    fault: RowFault | None = None


@dataclass
class Row:
    """One row.

    messages: OpenAI style; `content` is text or a list of `{"type": "text", "text": ...}` and `{"type": "image"}`;
        an assistant message may carry `reasoning_content`, `tool_calls` and `label` (0: this turn is not trained).
    images: one reference `{"path": ..., "bytes": ...}` for each image part, in their order.
    plain: (prompt, completion) of a row without turns; messages is then empty and no chat template is used.
    prompt_length: messages of the prompt in a prompt/completion row; None in other rows.
    responses: of a preference row, whose messages are then the prompt alone.
    thinking: enable_thinking of the chat template for this row; None leaves it to the recipe.
    columns: everything else the row held, such as `kind`, `answer`, and the `label` of an unpaired preference.
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
        """Positions of the assistant messages that are trained."""
        return [number for number, message in enumerate(self.messages) if is_trained(message)]


def is_trained(message: Message) -> bool:
    """An assistant turn, unless its label says 0."""
    return message["role"] == "assistant" and message.get("label", 1) != 0


def count_images(messages: list[Message]) -> int:
    """Number of image parts."""
    return sum(
        part.get("type") == "image"
        for message in messages
        if isinstance(message.get("content"), list)
        for part in message["content"]
    )


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
