"""A reward as the trainer calls it, and whose fault it is when a call fails."""

from __future__ import annotations

import inspect
import math
import numbers
import traceback
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ernie_align.errors import AlignError, Fault, RunError
from ernie_align.rewards.completion import Completion

FROM_TRAINER = ("completion_ids",)  # columns that every call has beside those of the rows

Scores = list[float | None]


@dataclass(frozen=True)
class Scorer:
    """What a kind of reward does with a batch.

    score: `(prompts, completions, **columns) -> list[float | None]`; columns: what it reads of a row; place: where its
    code is, for errors; counts: what happened so far that a user should know of.
    """

    score: Callable[..., Sequence[float | None]]
    columns: tuple[str, ...] = ()
    place: str = ""
    counts: Callable[[], Mapping[str, int]] = dict


def by_row(score: Callable[..., float | None], *columns: str) -> Scorer:
    """A scorer of single completions: `score(completion, *values)`, one value for each of the columns.

    A row with None in one of the columns is one to which the reward does not apply.
    """

    def batch(prompts: Sequence[Any], completions: Sequence[Completion], **given: Any) -> Scores:
        rows = zip(completions, *(given[column] for column in columns), strict=True)
        return [None if any(value is None for value in row[1:]) else score(*row) for row in rows]

    return Scorer(batch, columns, place_of(score))


def place_of(function: Callable) -> str:
    """`file:line` of a function."""
    code = inspect.unwrap(function).__code__
    return f"{code.co_filename}:{code.co_firstlineno}"


@dataclass(frozen=True)
class Reward:
    """A reward of a recipe: TRL's callable.

    name: what logs call it, unique in the recipe; weight: in the sum of rewards; columns: what a row must have for it;
    where: its place in the recipe.
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
        """The row columns it reads."""
        return tuple(column for column in self.scorer.columns if column not in FROM_TRAINER)

    @property
    def counts(self) -> Mapping[str, int]:
        """What happened so far that a user should know of, such as verdicts of a judge that held no score."""
        return self.scorer.counts()

    def __call__(self, prompts: Sequence[Any], completions: Sequence[Completion], **columns: Any) -> Scores:
        """N prompts, N completions, columns of N values each -> N scores; None where the reward does not apply.

        Raises RunError if the reward fails or returns anything else: it names the function, and the prompt and
        completion it failed on, which are found by calling it on one row after the other.
        """
        absent = [column for column in self.scorer.columns if column not in columns]
        if absent:
            raise RunError(*(_absent(self, column, columns) for column in absent))
        try:
            scores = self.scorer.score(prompts, completions, **columns)
        except AlignError:
            raise
        except Exception as error:
            raise self._blamed(error, prompts, completions, columns) from error
        return self._checked(scores, prompts, completions)

    def _blamed(self, error: Exception, prompts: Sequence, completions: Sequence, columns: dict[str, Any]) -> RunError:
        rows, what = len(completions), f"{type(error).__name__}: {error}"
        for row in range(rows):
            alone = {key: [value[row]] if _is_column(value, rows) else value for key, value in columns.items()}
            try:
                self.scorer.score([prompts[row]], [completions[row]], **alone)
            except Exception as own:
                if type(own) is type(error):
                    what = f"{type(own).__name__}: {own}"
                    return self._failed(what, self._place(own), prompts[row], completions[row])
        what += f", on a batch of {rows}; on each of its rows alone it does not fail like that"
        return self._failed(what, self._place(error))

    def _checked(self, scores: Any, prompts: Sequence, completions: Sequence) -> Scores:
        if not isinstance(scores, Sequence) or isinstance(scores, str):
            raise self._failed(f"returned {type(scores).__name__} where a list is wanted", self.scorer.place)
        if len(scores) != len(completions):
            what = f"returned {len(scores)} scores for {len(completions)} completions"
            raise self._failed(what, self.scorer.place)
        scores = [score.item() if hasattr(score, "item") else score for score in scores]  # of numpy and torch
        for row, score in enumerate(scores):
            if score is not None and not (isinstance(score, numbers.Real) and math.isfinite(score)):
                what = f"returned {_short(score)} where a finite number, or None for does not apply, is wanted"
                raise self._failed(what, self.scorer.place, prompts[row], completions[row])
        return [None if score is None else float(score) for score in scores]

    def _failed(self, what: str, place: str, prompt: Any = None, completion: Any = None) -> RunError:
        why = "" if completion is None else f"prompt: {_short(prompt)}\n    completion: {_short(completion)}"
        return RunError.at(place, f"reward {self.name}: {what}", why=why, fix="mend it, then go on with --resume")

    def _place(self, error: Exception) -> str:
        """The innermost line of the reward's own file that the error passed through."""
        file = self.scorer.place.rpartition(":")[0]
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == file]
        return f"{file}:{lines[-1]}" if lines else self.scorer.place


def missing_columns(rewards: Sequence[Reward], present: Collection[str]) -> list[Fault]:
    """One fault for each column that a reward reads and no row has."""
    return [_absent(reward, name, present) for reward in rewards for name in reward.columns if name not in present]


def _absent(reward: Reward, column: str, present: Collection[str]) -> Fault:
    others = ", ".join(sorted(set(present) - {"prompt", "images", *FROM_TRAINER})) or "none"
    fix = f"add it to the rows, or name another one; they have {others}"
    return Fault(
        reward.where or reward.name, f"reward {reward.name} reads the column {column!r}, which no row has", fix=fix
    )


def _is_column(value: Any, rows: int) -> bool:
    return isinstance(value, list | tuple) and len(value) == rows


def _short(value: Any, length: int = 300) -> str:
    text = repr(value)
    return text if len(text) <= length else f"{text[: length // 2]} ... {text[-length // 2 :]}"
