"""The one filter for text of rows, models and files before it is shown on a page or a terminal."""

from __future__ import annotations

from rich.markup import escape

# Rows may contain control characters besides tab and line feed; on a terminal or a page they would do harm.
_VISIBLE = (
    {code: 0x2400 + code for code in range(32) if code not in (9, 10)}
    | {0x7F: 0x2421, 0xFFFE: 0xFFFD, 0xFFFF: 0xFFFD}
    | dict.fromkeys(
        (*range(0x80, 0xA0), *range(0x202A, 0x202F), *range(0x2066, 0x206A), *range(0xD800, 0xE000)), 0xFFFD
    )
)


def visible(text: object) -> str:
    """Show control characters as symbols; replace lone surrogates and bidirectional controls by U+FFFD."""
    return str(text).translate(_VISIBLE)


def markup(text: object) -> str:
    """Return visible text as rich markup that prints its brackets unchanged."""
    return escape(visible(text))
