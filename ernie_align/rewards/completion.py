"""A completion taken apart: what was reasoned, and what was answered."""

from __future__ import annotations

import re
from typing import Any

Completion = str | list[dict[str, Any]]

OPEN, CLOSE = "<think>", "</think>"
_RESPONSE = re.compile(r"\s*<response>(.*?)(?:</response>\s*|\Z)", re.DOTALL)  # 21B-Thinking puts its answer in one


def parse_completion(text: str, *, opened: bool) -> dict[str, Any]:
    """Generated text -> an assistant message: content, and reasoning_content where there is reasoning.

    opened: the generation prompt ended in an open <think>. Then a text that never closes it is all reasoning, and its
    content is empty: an answer that was not reached is not guessed. The same holds for a <think> the text opens itself.
    Both parts are without the white space around them, as the family's templates write them.
    """
    reasoning, content = _split(text, opened=opened)
    response = _RESPONSE.fullmatch(content)
    parts = {"role": "assistant", "content": (response[1] if response else content).strip()}
    return parts if reasoning is None else {**parts, "reasoning_content": reasoning.strip()}


def _split(text: str, *, opened: bool) -> tuple[str | None, str]:
    before, start, rest = ("", OPEN, text.lstrip().removeprefix(OPEN)) if opened else text.partition(OPEN)
    if not start:
        return None, text
    reasoning, _, answer = rest.partition(CLOSE)
    return reasoning, before + answer


def answer_text(completion: Completion) -> str:
    """The answer alone, never the reasoning: what verifiers judge. Of several messages, the last one's."""
    return _last(completion)["content"]


def reasoning_text(completion: Completion) -> str | None:
    """The reasoning, or None where there is none. Of several messages, the last one's."""
    return _last(completion).get("reasoning_content")


def _last(completion: Completion) -> dict[str, Any]:
    """Plain text closes a thought that its prompt opened, so a lone </think> tells that there was one."""
    if isinstance(completion, str):
        return parse_completion(completion, opened=CLOSE in completion and OPEN not in completion)
    if not completion:
        return {"content": ""}
    last = completion[-1]
    content = content_text(last.get("content"))
    if last.get("reasoning_content") is None and OPEN in content:
        return parse_completion(content, opened=False)
    return {**last, "content": content}


def content_text(content: str | list[dict[str, Any]] | None) -> str:
    """The text of a message's content; images and other parts have none."""
    if isinstance(content, list):
        return "".join(part.get("text", "") for part in content if part.get("type") == "text")
    return content or ""
