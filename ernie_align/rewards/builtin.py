"""The literal table of rewards: name -> block to scorer."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ernie_align.errors import RecipeError
from ernie_align.recipe import rewards as blocks
from ernie_align.rewards import verifiers
from ernie_align.rewards.boxes import boxes_in, boxes_of, corners, grounding
from ernie_align.rewards.choice import choice
from ernie_align.rewards.completion import answer_text, reasoning_text
from ernie_align.rewards.custom import custom
from ernie_align.rewards.json_answer import json_verifier
from ernie_align.rewards.judge import judge
from ernie_align.rewards.math_verifier import MathVerifier
from ernie_align.rewards.quantities import numeric
from ernie_align.rewards.reward import Scorer, by_row, place_of


def _exact_match(block: blocks.ExactMatchReward, cache: Path | None) -> Scorer:
    def score(completion: Any, expected: Any) -> float:
        return verifiers.exact_match(answer_text(completion), expected, ignore_case=block.ignore_case)

    return by_row(score, block.column)


def _contains(block: blocks.ContainsReward, cache: Path | None) -> Scorer:
    def score(completion: Any, expected: Any = block.text) -> float:
        return verifiers.contains(answer_text(completion), expected, ignore_case=block.ignore_case)

    return by_row(score, *([block.column] if block.column else []))


def _choice(block: blocks.ChoiceReward, cache: Path | None) -> Scorer:
    def score(completion: Any, expected: Any, options: Any = None) -> float:
        return choice(answer_text(completion), expected, block.letters, options)

    return by_row(score, block.column, *([block.options_column] if block.options_column else []))


def _numeric(block: blocks.NumericReward, cache: Path | None) -> Scorer:
    def score(completion: Any, expected: Any) -> float:
        return numeric(answer_text(completion), expected, absolute=block.absolute, relative=block.relative)

    return by_row(score, block.column)


def _maths(block: blocks.MathReward, cache: Path | None) -> Scorer:
    if find_spec("math_verify") is None:
        what = "reward maths needs math-verify, which is not installed"
        raise RecipeError.at(block.where("name"), what, fix="pip install 'ernie-align[rewards]'")
    mathematician = MathVerifier(timeout=block.timeout)

    def score(completion: Any, expected: Any) -> float | None:
        scores = [mathematician.equal(answer_text(completion), text) for text in verifiers.expected_texts(expected)]
        return max((score for score in scores if score is not None), default=None)

    return replace(by_row(score, block.column), counts=lambda: mathematician.counts)


def _format(block: blocks.FormatReward, cache: Path | None) -> Scorer:
    pattern = re.compile(block.pattern)

    def score(completion: Any) -> float:
        return verifiers.matches(answer_text(completion), pattern, full=block.match == "full")

    return by_row(score)


def _thinking(block: blocks.ThinkingReward, cache: Path | None) -> Scorer:
    def score(completion: Any) -> float:
        answer, reasoning = answer_text(completion), reasoning_text(completion)
        return verifiers.thinking(answer, reasoning, shortest=block.min or 1, longest=block.max)

    return by_row(score)


def _json_schema(block: blocks.JsonSchemaReward, cache: Path | None) -> Scorer:
    verify = json_verifier(block.schema_dict, fenced=block.fenced, where=block.where("against"))

    def score(completion: Any) -> float:
        return verify(answer_text(completion))

    return by_row(score)


def _iou(block: blocks.IouReward, cache: Path | None) -> Scorer:
    def score(completion: Any, expected: Any) -> float:
        given = [corners(box, block.form) for box in boxes_in(answer_text(completion))]
        wanted = [corners(box, block.column_form or block.form) for box in boxes_of(expected)]
        return grounding(given, wanted, threshold=block.threshold)

    return by_row(score, block.column)


def _length(block: blocks.LengthReward, cache: Path | None) -> Scorer:
    shortest, longest = block.target or block.min, block.target or block.max

    def score(completion: Any, token_ids: Any = ()) -> float:
        length = len(verifiers.split_units(answer_text(completion), token_ids, block.unit))
        return verifiers.within_length(length, shortest=shortest, longest=longest, falloff=block.falloff)

    return by_row(score, *(["completion_ids"] if block.unit == "tokens" else []))


def _repetition(block: blocks.RepetitionReward, cache: Path | None) -> Scorer:
    def score(completion: Any, token_ids: Any = ()) -> float:
        return verifiers.repetition(
            verifiers.split_units(answer_text(completion), token_ids, block.unit), n=block.ngram
        )

    return by_row(score, *(["completion_ids"] if block.unit == "tokens" else []))


def _judge(block: blocks.JudgeReward, cache: Path | None) -> Scorer:
    return judge(block, cache=cache)


def _checklist(block: blocks.ChecklistReward, cache: Path | None) -> Scorer:
    """Mean of the criteria by weight; a criterion that does not apply to a row is left out of that row's mean."""
    criteria = [(criterion.weight, scorer_of(criterion, cache)) for criterion in block.criteria]

    def score(prompts: Any, completions: Any, **columns: Any) -> list[float | None]:
        table = [[*scorer.score(prompts, completions, **columns)] for _, scorer in criteria]
        return [
            _mean(list(zip([weight for weight, _ in criteria], scores, strict=True)))
            for scores in zip(*table, strict=True)
        ]

    def counts() -> Counter[str]:
        return sum((Counter(scorer.counts()) for _, scorer in criteria), Counter())

    columns = dict.fromkeys(column for _, scorer in criteria for column in scorer.columns)
    return Scorer(score, tuple(columns), place_of(score), counts)


def _mean(scores: list[tuple[float, float | None]]) -> float | None:
    applying = [(weight, score) for weight, score in scores if score is not None]
    return (
        sum(weight * score for weight, score in applying) / sum(weight for weight, _ in applying) if applying else None
    )


def scorer_of(block: blocks.RewardBlock, cache: Path | None) -> Scorer:
    """The scorer that the block asks for. cache: folder of judges' verdicts."""
    return custom(block) if isinstance(block, blocks.CustomReward) else SCORERS[block.name](block, cache)


SCORERS: dict[str, Callable[[Any, Path | None], Scorer]] = {
    "exact_match": _exact_match,
    "contains": _contains,
    "choice": _choice,
    "numeric": _numeric,
    "math": _maths,
    "format": _format,
    "thinking": _thinking,
    "json_schema": _json_schema,
    "iou": _iou,
    "length": _length,
    "repetition": _repetition,
    "judge": _judge,
    "checklist": _checklist,
}
