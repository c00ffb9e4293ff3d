"""The metrics of a plan as measures: which rows each applies to, and what each row adds to its figure."""

from __future__ import annotations

import math
import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ernie_align.data import media
from ernie_align.errors import RecipeError
from ernie_align.evaluation import metrics
from ernie_align.evaluation.intervals import Part
from ernie_align.evaluation.questions import Question
from ernie_align.recipe import evaluation as blocks
from ernie_align.rewards import Reward, build_rewards, missing_columns
from ernie_align.rewards.completion import answer_text, parse_completion, reasoning_text
from ernie_align.rewards.verifiers import expected_texts, split_units

Way = Literal["answers", "likelihood", "pairs"]
Outcome = dict[str, Any]


@dataclass(frozen=True)
class Metric:
    """One figure of a report.

    way: what has to be known of a row. answers: what the model said to it, as `answers` of {text, ids} and `opened`;
        likelihood: `nll` and `tokens` of the expected answer; pairs: `chosen_logp` and `rejected_logp`.
    score: questions and their outcomes -> what each adds to the figure's sum and to what the sum is divided by, or None
        where the measure does not apply; columns: what it reads of a row; is_log: the figure is exp of that ratio.
    """

    name: str
    way: Way
    score: Callable[[Sequence[Question], Sequence[Outcome]], list[Part | None]]
    columns: tuple[str, ...] = ()
    better: Literal["higher", "lower"] = "higher"
    is_log: bool = False

    def applies(self, question: Question) -> bool:
        """Whether the row can be measured by it."""
        if self.way == "pairs":
            return bool(question.row.responses)
        if self.way == "likelihood":
            return question.answered is not None
        has = {name for name, value in question.columns.items() if value is not None}
        return not question.row.responses and (has | {"images"}).issuperset(self.columns)

    def shown(self, figure: float) -> float:
        """The figure as it is reported."""
        return math.exp(figure) if self.is_log else figure


def build_metrics(plan: blocks.EvalConfig, *, cache: Path | None = None) -> list[Metric]:
    """The measures of a plan, in its order; one metric may give several.

    cache: folder in which judges keep their verdicts. Raises RecipeError where two have the same name, or where a
    metric asks for what is not there.
    """
    measures = [measure for block in plan.metrics for measure in _measures(block, cache)]
    names = [measure.name for measure in measures]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        where = plan.where("metrics")
        raise RecipeError.at(where, f"two measures are called {', '.join(twice)}", fix="give one of them a label:")
    return measures


def _measures(block: Any, cache: Path | None) -> list[Metric]:
    name = block.label or block.name
    if isinstance(block, blocks.PerplexityMetric):
        return [Metric(name, "likelihood", _nll, better="lower", is_log=True)]
    if isinstance(block, blocks.PreferenceMetric):
        return [Metric(name, "pairs", _preferred), Metric(f"{name}_margin", "pairs", _margin)]
    if isinstance(block, blocks.PassAtKMetric):
        (verifier,) = build_rewards([block.verifier], cache=cache)
        base = block.label or "pass_at"
        return [Metric(f"{base}_{k}", "answers", _pass_at(verifier, k), verifier.columns) for k in block.k]
    if isinstance(block, blocks.ThinkingLengthMetric):
        return [Metric(name, "answers", _thinking_length(block.unit))]
    if block.name in _TEXTUAL and not isinstance(block, blocks.CustomReward):
        return [Metric(name, "answers", _mean_of(_TEXTUAL[block.name](block), block.column), (block.column,))]
    (reward,) = build_rewards([block], cache=cache)
    return [Metric(reward.name, "answers", _mean_reward(reward), reward.columns)]


# -- one row's part of a figure ---------------------------------------------------------------------------------------

_TEXTUAL: dict[str, Callable[[Any], Callable[[str, list[str]], float]]] = {
    "anls": lambda block: lambda answer, expected: metrics.anls(answer, expected, threshold=block.threshold),
    "relaxed_accuracy": lambda block: (
        lambda answer, expected: metrics.relaxed_accuracy(answer, expected, tolerance=block.tolerance)
    ),
    "f1": lambda block: metrics.f1,
}


def _nll(questions: Sequence[Question], outcomes: Sequence[Outcome]) -> list[Part | None]:
    return [(outcome["nll"], outcome["tokens"]) for outcome in outcomes]


def _preferred(questions: Sequence[Question], outcomes: Sequence[Outcome]) -> list[Part | None]:
    return [(float(outcome["chosen_logp"] > outcome["rejected_logp"]), 1.0) for outcome in outcomes]


def _margin(questions: Sequence[Question], outcomes: Sequence[Outcome]) -> list[Part | None]:
    return [(outcome["chosen_logp"] - outcome["rejected_logp"], 1.0) for outcome in outcomes]


def _mean_of(score: Callable[[str, list[str]], float], column: str) -> Callable[..., list[Part | None]]:
    def parts(questions: Sequence[Question], outcomes: Sequence[Outcome]) -> list[Part | None]:
        return [
            _mean(
                [
                    score(answer_text(said), expected_texts(question.columns[column]))
                    for said in parsed_completions(outcome)
                ]
            )
            for question, outcome in zip(questions, outcomes, strict=True)
        ]

    return parts


def _thinking_length(unit: str) -> Callable[..., list[Part | None]]:
    def parts(questions: Sequence[Question], outcomes: Sequence[Outcome]) -> list[Part | None]:
        return [
            _mean(
                [
                    len(split_units(text, (), unit)) if (text := reasoning_text(said)) else None
                    for said in parsed_completions(outcome)
                ]
            )
            for outcome in outcomes
        ]

    return parts


def _mean_reward(reward: Reward) -> Callable[..., list[Part | None]]:
    def parts(questions: Sequence[Question], outcomes: Sequence[Outcome]) -> list[Part | None]:
        return [_mean(scores) for scores in _scores(reward, questions, outcomes)]

    return parts


def _pass_at(verifier: Reward, k: int) -> Callable[..., list[Part | None]]:
    def parts(questions: Sequence[Question], outcomes: Sequence[Outcome]) -> list[Part | None]:
        judged = [[score for score in scores if score is not None] for scores in _scores(verifier, questions, outcomes)]
        return [
            (metrics.pass_at_k(len(scores), sum(score >= 1 for score in scores), k), 1.0) if len(scores) >= k else None
            for scores in judged
        ]

    return parts


def _mean(scores: Sequence[float | None]) -> Part | None:
    applying = [score for score in scores if score is not None]
    return (math.fsum(applying) / len(applying), 1.0) if applying else None


def parsed_completions(outcome: Outcome) -> list[list[dict[str, Any]]]:
    """The completions of an outcome as TRL hands them to rewards: messages, the reasoning apart."""
    return [[parse_completion(answer["text"], opened=outcome["opened"])] for answer in outcome["answers"]]


def _scores(reward: Reward, questions: Sequence[Question], outcomes: Sequence[Outcome]) -> list[list[float | None]]:
    """Of each row, of each of its answers: one call of the reward, as a trainer makes it."""
    counts = [len(outcome["answers"]) for outcome in outcomes]
    repeated = [question for question, count in zip(questions, counts, strict=True) for _ in range(count)]
    names = {name for question in questions for name in question.columns}
    columns: dict[str, list[Any]] = {name: [question.columns.get(name) for question in repeated] for name in names}
    if "images" in reward.columns:
        columns["images"] = [[media.load_image(image) for image in question.row.images] for question in repeated]
    absent = missing_columns([reward], columns)
    if absent:
        raise RecipeError(*absent)
    prompts = [question.asked.plain[0] if question.asked.plain else question.asked.messages for question in repeated]
    flat = iter(
        reward(
            prompts,
            [completion for outcome in outcomes for completion in parsed_completions(outcome)],
            **columns,
            completion_ids=[answer["ids"] for outcome in outcomes for answer in outcome["answers"]],
            trainer_state=None,
            log_extra=lambda *args: None,  # a trainer's tables, which an evaluation does not have
            log_metric=lambda *args: None,
        )
    )
    return [[next(flat) for _ in range(count)] for count in counts]


def anls(answer: str, expected: Sequence[str], *, threshold: float = 0.5) -> float:
    """Normalized Levenshtein similarity to the nearest expected text, 0 where it is under the threshold.

    s = max over e of 1 - lev(a, e) / max(|a|, |e|), both in lower case without white space around them.
    Biten et al. (2019), Scene Text Visual Question Answering, ICCV; its mean over questions is ANLS. A similarity of
    exactly the threshold counts, as in the benchmark's own script.
    """
    answer = _plain(answer)
    similarity = max(_similarity(answer, _plain(one)) for one in expected)
    return similarity if similarity >= threshold else 0.0


def _plain(text: str) -> str:
    return " ".join(text.strip().lower().split())


def _similarity(one: str, other: str) -> float:
    longest = max(len(one), len(other))
    return 1 - levenshtein(one, other) / longest if longest else 1.0


def levenshtein(one: str, other: str) -> int:
    """Fewest insertions, deletions and substitutions of a character that turn one text into the other."""
    above = list(range(len(other) + 1))
    for row, left in enumerate(one, start=1):
        here = [row]
        for column, right in enumerate(other, start=1):
            here.append(min(above[column] + 1, here[-1] + 1, above[column - 1] + (left != right)))
        above = here
    return above[-1]


def relaxed_accuracy(answer: str, expected: Sequence[str], *, tolerance: float = 0.05) -> float:
    """1 if answer and expected are numbers at most `tolerance` of the expected one apart, or else the same text.

    |x - y| / |y| <= tolerance; a percent sign divides by 100; an expected 0 is compared as text. Case does not matter.
    Masry et al. (2022), ChartQA, Findings of ACL, with the parsing of its reference implementation in Pix2Struct.
    """
    return float(any(_near(answer.strip(), one.strip(), tolerance) for one in expected))


def _near(answer: str, expected: str, tolerance: float) -> bool:
    given, wanted = _number(answer), _number(expected)
    if given is not None and wanted:
        return abs(given - wanted) / abs(wanted) <= tolerance
    return answer.lower() == expected.lower()


def _number(text: str) -> float | None:
    try:
        value = float(text.rstrip("%")) / 100 if text.endswith("%") else float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def f1(answer: str, expected: Sequence[str]) -> float:
    """2PR / (P + R) over the words shared with the expected text, of the nearest one.

    P, R: share of the answer's, of the expected text's words that the other has; words in lower case, without
    punctuation and a, an, the. Rajpurkar et al. (2016), SQuAD, EMNLP, as its evaluation script computes it.
    """
    given = _words(answer)
    return max(_word_f1(given, _words(one)) for one in expected)


def _words(text: str) -> list[str]:
    bare = "".join(character for character in text.lower() if character not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", bare).split()


def _word_f1(given: list[str], wanted: list[str]) -> float:
    if not given or not wanted:
        return float(given == wanted)
    shared = (Counter(given) & Counter(wanted)).total()
    return 2 * shared / (len(given) + len(wanted))  # 2PR / (P + R) with P = shared / given, R = shared / wanted


def pass_at_k(samples: int, passed: int, k: int) -> float:
    """1 - C(n - c, k) / C(n, k): the chance that one of k of the n samples is among the c that passed.

    Chen et al. (2021), Evaluating Large Language Models Trained on Code, arXiv:2107.03374, equation 1.
    Raises ValueError for k over n.
    """
    if k > samples:
        raise ValueError(f"pass@{k} of {samples} samples")
    return 1 - math.comb(samples - passed, k) / math.comb(samples, k)
