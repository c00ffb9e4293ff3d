"""Run one checkpoint on the questions of an evaluation: collect its responses, score them and aggregate the scores."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

from ernie_align.data.render import Renderer
from ernie_align.data.row import RowFault
from ernie_align.errors import DataError
from ernie_align.evaluation.generate import Sampling, generate_answers
from ernie_align.evaluation.intervals import Part, bootstrap_interval, is_rate, ratio, wilson_interval
from ernie_align.evaluation.likelihood import answer_nlls, pair_logps
from ernie_align.evaluation.metrics import Metric, Outcome, RequestType
from ernie_align.evaluation.questions import Question
from ernie_align.evaluation.response_cache import ResponseCache
from ernie_align.models.load import Bundle
from ernie_align.recipe.evaluation import GenerationBlock

Requests = dict[RequestType, list[int]]  # request type -> numbers of the questions
Groups = dict[tuple[str, str], list[int]]  # (data set, kind) -> numbers of the questions
Table = dict[str, list[Part | None]]  # metric -> (numerator, denominator) of each question


@dataclass(frozen=True)
class Figure:
    """One metric over one kind of question in one data set; kind `all` is every kind together.

    value: the ratio over n rows, or exp of the mean negative log-likelihood; interval: 95 %, Wilson's score for rates,
    otherwise a bootstrap over rows.
    """

    data: str
    kind: str
    metric: str
    n: int
    value: float
    interval: tuple[float, float]

    def to_json(self) -> dict[str, Any]:
        """Return the report's keys, in which the metric's name is called `measure`."""
        values = asdict(self) | {"interval": list(self.interval)}
        return {"measure" if key == "metric" else key: value for key, value in values.items()}


@dataclass(frozen=True)
class CheckpointResult:
    """The responses and scores of one checkpoint.

    table: metric -> (numerator, denominator) of each question; outcomes: the model's response to each question;
    seconds, new_responses: of this call; cached responses are not counted.
    """

    checkpoint: str
    name: str
    figures: tuple[Figure, ...]
    table: Table = field(repr=False)
    outcomes: list[Outcome] = field(repr=False)
    seconds: float = 0.0
    new_responses: int = 0


def plan_requests(questions: Sequence[Question], metrics: Sequence[Metric]) -> Requests:
    """Return request type -> numbers of the questions for which some metric needs it.

    Raises DataError for a question to which no metric applies.
    """
    requests: Requests = {"answers": [], "likelihood": [], "pairs": []}
    for number, question in enumerate(questions):
        needed = dict.fromkeys(metric.request_type for metric in metrics if metric.applies(question))
        if not needed:
            reads = "; ".join(f"{metric.name} reads {_required_data(metric)}" for metric in metrics)
            fix = f"the row has {', '.join(question.columns) or 'no columns'}"
            raise DataError.at(question.place, f"no metric applies to this row: {reads}", fix=fix)
        for request_type in needed:
            requests[request_type].append(number)
    return requests


def _required_data(metric: Metric) -> str:
    by_type = {"pairs": "chosen and rejected", "likelihood": "an expected answer"}
    return by_type.get(metric.request_type) or ", ".join(metric.columns) or "a question"


def collect_responses(
    bundle: Bundle,
    renderer: Renderer,
    questions: Sequence[Question],
    requests: Requests,
    generation: GenerationBlock,
    cache: ResponseCache,
    tick: Callable[[int, int], None] = lambda done, total: None,
) -> int:
    """Run every request that is not cached, and return the number of new responses.

    Raises DataError for a row that cannot be rendered, ModelError if an image does not reach the vision experts.
    """
    sampling = Sampling(generation.max_new_tokens, generation.temperature, generation.top_p, generation.seed)
    runs = {  # request type -> (the row to run, the function that runs it)
        "answers": ("prompt", partial(generate_answers, sampling=sampling, samples=generation.samples)),
        "likelihood": ("with_answer", answer_nlls),
        "pairs": ("row", pair_logps),
    }
    total = sum(
        len(numbers) * (generation.samples if request_type == "answers" else 1)
        for request_type, numbers in requests.items()
    )
    before = len(cache.lines)
    tick(before, total)
    for request_type, (form, run) in runs.items():
        numbers = requests[request_type]
        rows = [getattr(questions[number], form) for number in numbers]
        skip = partial(cache.has_all, request_type, numbers)
        try:
            for batch in run(bundle, renderer, rows, batch_size=generation.batch_size, skip=skip):
                cache.add(request_type, [(numbers[row], sample, response) for row, sample, response in batch])
                tick(len(cache.lines), total)
        except RowFault as fault:
            names = ", ".join(dict.fromkeys(question.data for question in questions))
            raise DataError.at(names, fault.what, fix=fault.fix) from None
    return len(cache.lines) - before


def outcomes_from_cache(cache: ResponseCache, requests: Requests, count: int, samples: int) -> list[Outcome]:
    """Return the cached responses to each of `count` questions."""
    outcomes: list[Outcome] = [{} for _ in range(count)]
    for number in requests["answers"]:
        answers = [cache.lines["answers", number, sample] for sample in range(samples)]
        outcomes[number] |= {"answers": answers, "opened": answers[0]["opened"]}
    for number in requests["likelihood"]:
        outcomes[number] |= cache.lines["likelihood", number, 0]
    for number in requests["pairs"]:
        outcomes[number] |= cache.lines["pairs", number, 0]
    return outcomes


def score_outcomes(questions: Sequence[Question], outcomes: Sequence[Outcome], metrics: Sequence[Metric]) -> Table:
    """Return each metric's (numerator, denominator) of each question, None where it does not apply."""
    table: Table = {}
    for metric in metrics:
        numbers = [number for number, question in enumerate(questions) if metric.applies(question)]
        parts: list[Part | None] = [None] * len(questions)
        scores = metric.score([questions[number] for number in numbers], [outcomes[number] for number in numbers])
        for number, part in zip(numbers, scores, strict=True):
            parts[number] = part
        table[metric.name] = parts
    return table


def group_questions(questions: Sequence[Question]) -> Groups:
    """Return (data set, kind) -> question numbers: kinds in alphabetical order, then `all` if there are several."""
    groups: Groups = {}
    for data in dict.fromkeys(question.data for question in questions):
        numbers = [number for number, question in enumerate(questions) if question.data == data]
        kinds = sorted({questions[number].kind for number in numbers} - {"all"})
        for kind in kinds:
            groups[data, kind] = [number for number in numbers if questions[number].kind == kind]
        groups[data, "all"] = numbers
        if len(kinds) == 1 and len(groups[data, kinds[0]]) == len(numbers):
            del groups[data, "all"]
    return groups


def compute_figures(table: Table, groups: Groups, metrics: Sequence[Metric]) -> tuple[Figure, ...]:
    """Aggregate every metric over every group that it applies to."""
    figures = []
    for (data, kind), numbers in groups.items():
        for metric in metrics:
            parts = [part for number in numbers if (part := table[metric.name][number]) is not None]
            if parts:
                interval = (
                    wilson_interval(sum(int(a) for a, _ in parts), len(parts))
                    if is_rate(parts)
                    else bootstrap_interval(parts)
                )
                low, high = map(metric.reported, interval)
                value = metric.reported(ratio(parts))
                figures.append(Figure(data, kind, metric.name, len(parts), value, (low, high)))
    return tuple(figures)


def to_accelerator(model: Any) -> None:
    """Move a model to the GPU if there is one."""
    import torch

    if torch.cuda.is_available():
        model.to("cuda")
