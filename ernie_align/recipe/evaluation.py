"""The blocks of an evaluation config: data, generation settings and metrics."""

from __future__ import annotations

import re
from pathlib import PurePath
from typing import Annotated, Any, Literal, Self, Union

from pydantic import BeforeValidator, Field, field_validator, model_validator

from ernie_align.recipe.rewards import ANSWER_COLUMN, REWARDS, CustomReward, parse_named_block
from ernie_align.recipe.schema import Block, Format, fault, scalar_or_list

_Names = scalar_or_list(str, str)


class ColumnsBlock(Block):
    """The meaning of the columns of a benchmark file. Options are listed by letter under the question."""

    question: str = Field(description="Column with the question")
    answer: str | None = Field(None, description="Column with the expected answer, or a list of correct ones")
    options: _Names | None = Field(None, description="Column with a list of options, also as JSON, or one per option")
    image: _Names | None = Field(None, description="Column or columns with a path, bytes, base64 or a list of these")


class DataSetBlock(Block):
    """One file of rows with known answers."""

    path: str = Field(description="JSON, JSONL, Parquet or CSV file, or a glob for several")
    name: str | None = Field(None, pattern=r"^[^\s@/<>=]+$", description="Name in the report; default: the file's name")
    format: Literal["auto"] | Format = Field("auto", description="Row format; auto detects the format of each file")
    columns: ColumnsBlock | None = Field(None, description="Columns of a benchmark file in its own layout")
    instruction: str | None = Field(None, min_length=1, description="Text after every question, on its own line")
    kind_column: str = Field("kind", description="Row column by which results are grouped")
    media_root: str | None = Field(None, description="Folder of the images; default: the folder of the file")
    limit: int | None = Field(None, ge=1, description="Use only the first rows, at most this many")

    @property
    def display_name(self) -> str:
        """The name in the report."""
        return self.name or PurePath(self.path).name

    @model_validator(mode="after")
    def _one_layout(self) -> Self:
        if self.columns is not None and self.format != "auto":
            raise fault("format", "both format and columns are given", fix="remove format: columns describe the layout")
        if self.instruction is not None and self.columns is None:
            raise fault(
                "instruction", "instruction is given without columns", fix="name the question's column under columns"
            )
        return self


class _Metric(Block):
    name: str
    label: str | None = Field(None, min_length=1, description="Name in the report; default: its name")


class AnlsMetric(_Metric):
    """Average normalized Levenshtein similarity, as in document VQA."""

    name: Literal["anls"]
    column: str = ANSWER_COLUMN
    threshold: float = Field(0.5, ge=0, le=1, description="A similarity below this counts 0")


class RelaxedAccuracyMetric(_Metric):
    """ChartQA's relaxed accuracy: a number within a tolerance, or the same text."""

    name: Literal["relaxed_accuracy"]
    column: str = ANSWER_COLUMN
    tolerance: float = Field(0.05, ge=0, description="Tolerance as a share of the expected number")


class F1Metric(_Metric):
    """F1 of the words shared by the answer and the expected answer, as in SQuAD."""

    name: Literal["f1"]
    column: str = ANSWER_COLUMN


class ThinkingLengthMetric(_Metric):
    """Mean length of the reasoning, over the answers with reasoning; their share is the metric `thinking`."""

    name: Literal["thinking_length"]
    unit: Literal["words", "characters"] = Field("words", description="Unit of length")


class PassAtKMetric(_Metric):
    """Probability that at least one of k answers passes a verifier: the unbiased estimate from all samples."""

    name: Literal["pass_at_k"]
    k: list[Annotated[int, Field(ge=1)]] = Field([1], min_length=1, description="Numbers of answers")
    verifier: MetricBlock = Field(description="A reward; an answer passes if its reward is 1")

    @field_validator("verifier")
    @classmethod
    def _scores_one_answer(cls, verifier: Any) -> Any:
        if not isinstance(verifier, (*REWARDS.values(), CustomReward)):
            raise fault("", f"{verifier.name} is not a verifier", fix=f"choose from {', '.join(REWARDS)}")
        return verifier


class PerplexityMetric(_Metric):
    """exp of the mean negative log-likelihood of the expected answers' tokens, teacher-forced."""

    name: Literal["perplexity"]


class PreferenceMetric(_Metric):
    """Share of pairs whose chosen answer is more likely than the rejected one, and the margin; teacher-forced."""

    name: Literal["preference"]


EVAL_METRICS = {
    "anls": AnlsMetric,
    "relaxed_accuracy": RelaxedAccuracyMetric,
    "f1": F1Metric,
    "thinking_length": ThinkingLengthMetric,
    "pass_at_k": PassAtKMetric,
    "perplexity": PerplexityMetric,
    "preference": PreferenceMetric,
}
METRICS = {**REWARDS, **EVAL_METRICS}
MetricBlock = Annotated[
    Union[(*METRICS.values(), CustomReward)],
    BeforeValidator(lambda value: parse_named_block(value, METRICS, kind="metric")),
]


class GenerationBlock(Block):
    """Generation settings. Each row has its own seed, so batch size and resuming do not change any answer."""

    max_new_tokens: int = Field(256, ge=1, description="Maximum tokens of an answer")
    temperature: float = Field(0.0, ge=0, description="0 is greedy")
    top_p: float = Field(1.0, gt=0, le=1, description="Nucleus sampling: cumulative probability that is sampled from")
    samples: int = Field(1, ge=1, description="Answers per row")
    batch_size: int = Field(64, ge=1, description="Answers generated at once")
    seed: int = Field(0, ge=0, description="Seed for sampling at a temperature above 0")
    thinking: bool = Field(False, description="enable_thinking of the chat template; a row may override it")

    @model_validator(mode="after")
    def _samples_differ(self) -> Self:
        if self.samples > 1 and self.temperature == 0:
            what = f"{self.samples} greedy samples of a row are identical"
            raise fault("samples", what, fix="set a temperature above 0, or samples: 1")
        return self


class RetentionBlock(Block):
    """Comparison with the baseline beyond answers: drift on text, and routing."""

    text: list[DataSetBlock] = Field(default_factory=list, description="Held-out text; default: a page of our own")
    tokens: int = Field(1024, ge=1, description="Maximum tokens of text whose distributions are compared")
    routed_rows: int = Field(32, ge=1, description="Rows of each data set whose routing is compared")


class EvalConfig(Block):
    """An evaluation: every checkpoint answers the same rows with the same settings."""

    data: list[DataSetBlock] = Field(min_length=1, description="Files of rows with known answers")
    metrics: list[MetricBlock] = Field(min_length=1, description="Metrics of the answers")
    generation: GenerationBlock = Field(default_factory=GenerationBlock)
    retention: RetentionBlock = Field(default_factory=RetentionBlock)
    require: list[str] = Field(default_factory=list, description="Such as exact_match@test.jsonl/sum>=0.9")

    @model_validator(mode="after")
    def _names_are_unique(self) -> Self:
        names = [data.display_name for data in self.data]
        for number, name in enumerate(names):
            if name in names[:number] or re.search(r"[\s@/<>=]", name):
                why = "is used twice" if name in names[:number] else "contains white space or one of @ / < > ="
                raise fault("data", f"the name {name!r} {why}", fix="give each data set its own name:")
        return self

    @model_validator(mode="after")
    def _enough_samples(self) -> Self:
        for metric in self.metrics:
            if isinstance(metric, PassAtKMetric) and (k := max(metric.k)) > self.generation.samples:
                what = f"pass_at_k needs at least {k} samples per row; generation.samples is {self.generation.samples}"
                raise fault("metrics", what, fix=f"set generation.samples to {k} or more")
        return self
