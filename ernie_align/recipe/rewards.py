"""The blocks under `rewards:` in a recipe: how answers are scored."""

from __future__ import annotations

import ast
import difflib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Self, Union

from pydantic import BeforeValidator, Discriminator, Field, Tag, ValidationError, field_validator, model_validator
from pydantic_core import InitErrorDetails, PydanticCustomError

from ernie_align.recipe.document import read_text_file
from ernie_align.recipe.schema import Block, fault

Unit = Literal["tokens", "characters", "words"]


class _Reward(Block):
    """The keys of every reward."""

    name: str
    label: str | None = Field(None, min_length=1, description="Name in logs; default: the reward's name")
    weight: float = Field(
        1.0, allow_inf_nan=False, description="Weight in the sum of rewards; negative is a penalty, 0 is only logged"
    )


_Column = Field("answer", description="Row column with the expected answer, or a list of right ones")
_IgnoreCase = Field(False, description="Ignore upper and lower case")


class ExactMatchReward(_Reward):
    """1 if the answer equals the expected one, ignoring white space around them, else 0."""

    name: Literal["exact_match"]
    column: str = _Column
    ignore_case: bool = _IgnoreCase


class ContainsReward(_Reward):
    """1 if the answer contains the expected text, else 0."""

    name: Literal["contains"]
    column: str | None = Field(None, description="Row column with the text, or a list of texts of which one suffices")
    text: str | None = Field(None, min_length=1, description="The same text for every row")
    ignore_case: bool = _IgnoreCase

    @model_validator(mode="after")
    def _validate_text_source(self) -> Self:
        if (self.column is None) == (self.text is None):
            what = "neither column nor text is set" if self.column is None else "both column and text are set"
            raise fault("text" if self.text else "", what, fix="set column to a row column, or text to one text")
        return self


class ChoiceReward(_Reward):
    """1 if the answer settles on the expected letter of a multiple choice, else 0; an ambiguous answer is wrong."""

    name: Literal["choice"]
    column: str = Field("answer", description="Row column with the letter, its number from 0, or its text")
    options_column: str | None = Field(None, description="Row column with the options' texts, in the letters' order")
    letters: str = Field("ABCDEFGHIJ", pattern="^[A-Z]{2,26}$", description="Allowed letters, if no options are given")


class NumericReward(_Reward):
    """1 if the last number of the answer equals the expected one within the larger of two tolerances, else 0."""

    name: Literal["numeric"]
    column: str = _Column
    absolute: float = Field(0.0, ge=0, description="Absolute tolerance")
    relative: float = Field(1e-6, ge=0, description="Relative tolerance: a fraction of the expected number")


class MathReward(_Reward):
    """1 if the answer is mathematically equal to the expected one, according to math-verify, else 0."""

    name: Literal["math"]
    column: str = Field("answer", description="Row column with the expected answer, as LaTeX or plain text")
    timeout: float = Field(5.0, gt=0, description="Computing time of one comparison, in seconds; a longer one scores 0")


class FormatReward(_Reward):
    """1 if the answer matches a regular expression, within a second of computing; else 0."""

    name: Literal["format"]
    pattern: str = Field(description="Regular expression of Python's re; flags inline, such as (?s) or (?i)")
    match: Literal["full", "search"] = Field("full", description="Match the whole answer, or some part of it")

    @field_validator("pattern")
    @classmethod
    def _validate_pattern(cls, pattern: str) -> str:
        try:
            re.compile(pattern)
        except re.error as error:
            at = "" if error.pos is None else f", at character {error.pos + 1}"
            raise fault("", f"invalid regular expression: {error.msg}{at}", fix="correct the pattern") from None
        return pattern


def _validate_bounds(block: Any) -> None:
    if block.min is not None and block.max is not None and block.min > block.max:
        raise fault("min", f"min {block.min} is greater than max {block.max}", fix="swap them")


class ThinkingReward(_Reward):
    """1 if closed, non-empty reasoning is followed by an answer without thinking tags, else 0."""

    name: Literal["thinking"]
    min: int | None = Field(None, ge=1, description="Minimum characters of reasoning")
    max: int | None = Field(None, ge=1, description="Maximum characters of reasoning")

    @model_validator(mode="after")
    def _validate_range(self) -> Self:
        _validate_bounds(self)
        return self


class JsonSchemaReward(_Reward):
    """1 if the answer is JSON that validates against a JSON schema, within a second of computing; else 0."""

    name: Literal["json_schema"]
    against: Annotated[
        Annotated[dict[str, Any], Tag("mapping")] | Annotated[str, Tag("text")],
        Discriminator(lambda value: "mapping" if isinstance(value, Mapping) else "text"),
    ] = Field(description="The schema itself, or the path of a JSON file")
    fenced: bool = Field(False, description="Accept an answer inside a ```json fence")

    @field_validator("against")
    @classmethod
    def _validate_schema_file(cls, against: dict[str, Any] | str) -> dict[str, Any] | str:
        if isinstance(against, str):
            _read_json(against)
        return against

    @property
    def schema_dict(self) -> dict[str, Any]:
        """The schema as a mapping, read from the file if `against` is a path."""
        return _read_json(self.against) if isinstance(self.against, str) else self.against


def _read_json(path: str) -> dict[str, Any]:
    try:
        schema = json.loads(read_text_file(Path(path)))
    except OSError as error:
        fix = "check the path; it is relative to the working directory"
        raise fault("", f"{path} cannot be read: {error.strerror}", fix=fix) from None
    except (ValueError, RecursionError) as error:
        raise fault("", f"{path} is not valid JSON: {error}", fix="correct the file") from None
    if not isinstance(schema, dict):
        raise fault("", f"{path} contains {type(schema).__name__}; expected a mapping", fix="write a JSON schema")
    return schema


class IouReward(_Reward):
    """Intersection over union of the boxes in the answer with the expected ones, averaged over boxes."""

    name: Literal["iou"]
    column: str = Field("boxes", description="Row column with a box of four numbers, a list of boxes, or their text")
    form: Literal["xyxy", "xywh"] = Field("xyxy", description="Two corners, or one corner with width and height")
    column_form: Literal["xyxy", "xywh"] | None = Field(None, description="Form of the column's boxes; default: form")
    threshold: float | None = Field(None, gt=0, le=1, description="A box counts 1 from this IoU on, else 0")


class LengthReward(_Reward):
    """1 if the length is within bounds; outside, the score falls linearly to 0."""

    name: Literal["length"]
    unit: Unit = Field("characters", description="tokens: of the whole completion; characters and words: of the answer")
    target: int | None = Field(None, ge=1, description="Sets both min and max")
    min: int | None = Field(None, ge=1, description="Minimum length, in units")
    max: int | None = Field(None, ge=1, description="Maximum length, in units")
    falloff: int | None = Field(None, ge=1, description="Units from the bound to score 0; default: the bound")

    @model_validator(mode="after")
    def _validate_target(self) -> Self:
        bounds = [name for name in ("min", "max") if getattr(self, name) is not None]
        if self.target is not None and bounds:
            what = f"target together with {' and '.join(bounds)}"
            raise fault("target", what, fix="set target alone, or min and max")
        if self.target is None and not bounds:
            raise fault("", "no bound is set", fix="set target, min or max")
        _validate_bounds(self)
        return self


class RepetitionReward(_Reward):
    """Minus the fraction of n-grams that repeat an earlier one: 0 without repetition, near -1 if all repeat."""

    name: Literal["repetition"]
    unit: Unit = Field("words", description="tokens: of the whole completion; characters suit Chinese")
    ngram: int = Field(3, ge=1, description="Units in an n-gram")


class JudgeReward(_Reward):
    """The score given by a language model behind an OpenAI-compatible endpoint, scaled to 0..1."""

    name: Literal["judge"]
    url: str = Field(pattern="^https?://", description="Base URL of the endpoint, such as http://localhost:8000/v1")
    model: str = Field(description="Name of the model at the endpoint")
    rubric: str = Field(min_length=1, description="Scoring rules: which answer gets which score")
    reference_column: str | None = Field(None, description="Row column with a reference answer")
    api_key_env: str | None = Field(
        None, pattern="^[A-Za-z_][A-Za-z0-9_]*$", description="Environment variable with the API key"
    )
    min_score: float = Field(0.0, allow_inf_nan=False, description="The score that is scaled to 0")
    max_score: float = Field(10.0, allow_inf_nan=False, description="The score that is scaled to 1")
    images: bool = Field(False, description="Send the prompt's images too")
    temperature: float = Field(0.0, ge=0, description="Sampling temperature of the judge; 0 is greedy")
    max_tokens: int | None = Field(None, ge=1, description="Maximum tokens of a reply; default: the endpoint's limit")
    concurrency: int = Field(8, ge=1, description="Concurrent requests")
    timeout: float = Field(60.0, gt=0, description="Timeout of one request, in seconds")
    retries: int = Field(4, ge=0, description="Retries of a request that failed, or whose reply contains no score")
    backoff: float = Field(1.0, gt=0, description="Seconds before the first retry; doubles with each retry")

    @model_validator(mode="after")
    def _validate_score_range(self) -> Self:
        if self.min_score >= self.max_score:
            raise fault("max_score", f"{self.max_score} is not greater than min_score {self.min_score}")
        return self


class CustomReward(_Reward):
    """A function in the user's own file: the only place where a recipe names code."""

    name: str = Field(pattern=r"^.+\.py:[A-Za-z_]\w*$", description="path/to/file.py:function")
    args: dict[str, Any] = Field(default_factory=dict, description="Keyword arguments of every call")

    @property
    def path(self) -> Path:
        """The file, relative to the working directory like every path of a recipe."""
        return Path(self.name.rpartition(":")[0])

    @property
    def function(self) -> str:
        """The function's name."""
        return self.name.rpartition(":")[2]

    @property
    def signature(self) -> FunctionSignature:
        """The function's parameters, read from its file."""
        return FunctionSignature.read(self.path, self.function)

    @property
    def columns(self) -> tuple[str, ...]:
        """The row columns it requires: parameters without a default that neither TRL nor args provides."""
        return tuple(name for name in self.signature.required if name not in self.args)

    @field_validator("name")
    @classmethod
    def _validate_signature(cls, name: str) -> str:
        path, _, function = name.rpartition(":")
        signature = FunctionSignature.read(Path(path), function)
        if signature.is_async:
            raise fault("", f"{function} is async ({path}:{signature.line})", fix="write a plain function")
        if not signature.accepts_kwargs:
            what = f"{function} takes no **kwargs ({path}:{signature.line})"
            raise fault("", what, why="TRL passes every column of the rows, and more", fix="add **kwargs")
        return name

    @model_validator(mode="after")
    def _validate_args(self) -> Self:
        known = [*self.signature.required, *self.signature.optional]
        for key in self.args:
            if key not in known:
                fix = did_you_mean(key, known) if known else "add the parameter to the function"
                raise fault("args", f"{self.function} has no parameter {key!r}", fix=fix)
        return self


CRITERIA = {
    "exact_match": ExactMatchReward,
    "contains": ContainsReward,
    "choice": ChoiceReward,
    "numeric": NumericReward,
    "math": MathReward,
    "format": FormatReward,
    "thinking": ThinkingReward,
    "json_schema": JsonSchemaReward,
    "iou": IouReward,
    "length": LengthReward,
    "repetition": RepetitionReward,
    "judge": JudgeReward,
}
Criterion = Union[(*CRITERIA.values(), CustomReward)]


class ChecklistReward(_Reward):
    """Several criteria, each a reward: their mean by weight, over those that apply to the row."""

    name: Literal["checklist"]
    criteria: list[Annotated[Criterion, BeforeValidator(lambda value: parse_named_block(value, CRITERIA))]] = Field(
        min_length=1, description="Any reward except another checklist"
    )

    @field_validator("criteria")
    @classmethod
    def _validate_weights(cls, criteria: list[Criterion]) -> list[Criterion]:
        for criterion in criteria:
            if criterion.weight <= 0:
                what = f"criterion {criterion.name} has weight {criterion.weight}"
                raise fault("", what, why="a checklist is a mean by weight", fix="set a weight greater than 0")
        return criteria


REWARDS = {**CRITERIA, "checklist": ChecklistReward}


def reward_names(blocks: Sequence[Any]) -> list[str]:
    """Return the name of each reward in logs and keys: its label, or its name; a second one without label is name_2."""
    names: list[str] = []
    for block in blocks:
        base = block.label or block.name.rpartition(":")[2]
        numbered = (base if number == 1 else f"{base}_{number}" for number in range(1, len(names) + 2))
        names.append(next(name for name in numbered if name not in names))
    return names


def parse_named_block(value: Any, blocks: Mapping[str, type[Block]], *, kind: str = "reward") -> Block:
    """Parse the block that `name` selects. A plain union would report the faults of all its members."""
    if isinstance(value, Block):
        return value
    if not isinstance(value, Mapping):
        fix = "write a mapping: {name: exact_match, column: answer}"
        raise fault("", f"invalid {kind} {value!r}; expected a mapping", fix=fix)
    name = value.get("name")
    known = f"expected one of {', '.join(blocks)}, or your own function as path/to/file.py:function"
    if not isinstance(name, str):
        raise fault("name" if "name" in value else "", f"the {kind} has no name", why=known, fix="set name:")
    if name == "maths":
        raise fault("name", f"the {kind} maths is now called math", fix="write name: math")
    cls = CustomReward if ".py" in name else blocks.get(name)
    if cls is None:
        close = difflib.get_close_matches(name, blocks, n=1, cutoff=0.6)
        raise fault("name", f"unknown {kind} {name!r}", why=known, fix=f"did you mean {close[0]}?" if close else "")
    try:
        return cls.model_validate(value)
    except ValidationError as error:
        raise ValidationError.from_exception_data(
            cls.__name__, [_with_suggestion(cls, item) for item in error.errors()]
        ) from None


def _with_suggestion(cls: type[Block], item: Any) -> InitErrorDetails:
    """Convert one error of the block; for an unknown key, suggest one of this block's keys."""
    kind, loc, context = item["type"], item["loc"], item.get("ctx", {})
    if kind == "extra_forbidden" and len(loc) == 1:
        custom = fault(str(loc[0]), "unknown key", fix=did_you_mean(str(loc[0]), list(cls.model_fields)))
        return InitErrorDetails(type=custom, input=item["input"])
    if kind == "align":
        kind = PydanticCustomError("align", "{what}", context)
    return InitErrorDetails(type=kind, loc=loc, input=item["input"], ctx=context)


RewardBlock = Annotated[Criterion | ChecklistReward, BeforeValidator(lambda value: parse_named_block(value, REWARDS))]


# Arguments that TRL passes to every reward function in addition to the columns of the rows.
TRL_REWARD_ARGUMENTS = (
    "prompts",
    "completions",
    "completion_ids",
    "trainer_state",
    "log_extra",
    "log_metric",
    "environments",
)


@dataclass(frozen=True)
class FunctionSignature:
    """The parameters of a reward function in the user's file.

    line: its first line, from 1; required, optional: parameters without and with a default, except those that TRL
    passes; accepts_kwargs: it takes **kwargs.
    """

    line: int
    required: tuple[str, ...]
    optional: tuple[str, ...]
    accepts_kwargs: bool
    is_async: bool

    @classmethod
    def read(cls, path: Path, name: str) -> FunctionSignature:
        """Read the function `name` at the top level of the file without running it. Raises a fault if there is none."""
        try:
            tree = ast.parse(read_text_file(path), str(path))
        except OSError as error:
            what = f"{path} cannot be read: {error.strerror}"
            raise fault("", what, fix="check the path; it is relative to the working directory") from None
        except (SyntaxError, ValueError, RecursionError, MemoryError) as error:  # the last two: nesting
            raise fault("", f"{path} is not valid Python: {error}", fix="correct the file") from None
        functions = {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)}
        if name not in functions:
            fix = did_you_mean(name, list(functions)) if functions else "define it at the file's top level"
            raise fault("", f"{path} has no function {name}", fix=fix)
        return cls._from_ast(functions[name])

    @classmethod
    def _from_ast(cls, node: ast.FunctionDef | ast.AsyncFunctionDef) -> FunctionSignature:
        names = [argument.arg for argument in (*node.args.posonlyargs, *node.args.args)]
        without_default = len(names) - len(node.args.defaults)
        keywords = list(zip(node.args.kwonlyargs, node.args.kw_defaults, strict=True))
        required = [*names[:without_default], *(key.arg for key, default in keywords if default is None)]
        optional = [*names[without_default:], *(key.arg for key, default in keywords if default is not None)]
        return cls(
            line=node.lineno,
            required=tuple(name for name in required if name not in TRL_REWARD_ARGUMENTS),
            optional=tuple(name for name in optional if name not in TRL_REWARD_ARGUMENTS),
            accepts_kwargs=node.args.kwarg is not None,
            is_async=isinstance(node, ast.AsyncFunctionDef),
        )


def did_you_mean(word: str, choices: Sequence[str]) -> str:
    """Suggest the nearest right name, or list all of them."""
    close = difflib.get_close_matches(word, choices, n=1, cutoff=0.6)
    return f"did you mean {close[0]}?" if close else f"choose from {', '.join(choices)}"
