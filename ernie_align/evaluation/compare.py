"""Compare each checkpoint with its baseline, row by row: differences with intervals, and the rows that changed most."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ernie_align.evaluation.intervals import Part, paired_difference, ratio
from ernie_align.evaluation.metrics import Metric
from ernie_align.evaluation.questions import Question
from ernie_align.evaluation.runner import CheckpointResult, Groups

SHOWN_CHANGES = 6  # of the rows that got better, and of those that got worse
SHOWN_SAMPLES = 12  # rows of each data set

Pairs = Sequence[tuple[CheckpointResult, CheckpointResult]]  # (checkpoint, its baseline)


def compute_differences(pairs: Pairs, groups: Groups, metrics: Sequence[Metric]) -> list[dict[str, Any]]:
    """Return each checkpoint's metric minus its baseline's: {checkpoint, data, kind, measure, n, difference, ...}.

    n: rows to which the metric applies for both; interval: 95 %, over paired draws of rows; wins, losses, ties: rows on
    which the checkpoint did better, worse, or the same.
    """
    differences = []
    for checkpoint, baseline in pairs:
        for (data, kind), numbers in groups.items():
            for metric in metrics:
                ours, theirs = checkpoint.table[metric.name], baseline.table[metric.name]
                parts = [(ours[row], theirs[row]) for row in numbers if ours[row] and theirs[row]]
                if not parts:
                    continue
                ours, theirs = zip(*parts, strict=True)
                gains = [_gain(metric, *part) for part in parts]
                differences.append(
                    {
                        "checkpoint": checkpoint.name,
                        "data": data,
                        "kind": kind,
                        "measure": metric.name,
                        "n": len(parts),
                        "difference": metric.reported(ratio(ours)) - metric.reported(ratio(theirs)),
                        "interval": list(paired_difference(ours, theirs, of_exp=metric.is_log)),
                        "wins": sum(gain > 0 for gain in gains),
                        "losses": sum(gain < 0 for gain in gains),
                        "ties": sum(gain == 0 for gain in gains),
                    }
                )
    return differences


def _gain(metric: Metric, ours: Part, theirs: Part) -> float:
    gain = ours[0] / ours[1] - theirs[0] / theirs[1]
    return gain if metric.better == "higher" else -gain


def row_records(
    questions: Sequence[Question],
    results: Sequence[CheckpointResult],
    metrics: Sequence[Metric],
    numbers: Sequence[int] | None = None,
) -> list[dict[str, Any]]:
    """Return each question with the answers and scores of every checkpoint. numbers: only of these questions."""
    return [
        {
            "data": questions[number].data,
            "row": questions[number].place,
            "kind": questions[number].kind,
            "question": _prompt_text(questions[number]),
            "expected": questions[number].columns.get("answer"),
            "images": [image["path"] for image in questions[number].row.images],
            "results": {result.name: _answers_and_scores(result, number, metrics) for result in results},
        }
        for number in (range(len(questions)) if numbers is None else numbers)
    ]


def _prompt_text(question: Question) -> str:
    row = question.prompt
    if row.plain is not None:
        return row.plain[0]
    content = next((turn["content"] for turn in reversed(row.messages) if turn["role"] == "user"), "")
    return content if isinstance(content, str) else "".join(part.get("text", "") for part in content).strip()


def _answers_and_scores(result: CheckpointResult, number: int, metrics: Sequence[Metric]) -> dict[str, Any]:
    outcome = result.outcomes[number]
    scores = {
        metric.name: metric.reported(part[0] / part[1])
        for metric in metrics
        if (part := result.table[metric.name][number]) is not None
    }
    return {"answers": [answer["text"] for answer in outcome.get("answers", [])], "scores": scores}


def most_changed(questions: Sequence[Question], pairs: Pairs, metrics: Sequence[Metric]) -> list[dict[str, Any]]:
    """Return the questions on which each checkpoint got worse and better by most: {checkpoint, measure, row, gain}.

    row: number of the question; measure: the first metric of the config on which it changed.
    """
    changes = []
    for checkpoint, baseline in pairs:
        gains = []
        for number in range(len(questions)):
            for place, metric in enumerate(metrics):
                theirs, ours = baseline.table[metric.name][number], checkpoint.table[metric.name][number]
                gain = _gain(metric, ours, theirs) if theirs is not None and ours is not None else 0
                if gain:
                    gains.append((place, number, gain))
                    break
        # changes in the config's first metrics come first, because metrics differ in scale
        gains.sort(key=lambda gain: (gain[0], -abs(gain[2]), gain[1]))
        for sign in (-1, 1):
            shown = [gain for gain in gains if sign * gain[2] > 0][:SHOWN_CHANGES]
            changes += [
                {"checkpoint": checkpoint.name, "measure": metrics[place].name, "row": number, "gain": gain}
                for place, number, gain in shown
            ]
    return changes


def sample_rows(questions: Sequence[Question]) -> list[int]:
    """Return the numbers of up to SHOWN_SAMPLES questions of each data set, evenly spaced."""
    chosen = []
    for data in dict.fromkeys(question.data for question in questions):
        numbers = [number for number, question in enumerate(questions) if question.data == data]
        count = min(SHOWN_SAMPLES, len(numbers))
        chosen += [numbers[place * len(numbers) // count] for place in range(count)]
    return chosen
