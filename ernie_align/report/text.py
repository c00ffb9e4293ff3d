"""Text of rows and models where a person reads it: nothing in it moves a cursor or breaks a page."""

from __future__ import annotations

# Controls but tab and line feed: a row may hold them, a page or a terminal may not be handed them
_VISIBLE = (
    {code: 0x2400 + code for code in range(32) if code not in (9, 10)}
    | {0x7F: 0x2421, 0xFFFE: 0xFFFD, 0xFFFF: 0xFFFD}
    | dict.fromkeys(
        (*range(0x80, 0xA0), *range(0x202A, 0x202F), *range(0x2066, 0x206A), *range(0xD800, 0xE000)), 0xFFFD
    )
)


def visible(text: object) -> str:
    """Controls as their pictures; halves of characters and turns of direction as the mark for what is unknown."""
    return str(text).translate(_VISIBLE)
