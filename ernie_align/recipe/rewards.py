"""The blocks under `rewards:`: what an answer is paid for."""

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
    """What every reward has."""

    name: str
    label: str | None = Field(None, min_length=1, description="What logs call it; otherwise its name")
    weight: float = Field(
        1.0, allow_inf_nan=False, description="In the sum of rewards; negative is a penalty, 0 is only logged"
    )


_Column = Field("answer", description="Row column with the expected answer; a list there holds several right ones")
_IgnoreCase = Field(False, description="Upper and lower case are the same")


class ExactMatchReward(_Reward):
    """1 if the answer equals the expected one but for white space around them, else 0."""

    name: Literal["exact_match"]
    column: str = _Column
    ignore_case: bool = _IgnoreCase


class ContainsReward(_Reward):
    """1 if the answer contains the expected text, else 0."""

    name: Literal["contains"]
    column: str | None = Field(None, description="Row column with the text; a list there holds several, one suffices")
    text: str | None = Field(None, min_length=1, description="The same text for every row")
    ignore_case: bool = _IgnoreCase

    @model_validator(mode="after")
    def _one_origin(self) -> Self:
        if (self.column is None) == (self.text is None):
            what = "neither column nor text" if self.column is None else "both column and text"
            raise fault("text" if self.text else "", what, fix="name a column of the rows, or one text for all of them")
        return self


class ChoiceReward(_Reward):
    """1 if the answer settles on the expected letter of a multiple choice, else 0; an ambiguous answer is wrong."""

    name: Literal["choice"]
    column: str = Field("answer", description="Row column with the letter, its number counted from 0, or its text")
    options_column: str | None = Field(None, description="Row column with the options' texts, in the letters' order")
    letters: str = Field(
        "ABCDEFGHIJ", pattern="^[A-Z]{2,26}$", description="The letters there are, where no options are given"
    )


class NumericReward(_Reward):
    """1 if the last number of the answer is the expected one within the wider of both tolerances, else 0."""

    name: Literal["numeric"]
    column: str = _Column
    absolute: float = Field(0.0, ge=0, description="Tolerance in the number's own unit")
    relative: float = Field(1e-6, ge=0, description="Tolerance as a share of the expected number")


class MathReward(_Reward):
    """1 if the answer is mathematically equal to the expected one, as math-verify sees it, else 0."""

    name: Literal["maths"]
    column: str = Field("answer", description="Row column with the expected answer: LaTeX or plain")
    timeout: float = Field(5.0, gt=0, description="Seconds of computing for one comparison; what takes longer is wrong")


class FormatReward(_Reward):
    """1 if the answer matches a regular expression, else 0."""

    name: Literal["format"]
    pattern: str = Field(description="Regular expression of Python's re; flags as in (?s) or (?i)")
    match: Literal["full", "search"] = Field("full", description="The whole answer must match, or some part of it")

    @field_validator("pattern")
    @classmethod
    def _compiles(cls, pattern: str) -> str:
        try:
            re.compile(pattern)
        except re.error as error:
            at = "" if error.pos is None else f", at character {error.pos + 1}"
            raise fault("", f"no regular expression: {error.msg}{at}", fix="mend the pattern") from None
        return pattern


def _in_order(block: Any) -> None:
    if block.min is not None and block.max is not None and block.min > block.max:
        raise fault("min", f"min {block.min} is over max {block.max}", fix="write the smaller one as min")


class ThinkingReward(_Reward):
    """1 if the reasoning is there, closed and not empty, and an answer without thinking tags follows; else 0."""

    name: Literal["thinking"]
    min: int | None = Field(None, ge=1, description="Characters of reasoning, at least")
    max: int | None = Field(None, ge=1, description="Characters of reasoning, at most")

    @model_validator(mode="after")
    def _bounds_in_order(self) -> Self:
        _in_order(self)
        return self


class JsonSchemaReward(_Reward):
    """1 if the answer is JSON that is valid against a JSON schema, else 0."""

    name: Literal["json_schema"]
    against: Annotated[
        Annotated[dict[str, Any], Tag("mapping")] | Annotated[str, Tag("text")],
        Discriminator(lambda value: "mapping" if isinstance(value, Mapping) else "text"),
    ] = Field(description="The schema itself, or the path of a JSON file with it")
    fenced: bool = Field(False, description="The answer may stand in a ```json fence")

    @field_validator("against")
    @classmethod
    def _can_be_read(cls, against: dict[str, Any] | str) -> dict[str, Any] | str:
        if isinstance(against, str):
            _read_json(against)
        return against

    @property
    def schema_dict(self) -> dict[str, Any]:
        """The schema as a mapping, from the file where one is named."""
        return _read_json(self.against) if isinstance(self.against, str) else self.against


def _read_json(path: str) -> dict[str, Any]:
    try:
        found = json.loads(read_text_file(Path(path)))
    except OSError as error:
        raise fault(
            "", f"{path} cannot be read: {error.strerror}", fix="paths start at the working directory"
        ) from None
    except (ValueError, RecursionError) as error:
        raise fault("", f"{path} is not JSON: {error}", fix="mend the file") from None
    if not isinstance(found, dict):
        raise fault("", f"{path} holds no mapping", fix="a JSON schema is a mapping")
    return found


class IouReward(_Reward):
    """Overlap of the boxes in the answer with the expected ones: intersection over union, averaged over boxes."""

    name: Literal["iou"]
    column: str = Field("boxes", description="Row column with one box of four numbers, a list of boxes, or their text")
    form: Literal["xyxy", "xywh"] = Field("xyxy", description="Two corners, or a corner with width and height")
    column_form: Literal["xyxy", "xywh"] | None = Field(None, description="Of the column, where it differs from form")
    threshold: float | None = Field(None, gt=0, le=1, description="A box counts 1 from this overlap on, else 0")


class LengthReward(_Reward):
    """1 while the length is within bounds; outside it falls linearly to 0."""

    name: Literal["length"]
    unit: Unit = Field("characters", description="tokens count the whole completion; the others the answer alone")
    target: int | None = Field(None, ge=1, description="Stands for min and max at once")
    min: int | None = Field(None, ge=1, description="In units")
    max: int | None = Field(None, ge=1, description="In units")
    falloff: int | None = Field(None, ge=1, description="From the bound to 0, in units; otherwise the bound itself")

    @model_validator(mode="after")
    def _some_bound(self) -> Self:
        bounds = [name for name in ("min", "max") if getattr(self, name) is not None]
        if self.target is not None and bounds:
            raise fault("target", f"target and {' and '.join(bounds)}", fix="write target, or min and max")
        if self.target is None and not bounds:
            raise fault("", "no bound is named", fix="write target:, min: or max:")
        _in_order(self)
        return self


class RepetitionReward(_Reward):
    """Minus the share of n-grams that repeat an earlier one: 0 without repetition, toward -1 with nothing else."""

    name: Literal["repetition"]
    unit: Unit = Field("words", description="tokens see the whole completion; characters suit Chinese")
    ngram: int = Field(3, ge=1, description="Units of one n-gram")


class JudgeReward(_Reward):
    """The score of a language model behind an OpenAI-compatible endpoint, scaled to 0..1."""

    name: Literal["judge"]
    url: str = Field(pattern="^https?://", description="Base of the endpoint, such as http://localhost:8000/v1")
    model: str = Field(description="Model name that the endpoint knows")
    rubric: str = Field(min_length=1, description="What earns which score")
    reference_column: str | None = Field(None, description="Row column with an answer known to be good")
    api_key_env: str | None = Field(
        None, pattern="^[A-Za-z_][A-Za-z0-9_]*$", description="Environment variable that holds the key"
    )
    min_score: float = Field(0.0, allow_inf_nan=False, description="The score that counts 0")
    max_score: float = Field(10.0, allow_inf_nan=False, description="The score that counts 1")
    images: bool = Field(False, description="Show the judge the prompt's images too")
    temperature: float = Field(0.0, ge=0, description="Of the judge; 0 is greedy")
    max_tokens: int | None = Field(None, ge=1, description="Of a verdict; otherwise the endpoint's own limit")
    concurrency: int = Field(8, ge=1, description="Requests under way at once")
    timeout: float = Field(60.0, gt=0, description="Seconds for one request")
    retries: int = Field(4, ge=0, description="Of a request that failed or whose verdict holds no score")
    backoff: float = Field(1.0, gt=0, description="Seconds before the first retry; doubles with each")

    @model_validator(mode="after")
    def _scores_in_order(self) -> Self:
        if self.min_score >= self.max_score:
            raise fault("max_score", f"{self.max_score} is not over min_score {self.min_score}")
        return self


class CustomReward(_Reward):
    """A function of the user's own: the one place where a recipe names code."""

    name: str = Field(pattern=r"^.+\.py:[A-Za-z_]\w*$", description="path/to/file.py:function")
    args: dict[str, Any] = Field(default_factory=dict, description="Keyword arguments, the same for every call")

    @property
    def path(self) -> Path:
        """The file, relative to the working directory like every path of a recipe."""
        return Path(self.name.rpartition(":")[0])

    @property
    def function(self) -> str:
        """The function's name."""
        return self.name.rpartition(":")[2]

    @property
    def columns(self) -> tuple[str, ...]:
        """The row columns it cannot do without: parameters with no default that neither TRL nor args gives."""
        return tuple(
            name for name in FunctionSignature.read(self.path, self.function).required if name not in self.args
        )

    @field_validator("name")
    @classmethod
    def _can_be_called(cls, name: str) -> str:
        path, _, function = name.rpartition(":")
        found = FunctionSignature.read(Path(path), function)
        if found.is_async:
            raise fault("", f"{function} is async ({path}:{found.line})", fix="write a plain function")
        if not found.accepts_kwargs:
            what = f"{function} takes no **kwargs ({path}:{found.line})"
            raise fault("", what, why="TRL passes every column of the rows, and more", fix="add **kwargs")
        return name

    @model_validator(mode="after")
    def _args_are_parameters(self) -> Self:
        found = FunctionSignature.read(self.path, self.function)
        known = [*found.required, *found.optional]
        for key in self.args:
            if key not in known:
                fix = did_you_mean(key, known) if known else "give it such a parameter"
                raise fault("args", f"{self.function} has no parameter {key!r}", fix=fix)
        return self


CRITERIA = {
    "exact_match": ExactMatchReward,
    "contains": ContainsReward,
    "choice": ChoiceReward,
    "numeric": NumericReward,
    "maths": MathReward,
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
    """Several criteria, each a reward of its own: their mean by weight, over those that apply to the row."""

    name: Literal["checklist"]
    criteria: list[Annotated[Criterion, BeforeValidator(lambda value: parse_named_block(value, CRITERIA))]] = Field(
        min_length=1, description="Any reward but another checklist"
    )

    @field_validator("criteria")
    @classmethod
    def _weights_make_a_mean(cls, criteria: list[Criterion]) -> list[Criterion]:
        for criterion in criteria:
            if criterion.weight <= 0:
                what = f"criterion {criterion.name} has weight {criterion.weight}"
                raise fault("", what, why="a checklist is a mean by weight", fix="give each a weight over 0")
        return criteria


REWARDS = {**CRITERIA, "checklist": ChecklistReward}


def reward_names(blocks: Sequence[Any]) -> list[str]:
    """What logs and other keys call each reward: its label, or its name; the second without a label is name_2."""
    names: list[str] = []
    for block in blocks:
        own = block.label or block.name.rpartition(":")[2]
        numbered = (own if number == 1 else f"{own}_{number}" for number in range(1, len(names) + 2))
        names.append(next(name for name in numbered if name not in names))
    return names


def parse_named_block(value: Any, blocks: Mapping[str, type[Block]], *, kind: str = "reward") -> Block:
    """The block that `name` asks for. A bare union would report the faults of all its members instead of its own."""
    if isinstance(value, Block):
        return value
    if not isinstance(value, Mapping):
        raise fault("", f"{value!r} is no {kind}", fix="write a mapping: {name: exact_match, column: answer}")
    name = value.get("name")
    known = f"there are {', '.join(blocks)}, and your own as path/to/file.py:function"
    if not isinstance(name, str):
        raise fault("name" if "name" in value else "", f"no {kind} is named", why=known, fix="write name:")
    cls = CustomReward if ".py" in name else blocks.get(name)
    if cls is None:
        close = difflib.get_close_matches(name, blocks, n=1, cutoff=0.6)
        raise fault("name", f"{name!r} is no {kind}", why=known, fix=f"did you mean {close[0]}?" if close else "")
    try:
        return cls.model_validate(value)
    except ValidationError as error:
        raise ValidationError.from_exception_data(cls.__name__, [_line(cls, item) for item in error.errors()]) from None


def _line(cls: type[Block], item: Any) -> InitErrorDetails:
    """One fault of the block. Only here is it known which keys the user could have meant."""
    kind, loc, context = item["type"], item["loc"], item.get("ctx", {})
    if kind == "extra_forbidden" and len(loc) == 1:
        custom = fault(str(loc[0]), "unknown key", fix=did_you_mean(str(loc[0]), list(cls.model_fields)))
        return InitErrorDetails(type=custom, input=item["input"])
    if kind == "align":
        kind = PydanticCustomError("align", "{what}", context)
    return InitErrorDetails(type=kind, loc=loc, input=item["input"], ctx=context)


RewardBlock = Annotated[Criterion | ChecklistReward, BeforeValidator(lambda value: parse_named_block(value, REWARDS))]


# What TRL hands to every reward function beside the columns of the rows.
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
    """line: where it begins, from 1; required, optional: its parameters without and with a default, minus what TRL
    gives; takes_any: it has **kwargs.
    """

    line: int
    required: tuple[str, ...]
    optional: tuple[str, ...]
    accepts_kwargs: bool
    is_async: bool

    @classmethod
    def read(cls, path: Path, name: str) -> FunctionSignature:
        """The function `name` at the top level of the file. Raises a fault of the recipe if there is none."""
        try:
            tree = ast.parse(read_text_file(path), str(path))
        except OSError as error:
            what = f"{path} cannot be read: {error.strerror}"
            raise fault("", what, fix="name a file; paths start at the working directory") from None
        except (SyntaxError, ValueError, RecursionError, MemoryError) as error:  # of nesting: either of the last two
            raise fault("", f"{path} is no Python: {error}", fix="mend the file") from None
        functions = {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)}
        if name not in functions:
            fix = did_you_mean(name, list(functions)) if functions else "define it at the file's top level"
            raise fault("", f"{path} has no function {name}", fix=fix)
        return cls._of(functions[name])

    @classmethod
    def _of(cls, node: ast.FunctionDef | ast.AsyncFunctionDef) -> FunctionSignature:
        names = [argument.arg for argument in (*node.args.posonlyargs, *node.args.args)]
        bare = len(names) - len(node.args.defaults)
        keywords = list(zip(node.args.kwonlyargs, node.args.kw_defaults, strict=True))
        required = [*names[:bare], *(key.arg for key, default in keywords if default is None)]
        optional = [*names[bare:], *(key.arg for key, default in keywords if default is not None)]
        return cls(
            line=node.lineno,
            required=tuple(name for name in required if name not in TRL_REWARD_ARGUMENTS),
            optional=tuple(name for name in optional if name not in TRL_REWARD_ARGUMENTS),
            accepts_kwargs=node.args.kwarg is not None,
            is_async=isinstance(node, ast.AsyncFunctionDef),
        )


def did_you_mean(word: str, choices: Sequence[str]) -> str:
    """The next move after a wrong name: the nearest right one, or all of them."""
    close = difflib.get_close_matches(word, choices, n=1, cutoff=0.6)
    return f"did you mean {close[0]}?" if close else f"choose from {', '.join(choices)}"
