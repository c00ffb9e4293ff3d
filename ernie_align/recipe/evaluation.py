"""The blocks of an evaluation plan: what is asked, how answers are drawn, and what is measured of them."""

from __future__ import annotations

import re
from pathlib import PurePath
from typing import Annotated, Any, Literal, Self, Union

from pydantic import BeforeValidator, Discriminator, Field, Tag, field_validator, model_validator

from ernie_align.recipe.rewards import REWARDS, CustomReward, parse_named_block
from ernie_align.recipe.schema import Block, Format, fault

_Names = Annotated[
    Annotated[str, Tag("text")] | Annotated[list[str], Tag("list")],
    Discriminator(lambda value: "list" if isinstance(value, list) else "text"),
]


class ColumnsBlock(Block):
    """Which columns of a benchmark's file hold what. A question is asked with its options under it, by letter."""

    question: str = Field(description="Column with the question")
    answer: str | None = Field(None, description="Column with the expected answer, or a list of right ones")
    options: _Names | None = Field(
        None, description="Column with a list of options (or its text as JSON), or one column for each option"
    )
    image: _Names | None = Field(None, description="Column with a path, bytes, base64 or a list of them, or several")


class DataSetBlock(Block):
    """One file of rows with known answers."""

    path: str = Field(description="JSON, JSONL, Parquet or CSV file; a glob names several")
    name: str | None = Field(
        None, pattern=r"^[^\s@/<>=]+$", description="What figures call it; otherwise the file's name"
    )
    format: Literal["auto"] | Format = Field("auto", description="auto finds the format of each file")
    columns: ColumnsBlock | None = Field(None, description="For a benchmark's file in a layout of its own")
    instruction: str | None = Field(None, min_length=1, description="Behind every question, on a line of its own")
    kind_column: str = Field("kind", description="Row column that groups the figures")
    media_root: str | None = Field(None, description="Folder of the images; otherwise the folder of the file")
    limit: int | None = Field(None, ge=1, description="Use only this many rows, the first ones")

    @property
    def display_name(self) -> str:
        """What figures call it."""
        return self.name or PurePath(self.path).name

    @model_validator(mode="after")
    def _one_layout(self) -> Self:
        if self.columns is not None and self.format != "auto":
            raise fault("format", "both format and columns", fix="columns describe a layout of their own: drop format")
        if self.instruction is not None and self.columns is None:
            raise fault("instruction", "an instruction without columns", fix="name the question's column under columns")
        return self


class _Measure(Block):
    name: str
    label: str | None = Field(None, min_length=1, description="What figures call it; otherwise its name")


_Column = Field("answer", description="Row column with the expected answer; a list there holds several right ones")


class AnlsMetric(_Measure):
    """Average normalized Levenshtein similarity, of document VQA."""

    name: Literal["anls"]
    column: str = _Column
    threshold: float = Field(0.5, ge=0, le=1, description="A similarity under it counts 0")


class RelaxedAccuracyMetric(_Measure):
    """ChartQA's: a number within a tolerance, or the same text."""

    name: Literal["relaxed_accuracy"]
    column: str = _Column
    tolerance: float = Field(0.05, ge=0, description="As a share of the expected number")


class F1Metric(_Measure):
    """F1 of the words that answer and expected answer share, of SQuAD."""

    name: Literal["f1"]
    column: str = _Column


class ThinkingLengthMetric(_Measure):
    """Length of the reasoning, over the answers that have one. The rate is the metric `thinking`."""

    name: Literal["thinking_length"]
    unit: Literal["words", "characters"] = Field("words", description="What is counted")


class PassAtKMetric(_Measure):
    """The chance that one of k answers passes a verifier, estimated without bias from all samples."""

    name: Literal["pass_at_k"]
    k: list[Annotated[int, Field(ge=1)]] = Field(
        default=[1], min_length=1, description="Answers drawn, of which one passes"
    )
    verifier: MetricBlock = Field(description="A reward; an answer passes if it earns 1")

    @field_validator("verifier")
    @classmethod
    def _judges_one_answer(cls, verifier: Any) -> Any:
        if not isinstance(verifier, (*REWARDS.values(), CustomReward)):
            raise fault("", f"{verifier.name} verifies nothing", fix=f"choose from {', '.join(REWARDS)}")
        return verifier


class PerplexityMetric(_Measure):
    """exp of the mean negative log-likelihood of the expected answers' tokens, teacher-forced."""

    name: Literal["perplexity"]


class PreferenceMetric(_Measure):
    """Share of pairs whose chosen answer is the more likely one, and by how much; teacher-forced."""

    name: Literal["preference"]


OWN = {
    "anls": AnlsMetric,
    "relaxed_accuracy": RelaxedAccuracyMetric,
    "f1": F1Metric,
    "thinking_length": ThinkingLengthMetric,
    "pass_at_k": PassAtKMetric,
    "perplexity": PerplexityMetric,
    "preference": PreferenceMetric,
}
METRICS = {**REWARDS, **OWN}
MetricBlock = Annotated[
    Union[(*METRICS.values(), CustomReward)],
    BeforeValidator(lambda value: parse_named_block(value, METRICS, kind="metric")),
]


class GenerationBlock(Block):
    """How answers are drawn. Each row has a seed of its own: neither batches nor a resumed run change what is drawn."""

    max_new_tokens: int = Field(256, ge=1, description="Tokens of an answer, at most")
    temperature: float = Field(0.0, ge=0, allow_inf_nan=False, description="0 is greedy")
    top_p: float = Field(1.0, gt=0, le=1, description="Share of probability that is drawn from")
    samples: int = Field(1, ge=1, description="Answers to each row")
    batch_size: int = Field(64, ge=1, description="Answers drawn at once")
    seed: int = Field(0, ge=0, description="Of what is drawn at a temperature over 0")
    thinking: bool = Field(False, description="enable_thinking of the chat template; a row may override it")

    @model_validator(mode="after")
    def _samples_differ(self) -> Self:
        if self.samples > 1 and self.temperature == 0:
            what = f"{self.samples} greedy samples are {self.samples} times the same one"
            raise fault("samples", what, fix="set temperature over 0, or samples: 1")
        return self


class RetentionBlock(Block):
    """What is compared with the first checkpoint beside the answers."""

    text: list[DataSetBlock] = Field(
        default_factory=list, description="Held-out text; otherwise a page that comes along"
    )
    tokens: int = Field(1024, ge=1, description="Tokens of text whose distributions are compared, at most")
    routed_rows: int = Field(32, ge=1, description="Rows whose routing is compared, the first ones of each data set")


class EvalConfig(Block):
    """An evaluation: every checkpoint is asked the same rows in the same way."""

    data: list[DataSetBlock] = Field(min_length=1, description="The files that are asked")
    metrics: list[MetricBlock] = Field(min_length=1, description="What is measured of the answers")
    generation: GenerationBlock = Field(default_factory=GenerationBlock)
    retention: RetentionBlock = Field(default_factory=RetentionBlock)
    require: list[str] = Field(default_factory=list, description="Such as exact_match@test.jsonl/sum>=0.9")

    @model_validator(mode="after")
    def _names_are_unique(self) -> Self:
        names = [data.display_name for data in self.data]
        for number, name in enumerate(names):
            if name in names[:number] or re.search(r"[\s@/<>=]", name):
                why = "stands twice" if name in names[:number] else "holds white space or one of @ < > ="
                raise fault("data", f"the name {name!r} {why}", fix="give each data set a name: of its own")
        return self

    @model_validator(mode="after")
    def _enough_samples(self) -> Self:
        for metric in self.metrics:
            if isinstance(metric, PassAtKMetric) and max(metric.k) > self.generation.samples:
                what = f"pass_at_k with k {max(metric.k)} and {self.generation.samples} samples"
                raise fault("metrics", what, fix=f"set generation.samples to {max(metric.k)} or more")
        return self
