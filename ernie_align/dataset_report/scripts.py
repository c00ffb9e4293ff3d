"""Scripts of a text (Latin, Han, ...), which can be counted without guessing its language."""

from __future__ import annotations

import numpy as np

# First code point of each range, and its script; "" is digits, signs and spaces.
_RANGES = (
    (0x0000, ""),
    (0x0041, "Latin"),
    (0x005B, ""),
    (0x0061, "Latin"),
    (0x007B, ""),
    (0x00C0, "Latin"),
    (0x0250, ""),
    (0x0370, "Greek"),
    (0x0400, "Cyrillic"),
    (0x0530, "Armenian"),
    (0x0590, "Hebrew"),
    (0x0600, "Arabic"),
    (0x0780, "other"),
    (0x0900, "Devanagari"),
    (0x0980, "Bengali"),
    (0x0A00, "other"),
    (0x0B80, "Tamil"),
    (0x0C00, "other"),
    (0x0E00, "Thai"),
    (0x0E80, "other"),
    (0x10A0, "Georgian"),
    (0x1100, "Hangul"),
    (0x1200, "other"),
    (0x1E00, "Latin"),
    (0x1F00, "Greek"),
    (0x2000, ""),
    (0x2E80, "Han"),
    (0x3000, ""),
    (0x3040, "Kana"),
    (0x3100, "Han"),
    (0x3130, "Hangul"),
    (0x3190, "Han"),
    (0xA4D0, "other"),
    (0xAC00, "Hangul"),
    (0xD7B0, ""),
    (0xF900, "Han"),
    (0xFB00, "other"),
    (0xFE00, ""),
    (0xFF66, "Kana"),
    (0xFFA0, ""),
    (0x10000, "other"),
    (0x1D000, ""),
    (0x20000, "Han"),
    (0x32000, ""),
)
_FIRST = np.array([first for first, _ in _RANGES], dtype=np.uint32)
_NAMES = tuple(dict.fromkeys(name for _, name in _RANGES))
_NUMBERS = np.array([_NAMES.index(name) for _, name in _RANGES])


def letters_by_script(text: str) -> dict[str, int]:
    """Count the letters of each script in a text; other characters are left out."""
    points = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype=np.uint32)
    counts = np.bincount(_NUMBERS[np.searchsorted(_FIRST, points, side="right") - 1], minlength=len(_NAMES))
    return {name: int(number) for name, number in zip(_NAMES, counts, strict=True) if name and number}
