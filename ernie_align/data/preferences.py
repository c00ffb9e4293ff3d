"""Preference rows of the world -> a prompt and its ranked endings."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ernie_align.data.media import Reach
from ernie_align.data.messages import answer, history_of, normal_message, sharegpt_message, system_message, take_images
from ernie_align.data.row import Ending, Message, Row, RowFault
from ernie_align.data.shapes import a_list, objects, text, texts

KEYS: dict[str, tuple[str, ...]] = {
    "sharegpt_preference": ("conversations", "chosen", "rejected"),
    "alpaca_preference": ("question|instruction", "chosen", "rejected"),
    "preference": ("chosen", "rejected"),
    "erniekit_preference": ("src", "response", "sort"),
    "ultrafeedback": ("instruction", "completions"),
}
_SIDES = ("chosen", "rejected")
_SCORES = ("overall_score", "score", "rating")  # of a completion in UltraFeedback-style rows


def _preference(row: Mapping[str, Any], root: Path | Reach | None) -> Row:
    """TRL's: prompt, chosen and rejected, as text or messages; the prompt may be left inside both sides."""
    prompt, sides = row.get("prompt"), [row["chosen"], row["rejected"]]
    if all(isinstance(side, str) for side in sides):
        if isinstance(prompt, list):
            return _ranked(prompt, [[answer(side)] for side in sides], root)
        if prompt is None:
            prompt, *sides = _split_text(*sides)
        prompt = text(prompt, "prompt")
        return Row(plain=(prompt, ""), endings=[Ending(1, text=sides[0]), Ending(0, text=sides[1])])
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


def _sharegpt(row: Mapping[str, Any], root: Path | Reach | None) -> Row:
    prompt = [*system_message(row), *map(sharegpt_message, objects(row["conversations"], "conversations"))]
    sides = [
        [sharegpt_message(turn) if isinstance(turn, Mapping) and "from" in turn else turn for turn in _listed(row[key])]
        for key in _SIDES
    ]
    return _ranked(prompt, sides, root)


def _alpaca(row: Mapping[str, Any], root: Path | Reach | None) -> Row:
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


def _erniekit(row: Mapping[str, Any], root: Path | Reach | None) -> Row:
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


def _ultrafeedback(row: Mapping[str, Any], root: Path | Reach | None) -> Row:
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


CONVERTERS: dict[str, Callable[[Mapping[str, Any], Path | Reach | None], Row]] = {
    "sharegpt_preference": _sharegpt,
    "alpaca_preference": _alpaca,
    "preference": _preference,
    "erniekit_preference": _erniekit,
    "ultrafeedback": _ultrafeedback,
}


def _ranked(prompt: list[Message], sides: list[list[Any]], root: Path | Reach | None, ranks: Any = (1, 0)) -> Row:
    messages, images = take_images(prompt, root)
    try:
        scores = [float(rank) for rank in ranks]
    except (TypeError, ValueError, OverflowError):
        scores = [math.nan]
    if not all(map(math.isfinite, scores)):
        raise RowFault(f"ranks {list(ranks)!r}"[:80], "a rank is a number", kind="a rank that is no number")
    endings = [_ending(score, side) for score, side in zip(scores, sides, strict=True)]
    return Row(messages=messages, images=images, endings=endings)


def _ending(rank: float, messages: list[Any]) -> Ending:
    """A fault of one side is kept with it: the recipe says whether such a pair stops the run."""
    if any(isinstance(message, Mapping) and _shows_image(message) for message in messages):
        fault = RowFault("an image in only one side", "put the images into the prompt")
        return Ending(rank, fault=fault)
    try:
        normal = [normal_message(message) for message in messages]
    except RowFault as fault:
        return Ending(rank, fault=fault)
    if not any(message["role"] == "assistant" for message in normal):
        return Ending(rank, fault=RowFault("no answer", "end it with an assistant turn"))
    return Ending(rank, normal)


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
