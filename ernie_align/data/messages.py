"""Messages of the world -> messages in one spelling: parts, images, tool calls and reasoning where they belong."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

from ernie_align.data import media
from ernie_align.data.media import MediaAccess
from ernie_align.data.row import Message, Row, RowFault, a_list, an_object, count_images, objects, text

ROLES = ("system", "user", "assistant", "tool")
_SHAREGPT_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "system": "system",
    "tool": "tool",
    "observation": "tool",
    "function_response": "tool",
    "function_call": "assistant",
}
_THINKING = re.compile(r"\s*<think>\n?(.*?)\n?</think>\s*", re.DOTALL)
_PLACEHOLDER = "<image>"  # in the text of rows that carry an images column: the convention of ShareGPT-style sets


def system_message(row: Mapping[str, Any]) -> list[Message]:
    """The system column as a message, if there is one."""
    return [{"role": "system", "content": text(row["system"], "system")}] if row.get("system") else []


def answer(said: Any) -> Message:
    """An assistant's turn."""
    return {"role": "assistant", "content": said}


def history_of(row: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Earlier questions and answers of an alpaca row."""
    pairs = [a_list(pair, "an entry of history") for pair in a_list(row.get("history") or [], "history")]
    if any(len(pair) != 2 for pair in pairs):
        raise RowFault("an entry of history is no pair", "write [question, answer]")
    return [(text(pair[0], "history"), text(pair[1], "history")) for pair in pairs]


def column_list(row: Mapping[str, Any], *keys: str) -> list[Any]:
    """The first of these columns that is there, as a list."""
    value = next((row[key] for key in keys if row.get(key) is not None), [])
    return value if isinstance(value, list) else [value]


def sharegpt_message(turn: Mapping[str, Any]) -> Message:
    """`{"from": ..., "value": ...}` as a message. Raises RowFault for an unknown speaker."""
    speaker, said = turn.get("from", turn.get("role")), turn.get("value", turn.get("content"))
    role = _SHAREGPT_ROLES.get(speaker) if isinstance(speaker, str) else None
    if role is None:
        fix = f"speakers are {', '.join(_SHAREGPT_ROLES)}"
        raise RowFault(f"{_short(speaker)} speaks", fix, kind="an unknown speaker")
    message: Message = {"role": role, "content": said}
    if speaker == "function_call":
        message = {"role": role, "content": "", "tool_calls": _tool_calls(said)}
    if turn.get("label") is not None:
        message["label"] = turn["label"]
    return message


def take_images(messages: Any, root: Path | MediaAccess | None) -> tuple[list[Message], list[dict[str, Any]]]:
    """Image parts that carry their image -> bare parts and the images. Bare ones are filled from the images column."""
    images: list[dict[str, Any]] = []
    bare, result = 0, []
    for message in a_list(messages, "messages"):
        if not isinstance(message, Mapping) or "role" not in message:
            raise _without_role()
        if not isinstance(message.get("content"), list):
            result.append(dict(message))
            continue
        parts = []
        for part in objects(message["content"], "a content part"):
            part = {key: value for key, value in part.items() if value is not None}
            if part.get("type") in ("image", "image_url"):
                source = next(
                    (part[key] for key in ("image_url", "image", "path", "url", "bytes") if key in part), None
                )
                bare += source is None
                if source is not None:
                    images.append(media.image_reference(source, root))
                part = {"type": "image"}
            parts.append(part)
        result.append({**message, "content": parts})
    if bare and images:
        raise RowFault(f"{len(images)} image parts carry their image and {bare} do not", "write all in one way")
    return result, images


def _without_role() -> RowFault:
    return RowFault("a message without a role", 'write {"role": ..., "content": ...}')


def _short(value: Any) -> str:
    """Of a row, in a message to a person."""
    shown = repr(value)
    return shown if len(shown) <= 60 else f"{shown[:57]}..."


def normal_message(message: Any) -> Message:
    """A message in the one spelling of data.row. Raises RowFault where it cannot be one."""
    if not isinstance(message, Mapping) or "role" not in message:
        raise _without_role()
    message = {key: value for key, value in message.items() if value is not None}
    if message.get("role") not in ROLES:
        raise RowFault(f"role {_short(message.get('role'))}", f"roles are {', '.join(ROLES)}", kind="an unknown role")
    if "weight" in message:  # OpenAI's spelling of the same thing
        message.setdefault("label", message.pop("weight"))
    content = message.setdefault("content", "")
    if isinstance(content, list):
        for part in objects(content, "a content part"):
            kind = part.get("type")
            if kind in ("video", "video_url"):
                raise RowFault("a video: videos are not trained on yet", "drop the row, or give frames as images")
            if kind not in ("text", "image") or (kind == "text" and not isinstance(part.get("text"), str)):
                what = f"a content part of type {_short(kind)}"
                raise RowFault(what, "parts are text and image", kind="a content part of another type")
            if kind == "image" and message["role"] == "assistant":
                raise RowFault("an image in an answer", "the model writes text: put the image into the question")
    elif not isinstance(content, str):
        raise RowFault(f"content is {type(content).__name__}", "content is text or a list of parts")
    if message["role"] == "assistant":
        _assistant(message)
    return message


def _assistant(message: Message) -> None:
    if isinstance(message["content"], list):
        message["content"] = "".join(part["text"] for part in message["content"])  # its parts are text alone
    if message.get("tool_calls"):
        message["tool_calls"] = _tool_calls(message["tool_calls"])
    text(message.get("reasoning_content") or "", "reasoning_content")
    inline = _THINKING.match(message["content"])
    if inline and not message.get("reasoning_content"):
        message["reasoning_content"] = inline.group(1)
        message["content"] = message["content"][inline.end() :]
    if message.get("label", 1) not in (0, 1):
        raise RowFault(f"label {_short(message['label'])}", "a label is 1 (trained) or 0", kind="an unknown label")
    if message.get("label", 1) and not message["content"].strip() and not message.get("tool_calls"):
        raise RowFault("an empty answer", "drop the row, or set its label to 0")


def _tool_calls(calls: Any) -> list[dict[str, Any]]:
    calls = _parsed(calls, "tool_calls")
    result = []
    for call in objects(calls if isinstance(calls, list) else [calls], "a tool call"):
        function = an_object(call.get("function", call), "a tool call")
        if not isinstance(function.get("name"), str):
            raise RowFault("a tool call without a name", 'write {"name": ..., "arguments": {...}}')
        what = "the arguments of a tool call"
        arguments = an_object(_parsed(function.get("arguments") or {}, what) or {}, what)
        result.append({"type": "function", "function": {"name": function["name"], "arguments": arguments}})
    return result


def tools_of(row: Mapping[str, Any]) -> list[dict[str, Any]] | None:
    """Declarations of the tools that the template shows. Raises RowFault where they are no JSON."""
    return objects(_parsed(row.get("tools"), "tools") or [], "tools") or None


def _parsed(value: Any, what: str) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value) if value.strip() else None
    except (ValueError, RecursionError) as error:
        raise RowFault(f"{what}: not JSON ({error})", "mend the JSON", kind=f"{what}: not JSON") from None


def thinking_of(row: Mapping[str, Any]) -> bool | None:
    """What the row says about thinking, if it does."""
    nested = an_object(row.get("chat_template_kwargs") or {}, "chat_template_kwargs")
    for value in (row.get("thinking"), row.get("enable_thinking"), nested.get("enable_thinking")):
        if value is not None:
            if not isinstance(value, bool):
                raise RowFault(f"thinking is {_short(value)}", "write true or false", kind="thinking is no switch")
            return value
    return None


def place_images(row: Row) -> None:
    """Give each image its part: parts as written, else `<image>` in the texts, else before the first user turn."""
    if row.images and row.plain is not None:
        raise RowFault("images in a row of plain text", "write prompt and completion as messages")
    if row.images and not count_images(row.messages):
        users = [message for message in row.messages if message["role"] == "user"]
        for message in users:
            if isinstance(message["content"], str) and _PLACEHOLDER in message["content"]:
                message["content"] = _split(message["content"])
        if users and not count_images(row.messages):  # TRL's rule for rows that say nothing about where
            said = users[0]["content"]
            parts = said if isinstance(said, list) else [{"type": "text", "text": said}]
            users[0]["content"] = [*({"type": "image"} for _ in row.images), *parts]
    if count_images(row.messages) != len(row.images):
        what = f"{count_images(row.messages)} image parts for {len(row.images)} images"
        fix = "give one image for each part, in the images column or in the part"
        raise RowFault(what, fix, kind="image parts and images differ")


def _split(said: str) -> list[dict[str, Any]]:
    pieces = said.split(_PLACEHOLDER)
    parts: list[dict[str, Any]] = []
    for number, piece in enumerate(pieces):
        if number:
            parts.append({"type": "image"})
        if piece:
            parts.append({"type": "text", "text": piece})
    return parts


def drop_oldest_exchange(messages: list[Message]) -> list[Message] | None:
    """The prompt without its oldest question and what was said to it; None if only images and the last are left."""
    questions = [place for place, message in enumerate(messages) if message["role"] == "user"]
    for start, end in pairwise(questions):
        if not count_images(messages[start:end]):
            return messages[:start] + messages[end:]
    return None
