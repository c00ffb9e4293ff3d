"""Input formats: one function converts a row of each to a canonical row; the first row's columns tell the format."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ernie_align.data import media
from ernie_align.data.media import MediaAccess
from ernie_align.data.messages import (
    assistant_message,
    extract_images,
    normalize_message,
    parse_thinking,
    parse_tools,
    place_images,
    sharegpt_message,
    system_message,
    user_message,
)
from ernie_align.data.row import (
    MAX_MESSAGES,
    MAX_TEXT,
    Message,
    Response,
    Row,
    RowFault,
    expect,
    expect_objects,
    expect_texts,
)

_Root = Path | MediaAccess | None
_SIDES = ("chosen", "rejected")
_SCORES = ("overall_score", "score", "rating")  # of a completion in UltraFeedback-style rows


def detect_format(row: Mapping[str, Any]) -> str:
    """Return the format of a row by its columns. Raises RowFault if none fits."""
    for name, columns in FORMAT_COLUMNS.items():
        if not _missing(row, columns):
            return name
    known = "; ".join(f"{name} ({', '.join(columns)})" for name, columns in FORMAT_COLUMNS.items())
    raise RowFault(f"no known format has the columns {', '.join(row)}", f"the formats and their columns: {known}")


def canonicalize(row: Mapping[str, Any], format: str, root: _Root = None) -> Row:
    """Convert a row in `format` to a canonical row. root: the folder that relative image paths start at.

    Raises RowFault if the row is not in that format, or if image parts and images do not match.
    """
    convert, columns = _FORMATS[format]
    missing = _missing(row, columns)
    if missing:
        raise RowFault(f"a {format} row without {', '.join(missing)}", f"it has {', '.join(row)}")
    result = convert(row, root)
    if result.plain is None and not result.messages:
        raise RowFault("no messages", "write a conversation, or drop the row")
    _check_size(result)
    result.messages = [normalize_message(message) for message in result.messages]
    result.images = result.images or [media.image_reference(image, root) for image in _image_column(row)]
    place_images(result)
    result.tools = parse_tools(row)
    result.thinking = parse_thinking(row)
    used = {name for column in columns for name in column.split("|")}
    used |= {"images", "image", "tools", "thinking", "enable_thinking", "chat_template_kwargs", "system"}
    result.columns = {key: value for key, value in row.items() if key not in used}
    return result


def _check_size(row: Row) -> None:
    """Raise RowFault for a row that would take minutes to render."""
    turns = max([len(row.messages), *(len(response.messages) for response in row.responses)])
    if turns > MAX_MESSAGES:
        what = f"{turns:,} messages are over the limit of {MAX_MESSAGES:,}"
        raise RowFault(what, "split the conversation", kind="too many messages")
    length = sum(len(part) for part in (*(row.plain or ()), *(response.text or "" for response in row.responses)))
    messages = [*row.messages, *(message for response in row.responses for message in response.messages)]
    length += sum(len(str(message.get("content") or "")) for message in messages if isinstance(message, Mapping))
    if length > MAX_TEXT:
        what = f"{length:,} characters of text are over the limit of {MAX_TEXT:,}"
        raise RowFault(what, "split or drop the row", kind="too much text")


def _missing(row: Mapping[str, Any], columns: tuple[str, ...]) -> list[str]:
    return [column for column in columns if all(row.get(name) is None for name in column.split("|"))]


def _image_column(row: Mapping[str, Any]) -> list[Any]:
    return _as_list(next((row[name] for name in ("images", "image") if row.get(name) is not None), []))


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


# -- formats with one answer ------------------------------------------------------------------------------------------


def _messages(row: Mapping[str, Any], root: _Root, column: str = "messages") -> Row:
    messages, images = extract_images(row[column], root)
    return Row(messages=messages, images=images)


def _prompt_completion(row: Mapping[str, Any], root: _Root) -> Row:
    prompt, completion = row["prompt"], row["completion"]
    if isinstance(prompt, str) and isinstance(completion, str):
        return Row(plain=(prompt, completion))
    if not (isinstance(prompt, list) and isinstance(completion, list)):
        raise RowFault("prompt and completion must both be text or both be messages", "write both in one way")
    messages, images = extract_images([*prompt, *completion], root)
    for message in messages[: len(prompt)]:  # only the completion is trained
        if message["role"] == "assistant":
            message["label"] = 0
    return Row(messages=messages, images=images, prompt_length=len(prompt))


def _prompt(row: Mapping[str, Any], root: _Root) -> Row:
    """Convert TRL's prompt-only type."""
    return Row(plain=(row["prompt"], "")) if isinstance(row["prompt"], str) else _messages(row, root, "prompt")


def _sharegpt(row: Mapping[str, Any], root: _Root) -> Row:
    return Row(messages=_sharegpt_messages(row))


def _sharegpt_messages(row: Mapping[str, Any]) -> list[Message]:
    return [*system_message(row), *map(sharegpt_message, expect_objects(row["conversations"], "conversations"))]


def _alpaca(row: Mapping[str, Any], root: _Root) -> Row:
    answer = assistant_message(expect(row["output"], str, "output"))
    return Row(messages=[*_alpaca_prompt(row, row["instruction"]), answer])


def _alpaca_prompt(row: Mapping[str, Any], instruction: Any) -> list[Message]:
    """Return the system message, the history, and the question: instruction and input on two lines."""
    messages = system_message(row)
    pairs = [expect(pair, list, "an entry of history") for pair in expect(row.get("history") or [], list, "history")]
    if any(len(pair) != 2 for pair in pairs):
        raise RowFault("an entry of history is not a pair", "write [question, answer]")
    for question, answer in pairs:
        messages.append(user_message(expect(question, str, "history")))
        messages.append(assistant_message(expect(answer, str, "history")))
    parts = (expect(instruction, str, "instruction"), expect(row.get("input") or "", str, "input"))
    return [*messages, user_message("\n".join(part for part in parts if part))]


def _erniekit(row: Mapping[str, Any], root: _Root) -> Row:
    questions, answers = (expect_texts(row[key], key) for key in ("src", "tgt"))
    labels = expect(row.get("label") or [1] * len(answers), list, "label")
    if not len(questions) == len(answers) == len(labels):
        what = f"{len(questions)} src, {len(answers)} tgt and {len(labels)} label"
        raise RowFault(what, "give one of each per turn")
    messages = system_message(row)
    for question, answer, label in zip(questions, answers, labels, strict=True):
        messages += [user_message(question), {**assistant_message(answer), "label": label}]
    return Row(messages=messages)


def _erniekit_vl(row: Mapping[str, Any], root: _Root) -> Row:
    if row.get("video_info"):
        raise RowFault("video_info: videos are not supported yet", "drop the row, or give frames as images")
    images_before: dict[int, list[Any]] = {}
    texts = expect_objects(row["text_info"], "text_info")
    for image in expect_objects(row.get("image_info") or [], "image_info"):
        index = image.get("matched_text_index")
        if not isinstance(index, int) or isinstance(index, bool) or not 0 <= index < len(texts):
            raise RowFault(f"matched_text_index {index!r} matches no text", "count text_info from 0")
        images_before.setdefault(index, []).append(image.get("image_url", image.get("image")))
    messages, images = system_message(row), []
    for index, text in enumerate(texts):
        role = {"mask": "user", "no_mask": "assistant"}.get(expect(text.get("tag"), str, "tag"))
        if role is None:
            raise RowFault(f"tag {text.get('tag')!r} in text_info", "expected mask (prompt) or no_mask (answer)")
        references = [media.image_reference(image, root) for image in images_before.get(index, [])]
        images += references
        content = {"type": "text", "text": expect(text.get("text") or "", str, "text")}
        parts = [*({"type": "image"} for _ in references), content]
        if messages and messages[-1]["role"] == role:
            messages[-1]["content"] += parts
        else:
            messages.append({"role": role, "content": parts})
    return Row(messages=messages, images=images)


# -- preferences ------------------------------------------------------------------------------------------------------


def _preference(row: Mapping[str, Any], root: _Root) -> Row:
    """Convert TRL's preference type: text or messages, with the prompt explicit or inside both sides."""
    prompt, sides = row.get("prompt"), [row["chosen"], row["rejected"]]
    if all(isinstance(side, str) for side in sides):
        if isinstance(prompt, list):
            return _ranked_row(prompt, [[assistant_message(side)] for side in sides], root)
        if prompt is None:
            prompt, *sides = _split_text(*sides)
        prompt = expect(prompt, str, "prompt")
        return Row(plain=(prompt, ""), responses=[Response(1, text=sides[0]), Response(0, text=sides[1])])
    chosen, rejected = map(_as_list, sides)
    if not isinstance(prompt, list):
        prompt = prompt if prompt is None else expect(prompt, str, "prompt")
        shared = _common_length(chosen, rejected)
        while shared and _role(chosen[shared - 1]) == "assistant" and shared == min(len(chosen), len(rejected)):
            shared -= 1  # equal sides: the last answer is what is compared
        common = chosen[:shared]
        if not any(_role(message) == "user" for message in common):
            if prompt is None:
                raise RowFault("no prompt: chosen and rejected do not begin with the same messages", "give the prompt")
            common = [*common, user_message(prompt)]
        prompt, chosen, rejected = common, chosen[shared:], rejected[shared:]
    system = [] if prompt and _role(prompt[0]) == "system" else system_message(row)
    return _ranked_row([*system, *prompt], [chosen, rejected], root)


def _sharegpt_preference(row: Mapping[str, Any], root: _Root) -> Row:
    sides = [
        [
            sharegpt_message(turn) if isinstance(turn, Mapping) and "from" in turn else turn
            for turn in _as_list(row[side])
        ]
        for side in _SIDES
    ]
    return _ranked_row(_sharegpt_messages(row), sides, root)


def _alpaca_preference(row: Mapping[str, Any], root: _Root) -> Row:
    sides = [[assistant_message(row[key])] if isinstance(row[key], str) else _as_list(row[key]) for key in _SIDES]
    return _ranked_row(_alpaca_prompt(row, row.get("question") or row.get("instruction") or ""), sides, root)


def _erniekit_preference(row: Mapping[str, Any], root: _Root) -> Row:
    questions, answers = expect_texts(row["src"], "src"), expect_texts(row.get("tgt") or [], "tgt")
    responses, ranks = expect(row["response"], list, "response"), expect(row["sort"], list, "sort")
    if len(answers) != len(questions) - 1 or len(responses) != len(ranks):
        what = f"{len(questions)} src, {len(answers)} tgt, {len(responses)} response and {len(ranks)} sort"
        raise RowFault(what, "give one tgt fewer than src, and one sort per response")
    prompt = system_message(row)
    for number, question in enumerate(questions):
        prompt += [user_message(question), *map(assistant_message, answers[number : number + 1])]
    # a response is one text, or answer, question, answer, ... as the official toolkit lists turns
    sides = [
        [(user_message if number % 2 else assistant_message)(text) for number, text in enumerate(turns)]
        for turns in (expect_texts(response, "response") for response in responses)
    ]
    return _ranked_row(prompt, sides, root, ranks)


def _ultrafeedback(row: Mapping[str, Any], root: _Root) -> Row:
    sides, ranks = [], []
    for completion in expect_objects(row["completions"], "completions"):
        response = completion.get("response", completion.get("text"))
        score = next((completion[key] for key in _SCORES if completion.get(key) is not None), None)
        if response is None or score is None:
            raise RowFault("a completion without response or score", f"give response and one of {', '.join(_SCORES)}")
        sides.append([assistant_message(response)])
        ranks.append(score)
    question = user_message(expect(row["instruction"], str, "instruction"))
    return _ranked_row([*system_message(row), question], sides, root, ranks)


def _ranked_row(prompt: list[Message], sides: list[list[Any]], root: _Root, ranks: Any = (1, 0)) -> Row:
    messages, images = extract_images(prompt, root)
    try:
        scores = [float(rank) for rank in ranks]
    except (TypeError, ValueError, OverflowError):
        scores = [math.nan]
    if not all(map(math.isfinite, scores)):
        raise RowFault(f"ranks {list(ranks)!r}"[:80], "give numbers as ranks", kind="a rank that is not a number")
    responses = [_make_response(score, side) for score, side in zip(scores, sides, strict=True)]
    return Row(messages=messages, images=images, responses=responses)


def _make_response(rank: float, messages: list[Any]) -> Response:
    """Return the response; its fault is stored with it, because the recipe decides if such a pair stops the run."""
    if any(isinstance(message, Mapping) and _has_image(message) for message in messages):
        return Response(rank, fault=RowFault("an image in only one side", "put the images into the prompt"))
    try:
        normalized = [normalize_message(message) for message in messages]
    except RowFault as fault:
        return Response(rank, fault=fault)
    if not any(message["role"] == "assistant" for message in normalized):
        return Response(rank, fault=RowFault("no answer", "end it with an assistant turn"))
    return Response(rank, normalized)


def _has_image(message: Mapping[str, Any]) -> bool:
    parts = message.get("content")
    kinds = {part.get("type") for part in parts if isinstance(part, Mapping)} if isinstance(parts, list) else set()
    return bool(kinds & {"image", "image_url"})


def _role(message: Any) -> str | None:
    return message.get("role") if isinstance(message, Mapping) else None


def _split_text(chosen: str, rejected: str) -> tuple[str, str, str]:
    """Split off the common beginning, up to the word in which both differ, as the prompt.

    A space before that word belongs to the answers.
    """
    head = chosen[: _common_length(chosen, rejected)]
    start = max(head.rfind(" "), head.rfind("\n") + 1, 0)
    if not start:
        raise RowFault("no prompt: chosen and rejected do not begin with the same words", "give the prompt")
    return chosen[:start], chosen[start:], rejected[start:]


def _common_length(left: Sequence[Any], right: Sequence[Any]) -> int:
    pairs = enumerate(zip(left, right, strict=False))
    return next((place for place, (one, other) in pairs if one != other), min(len(left), len(right)))


# format -> its converter, and the columns that identify it (`a|b`: either); the first format that fits is taken
_FORMATS: dict[str, tuple[Callable[[Mapping[str, Any], _Root], Row], tuple[str, ...]]] = {
    "sharegpt_preference": (_sharegpt_preference, ("conversations", "chosen", "rejected")),
    "alpaca_preference": (_alpaca_preference, ("question|instruction", "chosen", "rejected")),
    "preference": (_preference, ("chosen", "rejected")),
    "erniekit_preference": (_erniekit_preference, ("src", "response", "sort")),
    "ultrafeedback": (_ultrafeedback, ("instruction", "completions")),
    "messages": (_messages, ("messages",)),
    "prompt_completion": (_prompt_completion, ("prompt", "completion")),
    "sharegpt": (_sharegpt, ("conversations",)),
    "alpaca": (_alpaca, ("instruction", "output")),
    "erniekit": (_erniekit, ("src", "tgt")),
    "erniekit_vl": (_erniekit_vl, ("text_info",)),
    "prompt": (_prompt, ("prompt",)),
}
FORMAT_COLUMNS = {name: columns for name, (_, columns) in _FORMATS.items()}
