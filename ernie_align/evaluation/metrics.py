"""Measures of one answer against its expected ones: pure functions."""

from __future__ import annotations

import math
import re
import string
from collections import Counter
from collections.abc import Sequence


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
