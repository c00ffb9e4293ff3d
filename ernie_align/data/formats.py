"""One row of the world -> one canonical row. Each format is one function; the first row's keys tell which it is."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ernie_align.data import media
from ernie_align.data.media import MediaAccess
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
from ernie_align.data.row import MAX_MESSAGES, MAX_TEXT, Message, Response, Row, RowFault, a_list, objects, text, texts


def detect_format(row: Mapping[str, Any]) -> str:
    """The format of a row, by its keys. Raises RowFault where none fits."""
    for name, keys in FORMAT_COLUMNS.items():
        if not _missing(row, keys):
            return name
    known = "; ".join(f"{name} ({', '.join(keys)})" for name, keys in FORMAT_COLUMNS.items())
    raise RowFault(f"no known format has the columns {', '.join(row)}", f"the formats and their columns: {known}")


def canonicalize(row: Mapping[str, Any], format: str, root: Path | MediaAccess | None = None) -> Row:
    """A row in `format` -> a canonical row. root: the folder that image paths start at.

    Raises RowFault where the row is not in that format, or where image parts and images do not match.
    """
    missing = _missing(row, FORMAT_COLUMNS[format])
    if missing:
        raise RowFault(f"a {format} row without {', '.join(missing)}", f"it has {', '.join(row)}")
    result = _CONVERTERS[format](row, root)
    if result.plain is None and not result.messages:
        raise RowFault("no messages", "write a conversation, or drop the row")
    _bounded(result)
    result.messages = [normal_message(message) for message in result.messages]
    result.images = result.images or [
        media.image_reference(value, root) for value in column_list(row, "images", "image")
    ]
    place_images(result)
    result.tools = tools_of(row)
    result.thinking = thinking_of(row)
    own = [name for key in FORMAT_COLUMNS[format] for name in key.split("|")]
    used = {*own, "images", "image", "tools", "thinking", "enable_thinking", "chat_template_kwargs", "system"}
    result.columns = {key: value for key, value in row.items() if key not in used}
    return result


def _bounded(row: Row) -> None:
    """Raises RowFault for a row that would take minutes to render."""
    turns = max([len(row.messages), *(len(ending.messages) for ending in row.responses)])
    if turns > MAX_MESSAGES:
        what = f"{turns:,} messages are over {MAX_MESSAGES:,}"
        raise RowFault(what, "split the conversation", kind="too many messages")
    length = sum(len(part) for part in (*(row.plain or ()), *(ending.text or "" for ending in row.responses)))
    said = [*row.messages, *(message for ending in row.responses for message in ending.messages)]
    length += sum(len(str(message.get("content") or "")) for message in said if isinstance(message, Mapping))
    if length > MAX_TEXT:
        what = f"{length:,} characters of text are over {MAX_TEXT:,}"
        raise RowFault(what, "split or drop the row", kind="too much text")


def _missing(row: Mapping[str, Any], keys: tuple[str, ...]) -> list[str]:
    return [key for key in keys if all(row.get(name) is None for name in key.split("|"))]


def _messages(row: Mapping[str, Any], root: Path | MediaAccess | None) -> Row:
    messages, images = take_images(row["messages"], root)
    return Row(messages=messages, images=images)


def _prompt_completion(row: Mapping[str, Any], root: Path | MediaAccess | None) -> Row:
    prompt, completion = row["prompt"], row["completion"]
    if isinstance(prompt, str) and isinstance(completion, str):
        return Row(plain=(prompt, completion))
    if not (isinstance(prompt, list) and isinstance(completion, list)):
        raise RowFault("prompt and completion must both be text or both be messages", "write both in one way")
    messages, images = take_images([*prompt, *completion], root)
    for message in messages[: len(prompt)]:  # the completion alone is trained
        if message["role"] == "assistant":
            message["label"] = 0
    return Row(messages=messages, images=images, prompt_length=len(prompt))


def _prompt(row: Mapping[str, Any], root: Path | MediaAccess | None) -> Row:
    """TRL's prompt-only type."""
    if isinstance(row["prompt"], str):
        return Row(plain=(row["prompt"], ""))
    messages, images = take_images(row["prompt"], root)
    return Row(messages=messages, images=images)


def _sharegpt(row: Mapping[str, Any], root: Path | MediaAccess | None) -> Row:
    return Row(messages=[*system_message(row), *map(sharegpt_message, objects(row["conversations"], "conversations"))])


def _alpaca(row: Mapping[str, Any], root: Path | MediaAccess | None) -> Row:
    messages = system_message(row)
    for asked, replied in history_of(row):
        messages += [{"role": "user", "content": asked}, answer(replied)]
    parts = (text(row["instruction"], "instruction"), text(row.get("input") or "", "input"))
    question = "\n".join(part for part in parts if part)
    return Row(messages=[*messages, {"role": "user", "content": question}, answer(text(row["output"], "output"))])


def _erniekit(row: Mapping[str, Any], root: Path | MediaAccess | None) -> Row:
    questions, answers = (texts(row[key], key) for key in ("src", "tgt"))
    labels = a_list(row.get("label") or [1] * len(answers), "label")
    if not len(questions) == len(answers) == len(labels):
        what = f"{len(questions)} src, {len(answers)} tgt and {len(labels)} label"
        raise RowFault(what, "give one of each per turn")
    messages = system_message(row)
    for question, reply, label in zip(questions, answers, labels, strict=True):
        messages += [{"role": "user", "content": question}, {**answer(reply), "label": label}]
    return Row(messages=messages)


def _erniekit_vl(row: Mapping[str, Any], root: Path | MediaAccess | None) -> Row:
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
        images += [media.image_reference(image, root) for image in here]
        parts = [*({"type": "image"} for _ in here), {"type": "text", "text": text(piece.get("text") or "", "text")}]
        if messages and messages[-1]["role"] == role:
            messages[-1]["content"] += parts
        else:
            messages.append({"role": role, "content": parts})
    return Row(messages=messages, images=images)


KEYS: dict[str, tuple[str, ...]] = {
    "sharegpt_preference": ("conversations", "chosen", "rejected"),
    "alpaca_preference": ("question|instruction", "chosen", "rejected"),
    "preference": ("chosen", "rejected"),
    "erniekit_preference": ("src", "response", "sort"),
    "ultrafeedback": ("instruction", "completions"),
}
_SIDES = ("chosen", "rejected")
_SCORES = ("overall_score", "score", "rating")  # of a completion in UltraFeedback-style rows


def _preference(row: Mapping[str, Any], root: Path | MediaAccess | None) -> Row:
    """TRL's: prompt, chosen and rejected, as text or messages; the prompt may be left inside both sides."""
    prompt, sides = row.get("prompt"), [row["chosen"], row["rejected"]]
    if all(isinstance(side, str) for side in sides):
        if isinstance(prompt, list):
            return _ranked(prompt, [[answer(side)] for side in sides], root)
        if prompt is None:
            prompt, *sides = _split_text(*sides)
        prompt = text(prompt, "prompt")
        return Row(plain=(prompt, ""), responses=[Response(1, text=sides[0]), Response(0, text=sides[1])])
    chosen, rejected = (_listed(side) for side in sides)
    if not isinstance(prompt, list):
        prompt = prompt if prompt is None else text(prompt, "prompt")
        shared = _shared(chosen, rejected)
        while shared and _role(chosen[shared - 1]) == "assistant" and shared == min(len(chosen), len(rejected)):
            shared -= 1  # two equal sides: the last answer is what is compared
        spoken = chosen[:shared]
        if not any(_role(message) == "user" for message in spoken):
            if prompt is None:
                raise RowFault("no prompt: chosen and rejected do not begin with the same messages", "give the prompt")
            spoken = [*spoken, {"role": "user", "content": prompt}]
        prompt, chosen, rejected = spoken, chosen[shared:], rejected[shared:]
    return _ranked([*_system_before(row, prompt), *prompt], [chosen, rejected], root)


def _sharegpt_preference(row: Mapping[str, Any], root: Path | MediaAccess | None) -> Row:
    prompt = [*system_message(row), *map(sharegpt_message, objects(row["conversations"], "conversations"))]
    sides = [
        [sharegpt_message(turn) if isinstance(turn, Mapping) and "from" in turn else turn for turn in _listed(row[key])]
        for key in _SIDES
    ]
    return _ranked(prompt, sides, root)


def _alpaca_preference(row: Mapping[str, Any], root: Path | MediaAccess | None) -> Row:
    prompt: list[Message] = system_message(row)
    for question, reply in history_of(row):
        prompt += [{"role": "user", "content": question}, answer(reply)]
    parts = (
        text(row.get("question") or row.get("instruction") or "", "question"),
        text(row.get("input") or "", "input"),
    )
    question = "\n".join(part for part in parts if part)
    sides = [[answer(row[key])] if isinstance(row[key], str) else _listed(row[key]) for key in _SIDES]
    return _ranked([*prompt, {"role": "user", "content": question}], sides, root)


def _erniekit_preference(row: Mapping[str, Any], root: Path | MediaAccess | None) -> Row:
    questions, replies = texts(row["src"], "src"), texts(row.get("tgt") or [], "tgt")
    responses, ranks = a_list(row["response"], "response"), a_list(row["sort"], "sort")
    if len(replies) != len(questions) - 1 or len(responses) != len(ranks):
        what = f"{len(questions)} src, {len(replies)} tgt, {len(responses)} response and {len(ranks)} sort"
        raise RowFault(what, "give one tgt fewer than src, and one sort per response")
    prompt = system_message(row)
    for number, question in enumerate(questions):
        prompt.append({"role": "user", "content": question})
        prompt += [answer(reply) for reply in replies[number : number + 1]]
    sides = [_turns(response) for response in responses]
    return _ranked(prompt, sides, root, ranks)


def _ultrafeedback(row: Mapping[str, Any], root: Path | MediaAccess | None) -> Row:
    sides, ranks = [], []
    for completion in objects(row["completions"], "completions"):
        said = completion.get("response", completion.get("text"))
        score = next((completion[key] for key in _SCORES if completion.get(key) is not None), None)
        if said is None or score is None:
            raise RowFault("a completion without response or score", f"give response and one of {', '.join(_SCORES)}")
        sides.append([answer(said)])
        ranks.append(score)
    return _ranked(
        [*system_message(row), {"role": "user", "content": text(row["instruction"], "instruction")}], sides, root, ranks
    )


CONVERTERS: dict[str, Callable[[Mapping[str, Any], Path | MediaAccess | None], Row]] = {
    "sharegpt_preference": _sharegpt_preference,
    "alpaca_preference": _alpaca_preference,
    "preference": _preference,
    "erniekit_preference": _erniekit_preference,
    "ultrafeedback": _ultrafeedback,
}


def _ranked(prompt: list[Message], sides: list[list[Any]], root: Path | MediaAccess | None, ranks: Any = (1, 0)) -> Row:
    messages, images = take_images(prompt, root)
    try:
        scores = [float(rank) for rank in ranks]
    except (TypeError, ValueError, OverflowError):
        scores = [math.nan]
    if not all(map(math.isfinite, scores)):
        raise RowFault(f"ranks {list(ranks)!r}"[:80], "a rank is a number", kind="a rank that is no number")
    responses = [_ending(score, side) for score, side in zip(scores, sides, strict=True)]
    return Row(messages=messages, images=images, responses=responses)


def _ending(rank: float, messages: list[Any]) -> Response:
    """A fault of one side is kept with it: the recipe says whether such a pair stops the run."""
    if any(isinstance(message, Mapping) and _shows_image(message) for message in messages):
        fault = RowFault("an image in only one side", "put the images into the prompt")
        return Response(rank, fault=fault)
    try:
        normal = [normal_message(message) for message in messages]
    except RowFault as fault:
        return Response(rank, fault=fault)
    if not any(message["role"] == "assistant" for message in normal):
        return Response(rank, fault=RowFault("no answer", "end it with an assistant turn"))
    return Response(rank, normal)


def _shows_image(message: Mapping[str, Any]) -> bool:
    parts = message.get("content")
    kinds = {part.get("type") for part in parts if isinstance(part, Mapping)} if isinstance(parts, list) else set()
    return bool(kinds & {"image", "image_url"})


def _listed(side: Any) -> list[Any]:
    return side if isinstance(side, list) else [side]


def _turns(response: Any) -> list[Message]:
    """A response of one text, or of answer, question, answer, ... as the official toolkit lists turns."""
    turns = enumerate(texts(response, "response"))
    return [answer(said) if number % 2 == 0 else {"role": "user", "content": said} for number, said in turns]


def _role(message: Any) -> str | None:
    return message.get("role") if isinstance(message, Mapping) else None


def _system_before(row: Mapping[str, Any], prompt: list[Message]) -> list[Message]:
    return [] if prompt and _role(prompt[0]) == "system" else system_message(row)


def _split_text(chosen: str, rejected: str) -> tuple[str, str, str]:
    """The prompt is what both begin with, up to the word where they part; a space before it belongs to the answers."""
    head = chosen[: _shared(chosen, rejected)]
    start = max(head.rfind(" "), head.rfind("\n") + 1, 0)
    if not start:
        raise RowFault("no prompt: chosen and rejected do not begin with the same words", "give the prompt")
    return chosen[:start], chosen[start:], rejected[start:]


def _shared(left: Sequence[Any], right: Sequence[Any]) -> int:
    """Length of what both begin with."""
    pairs = enumerate(zip(left, right, strict=False))
    return next((place for place, (one, other) in pairs if one != other), min(len(left), len(right)))


# Columns by which a format is known; `a|b` is either. The first format that fits is taken.
FORMAT_COLUMNS: dict[str, tuple[str, ...]] = {
    **KEYS,
    "messages": ("messages",),
    "prompt_completion": ("prompt", "completion"),
    "sharegpt": ("conversations",),
    "alpaca": ("instruction", "output"),
    "erniekit": ("src", "tgt"),
    "erniekit_vl": ("text_info",),
    "prompt": ("prompt",),
}
_CONVERTERS: dict[str, Callable[[Mapping[str, Any], Path | MediaAccess | None], Row]] = {
    **CONVERTERS,
    "messages": _messages,
    "prompt_completion": _prompt_completion,
    "sharegpt": _sharegpt,
    "alpaca": _alpaca,
    "erniekit": _erniekit,
    "erniekit_vl": _erniekit_vl,
    "prompt": _prompt,
}
