"""Rewards that read the text of an answer: equality, patterns, thinking tags, length, repetition."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from ernie_align.rewards.completion import CLOSE, OPEN


def expected_texts(value: Any) -> list[str]:
    """A column's value as the texts that are right: one, or several in a list. Numbers are written out."""
    return [str(one) for one in value] if isinstance(value, list | tuple) else [str(value)]


def exact_match(answer: str, expected: Any, *, ignore_case: bool = False) -> float:
    """1 if the answer equals the expected text, or one of them, but for white space around it."""
    answer = _folded(answer.strip(), ignore_case)
    return float(any(answer == _folded(text.strip(), ignore_case) for text in expected_texts(expected)))


def contains(answer: str, expected: Any, *, ignore_case: bool = False) -> float:
    """1 if the answer contains the expected text, or one of them. Empty text is in no answer."""
    answer = _folded(answer, ignore_case)
    return float(any(text and _folded(text, ignore_case) in answer for text in expected_texts(expected)))


def _folded(text: str, ignore_case: bool) -> str:
    return text.casefold() if ignore_case else text


def matches(answer: str, pattern: re.Pattern, *, full: bool) -> float:
    """1 if the pattern matches the whole answer (full), or some part of it."""
    return float(bool(pattern.fullmatch(answer) if full else pattern.search(answer)))


def thinking(answer: str, reasoning: str | None, *, shortest: int = 1, longest: int | None = None) -> float:
    """1 if there is reasoning of shortest..longest characters and then an answer free of thinking tags.

    Reasoning that was never closed leaves no answer, and so earns nothing.
    """
    if (
        reasoning is None
        or not answer.strip()
        or any(tag in part for tag in (OPEN, CLOSE) for part in (answer, reasoning))
    ):
        return 0.0
    length = len(reasoning.strip())
    return float(length >= max(shortest, 1) and (longest is None or length <= longest))


def within_length(length: int, *, shortest: int | None, longest: int | None, falloff: int | None = None) -> float:
    """1 for a length within bounds; outside, 1 - distance / falloff, not under 0.

    Without a falloff the distance is measured by the bound itself: nothing is left at length 0, or at twice longest.
    """
    if shortest is not None and length < shortest:
        return max(0.0, 1 - (shortest - length) / (falloff or shortest))
    if longest is not None and length > longest:
        return max(0.0, 1 - (length - longest) / (falloff or longest))
    return 1.0


def repetition(split_units: Sequence, *, n: int) -> float:
    """(distinct n-grams / n-grams) - 1, in (-1, 0]; 0 for a text of less than two of them.

    The n-gram penalty of Yeo et al. (2025), Demystifying Long Chain-of-Thought Reasoning in LLMs, arXiv:2502.03373,
    as one score of the whole text.
    """
    grams = [tuple(split_units[start : start + n]) for start in range(len(split_units) - n + 1)]
    return len(set(grams)) / len(grams) - 1 if grams else 0.0


def split_units(answer: str, token_ids: Sequence[int], unit: str) -> Sequence:
    """What length and repetition count: tokens of the whole completion, or characters or words of the answer."""
    return token_ids if unit == "tokens" else answer.split() if unit == "words" else answer.strip()
