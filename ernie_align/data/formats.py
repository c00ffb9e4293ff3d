"""One row of the world -> one canonical row. Each format is one function; the first row's keys tell which it is."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ernie_align.data import media
from ernie_align.data.row import Message, Row, RowFault, images_in

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


def detect(row: Mapping[str, Any]) -> str:
    """The format of a row, by its keys. Raises RowFault where none fits."""
    for name, keys in KEYS.items():
        if all(row.get(key) is not None for key in keys):
            return name
    known = "; ".join(f"{name} ({', '.join(keys)})" for name, keys in KEYS.items())
    raise RowFault(f"no known format has the columns {', '.join(row)}", f"the formats and their columns: {known}")


def canonical(row: Mapping[str, Any], format: str, root: Path | None = None) -> Row:
    """A row in `format` -> a canonical row. root: the folder that image paths start at.

    Raises RowFault where the row is not in that format, or where image parts and images do not match.
    """
    missing = [key for key in KEYS[format] if row.get(key) is None]
    if missing:
        raise RowFault(f"a {format} row without {', '.join(missing)}", f"it has {', '.join(row)}")
    result = _CONVERTERS[format](row, root)
    result.messages = [_message(message) for message in result.messages]
    result.images = result.images or [media.reference(value, root) for value in _listed(row, "images", "image")]
    _place_images(result)
    result.tools = _tools(row.get("tools"))
    result.thinking = _thinking(row)
    used = {*KEYS[format], "images", "image", "tools", "thinking", "enable_thinking", "chat_template_kwargs", "system"}
    result.columns = {key: value for key, value in row.items() if key not in used}
    return result


def _messages(row: Mapping[str, Any], root: Path | None) -> Row:
    messages, images = _own_images(row["messages"], root)
    return Row(messages=messages, images=images)


def _prompt_completion(row: Mapping[str, Any], root: Path | None) -> Row:
    prompt, completion = row["prompt"], row["completion"]
    if isinstance(prompt, str) and isinstance(completion, str):
        return Row(plain=(prompt, completion))
    if not (isinstance(prompt, list) and isinstance(completion, list)):
        raise RowFault("prompt and completion must both be text or both be messages", "write both in one way")
    messages, images = _own_images([*prompt, *completion], root)
    for message in messages[: len(prompt)]:  # the completion alone is trained
        if message.get("role") == "assistant":
            message["label"] = 0
    return Row(messages=messages, images=images)


def _sharegpt(row: Mapping[str, Any], root: Path | None) -> Row:
    messages: list[Message] = _system(row)
    for turn in row["conversations"]:
        speaker, text = turn.get("from", turn.get("role")), turn.get("value", turn.get("content"))
        role = _SHAREGPT_ROLES.get(speaker)
        if role is None:
            raise RowFault(f"{speaker!r} speaks", f"speakers are {', '.join(_SHAREGPT_ROLES)}")
        message: Message = {"role": role, "content": text}
        if speaker == "function_call":
            message = {"role": role, "content": "", "tool_calls": _tool_calls(text)}
        if turn.get("label") is not None:
            message["label"] = turn["label"]
        messages.append(message)
    return Row(messages=messages)


def _alpaca(row: Mapping[str, Any], root: Path | None) -> Row:
    messages = _system(row)
    for pair in row.get("history") or []:
        if len(pair) != 2:
            raise RowFault("an entry of history is no pair", "write [question, answer]")
        messages += [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]}]
    question = "\n".join(text for text in (row["instruction"], row.get("input")) if text)
    return Row(messages=[*messages, {"role": "user", "content": question}, _answer(row["output"])])


def _erniekit(row: Mapping[str, Any], root: Path | None) -> Row:
    questions, answers = ([row[key]] if isinstance(row[key], str) else list(row[key]) for key in ("src", "tgt"))
    labels = row.get("label") or [1] * len(answers)
    if not len(questions) == len(answers) == len(labels):
        what = f"{len(questions)} src, {len(answers)} tgt and {len(labels)} label"
        raise RowFault(what, "give one of each per turn")
    messages = _system(row)
    for question, answer, label in zip(questions, answers, labels, strict=True):
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer, "label": label}]
    return Row(messages=messages)


def _erniekit_vl(row: Mapping[str, Any], root: Path | None) -> Row:
    if row.get("video_info"):
        raise RowFault("video_info: videos are not trained on yet", "drop the row, or give frames as images")
    before: dict[int, list[Any]] = {}
    for image in row.get("image_info") or []:
        index = image.get("matched_text_index")
        if not isinstance(index, int) or not 0 <= index < len(row["text_info"]):
            raise RowFault(f"matched_text_index {index!r} matches no text", "count text_info from 0")
        before.setdefault(index, []).append(image.get("image_url", image.get("image")))
    messages, images = _system(row), []
    for index, piece in enumerate(row["text_info"]):
        role = {"mask": "user", "no_mask": "assistant"}.get(piece.get("tag"))
        if role is None:
            raise RowFault(f"tag {piece.get('tag')!r} in text_info", "tags are mask (prompt) and no_mask (answer)")
        here = before.get(index, [])
        images += [media.reference(image, root) for image in here]
        parts = [*({"type": "image"} for _ in here), {"type": "text", "text": piece.get("text") or ""}]
        if messages and messages[-1]["role"] == role:
            messages[-1]["content"] += parts
        else:
            messages.append({"role": role, "content": parts})
    return Row(messages=messages, images=images)


KEYS: dict[str, tuple[str, ...]] = {
    "messages": ("messages",),
    "prompt_completion": ("prompt", "completion"),
    "sharegpt": ("conversations",),
    "alpaca": ("instruction", "output"),
    "erniekit": ("src", "tgt"),
    "erniekit_vl": ("text_info",),
}
_CONVERTERS: dict[str, Callable[[Mapping[str, Any], Path | None], Row]] = {
    "messages": _messages,
    "prompt_completion": _prompt_completion,
    "sharegpt": _sharegpt,
    "alpaca": _alpaca,
    "erniekit": _erniekit,
    "erniekit_vl": _erniekit_vl,
}


def _system(row: Mapping[str, Any]) -> list[Message]:
    return [{"role": "system", "content": row["system"]}] if row.get("system") else []


def _answer(text: Any) -> Message:
    return {"role": "assistant", "content": text}


def _listed(row: Mapping[str, Any], *keys: str) -> list[Any]:
    value = next((row[key] for key in keys if row.get(key) is not None), [])
    return value if isinstance(value, list) else [value]


def _own_images(messages: list[Message], root: Path | None) -> tuple[list[Message], list[dict[str, Any]]]:
    """Image parts that carry their image -> bare parts and the images. Bare ones are filled from the images column."""
    images: list[dict[str, Any]] = []
    bare, result = 0, []
    for message in messages:
        if not isinstance(message, Mapping) or not isinstance(message.get("content"), list):
            result.append(dict(message) if isinstance(message, Mapping) else message)
            continue
        parts = []
        for part in message["content"]:
            part = {key: value for key, value in part.items() if value is not None}
            if part.get("type") in ("image", "image_url"):
                source = next(
                    (part[key] for key in ("image_url", "image", "path", "url", "bytes") if key in part), None
                )
                bare += source is None
                if source is not None:
                    images.append(media.reference(source, root))
                part = {"type": "image"}
            parts.append(part)
        result.append({**message, "content": parts})
    if bare and images:
        raise RowFault(f"{len(images)} image parts carry their image and {bare} do not", "write all in one way")
    return result, images


def _message(message: Any) -> Message:
    if not isinstance(message, Mapping) or "role" not in message:
        raise RowFault("a message without a role", 'write {"role": ..., "content": ...}')
    message = {key: value for key, value in message.items() if value is not None}
    if message["role"] not in ROLES:
        raise RowFault(f"role {message['role']!r}", f"roles are {', '.join(ROLES)}")
    if "weight" in message:  # OpenAI's spelling of the same thing
        message.setdefault("label", message.pop("weight"))
    content = message.setdefault("content", "")
    if isinstance(content, list):
        for part in content:
            kind = part.get("type")
            if kind in ("video", "video_url"):
                raise RowFault("a video: videos are not trained on yet", "drop the row, or give frames as images")
            if kind not in ("text", "image") or (kind == "text" and not isinstance(part.get("text"), str)):
                raise RowFault(f"a content part of type {kind!r}", "parts are text and image")
            if kind == "image" and message["role"] == "assistant":
                raise RowFault("an image in an answer", "the model writes text: put the image into the question")
    elif not isinstance(content, str):
        raise RowFault(f"content is {type(content).__name__}", "content is text or a list of parts")
    if message["role"] == "assistant":
        _assistant(message)
    return message


def _assistant(message: Message) -> None:
    if isinstance(message["content"], list):
        message["content"] = "".join(part["text"] for part in message["content"])
    if message.get("tool_calls"):
        message["tool_calls"] = _tool_calls(message["tool_calls"])
    inline = _THINKING.match(message["content"])
    if inline and not message.get("reasoning_content"):
        message["reasoning_content"] = inline.group(1)
        message["content"] = message["content"][inline.end() :]
    if message.get("label", 1) not in (0, 1):
        raise RowFault(f"label {message['label']!r}", "a label is 1 (trained) or 0")
    if message.get("label", 1) and not message["content"].strip() and not message.get("tool_calls"):
        raise RowFault("an empty answer", "drop the row, or set its label to 0")


def _tool_calls(calls: Any) -> list[dict[str, Any]]:
    calls = _json(calls, "tool_calls")
    result = []
    for call in calls if isinstance(calls, list) else [calls]:
        function = call.get("function", call)
        if "name" not in function:
            raise RowFault("a tool call without a name", 'write {"name": ..., "arguments": {...}}')
        arguments = _json(function.get("arguments") or {}, "the arguments of a tool call")
        result.append({"type": "function", "function": {"name": function["name"], "arguments": arguments}})
    return result


def _tools(tools: Any) -> list[dict[str, Any]] | None:
    return _json(tools, "tools") or None


def _json(value: Any, what: str) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value) if value.strip() else None
    except ValueError as error:
        raise RowFault(f"{what}: not JSON ({error})", "mend the JSON") from None


def _thinking(row: Mapping[str, Any]) -> bool | None:
    nested = row.get("chat_template_kwargs") or {}
    for value in (row.get("thinking"), row.get("enable_thinking"), nested.get("enable_thinking")):
        if value is not None:
            if not isinstance(value, bool):
                raise RowFault(f"thinking is {value!r}", "write true or false")
            return value
    return None


def _place_images(row: Row) -> None:
    """Give each image its part: parts as written, else `<image>` in the texts, else before the first user turn."""
    if row.images and row.plain is not None:
        raise RowFault("images in a row of plain text", "write prompt and completion as messages")
    if row.images and not images_in(row.messages):
        users = [message for message in row.messages if message["role"] == "user"]
        for message in users:
            if isinstance(message["content"], str) and _PLACEHOLDER in message["content"]:
                message["content"] = _split(message["content"])
        if users and not images_in(row.messages):  # TRL's rule for rows that say nothing about where
            text = users[0]["content"]
            parts = text if isinstance(text, list) else [{"type": "text", "text": text}]
            users[0]["content"] = [*({"type": "image"} for _ in row.images), *parts]
    if images_in(row.messages) != len(row.images):
        what = f"{images_in(row.messages)} image parts for {len(row.images)} images"
        raise RowFault(what, "give one image for each part, in the images column or in the part")


def _split(text: str) -> list[dict[str, Any]]:
    pieces = text.split(_PLACEHOLDER)
    parts: list[dict[str, Any]] = []
    for number, piece in enumerate(pieces):
        if number:
            parts.append({"type": "image"})
        if piece:
            parts.append({"type": "text", "text": piece})
    return parts
