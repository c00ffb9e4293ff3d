"""The metrics of an evaluation: the rows each one applies to, and the score of each answer."""

from __future__ import annotations

import math
import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from ernie_align.data import media
from ernie_align.errors import RecipeError
from ernie_align.evaluation.intervals import Part
from ernie_align.evaluation.questions import Question
from ernie_align.recipe import evaluation as blocks
from ernie_align.rewards import Reward, build_rewards, missing_columns
from ernie_align.rewards.reward import answer_text, parse_completion, reasoning_text
from ernie_align.rewards.verifiers import expected_texts, split_units

# The model's response to a row: `answers` [{text, ids}] and `opened` (the prompt opens the reasoning); or `nll` and
# `tokens` of the expected answer; or `chosen_logp` and `rejected_logp`.
RequestType = Literal["answers", "likelihood", "pairs"]
Outcome = dict[str, Any]
Score = Callable[[Sequence[Question], Sequence[Outcome]], list[Part | None]]


@dataclass(frozen=True)
class Metric:
    """A ratio over rows: Σ numerators / Σ denominators.

    request_type: the response that it needs for a row; score: questions and their outcomes -> each row's (numerator,
    denominator), or None if the metric does not apply to the row; columns: row columns that it reads; is_log: the
    reported value is exp of the ratio.
    """

    name: str
    request_type: RequestType
    score: Score
    columns: tuple[str, ...] = ()
    better: Literal["higher", "lower"] = "higher"
    is_log: bool = False

    def applies(self, question: Question) -> bool:
        """Return True if the row has what the metric reads."""
        if self.request_type == "pairs":
            return bool(question.row.responses)
        if self.request_type == "likelihood":
            return question.with_answer is not None
        present = {name for name, value in question.columns.items() if value is not None}
        return not question.row.responses and (present | {"images"}).issuperset(self.columns)

    def reported(self, value: float) -> float:
        """Convert a ratio to the reported value."""
        return math.exp(value) if self.is_log else value


def build_metrics(config: blocks.EvalConfig, *, cache: Path | None = None) -> list[Metric]:
    """Build the metrics of a config, in its order; one block may give several.

    cache: folder for the verdicts of LLM judges. Raises RecipeError if two metrics have the same name, or if a metric
    needs something that is missing.
    """
    metrics = [metric for block in config.metrics for metric in _build(block, cache)]
    names = [metric.name for metric in metrics]
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        what = f"several metrics have the name {', '.join(repeated)}"
        raise RecipeError.at(config.where("metrics"), what, fix="give one of them its own label:")
    return metrics


def _build(block: Any, cache: Path | None) -> list[Metric]:
    name = block.label or block.name
    if isinstance(block, blocks.PerplexityMetric):
        nll = _per_row(lambda question, outcome: (outcome["nll"], outcome["tokens"]))
        return [Metric(name, "likelihood", nll, better="lower", is_log=True)]
    if isinstance(block, blocks.PreferenceMetric):
        margin = _per_row(lambda question, outcome: (outcome["chosen_logp"] - outcome["rejected_logp"], 1.0))
        correct = _per_row(lambda question, outcome: (float(outcome["chosen_logp"] > outcome["rejected_logp"]), 1.0))
        return [Metric(name, "pairs", correct), Metric(f"{name}_margin", "pairs", margin)]
    if isinstance(block, blocks.PassAtKMetric):
        (verifier,) = build_rewards([block.verifier], cache=cache)
        base = block.label or "pass_at"
        return [Metric(f"{base}_{k}", "answers", _pass_at(verifier, k), verifier.columns) for k in block.k]
    if isinstance(block, blocks.ThinkingLengthMetric):
        return [Metric(name, "answers", _per_row(lambda question, outcome: _thinking_length(outcome, block.unit)))]
    if block.name in _TEXT_SCORES and not isinstance(block, blocks.CustomReward):
        score, column = _TEXT_SCORES[block.name](block), block.column
        return [Metric(name, "answers", _per_row(partial(_text_score, score, column)), (column,))]
    (reward,) = build_rewards([block], cache=cache)

    def mean_reward(questions: Sequence[Question], outcomes: Sequence[Outcome]) -> list[Part | None]:
        return [_mean(scores) for scores in _rewards(reward, questions, outcomes)]

    return [Metric(reward.name, "answers", mean_reward, reward.columns)]


# -- (numerator, denominator) of each row -----------------------------------------------------------------------------

_TEXT_SCORES: dict[str, Callable[[Any], Callable[[str, list[str]], float]]] = {
    "anls": lambda block: partial(anls, threshold=block.threshold),
    "relaxed_accuracy": lambda block: partial(relaxed_accuracy, tolerance=block.tolerance),
    "f1": lambda block: f1,
}


def _per_row(score: Callable[[Question, Outcome], Part | None]) -> Score:
    return lambda questions, outcomes: [score(*row) for row in zip(questions, outcomes, strict=True)]


def _text_score(
    score: Callable[[str, list[str]], float], column: str, question: Question, outcome: Outcome
) -> Part | None:
    expected = expected_texts(question.columns[column])
    return _mean([score(answer_text(completion), expected) for completion in parsed_completions(outcome)])


def _thinking_length(outcome: Outcome, unit: str) -> Part | None:
    texts = [reasoning_text(completion) for completion in parsed_completions(outcome)]
    return _mean([len(split_units(text, (), unit)) if text else None for text in texts])


def _pass_at(verifier: Reward, k: int) -> Score:
    def parts(questions: Sequence[Question], outcomes: Sequence[Outcome]) -> list[Part | None]:
        known = [[score for score in scores if score is not None] for scores in _rewards(verifier, questions, outcomes)]
        return [
            (pass_at_k(len(scores), sum(score >= 1 for score in scores), k), 1.0) if len(scores) >= k else None
            for scores in known
        ]

    return parts


def _mean(scores: Sequence[float | None]) -> Part | None:
    known = [score for score in scores if score is not None]
    return (math.fsum(known) / len(known), 1.0) if known else None


def parsed_completions(outcome: Outcome) -> list[list[dict[str, Any]]]:
    """Return an outcome's completions as TRL passes them to rewards: messages with separate reasoning."""
    return [[parse_completion(answer["text"], opened=outcome["opened"])] for answer in outcome["answers"]]


def _rewards(reward: Reward, questions: Sequence[Question], outcomes: Sequence[Outcome]) -> list[list[float | None]]:
    """Return the reward of each answer of each row, from one call with a trainer's arguments."""
    counts = [len(outcome["answers"]) for outcome in outcomes]
    repeated = [question for question, count in zip(questions, counts, strict=True) for _ in range(count)]
    names = {name for question in questions for name in question.columns}
    columns: dict[str, list[Any]] = {name: [question.columns.get(name) for question in repeated] for name in names}
    if "images" in reward.columns:
        columns["images"] = [[media.load_image(image) for image in question.row.images] for question in repeated]
    absent = missing_columns([reward], columns)
    if absent:
        raise RecipeError(*absent)
    scores = iter(
        reward(
            [question.prompt.plain[0] if question.prompt.plain else question.prompt.messages for question in repeated],
            [completion for outcome in outcomes for completion in parsed_completions(outcome)],
            **columns,
            completion_ids=[answer["ids"] for outcome in outcomes for answer in outcome["answers"]],
            trainer_state=None,
            log_extra=lambda *args: None,  # fills a trainer's completion table, which an evaluation does not have
            log_metric=lambda *args: None,
        )
    )
    return [[next(scores) for _ in range(count)] for count in counts]


# -- scores of one answer against its expected texts ------------------------------------------------------------------


def anls(answer: str, expected: Sequence[str], *, threshold: float = 0.5) -> float:
    """Normalized Levenshtein similarity to the closest expected text, or 0 if it is below the threshold.

    s = max over e of 1 - lev(a, e) / max(|a|, |e|), both in lower case with white space collapsed.
    Biten et al. (2019), Scene Text Visual Question Answering, ICCV; ANLS is its mean over questions. A similarity equal
    to the threshold counts, as in the benchmark's script.
    """
    answer = _normalize_space(answer)
    similarity = max(_similarity(answer, _normalize_space(one)) for one in expected)
    return similarity if similarity >= threshold else 0.0


def _normalize_space(text: str) -> str:
    return " ".join(text.strip().lower().split())


def _similarity(one: str, other: str) -> float:
    longest = max(len(one), len(other))
    return 1 - levenshtein(one, other) / longest if longest else 1.0


def levenshtein(one: str, other: str) -> int:
    """Return the fewest character insertions, deletions and substitutions that turn one text into the other."""
    previous = list(range(len(other) + 1))
    for row, left in enumerate(one, start=1):
        current = [row]
        for column, right in enumerate(other, start=1):
            current.append(min(previous[column] + 1, current[-1] + 1, previous[column - 1] + (left != right)))
        previous = current
    return previous[-1]


def relaxed_accuracy(answer: str, expected: Sequence[str], *, tolerance: float = 0.05) -> float:
    """Return 1 if both are numbers with |x - y| / |y| <= tolerance, y expected, or if both are the same text; else 0.

    A percent sign divides by 100; an expected 0 is compared as text; case is ignored.
    Masry et al. (2022), ChartQA, Findings of ACL; numbers are parsed as in its reference implementation, Pix2Struct.
    """
    return float(any(_is_close(answer.strip(), one.strip(), tolerance) for one in expected))


def _is_close(answer: str, expected: str, tolerance: float) -> bool:
    x, y = _parse_number(answer), _parse_number(expected)
    if x is not None and y:
        return abs(x - y) / abs(y) <= tolerance
    return answer.lower() == expected.lower()


def _parse_number(text: str) -> float | None:
    try:
        value = float(text.rstrip("%")) / 100 if text.endswith("%") else float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def f1(answer: str, expected: Sequence[str]) -> float:
    """Word F1, 2PR / (P + R), against the expected text that gives the highest value.

    P: share of the answer's words that the expected text contains; R: share of the expected text's words that the
    answer contains. Words are in lower case, without punctuation and a, an, the. Rajpurkar et al. (2016), SQuAD, EMNLP,
    as computed by its evaluation script.
    """
    words = _words(answer)
    return max(_word_f1(words, _words(one)) for one in expected)


def _words(text: str) -> list[str]:
    bare = "".join(character for character in text.lower() if character not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", bare).split()


def _word_f1(answer: list[str], expected: list[str]) -> float:
    if not answer or not expected:
        return float(answer == expected)
    shared = (Counter(answer) & Counter(expected)).total()
    return 2 * shared / (len(answer) + len(expected))  # 2PR / (P + R), P = shared / answer, R = shared / expected


def pass_at_k(samples: int, passed: int, k: int) -> float:
    """Probability that at least one of k samples drawn from the n is one of the c that passed.

    1 - C(n - c, k) / C(n, k): Chen et al. (2021), Evaluating Large Language Models Trained on Code, arXiv:2107.03374,
    equation 1.
    Raises ValueError if k > n.
    """
    if k > samples:
        raise ValueError(f"pass@{k} of {samples} samples")
    return 1 - math.comb(samples - passed, k) / math.comb(samples, k)
