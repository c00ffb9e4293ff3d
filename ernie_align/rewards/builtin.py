"""Turn the blocks of a recipe into scorers: a table of the built-in rewards, and functions of the user's files."""

from __future__ import annotations

import importlib.util
import re
import sys
import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

from ernie_align.errors import RecipeError
from ernie_align.recipe import rewards as blocks
from ernie_align.rewards import sandbox, verifiers
from ernie_align.rewards.judge import judge
from ernie_align.rewards.reward import Reward, Scorer, answer_text, by_row, reasoning_text, source_line

_PATTERN_SECONDS = 1.0  # of computing for one answer; a pattern that takes longer is backtracking


def _contains(block: blocks.ContainsReward) -> Scorer:
    def score(answer: str, expected: Any = block.text) -> float:
        return verifiers.contains(answer, expected, ignore_case=block.ignore_case)

    return by_row(score, *([block.column] if block.column else []))


def _choice(block: blocks.ChoiceReward) -> Scorer:
    def score(answer: str, expected: Any, options: Any = None) -> float:
        return verifiers.choice(answer, expected, block.letters, options)

    return by_row(score, block.column, *([block.options_column] if block.options_column else []))


def _math(block: blocks.MathReward) -> Scorer:
    _require(block, "math_verify", "pebble")
    warm_up = ("$x^2 - 1$", "(x - 1)(x + 1)")
    verifier = sandbox.Sandbox(sandbox.math_equal, seconds=block.timeout, warm_up=warm_up)

    def score(answer: str, expected: Any) -> float | None:
        scores = [verifier.score(answer, text) for text in verifiers.expected_texts(expected)]
        return max((score for score in scores if score is not None), default=None)

    return replace(by_row(score, block.column), counts=lambda: verifier.counts)


def _format(block: blocks.FormatReward) -> Scorer:
    _require(block, "pebble")
    return _in_sandbox(sandbox.regex_matches, block.pattern, block.match == "full", warm_up="")


def _in_sandbox(verify: Callable[..., float], *args: Any, warm_up: str) -> Scorer:
    """Score `verify(answer, *args)`, where a pattern of the user's may backtrack forever."""
    verifier = sandbox.Sandbox(verify, seconds=_PATTERN_SECONDS, warm_up=(warm_up, *args))
    return replace(by_row(lambda answer: verifier.score(answer, *args)), counts=lambda: verifier.counts)


def _json_schema(block: blocks.JsonSchemaReward) -> Scorer:
    """Raises RecipeError if the schema itself is invalid, or refers to anything outside it."""
    _require(block, "jsonschema", "pebble")
    from jsonschema.exceptions import SchemaError
    from referencing.exceptions import Unresolvable

    schema, where = block.schema_dict, block.where("against")
    try:
        validator = sandbox.json_validator(schema)
        validator.check_schema(schema)
        validator.is_valid({})
    except SchemaError as error:
        what, fix = f"invalid JSON schema: {error.message}", "correct the schema at this path"
        raise RecipeError.at(where, what, why=error.json_path, fix=fix) from None
    except Unresolvable as error:
        raise RecipeError.at(where, f"$ref {error.ref!r} is not in the schema", fix="move it into $defs") from None
    return _in_sandbox(sandbox.json_is_valid, schema, block.fenced, warm_up="{}")


def _iou(block: blocks.IouReward) -> Scorer:
    def score(answer: str, expected: Any) -> float:
        given = [verifiers.to_corners(box, block.form) for box in verifiers.find_boxes(answer)]
        form = block.column_form or block.form
        right = [verifiers.to_corners(box, form) for box in verifiers.parse_boxes(expected)]
        return verifiers.grounding(given, right, threshold=block.threshold)

    return by_row(score, block.column)


def _length(block: blocks.LengthReward) -> Scorer:
    shortest, longest = block.target or block.min, block.target or block.max

    def score(answer: str, token_ids: Any = ()) -> float:
        length = len(verifiers.split_units(answer, token_ids, block.unit))
        return verifiers.within_length(length, shortest=shortest, longest=longest, falloff=block.falloff)

    return by_row(score, *(["completion_ids"] if block.unit == "tokens" else []))


def _repetition(block: blocks.RepetitionReward) -> Scorer:
    def score(answer: str, token_ids: Any = ()) -> float:
        return verifiers.repetition(verifiers.split_units(answer, token_ids, block.unit), n=block.ngram)

    return by_row(score, *(["completion_ids"] if block.unit == "tokens" else []))


def _checklist(block: blocks.ChecklistReward, cache: Path | None) -> Scorer:
    """Score the mean of the criteria by weight; a criterion that does not apply to a row is not in that row's mean."""
    criteria = [(criterion.weight, build_scorer(criterion, cache)) for criterion in block.criteria]

    def score(prompts: Any, completions: Any, **columns: Any) -> list[float | None]:
        table = [[*scorer.score(prompts, completions, **columns)] for _, scorer in criteria]
        return [
            _mean(list(zip([weight for weight, _ in criteria], scores, strict=True)))
            for scores in zip(*table, strict=True)
        ]

    def counts() -> Counter[str]:
        return sum((Counter(scorer.counts()) for _, scorer in criteria), Counter())

    columns = dict.fromkeys(column for _, scorer in criteria for column in scorer.columns)
    return Scorer(score, tuple(columns), source_line(score), counts)


def _mean(scores: list[tuple[float, float | None]]) -> float | None:
    applying = [(weight, score) for weight, score in scores if score is not None]
    if not applying:
        return None
    return sum(weight * score for weight, score in applying) / sum(weight for weight, _ in applying)


def _custom(block: blocks.CustomReward) -> Scorer:
    """Call the function that the block names as TRL does, with the block's args over the row's columns.

    Raises RecipeError at the block's place if its file cannot be imported.
    """
    path = block.path.resolve()
    try:
        function = getattr(_import_file(path), block.function)
    except Exception as error:
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
        what = f"{block.path} cannot be imported: {type(error).__name__}: {error}"
        why = f"{path}:{lines[-1]}" if lines else ""
        raise RecipeError.at(block.where("name"), what, why=why, fix="correct the file") from error

    def score(prompts: Any, completions: Any, **columns: Any) -> Any:
        return function(prompts=prompts, completions=completions, **{**columns, **block.args})

    return Scorer(score, block.columns, f"{path}:{block.signature.line}")


def _import_file(path: Path) -> ModuleType:
    """Import the file under a name of its own; several functions of one file share the module."""
    name = "ernie_align_recipe_" + re.sub(r"\W", "_", str(path.with_suffix("")))
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, path)
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module  # dataclasses and pickle look it up there
        try:
            spec.loader.exec_module(module)
        except BaseException:
            del sys.modules[name]
            raise
    return sys.modules[name]


def _require(block: blocks.RewardBlock, *modules: str) -> None:
    for module in modules:
        if importlib.util.find_spec(module) is None:
            what = f"reward {block.name} needs the package {module.replace('_', '-')}, which is not installed"
            raise RecipeError.at(block.where("name"), what, fix="pip install 'ernie-align[rewards]'")


def build_scorer(block: blocks.RewardBlock, cache: Path | None) -> Scorer:
    """Build the scorer of a block. cache: folder in which judges store their scores."""
    if isinstance(block, blocks.CustomReward):
        return _custom(block)
    if isinstance(block, blocks.ChecklistReward):
        return _checklist(block, cache)
    if isinstance(block, blocks.JudgeReward):
        _require(block, "openai")
        return judge(block, cache=cache)
    return SCORERS[block.name](block)


SCORERS: dict[str, Callable[[Any], Scorer]] = {
    "exact_match": lambda block: by_row(
        lambda answer, expected: verifiers.exact_match(answer, expected, ignore_case=block.ignore_case), block.column
    ),
    "contains": _contains,
    "choice": _choice,
    "numeric": lambda block: by_row(
        lambda answer, expected: verifiers.numeric(answer, expected, absolute=block.absolute, relative=block.relative),
        block.column,
    ),
    "math": _math,
    "format": _format,
    "thinking": lambda block: by_row(
        lambda completion: verifiers.thinking(
            answer_text(completion), reasoning_text(completion), shortest=block.min or 1, longest=block.max
        ),
        reads_answer=False,
    ),
    "json_schema": _json_schema,
    "iou": _iou,
    "length": _length,
    "repetition": _repetition,
}


def build_rewards(rewards: Sequence[blocks.RewardBlock], *, cache: Path | None = None) -> list[Reward]:
    """Build the rewards of a recipe, in its order.

    cache: folder in which judges store their scores; None stores nothing. A reward is named by its label, or by its
    name; the second one without a label is name_2.
    Raises RecipeError if a block names something that is missing or broken: an environment variable, a package, a JSON
    schema, a file that fails.
    """
    return [
        Reward(name, block.weight, build_scorer(block, cache), block.where(""))
        for name, block in zip(blocks.reward_names(rewards), rewards, strict=True)
    ]
