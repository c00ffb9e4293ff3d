"""The number that an answer ends on."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any

_PLAIN = r"(?:\d{1,3}(?:,\d{3})+(?:\.\d+)?|\d+(?:\.\d+)?|\.\d+)"
_POWER = r"(?:[eE](?P<e>[-+]?\d+)|\s*(?:[x\u00d7*]|\\times|\\cdot)\s*10\s*(?:\^|\*\*)\s*\{?(?P<ten>[-+]?\d+)\}?)"
_LATEX = r"\\[dt]?frac\{(?P<top>\d+)\}\{(?P<bottom>\d+)\}"
# \w and \d are those of ASCII: a number may stand right behind a Chinese word
_NUMBER = re.compile(
    r"(?a)(?<![\w.)\]}^/])(?P<sign>[-+]?)\s?\$?"  # a minus right after something is a difference, or a hyphen
    rf"(?:(?:(?P<whole>\d+)\s*)?{_LATEX}"
    r"|(?:(?P<mixed>\d+)\s+)?(?P<over>\d+)\s?/\s?(?P<under>\d+)(?![\d/]|\.\d)"
    r"|10\s*(?:\^|\*\*)\s*\{?(?P<exponent>[-+]?\d+)\}?"
    rf"|(?P<plain>{_PLAIN}){_POWER}?)"
    r"\s*(?P<percent>\\?[%\uff05])?"
)
_BOXED = re.compile(r"\\boxed\{((?:[^{}]|\{[^{}]*\})*)\}")


@dataclass(frozen=True)
class Quantity:
    """value: as written, 45 for `45%`; percent: a percent sign stood behind it."""

    value: float
    percent: bool = False


def last_quantity(text: str) -> Quantity | None:
    """The last number of the text, or of its last \\boxed{} where it has one.

    Reads 1,234.5 and .5, 1e-3, 1.2 x 10^3 and 1.2 \\times 10^{3}, 10^3, 3/4, 1 1/2 and \\frac{3}{4}, $5, 45%.
    A comma between groups of three digits separates thousands; elsewhere it separates numbers.
    """
    boxed = _BOXED.findall(text)
    found = list(_NUMBER.finditer((boxed[-1] if boxed else text).replace("\u2212", "-")))
    return _read(found[-1]) if found else None


def _read(match: re.Match) -> Quantity | None:
    top, bottom = match["top"] or match["over"], match["bottom"] or match["under"]
    try:
        if top:
            value = int(match["whole"] or match["mixed"] or 0) + int(top) / int(bottom)
        else:
            power = match["e"] or match["ten"] or match["exponent"] or "0"
            value = float(f"{(match['plain'] or '1').replace(',', '')}e{power}")
    except (ZeroDivisionError, OverflowError, ValueError):  # the last: more digits than Python reads
        return None
    if not math.isfinite(value):
        return None
    return Quantity(-value if match["sign"] == "-" else value, bool(match["percent"]))


def numeric(answer: str, expected: Any, *, absolute: float, relative: float) -> float:
    """1 if |x - y| <= max(absolute, relative · |y|) for the answer's last number x and the expected y, else 0.

    A percent sign on one side alone leaves open what was meant: 45% is then both 45 and 0.45. Booleans and texts
    without a number are no expected numbers: raises ValueError.
    """
    wanted = last_quantity(str(expected)) if not isinstance(expected, bool) else None
    if wanted is None:
        raise ValueError(f"the expected answer {expected!r} holds no number")
    given = last_quantity(answer)
    if given is None:
        return 0.0
    scales = (1.0,) if given.percent == wanted.percent else (1.0, 0.01)
    pairs = [
        (given.value * (scale if given.percent else 1.0), wanted.value * (scale if wanted.percent else 1.0))
        for scale in scales
    ]
    return float(any(abs(x - y) <= max(absolute, relative * abs(y)) for x, y in pairs))
