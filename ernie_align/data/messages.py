"""Messages of any common style -> messages in one style: parts, images, tool calls and reasoning."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

from ernie_align.data import media
from ernie_align.data.media import MediaAccess
from ernie_align.data.row import Message, Row, RowFault, count_images, expect, expect_objects

ROLES = ("system", "user", "assistant", "tool")
_SHAREGPT_ROLES = {
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "assistant", "model", "function_call"), "assistant"),
    **dict.fromkeys(("tool", "observation", "function_response"), "tool"),
    "system": "system",
}
_THINKING = re.compile(r"\s*<think>\n?(.*?)\n?</think>\s*", re.DOTALL)
_PLACEHOLDER = "<image>"  # in the text of rows with an images column: the convention of ShareGPT-style sets


def system_message(row: Mapping[str, Any]) -> list[Message]:
    """Return the system column as a list of one message, or of none."""
    return [{"role": "system", "content": expect(row["system"], str, "system")}] if row.get("system") else []


def user_message(content: Any) -> Message:
    """Return a user turn."""
    return {"role": "user", "content": content}


def assistant_message(content: Any) -> Message:
    """Return an assistant turn."""
    return {"role": "assistant", "content": content}


def sharegpt_message(turn: Mapping[str, Any]) -> Message:
    """Convert `{"from": ..., "value": ...}` to a message. Raises RowFault for an unknown speaker."""
    speaker, content = turn.get("from", turn.get("role")), turn.get("value", turn.get("content"))
    role = _SHAREGPT_ROLES.get(speaker) if isinstance(speaker, str) else None
    if role is None:
        fix = f"expected one of {', '.join(_SHAREGPT_ROLES)}"
        raise RowFault(f"unknown speaker {_short(speaker)} in `from`", fix, kind="an unknown speaker")
    message: Message = {"role": role, "content": content}
    if speaker == "function_call":
        message = {"role": role, "content": "", "tool_calls": _parse_tool_calls(content)}
    if turn.get("label") is not None:
        message["label"] = turn["label"]
    return message


def extract_images(messages: Any, root: Path | MediaAccess | None) -> tuple[list[Message], list[dict[str, Any]]]:
    """Split image parts that contain their image into bare parts and the images.

    Parts that are already bare take their images from the images column.
    """
    images: list[dict[str, Any]] = []
    bare, result = 0, []
    for message in expect(messages, list, "messages"):
        if not isinstance(message, Mapping) or "role" not in message:
            raise _no_role()
        if not isinstance(message.get("content"), list):
            result.append(dict(message))
            continue
        parts = []
        for part in expect_objects(message["content"], "a content part"):
            part = {key: value for key, value in part.items() if value is not None}
            if part.get("type") in ("image", "image_url"):
                keys = ("image_url", "image", "path", "url", "bytes")
                source = next((part[key] for key in keys if key in part), None)
                bare += source is None
                if source is not None:
                    images.append(media.image_reference(source, root))
                part = {"type": "image"}
            parts.append(part)
        result.append({**message, "content": parts})
    if bare and images:
        raise RowFault(f"{len(images)} image parts contain their image and {bare} do not", "write all in one way")
    return result, images


def _no_role() -> RowFault:
    return RowFault("a message without a role", 'write {"role": ..., "content": ...}')


def _short(value: Any) -> str:
    """Format a value of a row for an error message."""
    shown = repr(value)
    return shown if len(shown) <= 60 else f"{shown[:57]}..."


def normalize_message(message: Any) -> Message:
    """Return the message in the style of data.row. Raises RowFault if it cannot be converted."""
    if not isinstance(message, Mapping) or "role" not in message:
        raise _no_role()
    message = {key: value for key, value in message.items() if value is not None}
    if message.get("role") not in ROLES:
        what, fix = f"unknown role {_short(message.get('role'))}", f"expected one of {', '.join(ROLES)}"
        raise RowFault(what, fix, kind="an unknown role")
    if "weight" in message:  # OpenAI's name of the label
        message.setdefault("label", message.pop("weight"))
    content = message.setdefault("content", "")
    if isinstance(content, list):
        for part in expect_objects(content, "a content part"):
            kind = part.get("type")
            if kind in ("video", "video_url"):
                raise RowFault("a video: videos are not supported yet", "drop the row, or give frames as images")
            if kind not in ("text", "image") or (kind == "text" and not isinstance(part.get("text"), str)):
                what, fix = f"a content part of type {_short(kind)}", "expected type text (with its text) or image"
                raise RowFault(what, fix, kind="a content part of another type")
            if kind == "image" and message["role"] == "assistant":
                raise RowFault("an image in an answer", "put the image into the question: the model writes only text")
    elif not isinstance(content, str):
        raise RowFault(f"content is {type(content).__name__}", "expected text or a list of parts")
    if message["role"] == "assistant":
        _normalize_assistant(message)
    return message


def _normalize_assistant(message: Message) -> None:
    if isinstance(message["content"], list):
        message["content"] = "".join(part["text"] for part in message["content"])  # all of its parts are text
    if message.get("tool_calls"):
        message["tool_calls"] = _parse_tool_calls(message["tool_calls"])
    expect(message.get("reasoning_content") or "", str, "reasoning_content")
    inline = _THINKING.match(message["content"])
    if inline and not message.get("reasoning_content"):
        message["reasoning_content"] = inline.group(1)
        message["content"] = message["content"][inline.end() :]
    if message.get("label", 1) not in (0, 1):
        what = f"label {_short(message['label'])} of a turn"
        raise RowFault(what, "expected 1 (trained) or 0 (not trained)", kind="an unknown label")
    if message.get("label", 1) and not message["content"].strip() and not message.get("tool_calls"):
        raise RowFault("an empty answer", "drop the row, or set its label to 0")


def _parse_tool_calls(calls: Any) -> list[dict[str, Any]]:
    calls = _parse_json(calls, "tool_calls")
    result = []
    for call in expect_objects(calls if isinstance(calls, list) else [calls], "a tool call"):
        function = expect(call.get("function", call), Mapping, "a tool call")
        if not isinstance(function.get("name"), str):
            raise RowFault("a tool call without a name", 'write {"name": ..., "arguments": {...}}')
        name = "the arguments of a tool call"
        arguments = expect(_parse_json(function.get("arguments") or {}, name) or {}, Mapping, name)
        result.append({"type": "function", "function": {"name": function["name"], "arguments": arguments}})
    return result


def parse_tools(row: Mapping[str, Any]) -> list[dict[str, Any]] | None:
    """Return the tool declarations for the chat template. Raises RowFault if they are not valid JSON."""
    return expect_objects(_parse_json(row.get("tools"), "tools") or [], "tools") or None


def _parse_json(value: Any, name: str) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value) if value.strip() else None
    except (ValueError, RecursionError) as error:
        raise RowFault(f"{name}: not JSON ({error})", "fix the JSON", kind=f"{name}: not JSON") from None


def parse_thinking(row: Mapping[str, Any]) -> bool | None:
    """Return the row's own setting of enable_thinking, or None."""
    nested = expect(row.get("chat_template_kwargs") or {}, Mapping, "chat_template_kwargs")
    for value in (row.get("thinking"), row.get("enable_thinking"), nested.get("enable_thinking")):
        if value is not None:
            if not isinstance(value, bool):
                what = f"thinking is {_short(value)}"
                raise RowFault(what, "expected true or false", kind="thinking is not true or false")
            return value
    return None


def place_images(row: Row) -> None:
    """Give each image a part: the parts as written, else `<image>` in the text, else before the first user turn."""
    if row.images and row.plain is not None:
        raise RowFault("images in a row of plain text", "write prompt and completion as messages")
    if row.images and not count_images(row.messages):
        users = [message for message in row.messages if message["role"] == "user"]
        for message in users:
            if isinstance(message["content"], str) and _PLACEHOLDER in message["content"]:
                message["content"] = _split_placeholders(message["content"])
        if users and not count_images(row.messages):  # TRL's rule for rows without any position
            content = users[0]["content"]
            parts = content if isinstance(content, list) else [{"type": "text", "text": content}]
            users[0]["content"] = [*({"type": "image"} for _ in row.images), *parts]
    if count_images(row.messages) != len(row.images):
        what = f"{count_images(row.messages)} image parts for {len(row.images)} images"
        fix = "give one image per part, in the images column or in the part"
        raise RowFault(what, fix, kind="image parts and images differ")


def _split_placeholders(content: str) -> list[dict[str, Any]]:
    parts: list[dict[str, Any]] = []
    for number, piece in enumerate(content.split(_PLACEHOLDER)):
        if number:
            parts.append({"type": "image"})
        if piece:
            parts.append({"type": "text", "text": piece})
    return parts


def drop_oldest_exchange(messages: list[Message]) -> list[Message] | None:
    """Drop the oldest question without an image, and its answers. Returns None if only the last question is left."""
    questions = [place for place, message in enumerate(messages) if message["role"] == "user"]
    for start, end in pairwise(questions):
        if not count_images(messages[start:end]):
            return messages[:start] + messages[end:]
    return None
