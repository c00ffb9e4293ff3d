"""Several checkpoints on the same rows: differences with intervals, wins and losses, and the rows that changed most."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ernie_align.evaluation.intervals import paired_difference, ratio
from ernie_align.evaluation.metrics import Metric
from ernie_align.evaluation.questions import Question
from ernie_align.evaluation.runner import Result

SHOWN_CHANGES = 6  # rows that got better, and as many that got worse
SHOWN_SAMPLES = 12  # rows of each data set


@dataclass(frozen=True)
class Difference:
    """A checkpoint's figure minus the first one's, over the n rows that both were measured on.

    interval: 95 %, over paired draws of rows; wins, losses, ties: rows on which it did better, worse, or the same.
    """

    checkpoint: str
    data: str
    kind: str
    measure: str
    n: int
    difference: float
    interval: tuple[float, float]
    wins: int
    losses: int
    ties: int


def differences(
    results: Sequence[Result], groups: dict[tuple[str, str], list[int]], measures: Sequence[Metric]
) -> list[Difference]:
    """Every checkpoint after the first against the first."""
    first, *others = results
    found = []
    for other in others:
        for (data, kind), rows in groups.items():
            for measure in measures:
                theirs, ours = first.table[measure.name], other.table[measure.name]
                both = [row for row in rows if theirs[row] is not None and ours[row] is not None]
                if both:
                    found.append(
                        _difference(
                            (other.name, data, kind),
                            measure,
                            [ours[row] for row in both],
                            [theirs[row] for row in both],
                        )
                    )
    return found


def _difference(group: tuple[str, str, str], measure: Metric, ours: list, theirs: list) -> Difference:
    gains = [_gain(measure, one, two) for one, two in zip(ours, theirs, strict=True)]
    return Difference(
        *group,
        measure.name,
        len(ours),
        measure.shown(ratio(ours)) - measure.shown(ratio(theirs)),
        paired_difference(ours, theirs, of_exp=measure.is_log),
        sum(gain > 0 for gain in gains),
        sum(gain < 0 for gain in gains),
        sum(gain == 0 for gain in gains),
    )


def _gain(measure: Metric, ours: tuple[float, float], theirs: tuple[float, float]) -> float:
    gain = ours[0] / ours[1] - theirs[0] / theirs[1]
    return gain if measure.better == "higher" else -gain


def records(
    questions: Sequence[Question], results: Sequence[Result], measures: Sequence[Metric]
) -> list[dict[str, Any]]:
    """One per question: what was asked, what each checkpoint said, and what each measure makes of it."""
    return [
        {
            "data": question.data,
            "row": question.place,
            "kind": question.kind,
            "question": _text(question),
            "expected": question.columns.get("answer"),
            "images": [image["path"] for image in question.row.images],
            "results": {result.name: _said(result, number, measures) for result in results},
        }
        for number, question in enumerate(questions)
    ]


def _text(question: Question) -> str:
    row = question.asked
    if row.plain is not None:
        return row.plain[0]
    content = next((turn["content"] for turn in reversed(row.messages) if turn["role"] == "user"), "")
    return content if isinstance(content, str) else "".join(part.get("text", "") for part in content).strip()


def _said(result: Result, number: int, measures: Sequence[Metric]) -> dict[str, Any]:
    outcome = result.outcomes[number]
    scores = {
        measure.name: measure.shown(part[0] / part[1])
        for measure in measures
        if (part := result.table[measure.name][number]) is not None
    }
    return {"answers": [answer["text"] for answer in outcome.get("answers", [])], "scores": scores}


def changed(
    questions: Sequence[Question], results: Sequence[Result], measures: Sequence[Metric]
) -> list[dict[str, Any]]:
    """Of every checkpoint after the first: the questions that got worse and better by most, {checkpoint, measure, row,
    gain}, row being the question's number.

    A question is judged by the first measure of the plan on which it moved.
    """
    first, *others = results
    found = []
    for other in others:
        gains = []
        for number in range(len(questions)):
            for place, measure in enumerate(measures):
                theirs, ours = first.table[measure.name][number], other.table[measure.name][number]
                gain = _gain(measure, ours, theirs) if theirs is not None and ours is not None else 0
                if gain:
                    gains.append((place, number, gain))
                    break
        # the plan's first measures before its later ones: two measures share no scale
        gains.sort(key=lambda gain: (gain[0], -abs(gain[2]), gain[1]))
        for sign in (-1, 1):
            moved = [gain for gain in gains if sign * gain[2] > 0][:SHOWN_CHANGES]
            found += [
                {"checkpoint": other.name, "measure": measures[place].name, "row": number, "gain": gain}
                for place, number, gain in moved
            ]
    return found


def samples(questions: Sequence[Question]) -> list[int]:
    """Numbers of a few questions of each data set, spread evenly over it."""
    chosen = []
    for data in dict.fromkeys(question.data for question in questions):
        own = [number for number, question in enumerate(questions) if question.data == data]
        count = min(SHOWN_SAMPLES, len(own))
        chosen += [own[place * len(own) // count] for place in range(count)]
    return chosen
