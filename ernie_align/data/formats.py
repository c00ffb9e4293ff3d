"""One row of the world -> one canonical row. Each format is one function; the first row's keys tell which it is."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ernie_align.data import media, preferences
from ernie_align.data.media import Reach
from ernie_align.data.messages import (
    answer,
    column_list,
    history_of,
    normal_message,
    place_images,
    sharegpt_message,
    system_message,
    take_images,
    thinking_of,
    tools_of,
)
from ernie_align.data.row import Row, RowFault
from ernie_align.data.shapes import MAX_MESSAGES, MAX_TEXT, a_list, objects, text, texts


def detect(row: Mapping[str, Any]) -> str:
    """The format of a row, by its keys. Raises RowFault where none fits."""
    for name, keys in KEYS.items():
        if not _missing(row, keys):
            return name
    known = "; ".join(f"{name} ({', '.join(keys)})" for name, keys in KEYS.items())
    raise RowFault(f"no known format has the columns {', '.join(row)}", f"the formats and their columns: {known}")


def canonical(row: Mapping[str, Any], format: str, root: Path | Reach | None = None) -> Row:
    """A row in `format` -> a canonical row. root: the folder that image paths start at.

    Raises RowFault where the row is not in that format, or where image parts and images do not match.
    """
    missing = _missing(row, KEYS[format])
    if missing:
        raise RowFault(f"a {format} row without {', '.join(missing)}", f"it has {', '.join(row)}")
    result = _CONVERTERS[format](row, root)
    if result.plain is None and not result.messages:
        raise RowFault("no messages", "write a conversation, or drop the row")
    _bounded(result)
    result.messages = [normal_message(message) for message in result.messages]
    result.images = result.images or [media.reference(value, root) for value in column_list(row, "images", "image")]
    place_images(result)
    result.tools = tools_of(row)
    result.thinking = thinking_of(row)
    own = [name for key in KEYS[format] for name in key.split("|")]
    used = {*own, "images", "image", "tools", "thinking", "enable_thinking", "chat_template_kwargs", "system"}
    result.columns = {key: value for key, value in row.items() if key not in used}
    return result


def _bounded(row: Row) -> None:
    """Raises RowFault for a row that would take minutes to render."""
    turns = max([len(row.messages), *(len(ending.messages) for ending in row.endings)])
    if turns > MAX_MESSAGES:
        what = f"{turns:,} messages are over {MAX_MESSAGES:,}"
        raise RowFault(what, "split the conversation", kind="too many messages")
    length = sum(len(part) for part in (*(row.plain or ()), *(ending.text or "" for ending in row.endings)))
    said = [*row.messages, *(message for ending in row.endings for message in ending.messages)]
    length += sum(len(str(message.get("content") or "")) for message in said if isinstance(message, Mapping))
    if length > MAX_TEXT:
        what = f"{length:,} characters of text are over {MAX_TEXT:,}"
        raise RowFault(what, "split or drop the row", kind="too much text")


def _missing(row: Mapping[str, Any], keys: tuple[str, ...]) -> list[str]:
    return [key for key in keys if all(row.get(name) is None for name in key.split("|"))]


def _messages(row: Mapping[str, Any], root: Path | Reach | None) -> Row:
    messages, images = take_images(row["messages"], root)
    return Row(messages=messages, images=images)


def _prompt_completion(row: Mapping[str, Any], root: Path | Reach | None) -> Row:
    prompt, completion = row["prompt"], row["completion"]
    if isinstance(prompt, str) and isinstance(completion, str):
        return Row(plain=(prompt, completion))
    if not (isinstance(prompt, list) and isinstance(completion, list)):
        raise RowFault("prompt and completion must both be text or both be messages", "write both in one way")
    messages, images = take_images([*prompt, *completion], root)
    for message in messages[: len(prompt)]:  # the completion alone is trained
        if message["role"] == "assistant":
            message["label"] = 0
    return Row(messages=messages, images=images)


def _prompt(row: Mapping[str, Any], root: Path | Reach | None) -> Row:
    """TRL's prompt-only type."""
    if isinstance(row["prompt"], str):
        return Row(plain=(row["prompt"], ""))
    messages, images = take_images(row["prompt"], root)
    return Row(messages=messages, images=images)


def _sharegpt(row: Mapping[str, Any], root: Path | Reach | None) -> Row:
    return Row(messages=[*system_message(row), *map(sharegpt_message, objects(row["conversations"], "conversations"))])


def _alpaca(row: Mapping[str, Any], root: Path | Reach | None) -> Row:
    messages = system_message(row)
    for asked, replied in history_of(row):
        messages += [{"role": "user", "content": asked}, answer(replied)]
    parts = (text(row["instruction"], "instruction"), text(row.get("input") or "", "input"))
    question = "\n".join(part for part in parts if part)
    return Row(messages=[*messages, {"role": "user", "content": question}, answer(text(row["output"], "output"))])


def _erniekit(row: Mapping[str, Any], root: Path | Reach | None) -> Row:
    questions, answers = (texts(row[key], key) for key in ("src", "tgt"))
    labels = a_list(row.get("label") or [1] * len(answers), "label")
    if not len(questions) == len(answers) == len(labels):
        what = f"{len(questions)} src, {len(answers)} tgt and {len(labels)} label"
        raise RowFault(what, "give one of each per turn")
    messages = system_message(row)
    for question, reply, label in zip(questions, answers, labels, strict=True):
        messages += [{"role": "user", "content": question}, {**answer(reply), "label": label}]
    return Row(messages=messages)


def _erniekit_vl(row: Mapping[str, Any], root: Path | Reach | None) -> Row:
    if row.get("video_info"):
        raise RowFault("video_info: videos are not trained on yet", "drop the row, or give frames as images")
    before: dict[int, list[Any]] = {}
    pieces = objects(row["text_info"], "text_info")
    for image in objects(row.get("image_info") or [], "image_info"):
        index = image.get("matched_text_index")
        if not isinstance(index, int) or isinstance(index, bool) or not 0 <= index < len(pieces):
            raise RowFault(f"matched_text_index {index!r} matches no text", "count text_info from 0")
        before.setdefault(index, []).append(image.get("image_url", image.get("image")))
    messages, images = system_message(row), []
    for index, piece in enumerate(pieces):
        role = {"mask": "user", "no_mask": "assistant"}.get(text(piece.get("tag"), "tag"))
        if role is None:
            raise RowFault(f"tag {piece.get('tag')!r} in text_info", "tags are mask (prompt) and no_mask (answer)")
        here = before.get(index, [])
        images += [media.reference(image, root) for image in here]
        parts = [*({"type": "image"} for _ in here), {"type": "text", "text": text(piece.get("text") or "", "text")}]
        if messages and messages[-1]["role"] == role:
            messages[-1]["content"] += parts
        else:
            messages.append({"role": role, "content": parts})
    return Row(messages=messages, images=images)


# Columns by which a format is known; `a|b` is either. The first format that fits is taken.
KEYS: dict[str, tuple[str, ...]] = {
    **preferences.KEYS,
    "messages": ("messages",),
    "prompt_completion": ("prompt", "completion"),
    "sharegpt": ("conversations",),
    "alpaca": ("instruction", "output"),
    "erniekit": ("src", "tgt"),
    "erniekit_vl": ("text_info",),
    "prompt": ("prompt",),
}
_CONVERTERS: dict[str, Callable[[Mapping[str, Any], Path | Reach | None], Row]] = {
    **preferences.CONVERTERS,
    "messages": _messages,
    "prompt_completion": _prompt_completion,
    "sharegpt": _sharegpt,
    "alpaca": _alpaca,
    "erniekit": _erniekit,
    "erniekit_vl": _erniekit_vl,
    "prompt": _prompt,
}
