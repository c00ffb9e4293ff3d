"""The blocks under `rewards:`, and the signature of a reward function that a recipe names."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Self, Union

from pydantic import BeforeValidator, Discriminator, Field, Tag, ValidationError, field_validator, model_validator
from pydantic_core import InitErrorDetails, PydanticCustomError

from ernie_align.errors import did_you_mean
from ernie_align.recipe.document import read_text_file
from ernie_align.recipe.schema import Block, fault

# Arguments that TRL passes to every reward function besides the columns of the rows.
TRL_REWARD_ARGUMENTS = frozenset(
    {"prompts", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric", "environments"}
)

# old name of a reward -> new name; the old one gets an error for one version
_RENAMED = {"maths": "math"}

Unit = Literal["tokens", "characters", "words"]


@dataclass(frozen=True)
class FunctionSignature:
    """The parameters of a function, read from its source without running it.

    line: of the definition, from 1; required, optional: parameters without and with a default, except those that TRL
    passes; accepts_kwargs: it has **kwargs.
    """

    line: int
    required: tuple[str, ...]
    optional: tuple[str, ...]
    accepts_kwargs: bool
    is_async: bool

    @classmethod
    def read(cls, path: Path, name: str) -> FunctionSignature:
        """Read the top-level function `name` of the file. Raises a recipe fault if there is none."""
        try:
            tree = ast.parse(read_text_file(path), str(path))
        except OSError as error:
            fix = "give the path of a Python file; relative paths start at the working directory"
            raise fault("", f"{path} cannot be read: {error.strerror}", fix=fix) from None
        except (SyntaxError, ValueError, RecursionError, MemoryError) as error:  # the last two: nested too deeply
            raise fault("", f"{path} is not valid Python: {error}", fix="correct the file") from None
        functions = {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)}
        if name not in functions:
            fix = did_you_mean(name, functions, otherwise="define it at the top level of the file")
            raise fault("", f"{path} has no function {name}", fix=fix)
        node = functions[name]
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


class _Reward(Block):
    """The keys that every reward has."""

    name: str
    label: str | None = Field(None, min_length=1, description="Name of the reward in logs; default: its name")
    weight: float = Field(1.0, description="Weight in the sum of rewards; negative for a penalty, 0 to log it only")


ANSWER_COLUMN = Field("answer", description="Row column with the expected answer, or a list of correct ones")
_IGNORE_CASE = Field(False, description="Ignore upper and lower case")


class ExactMatchReward(_Reward):
    """1 if the answer equals the expected one, ignoring surrounding white space, else 0."""

    name: Literal["exact_match"]
    column: str = ANSWER_COLUMN
    ignore_case: bool = _IGNORE_CASE


class ContainsReward(_Reward):
    """1 if the answer contains the expected text, else 0."""

    name: Literal["contains"]
    column: str | None = Field(None, description="Row column with the text, or a list of texts of which one suffices")
    text: str | None = Field(None, min_length=1, description="The same text for every row")
    ignore_case: bool = _IGNORE_CASE

    @model_validator(mode="after")
    def _one_origin(self) -> Self:
        if (self.column is None) == (self.text is None):
            what = "neither column nor text is given" if self.column is None else "both column and text are given"
            raise fault("text" if self.text else "", what, fix="give a column of the rows, or one text for all rows")
        return self


class ChoiceReward(_Reward):
    """1 if the answer chooses the expected letter of a multiple choice, else 0; an ambiguous answer gets 0."""

    name: Literal["choice"]
    column: str = Field("answer", description="Row column with the letter, the option's number from 0, or its text")
    options_column: str | None = Field(None, description="Row column with the options' texts, in order of the letters")
    letters: str = Field("ABCDEFGHIJ", pattern="^[A-Z]{2,26}$", description="Valid letters without options_column")


class NumericReward(_Reward):
    """1 if the last number in the answer is within the wider of the two tolerances of the expected one, else 0."""

    name: Literal["numeric"]
    column: str = ANSWER_COLUMN
    absolute: float = Field(0.0, ge=0, description="Absolute tolerance")
    relative: float = Field(1e-6, ge=0, description="Tolerance as a share of the expected number")


class MathReward(_Reward):
    """1 if math-verify finds the answer mathematically equal to the expected one, else 0."""

    name: Literal["math"]
    column: str = Field("answer", description="Row column with the expected answer, as LaTeX or plain text")
    timeout: float = Field(5.0, gt=0, description="Computing time of one comparison, in seconds; a slower one gets 0")


class FormatReward(_Reward):
    """1 if the answer matches a regular expression within a second of computing, else 0."""

    name: Literal["format"]
    pattern: str = Field(description="Regular expression of Python's re module; write flags inline: (?s) or (?i)")
    match: Literal["full", "search"] = Field("full", description="Match the whole answer (full), or a part (search)")

    @field_validator("pattern")
    @classmethod
    def _compiles(cls, pattern: str) -> str:
        try:
            re.compile(pattern)
        except re.error as error:
            at = "" if error.pos is None else f", at character {error.pos + 1}"
            raise fault("", f"invalid regular expression: {error.msg}{at}", fix="correct the pattern") from None
        return pattern


def _check_bounds(block: Any) -> None:
    if block.min is not None and block.max is not None and block.min > block.max:
        raise fault("min", f"min {block.min} is larger than max {block.max}", fix="make min the smaller one")


class ThinkingReward(_Reward):
    """1 if a closed, non-empty thinking block precedes an answer without thinking tags, else 0."""

    name: Literal["thinking"]
    min: int | None = Field(None, ge=1, description="Minimum characters of reasoning")
    max: int | None = Field(None, ge=1, description="Maximum characters of reasoning")

    @model_validator(mode="after")
    def _bounds_in_order(self) -> Self:
        _check_bounds(self)
        return self


class JsonSchemaReward(_Reward):
    """1 if the answer is JSON that conforms to a JSON schema, within a second of computing, else 0."""

    name: Literal["json_schema"]
    against: Annotated[
        Annotated[dict[str, Any], Tag("mapping")] | Annotated[str, Tag("text")],
        Discriminator(lambda value: "mapping" if isinstance(value, Mapping) else "text"),
    ] = Field(description="The JSON schema, or the path of a JSON file that contains it")
    fenced: bool = Field(False, description="Accept an answer inside a ```json fence")

    @field_validator("against")
    @classmethod
    def _can_be_read(cls, against: dict[str, Any] | str) -> dict[str, Any] | str:
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
        fix = "give the path of a JSON file; relative paths start at the working directory"
        raise fault("", f"{path} cannot be read: {error.strerror}", fix=fix) from None
    except (ValueError, RecursionError) as error:
        raise fault("", f"{path} is not valid JSON: {error}", fix="correct the file") from None
    if not isinstance(schema, dict):
        raise fault("", f"{path} does not contain a JSON object", fix="a JSON schema is an object")
    return schema


class IouReward(_Reward):
    """Intersection over union of the answer's boxes with the expected ones, averaged over boxes."""

    name: Literal["iou"]
    column: str = Field(
        "boxes", description="Row column with a box of four numbers, a list of boxes, or either as text"
    )
    form: Literal["xyxy", "xywh"] = Field("xyxy", description="Two corners, or a corner with width and height")
    column_form: Literal["xyxy", "xywh"] | None = Field(None, description="Form in the column; default: form")
    threshold: float | None = Field(None, gt=0, le=1, description="A box counts 1 from this overlap on, below it 0")


class LengthReward(_Reward):
    """1 if the length is within bounds; outside them it falls linearly to 0."""

    name: Literal["length"]
    unit: Unit = Field("characters", description="tokens counts the whole completion, the other units only the answer")
    target: int | None = Field(None, ge=1, description="Sets min and max to the same value")
    min: int | None = Field(None, ge=1, description="Minimum length in units")
    max: int | None = Field(None, ge=1, description="Maximum length in units")
    falloff: int | None = Field(None, ge=1, description="Units from the bound to reward 0; default: the bound itself")

    @model_validator(mode="after")
    def _some_bound(self) -> Self:
        bounds = [name for name in ("min", "max") if getattr(self, name) is not None]
        if self.target is not None and bounds:
            raise fault(
                "target", f"target and {' and '.join(bounds)} are both given", fix="write target, or min and max"
            )
        if self.target is None and not bounds:
            raise fault("", "no bound is given", fix="write target:, min: or max:")
        _check_bounds(self)
        return self


class RepetitionReward(_Reward):
    """Minus the share of n-grams that repeat an earlier one: 0 without repetition, close to -1 for repetition only."""

    name: Literal["repetition"]
    unit: Unit = Field("words", description="tokens counts the whole completion; characters suits Chinese")
    ngram: int = Field(3, ge=1, description="Units per n-gram")


class JudgeReward(_Reward):
    """Score from an LLM judge behind an OpenAI-compatible endpoint, scaled to 0..1."""

    name: Literal["judge"]
    url: str = Field(pattern="^https?://", description="Base URL of the endpoint, such as http://localhost:8000/v1")
    model: str = Field(description="Model name at the endpoint")
    rubric: str = Field(min_length=1, description="Instructions that say what earns which score")
    reference_column: str | None = Field(None, description="Row column with a reference answer")
    api_key_env: str | None = Field(
        None, pattern="^[A-Za-z_][A-Za-z0-9_]*$", description="Environment variable with the API key"
    )
    min_score: float = Field(0.0, description="Score that maps to 0")
    max_score: float = Field(10.0, description="Score that maps to 1")
    images: bool = Field(False, description="Also send the prompt's images to the judge")
    temperature: float = Field(0.0, ge=0, description="Sampling temperature of the judge; 0 is greedy")
    max_tokens: int | None = Field(None, ge=1, description="Maximum tokens of a reply; default: the endpoint's limit")
    concurrency: int = Field(8, ge=1, description="Maximum concurrent requests")
    timeout: float = Field(60.0, gt=0, description="Seconds until a request times out")
    retries: int = Field(4, ge=0, description="Retries of a request that failed, or whose reply contains no score")
    backoff: float = Field(1.0, gt=0, description="Seconds before the first retry; doubles with each retry")

    @model_validator(mode="after")
    def _scores_in_order(self) -> Self:
        if self.min_score >= self.max_score:
            what = f"{self.max_score} is not larger than min_score {self.min_score}"
            raise fault("max_score", what, fix="make max_score the larger one")
        return self


class CustomReward(_Reward):
    """A function of the user: the only place where a recipe names code."""

    name: str = Field(pattern=r"^.+\.py:[A-Za-z_]\w*$", description="path/to/file.py:function")
    args: dict[str, Any] = Field(default_factory=dict, description="Keyword arguments that every call gets")

    @property
    def path(self) -> Path:
        """The file; relative paths start at the working directory, as everywhere in a recipe."""
        return Path(self.name.rpartition(":")[0])

    @property
    def function(self) -> str:
        """The name of the function."""
        return self.name.rpartition(":")[2]

    @property
    def signature(self) -> FunctionSignature:
        """The function's parameters, read from its file."""
        return FunctionSignature.read(self.path, self.function)

    @property
    def columns(self) -> tuple[str, ...]:
        """Required row columns: parameters without a default that neither TRL nor args provides."""
        return tuple(name for name in self.signature.required if name not in self.args)

    @field_validator("name")
    @classmethod
    def _can_be_called(cls, name: str) -> str:
        path, _, function = name.rpartition(":")
        signature = FunctionSignature.read(Path(path), function)
        if signature.is_async:
            raise fault("", f"{function} is async ({path}:{signature.line})", fix="write a plain function")
        if not signature.accepts_kwargs:
            what = f"{function} does not accept **kwargs ({path}:{signature.line})"
            raise fault("", what, why="TRL passes every column of the rows, and more", fix="add **kwargs")
        return name

    @model_validator(mode="after")
    def _args_are_parameters(self) -> Self:
        known = [*self.signature.required, *self.signature.optional]
        for key in self.args:
            if key not in known:
                fix = did_you_mean(key, known, otherwise="add the parameter to the function")
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
    """Weighted mean of several criteria, each a reward, over those that apply to the row."""

    name: Literal["checklist"]
    criteria: list[Annotated[Criterion, BeforeValidator(lambda value: parse_named_block(value, CRITERIA))]] = Field(
        min_length=1, description="Any rewards except another checklist"
    )

    @field_validator("criteria")
    @classmethod
    def _weights_make_a_mean(cls, criteria: list[Criterion]) -> list[Criterion]:
        for criterion in criteria:
            if criterion.weight <= 0:
                what = f"criterion {criterion.name} has weight {criterion.weight}"
                raise fault("", what, why="a checklist is a weighted mean", fix="give each criterion a weight above 0")
        return criteria


REWARDS = {**CRITERIA, "checklist": ChecklistReward}


def reward_names(blocks: Sequence[Any]) -> list[str]:
    """Return each reward's name in logs and other keys: its label, or its name, or name_2 if that is taken."""
    names: list[str] = []
    for block in blocks:
        base = block.label or block.name.rpartition(":")[2]
        numbered = (base if number == 1 else f"{base}_{number}" for number in range(1, len(names) + 2))
        names.append(next(name for name in numbered if name not in names))
    return names


def parse_named_block(value: Any, blocks: Mapping[str, type[Block]], *, kind: str = "reward") -> Block:
    """Validate the block that `name` selects. A plain union would report the faults of all its members."""
    if isinstance(value, Block):
        return value
    if not isinstance(value, Mapping):
        fix = "write a mapping: {name: exact_match, column: answer}"
        raise fault("", f"expected a {kind}, got {value!r}", fix=fix)
    name = value.get("name")
    known = f"valid names are {', '.join(blocks)}, and path/to/file.py:function for your own"
    if not isinstance(name, str):
        raise fault("name" if "name" in value else "", f"the {kind} has no name", why=known, fix="write name:")
    cls = CustomReward if ".py" in name else blocks.get(name)
    if cls is None and name in _RENAMED:
        new = _RENAMED[name]
        raise fault("name", f"the {kind} {name!r} is now called {new!r}", fix=f"write name: {new}")
    if cls is None:
        raise fault("name", f"unknown {kind} {name!r}", why=known, fix=did_you_mean(name, blocks))
    try:
        return cls.model_validate(value)
    except ValidationError as error:
        raise ValidationError.from_exception_data(cls.__name__, [_line(cls, item) for item in error.errors()]) from None


def _line(cls: type[Block], item: Any) -> InitErrorDetails:
    """Return one fault of the block. Unknown keys get their suggestion here, where the block is known."""
    kind, loc, context = item["type"], item["loc"], item.get("ctx", {})
    if kind == "extra_forbidden" and len(loc) == 1:
        custom = fault(str(loc[0]), "unknown key", fix=did_you_mean(str(loc[0]), cls.model_fields))
        return InitErrorDetails(type=custom, input=item["input"])
    if kind == "align":
        kind = PydanticCustomError("align", "{what}", context)
    return InitErrorDetails(type=kind, loc=loc, input=item["input"], ctx=context)


RewardBlock = Annotated[Criterion | ChecklistReward, BeforeValidator(lambda value: parse_named_block(value, REWARDS))]
