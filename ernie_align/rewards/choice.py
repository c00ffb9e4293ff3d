"""The letter that an answer to a multiple choice settles on."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

_OPEN, _SHUT = r"[(\[{*\"'`$]*", r"[)\]}*\"'`$]*"


def chosen(answer: str, letters: str, options: Sequence[str] = ()) -> str | None:
    """The chosen letter, or None where there is none, or more than one.

    The clearest kind of statement in the answer decides, and it alone: a bare letter; \\boxed{B}; the bare text of an
    option; "the answer is B", "option (B)"; lines that begin "B." or "(B)"; a letter in brackets or bold; a capital
    letter that stands by itself; the text of an option somewhere. If that kind names two letters, nothing is chosen.
    """
    for found in _statements(answer, letters, options):
        if found:
            return found.pop() if len(found) == 1 else None
    return None


def _statements(answer: str, letters: str, options: Sequence[str]) -> list[set[str]]:
    one = f"[{letters}]"
    several = rf"{_OPEN}{one}\b{_SHUT}(?:\s*(?:,|/|&|or|and)+\s*{_OPEN}{one}\b{_SHUT})*"
    says = (
        r"(?:(?i:answer|choice|choose|option|pick)\b(?i:\s+(?:is|are|would be|should be))?|(?:答案|选项?)(?:应?是|为)?)"
        r"\s*[:\uff1a=]?\s*(?i:option\s+)?"
    )
    boxed = re.findall(r"\\boxed\{\s*(?:\\text(?:bf)?\{|\\mathrm\{)?\s*([^{}]*?)\s*\}", answer)
    texts = {letter: _plain(option) for letter, option in zip(letters, options, strict=False)}
    # A and I are English words too: alone, they count only where no other word in lower case follows
    alone = rf"(?<![\w'\u2019]){one}(?![\w'\u2019])(?!(?<=[AI])\s+(?!or\b|and\b)[a-z])"
    return [
        _letters(answer.strip().upper(), rf"\W*{one}\W*", one, whole=True),
        {letter for text in boxed for letter in _of_text(text, letters, texts)},
        {letter for letter, text in texts.items() if text and text == _plain(answer)},
        _letters(answer, says + several, one),
        _letters(answer, rf"(?m)^\s*{_OPEN}{one}\s*(?:[.:)\]]|\*\*)", one),
        _letters(answer, rf"\({one}\)|\[{one}\]|\*\*{one}\*\*", one),
        _letters(answer, alone, one),
        _mentioned(answer, texts),
    ]


def _letters(answer: str, pattern: str, one: str, *, whole: bool = False) -> set[str]:
    """The letters in every match of the pattern, but for those inside its words. Chinese characters end a word."""
    found = [re.fullmatch(pattern, answer, re.ASCII)] if whole else re.finditer(pattern, answer, re.ASCII)
    return {letter for match in found if match for letter in re.findall(rf"\b{one}\b", match[0], re.ASCII)}


def _of_text(text: str, letters: str, texts: Mapping[str, str]) -> list[str]:
    bare = text.strip("()[]. ").upper()
    if len(bare) == 1 and bare in letters:
        return [bare]
    return [letter for letter, option in texts.items() if option and option == _plain(text)]


def _mentioned(answer: str, texts: Mapping[str, str]) -> set[str]:
    """Options whose text is in the answer, except where it stands within a longer one's that is there too."""
    plain = _plain(answer)
    there = {
        key: text for key, text in texts.items() if text and re.search(rf"(?a)(?<!\w){re.escape(text)}(?!\w)", plain)
    }
    return {key for key, text in there.items() if not any(text != other and text in other for other in there.values())}


def _plain(text: str) -> str:
    return re.sub(r"\s+", " ", str(text)).strip(" .,:;!?\"'`*").casefold()


def choice(answer: str, expected: Any, letters: str, options: Any = None) -> float:
    """1 if the answer settles on the expected option, else 0.

    expected: its letter, its number counted from 0, or its text; options: the texts in the order of the letters, or a
    mapping from letters to texts. Raises ValueError if `expected` is none of the options.
    """
    if isinstance(options, Mapping):
        options = [options[letter] for letter in sorted(options)]
    options = [str(option) for option in options or ()]
    letters = letters[: len(options)] if options else letters
    return float(chosen(answer, letters, options) == _letter(expected, letters, options))


def _letter(expected: Any, letters: str, options: Sequence[str]) -> str:
    if isinstance(expected, int) and not isinstance(expected, bool) and 0 <= expected < len(letters):
        return letters[expected]
    found = _of_text(str(expected), letters, dict(zip(letters, map(_plain, options), strict=False)))
    if len(found) != 1:
        raise ValueError(f"the expected answer {expected!r} is none of {', '.join(letters)} {options or ''}".rstrip())
    return found[0]
