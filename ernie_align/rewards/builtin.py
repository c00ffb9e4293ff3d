"""The literal table of rewards: name -> block to scorer."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ernie_align.recipe import rewards as blocks
from ernie_align.rewards import verifiers
from ernie_align.rewards.completion import reasoning_of, text_of
from ernie_align.rewards.reward import Scorer, by_row


def _exact_match(block: blocks.ExactMatchReward, cache: Path | None) -> Scorer:
    def score(completion: Any, expected: Any) -> float:
        return verifiers.exact_match(text_of(completion), expected, ignore_case=block.ignore_case)

    return by_row(score, block.column)


def _contains(block: blocks.ContainsReward, cache: Path | None) -> Scorer:
    def score(completion: Any, expected: Any = block.text) -> float:
        return verifiers.contains(text_of(completion), expected, ignore_case=block.ignore_case)

    return by_row(score, *([block.column] if block.column else []))


def _format(block: blocks.FormatReward, cache: Path | None) -> Scorer:
    pattern = re.compile(block.pattern)

    def score(completion: Any) -> float:
        return verifiers.matches(text_of(completion), pattern, full=block.match == "full")

    return by_row(score)


def _thinking(block: blocks.ThinkingReward, cache: Path | None) -> Scorer:
    def score(completion: Any) -> float:
        answer, reasoning = text_of(completion), reasoning_of(completion)
        return verifiers.thinking(answer, reasoning, shortest=block.min or 1, longest=block.max)

    return by_row(score)


def _length(block: blocks.LengthReward, cache: Path | None) -> Scorer:
    shortest, longest = block.target or block.min, block.target or block.max

    def score(completion: Any, token_ids: Any = ()) -> float:
        length = len(verifiers.units(text_of(completion), token_ids, block.unit))
        return verifiers.within_length(length, shortest=shortest, longest=longest, falloff=block.falloff)

    return by_row(score, *(["completion_ids"] if block.unit == "tokens" else []))


def _repetition(block: blocks.RepetitionReward, cache: Path | None) -> Scorer:
    def score(completion: Any, token_ids: Any = ()) -> float:
        return verifiers.repetition(verifiers.units(text_of(completion), token_ids, block.unit), n=block.ngram)

    return by_row(score, *(["completion_ids"] if block.unit == "tokens" else []))


SCORERS: dict[str, Callable[[Any, Path | None], Scorer]] = {
    "exact_match": _exact_match,
    "contains": _contains,
    "format": _format,
    "thinking": _thinking,
    "length": _length,
    "repetition": _repetition,
}
