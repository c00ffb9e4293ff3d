"""Score the text of an answer: equality, thinking tags, length, repetition, numbers, multiple choice, boxes."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ernie_align.rewards.reward import CLOSE, OPEN

# -- text -------------------------------------------------------------------------------------------------------------


def expected_texts(value: Any) -> list[str]:
    """Return a column's value as the list of right texts: one, or several from a list. Numbers are written out."""
    return [str(one) for one in value] if isinstance(value, list | tuple) else [str(value)]


def exact_match(answer: str, expected: Any, *, ignore_case: bool = False) -> float:
    """Return 1 if the answer equals the expected text, or one of them, ignoring white space around it."""
    answer = _fold(answer.strip(), ignore_case)
    return float(any(answer == _fold(text.strip(), ignore_case) for text in expected_texts(expected)))


def contains(answer: str, expected: Any, *, ignore_case: bool = False) -> float:
    """Return 1 if the answer contains the expected text, or one of them. No answer contains an empty text."""
    answer = _fold(answer, ignore_case)
    return float(any(text and _fold(text, ignore_case) in answer for text in expected_texts(expected)))


def _fold(text: str, ignore_case: bool) -> str:
    return text.casefold() if ignore_case else text


def thinking(answer: str, reasoning: str | None, *, shortest: int = 1, longest: int | None = None) -> float:
    """Return 1 for shortest..longest characters of reasoning followed by an answer without thinking tags.

    Reasoning that was never closed leaves no answer, and scores 0.
    """
    if (
        reasoning is None
        or not answer.strip()
        or any(tag in part for tag in (OPEN, CLOSE) for part in (answer, reasoning))
    ):
        return 0.0
    length = len(reasoning.strip())
    return float(length >= max(shortest, 1) and (longest is None or length <= longest))


def within_length(length: int, *, shortest: int | None, longest: int | None, falloff: int | None = None) -> float:
    """Return 1 for a length within bounds; outside, 1 - distance / falloff, but not below 0.

    falloff defaults to the violated bound: the score reaches 0 at length 0, or at twice longest.
    """
    if shortest is not None and length < shortest:
        return max(0.0, 1 - (shortest - length) / (falloff or shortest))
    if longest is not None and length > longest:
        return max(0.0, 1 - (length - longest) / (falloff or longest))
    return 1.0


def repetition(units: Sequence, *, n: int) -> float:
    """Return (distinct n-grams / n-grams) - 1, in (-1, 0]; 0 for a text with fewer than two n-grams.

    The n-gram penalty of Yeo et al. (2025), Demystifying Long Chain-of-Thought Reasoning in LLMs, arXiv:2502.03373,
    as one score of the whole text.
    """
    grams = [tuple(units[start : start + n]) for start in range(len(units) - n + 1)]
    return len(set(grams)) / len(grams) - 1 if grams else 0.0


def split_units(answer: str, token_ids: Sequence[int], unit: str) -> Sequence:
    """Return what length and repetition count: tokens of the whole completion, characters or words of the answer."""
    return token_ids if unit == "tokens" else answer.split() if unit == "words" else answer.strip()


# -- numbers ----------------------------------------------------------------------------------------------------------

_PLAIN = r"(?:\d{1,3}(?:,\d{3})+(?:\.\d+)?|\d+(?:\.\d+)?|\.\d+)"
_POWER = r"(?:[eE](?P<e>[-+]?\d+)|\s*(?:[x\u00d7*]|\\times|\\cdot)\s*10\s*(?:\^|\*\*)\s*\{?(?P<ten>[-+]?\d+)\}?)"
_LATEX = r"\\[dt]?frac\{(?P<top>\d+)\}\{(?P<bottom>\d+)\}"
# \w and \d match ASCII only: a number may directly follow a Chinese word
_QUANTITY = re.compile(
    r"(?a)(?<![\w.)\]}^/])(?P<sign>[-+]?)\s?\$?"  # a minus directly after something is a difference, or a hyphen
    rf"(?:(?:(?P<whole>\d+)\s*)?{_LATEX}"
    r"|(?:(?P<mixed>\d+)\s+)?(?P<over>\d+)\s?/\s?(?P<under>\d+)(?![\d/]|\.\d)"
    r"|10\s*(?:\^|\*\*)\s*\{?(?P<exponent>[-+]?\d+)\}?"
    rf"|(?P<plain>{_PLAIN}){_POWER}?)"
    r"\s*(?P<percent>\\?[%\uff05])?"
)
_BOXED = re.compile(r"\\boxed\{((?:[^{}]|\{[^{}]*\})*)\}")


@dataclass(frozen=True)
class Quantity:
    """A number in a text. value: as written, 45 for `45%`; percent: a percent sign follows it."""

    value: float
    percent: bool = False


def last_quantity(text: str) -> Quantity | None:
    """Return the last number of the text, or of its last \\boxed{} if it has one; None if there is none.

    Reads 1,234.5 and .5, 1e-3, 1.2 x 10^3 and 1.2 \\times 10^{3}, 10^3, 3/4, 1 1/2 and \\frac{3}{4}, $5, 45%.
    A comma between groups of three digits separates thousands; elsewhere it separates numbers.
    """
    boxed = _BOXED.findall(text)
    matches = list(_QUANTITY.finditer((boxed[-1] if boxed else text).replace("\u2212", "-")))
    return _parse_quantity(matches[-1]) if matches else None


def _parse_quantity(match: re.Match) -> Quantity | None:
    top, bottom = match["top"] or match["over"], match["bottom"] or match["under"]
    try:
        if top:
            value = int(match["whole"] or match["mixed"] or 0) + int(top) / int(bottom)
        else:
            power = match["e"] or match["ten"] or match["exponent"] or "0"
            value = float(f"{(match['plain'] or '1').replace(',', '')}e{power}")
    except (ZeroDivisionError, OverflowError, ValueError):  # ValueError: more digits than Python reads
        return None
    if not math.isfinite(value):
        return None
    return Quantity(-value if match["sign"] == "-" else value, bool(match["percent"]))


def numeric(answer: str, expected: Any, *, absolute: float, relative: float) -> float:
    """Return 1 if |x - y| <= max(absolute, relative · |y|) for the answer's last number x and the expected y, else 0.

    A percent sign on one side only is ambiguous: 45% then equals both 45 and 0.45. Raises ValueError if `expected` is
    a boolean or a text without a number.
    """
    right = last_quantity(str(expected)) if not isinstance(expected, bool) else None
    if right is None:
        raise ValueError(f"the expected answer {expected!r} contains no number")
    given = last_quantity(answer)
    if given is None:
        return 0.0
    scales = (1.0,) if given.percent == right.percent else (1.0, 0.01)
    pairs = [
        (given.value * (scale if given.percent else 1.0), right.value * (scale if right.percent else 1.0))
        for scale in scales
    ]
    return float(any(abs(x - y) <= max(absolute, relative * abs(y)) for x, y in pairs))


# -- multiple choice --------------------------------------------------------------------------------------------------

_OPENING, _CLOSING = r"[(\[{*\"'`$]*", r"[)\]}*\"'`$]*"


def choice(answer: str, expected: Any, letters: str, options: Any = None) -> float:
    """Return 1 if the answer settles on the expected option, else 0.

    expected: its letter, its number from 0, or its text; options: texts in the order of the letters, or letter -> text.
    Raises ValueError if `expected` is none of the options.
    """
    if isinstance(options, Mapping):
        options = [options[letter] for letter in sorted(options)]
    options = [str(option) for option in options or ()]
    letters = letters[: len(options)] if options else letters
    return float(chosen_letter(answer, letters, options) == _expected_letter(expected, letters, options))


def chosen_letter(answer: str, letters: str, options: Sequence[str] = ()) -> str | None:
    """Return the chosen letter, or None if there is none or more than one.

    Only the clearest kind of statement in the answer decides: a bare letter; \\boxed{B}; the bare text of an option;
    "the answer is B", "option (B)"; lines that begin with "B." or "(B)"; a letter in brackets or bold; an isolated
    capital letter; the text of an option somewhere. If that kind names two letters, nothing is chosen.
    """
    for named in _named_letters(answer, letters, options):
        if named:
            return named.pop() if len(named) == 1 else None
    return None


def _named_letters(answer: str, letters: str, options: Sequence[str]) -> list[set[str]]:
    """Return the letters that each kind of statement names, the clearest kind first."""
    one = f"[{letters}]"
    several = rf"{_OPENING}{one}\b{_CLOSING}(?:\s*(?:,|/|&|or|and)+\s*{_OPENING}{one}\b{_CLOSING})*"
    says = (
        r"(?:(?i:answer|choice|choose|option|pick)\b(?i:\s+(?:is|are|would be|should be))?|(?:答案|选项?)(?:应?是|为)?)"
        r"\s*[:\uff1a=]?\s*(?i:option\s+)?"
    )
    boxed = re.findall(r"\\boxed\{\s*(?:\\text(?:bf)?\{|\\mathrm\{)?\s*([^{}]*?)\s*\}", answer)
    texts = {letter: _simplify(option) for letter, option in zip(letters, options, strict=False)}
    # A and I are English words too: alone, they count only if no other word in lower case follows
    isolated = rf"(?<![\w'\u2019]){one}(?![\w'\u2019])(?!(?<=[AI])\s+(?!or\b|and\b)[a-z])"
    return [
        _find_letters(answer.strip().upper(), rf"\W*{one}\W*", one, whole=True),
        {letter for text in boxed for letter in _letters_of_text(text, letters, texts)},
        {letter for letter, text in texts.items() if text and text == _simplify(answer)},
        _find_letters(answer, says + several, one),
        _find_letters(answer, rf"(?m)^\s*{_OPENING}{one}\s*(?:[.:)\]]|\*\*)", one),
        _find_letters(answer, rf"\({one}\)|\[{one}\]|\*\*{one}\*\*", one),
        _find_letters(answer, isolated, one),
        _mentioned_options(answer, texts),
    ]


def _find_letters(answer: str, pattern: str, one: str, *, whole: bool = False) -> set[str]:
    """Return the letters in every match of the pattern, except inside its words. Chinese characters end a word."""
    matches = [re.fullmatch(pattern, answer, re.ASCII)] if whole else re.finditer(pattern, answer, re.ASCII)
    return {letter for match in matches if match for letter in re.findall(rf"\b{one}\b", match[0], re.ASCII)}


def _letters_of_text(text: str, letters: str, texts: Mapping[str, str]) -> list[str]:
    bare = text.strip("()[]. ").upper()
    if len(bare) == 1 and bare in letters:
        return [bare]
    return [letter for letter, option in texts.items() if option and option == _simplify(text)]


def _mentioned_options(answer: str, texts: Mapping[str, str]) -> set[str]:
    """Return the options whose text is in the answer, except inside a longer option's that is there too."""
    simple = _simplify(answer)
    mentioned = {
        key: text for key, text in texts.items() if text and re.search(rf"(?a)(?<!\w){re.escape(text)}(?!\w)", simple)
    }
    return {
        key
        for key, text in mentioned.items()
        if not any(text != other and text in other for other in mentioned.values())
    }


def _simplify(text: str) -> str:
    return re.sub(r"\s+", " ", str(text)).strip(" .,:;!?\"'`*").casefold()


def _expected_letter(expected: Any, letters: str, options: Sequence[str]) -> str:
    if isinstance(expected, int) and not isinstance(expected, bool) and 0 <= expected < len(letters):
        return letters[expected]
    named = _letters_of_text(str(expected), letters, dict(zip(letters, map(_simplify, options), strict=False)))
    if len(named) != 1:
        allowed = f"{', '.join(letters)} {options or ''}".rstrip()
        raise ValueError(f"invalid expected answer {expected!r}; expected one of {allowed}")
    return named[0]


# -- boxes ------------------------------------------------------------------------------------------------------------

Box = tuple[float, float, float, float]

_NUMBER = r"[-+]?(?:\d+(?:\.\d+)?|\.\d+)"
_BETWEEN = r"(?:[\s,;()\[\]]|</?(?:box|bbox)>)"
# numbers separated only by punctuation, starting at an opening bracket or a tag
_RUN = re.compile(rf"(?:[\[(]|<(?:box|bbox)>|<\|box_start\|>)\s*{_BETWEEN}*{_NUMBER}(?:{_BETWEEN}+{_NUMBER})*")


def find_boxes(text: str) -> list[Box]:
    """Return the boxes in a text, four numbers each, in the text's own form.

    Reads [1, 2, 3, 4], lists of such lists, (1, 2), (3, 4), <box>1 2 3 4</box> and JSON objects around them. A run of
    numbers whose count is not a multiple of four is ignored.
    """
    runs = ([float(number) for number in re.findall(_NUMBER, run)] for run in _RUN.findall(text))
    return [box for run in runs if len(run) % 4 == 0 for box in _group_by_four(run)]


def parse_boxes(value: Any) -> list[Box]:
    """Parse a column's value: four numbers, a list of fours (which may be empty), or their text.

    Raises ValueError for any other value.
    """
    if isinstance(value, str):
        boxes = find_boxes(value)
        if not boxes:
            raise ValueError(f"the expected value {value!r} contains no box")
        return boxes
    if value and not isinstance(value[0], Sequence):
        return _group_by_four([float(number) for number in value])
    return [box for inner in value for box in _group_by_four([float(number) for number in inner])]


def _group_by_four(numbers: list[float]) -> list[Box]:
    if len(numbers) % 4:
        raise ValueError(f"a box has four numbers, got {len(numbers)}")
    return [tuple(numbers[start : start + 4]) for start in range(0, len(numbers), 4)]


def to_corners(box: Box, form: str) -> Box:
    """Convert xyxy or xywh to (left, top, right, bottom)."""
    return box if form == "xyxy" else (box[0], box[1], box[0] + box[2], box[1] + box[3])


def iou(one: Box, other: Box) -> float:
    """Return intersection over union of two boxes (left, top, right, bottom); 0 if one of them has no area."""
    width = min(one[2], other[2]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[1], other[1])
    areas = [
        (box[2] - box[0]) * (box[3] - box[1]) if box[2] > box[0] and box[3] > box[1] else 0 for box in (one, other)
    ]
    if width <= 0 or height <= 0 or not all(areas):
        return 0.0
    return width * height / (sum(areas) - width * height)


def grounding(given: Sequence[Box], expected: Sequence[Box], *, threshold: float | None = None) -> float:
    """Return the sum of the IoUs of matched boxes / max(boxes given, boxes expected).

    Boxes are matched greedily by IoU, each at most once, so a missing box and a superfluous one cost the same.
    threshold: a pair counts 1 from this IoU on, else 0. No box where none is expected scores 1.
    """
    if not given and not expected:
        return 1.0
    pairs = sorted(
        ((iou(box, right), i, j) for i, box in enumerate(given) for j, right in enumerate(expected)), reverse=True
    )
    total, used, matched = 0.0, set(), set()
    for overlap, i, j in pairs:
        if i not in used and j not in matched:
            used.add(i)
            matched.add(j)
            total += overlap if threshold is None else float(overlap >= threshold)
    return total / max(len(given), len(expected))
