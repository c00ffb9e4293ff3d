"""One checkpoint and the questions of a plan -> its figures, and what it said to each row."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ernie_align.data.render import Renderer
from ernie_align.data.row import RowFault
from ernie_align.errors import DataError
from ernie_align.evaluation.generate import Sampling, generate_answers
from ernie_align.evaluation.intervals import Part, bootstrap_interval, is_rate, ratio, wilson_interval
from ernie_align.evaluation.likelihood import answer_nlls, pair_logps
from ernie_align.evaluation.metrics import Metric, Outcome
from ernie_align.evaluation.questions import Question
from ernie_align.evaluation.response_cache import ResponseCache
from ernie_align.models.load import Bundle
from ernie_align.recipe.evaluation import GenerationBlock, EvalConfig

Tick = Callable[[int, int], None]
Table = dict[str, list[Part | None]]  # measure -> of each question


@dataclass(frozen=True)
class Figure:
    """One measure of one kind of question in one data set; kind `all` is all of several.

    value: Σ over rows / n, or exp of the mean negative log-likelihood; interval: 95 %, by Wilson's score for rates,
    else over draws of rows.
    """

    data: str
    kind: str
    measure: str
    n: int
    value: float
    interval: tuple[float, float]


@dataclass(frozen=True)
class Result:
    """What was measured of one checkpoint.

    table: measure -> what each question adds to it; outcomes: of each question, what the model said or computed;
    seconds, asked: of this call alone, without the rows that were done before.
    """

    checkpoint: str
    name: str
    figures: tuple[Figure, ...]
    table: Table = field(repr=False)
    outcomes: list[Outcome] = field(repr=False)
    seconds: float = 0.0
    asked: int = 0


def wanted(questions: Sequence[Question], measures: Sequence[Metric]) -> dict[str, list[int]]:
    """Way -> numbers of the questions that some measure wants it for.

    Raises DataError for a question of which nothing can be measured.
    """
    ways: dict[str, list[int]] = {"answers": [], "likelihood": [], "pairs": []}
    for number, question in enumerate(questions):
        own = dict.fromkeys(measure.way for measure in measures if measure.applies(question))
        if not own:
            reads = "; ".join(f"{measure.name} reads {_reads(measure)}" for measure in measures)
            what = f"nothing can be measured: {reads}"
            raise DataError.at(question.place, what, fix=f"the row has {', '.join(question.columns) or 'no columns'}")
        for way in own:
            ways[way].append(number)
    return ways


def _reads(measure: Metric) -> str:
    by_way = {"pairs": "chosen and rejected", "likelihood": "an expected answer"}
    return by_way.get(measure.way) or ", ".join(measure.columns) or "a question"


def ask(
    bundle: Bundle,
    renderer: Renderer,
    questions: Sequence[Question],
    ways: dict[str, list[int]],
    plan: EvalConfig,
    ledger: ResponseCache,
    tick: Tick = lambda done, total: None,
) -> int:
    """Have the model answer every question that is not in the ledger yet; how many lines that added.

    Raises DataError for a row that cannot be asked, ModelError where an image does not reach the vision experts.
    """
    samples = plan.generation.samples
    total = len(ways["answers"]) * samples + len(ways["likelihood"]) + len(ways["pairs"])
    before = len(ledger.lines)
    tick(before, total)
    try:
        for lines in _lines(bundle, renderer, questions, ways, plan.generation, ledger):
            ledger.keep(lines)
            tick(len(ledger.lines), total)
    except RowFault as fault:
        names = ", ".join(dict.fromkeys(question.data for question in questions))
        raise DataError.at(names, fault.what, fix=fault.fix) from None
    return len(ledger.lines) - before


def _lines(
    bundle: Bundle,
    renderer: Renderer,
    questions: Sequence[Question],
    ways: dict[str, list[int]],
    generation: GenerationBlock,
    ledger: ResponseCache,
) -> Iterator[list[dict[str, Any]]]:
    def skipper(way: str) -> Callable[[list[tuple[int, int]]], bool]:
        return lambda keys: ledger.done(way, [(ways[way][number], sample) for number, sample in keys])

    size = generation.batch_size
    drawn = Sampling(generation.max_new_tokens, generation.temperature, generation.top_p, generation.seed)
    asked = [questions[number].asked for number in ways["answers"]]
    for batch in generate_answers(
        bundle, renderer, asked, sampling=drawn, samples=generation.samples, batch_size=size, skip=skipper("answers")
    ):
        yield [
            {
                "way": "answers",
                "row": ways["answers"][number],
                "sample": sample,
                "text": said.text,
                "ids": said.ids,
                "opened": renderer.opens_thinking(asked[number]),
            }
            for number, sample, said in batch
        ]
    answered = [questions[number].answered for number in ways["likelihood"]]
    for batch in answer_nlls(bundle, renderer, answered, batch_size=size, skip=skipper("likelihood")):
        yield [
            {"way": "likelihood", "row": ways["likelihood"][number], "sample": 0, "nll": nll, "tokens": tokens}
            for number, nll, tokens in batch
        ]
    paired = [questions[number].row for number in ways["pairs"]]
    for batch in pair_logps(bundle, renderer, paired, batch_size=size, skip=skipper("pairs")):
        yield [
            {"way": "pairs", "row": ways["pairs"][number], "sample": 0, "chosen_logp": better, "rejected_logp": worse}
            for number, better, worse in batch
        ]


def outcomes_of(ledger: ResponseCache, ways: dict[str, list[int]], count: int, samples: int) -> list[Outcome]:
    """Of each of `count` questions, everything the ledger holds about it."""
    outcomes: list[Outcome] = [{} for _ in range(count)]
    for row in ways["answers"]:
        lines = ledger.of("answers", row, samples)
        outcomes[row]["answers"] = [{"text": line["text"], "ids": line["ids"]} for line in lines]
        outcomes[row]["opened"] = lines[0]["opened"]
    for way in ("likelihood", "pairs"):
        for row in ways[way]:
            (line,) = ledger.of(way, row)
            outcomes[row] |= {key: value for key, value in line.items() if key not in ("way", "row", "sample")}
    return outcomes


def table_of(questions: Sequence[Question], outcomes: Sequence[Outcome], measures: Sequence[Metric]) -> Table:
    """Each measure's part of each question."""
    table: Table = {}
    for measure in measures:
        own = [number for number, question in enumerate(questions) if measure.applies(question)]
        parts: list[Part | None] = [None] * len(questions)
        found = measure.score([questions[number] for number in own], [outcomes[number] for number in own])
        for number, part in zip(own, found, strict=True):
            parts[number] = part
        table[measure.name] = parts
    return table


def groups_of(questions: Sequence[Question]) -> dict[tuple[str, str], list[int]]:
    """(data set, kind) -> its questions, kinds in alphabetical order and then `all` of a data set with several."""
    groups: dict[tuple[str, str], list[int]] = {}
    for data in dict.fromkeys(question.data for question in questions):
        own = [number for number, question in enumerate(questions) if question.data == data]
        kinds = sorted({questions[number].kind for number in own} - {"all"})
        for kind in kinds:
            groups[data, kind] = [number for number in own if questions[number].kind == kind]
        groups[data, "all"] = own
        if len(kinds) == 1 and len(groups[data, kinds[0]]) == len(own):
            del groups[data, "all"]
    return groups


def figures_of(
    table: Table, groups: dict[tuple[str, str], list[int]], measures: Sequence[Metric]
) -> tuple[Figure, ...]:
    """Every measure of every group that it applies to."""
    figures = []
    for (data, kind), rows in groups.items():
        for measure in measures:
            parts = [part for row in rows if (part := table[measure.name][row]) is not None]
            if parts:
                interval = (
                    wilson_interval(sum(int(a) for a, _ in parts), len(parts))
                    if is_rate(parts)
                    else bootstrap_interval(parts)
                )
                low, high = map(measure.shown, interval)
                value = measure.shown(ratio(parts))
                figures.append(Figure(data, kind, measure.name, len(parts), value, (low, high)))
    return tuple(figures)


def to_accelerator(model: Any) -> None:
    """Where there is one."""
    import torch

    if torch.cuda.is_available():
        model.to("cuda")


def name_of(checkpoint: str | Path) -> str:
    """runs/demo/digits-sft/final -> digits-sft."""
    path = Path(checkpoint)
    return path.parent.name if path.name == "final" else path.name
