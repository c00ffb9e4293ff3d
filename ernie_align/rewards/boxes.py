"""Boxes in an answer, and how well they lie over the expected ones."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

Box = tuple[float, float, float, float]

_NUMBER = r"[-+]?(?:\d+(?:\.\d+)?|\.\d+)"
_BETWEEN = r"(?:[\s,;()\[\]]|</?(?:box|bbox)>)"
# numbers with nothing but punctuation between them, from an opening bracket or a tag on
_RUN = re.compile(rf"(?:[\[(]|<(?:box|bbox)>|<\|box_start\|>)\s*{_BETWEEN}*{_NUMBER}(?:{_BETWEEN}+{_NUMBER})*")


def boxes_in(text: str) -> list[Box]:
    """The boxes that a text names, as four numbers each, in its own form.

    Reads [1, 2, 3, 4], lists of such lists, (1, 2), (3, 4), <box>1 2 3 4</box> and JSON objects around them. A run of
    numbers that does not come in fours is no box.
    """
    runs = ([float(number) for number in re.findall(_NUMBER, run)] for run in _RUN.findall(text))
    return [box for run in runs if len(run) % 4 == 0 for box in _in_fours(run)]


def boxes_of(value: Any) -> list[Box]:
    """The boxes of a column's value: four numbers, a list of fours (which may be empty), or their text.

    Raises ValueError if it is none of those.
    """
    if isinstance(value, str):
        found = boxes_in(value)
        if not found:
            raise ValueError(f"the expected {value!r} holds no box")
        return found
    if value and not isinstance(value[0], Sequence):
        return _in_fours([float(number) for number in value])
    return [box for inner in value for box in _in_fours([float(number) for number in inner])]


def _in_fours(numbers: list[float]) -> list[Box]:
    if len(numbers) % 4:
        raise ValueError(f"a box has four numbers, here are {len(numbers)}")
    return [tuple(numbers[start : start + 4]) for start in range(0, len(numbers), 4)]


def corners(box: Box, form: str) -> Box:
    """xyxy or xywh -> (left, top, right, bottom)."""
    return box if form == "xyxy" else (box[0], box[1], box[0] + box[2], box[1] + box[3])


def iou(one: Box, other: Box) -> float:
    """Intersection over union of two boxes (left, top, right, bottom); 0 where one of them has no area."""
    width = min(one[2], other[2]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[1], other[1])
    areas = [
        (box[2] - box[0]) * (box[3] - box[1]) if box[2] > box[0] and box[3] > box[1] else 0 for box in (one, other)
    ]
    if width <= 0 or height <= 0 or not all(areas):
        return 0.0
    return width * height / (sum(areas) - width * height)


def grounding(given: Sequence[Box], expected: Sequence[Box], *, threshold: float | None = None) -> float:
    """Sum of the overlaps of matched boxes / max(boxes given, boxes expected).

    The pair with the widest overlap is matched first, then the widest among the rest; a box is matched once. So a
    missing box costs its share, and so does one too many. threshold: a pair counts 1 from there on, else 0. No box
    where none is expected is right.
    """
    if not given and not expected:
        return 1.0
    pairs = sorted(
        ((iou(box, wanted), i, j) for i, box in enumerate(given) for j, wanted in enumerate(expected)), reverse=True
    )
    total, used, met = 0.0, set(), set()
    for overlap, i, j in pairs:
        if i not in used and j not in met:
            used.add(i)
            met.add(j)
            total += overlap if threshold is None else float(overlap >= threshold)
    return total / max(len(given), len(expected))
