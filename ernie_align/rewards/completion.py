"""Split a completion into its reasoning and its answer."""

from __future__ import annotations

import re
from typing import Any

Completion = str | list[dict[str, Any]]

OPEN, CLOSE = "<think>", "</think>"
_RESPONSE = re.compile(r"\s*<response>(.*?)(?:</response>\s*|\Z)", re.DOTALL)  # tags of 21B-Thinking's answers


def parse_completion(text: str, *, opened: bool) -> dict[str, Any]:
    """Parse generated text into an assistant message: content, and reasoning_content if there is reasoning.

    opened: the generation prompt ended in an open <think>. A text that never closes it is all reasoning and its content
    is empty: an answer that was not reached is not guessed. The same holds for a <think> that the text itself opens.
    White space around both parts is stripped, as in the family's chat templates.
    """
    reasoning, content = _split_reasoning(text, opened=opened)
    response = _RESPONSE.fullmatch(content)
    message = {"role": "assistant", "content": (response[1] if response else content).strip()}
    return message if reasoning is None else {**message, "reasoning_content": reasoning.strip()}


def _split_reasoning(text: str, *, opened: bool) -> tuple[str | None, str]:
    before, start, rest = ("", OPEN, text.lstrip().removeprefix(OPEN)) if opened else text.partition(OPEN)
    if not start:
        return None, text
    reasoning, _, answer = rest.partition(CLOSE)
    return reasoning, before + answer


def answer_text(completion: Completion) -> str:
    """Return the answer without its reasoning, which verifiers never see. Of several messages, the last one's."""
    return _last_message(completion)["content"]


def reasoning_text(completion: Completion) -> str | None:
    """Return the reasoning, or None if there is none. Of several messages, the last one's."""
    return _last_message(completion).get("reasoning_content")


def _last_message(completion: Completion) -> dict[str, Any]:
    """Return the last message. In plain text, </think> without <think> closes reasoning that the prompt opened."""
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
    """Return the text of a message's content; images and other parts have none."""
    if isinstance(content, list):
        return "".join(part.get("text", "") for part in content if part.get("type") == "text")
    return content or ""
