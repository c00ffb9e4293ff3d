"""Call a reward on a batch as TRL does, check its scores, name the row and line of a failure; split completions."""

from __future__ import annotations

import inspect
import math
import numbers
import re
import traceback
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ernie_align.errors import AlignError, Fault, RunError

FROM_TRAINER = ("completion_ids",)  # columns that the trainer adds to those of the rows

Scores = list[float | None]


@dataclass(frozen=True)
class Scorer:
    """The scoring function of a reward.

    score: `(prompts, completions, **columns) -> list[float | None]`; columns: the row columns it reads; place:
    `file:line` of its code, for errors; counts: events so far that a user should know of.
    """

    score: Callable[..., Sequence[float | None]]
    columns: tuple[str, ...] = ()
    place: str = ""
    counts: Callable[[], Mapping[str, int]] = dict


def by_row(score: Callable[..., float | None], *columns: str, reads_answer: bool = True) -> Scorer:
    """Build a scorer from a function of one answer: `score(answer, *values)`, one value for each column.

    The reward does not apply to a row with None in one of the columns. reads_answer: pass the answer's text, without
    the reasoning; otherwise the whole completion.
    """

    def score_batch(prompts: Sequence[Any], completions: Sequence[Completion], **values: Any) -> Scores:
        texts = map(answer_text, completions) if reads_answer else completions
        rows = zip(texts, *(values[column] for column in columns), strict=True)
        return [None if any(value is None for value in row[1:]) else score(*row) for row in rows]

    return Scorer(score_batch, columns, source_line(score))


def source_line(function: Callable) -> str:
    """Return `file:line` of a function."""
    code = inspect.unwrap(function).__code__
    return f"{code.co_filename}:{code.co_firstlineno}"


@dataclass(frozen=True)
class Reward:
    """A reward of a recipe, with TRL's signature.

    name: its name in logs, unique in the recipe; weight: in the sum of rewards; where: its place in the recipe.
    """

    name: str
    weight: float
    scorer: Scorer = field(repr=False)
    where: str = field(default="", repr=False)

    @property
    def __name__(self) -> str:  # TRL names its metrics by it
        return self.name

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns that a row must have."""
        return tuple(column for column in self.scorer.columns if column not in FROM_TRAINER)

    @property
    def counts(self) -> Mapping[str, int]:
        """Events so far that a user should know of, such as replies of a judge that contained no score."""
        return self.scorer.counts()

    def __call__(self, prompts: Sequence[Any], completions: Sequence[Completion], **columns: Any) -> Scores:
        """Score N completions of N prompts, with columns of N values each; None where the reward does not apply.

        Raises RunError if the reward fails or returns anything else. The error names the function, and the prompt and
        completion on which it failed, which are found by calling the reward on one row after the other.
        """
        absent = [column for column in self.scorer.columns if column not in columns]
        if absent:
            raise RunError(*(_missing_column(self, column, columns) for column in absent))
        try:
            scores = self.scorer.score(prompts, completions, **columns)
        except AlignError:
            raise
        except Exception as error:
            raise self._locate_failure(error, prompts, completions, columns) from error
        return self._validate(scores, prompts, completions)

    def _locate_failure(
        self, error: Exception, prompts: Sequence, completions: Sequence, columns: dict[str, Any]
    ) -> RunError:
        rows, what = len(completions), f"{type(error).__name__}: {error}"
        for row in range(rows):
            alone = {key: [value[row]] if _is_column(value, rows) else value for key, value in columns.items()}
            try:
                self.scorer.score([prompts[row]], [completions[row]], **alone)
            except Exception as row_error:
                if type(row_error) is type(error):
                    what = f"{type(row_error).__name__}: {row_error}"
                    return self._failure(what, self._failing_line(row_error), prompts[row], completions[row])
        what += f", on a batch of {rows} rows; on each of these rows alone it does not fail like that"
        return self._failure(what, self._failing_line(error))

    def _validate(self, scores: Any, prompts: Sequence, completions: Sequence) -> Scores:
        if not isinstance(scores, Sequence) or isinstance(scores, str):
            raise self._failure(f"returned {type(scores).__name__}; expected a list", self.scorer.place)
        if len(scores) != len(completions):
            what = f"returned {len(scores)} scores for {len(completions)} completions"
            raise self._failure(what, self.scorer.place)
        scores = [score.item() if hasattr(score, "item") else score for score in scores]  # numpy and torch scalars
        for row, score in enumerate(scores):
            if score is not None and not (isinstance(score, numbers.Real) and math.isfinite(score)):
                what = f"returned {_shorten(score)}; expected a finite number, or None if the reward does not apply"
                raise self._failure(what, self.scorer.place, prompts[row], completions[row])
        return [None if score is None else float(score) for score in scores]

    def _failure(self, what: str, place: str, prompt: Any = None, completion: Any = None) -> RunError:
        why = "" if completion is None else f"prompt: {_shorten(prompt)}\n    completion: {_shorten(completion)}"
        return RunError.at(place, f"reward {self.name}: {what}", why=why, fix="correct it, then continue with --resume")

    def _failing_line(self, error: Exception) -> str:
        """Return the innermost line of the reward's own file that the error passed through."""
        file = self.scorer.place.rpartition(":")[0]
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == file]
        return f"{file}:{lines[-1]}" if lines else self.scorer.place


def missing_columns(rewards: Sequence[Reward], present: Collection[str]) -> list[Fault]:
    """Return one fault for each column that a reward reads and no row has."""
    return [
        _missing_column(reward, name, present) for reward in rewards for name in reward.columns if name not in present
    ]


def _missing_column(reward: Reward, column: str, present: Collection[str]) -> Fault:
    others = ", ".join(sorted(set(present) - {"prompt", "images", *FROM_TRAINER})) or "none"
    what = f"reward {reward.name} reads the column {column!r}, which no row has"
    fix = f"add the column to the rows, or name one that they have: {others}"
    return Fault(reward.where or reward.name, what, fix=fix)


def _is_column(value: Any, rows: int) -> bool:
    return isinstance(value, list | tuple) and len(value) == rows


def _shorten(value: Any, length: int = 300) -> str:
    text = repr(value)
    return text if len(text) <= length else f"{text[: length // 2]} ... {text[-length // 2 :]}"


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
