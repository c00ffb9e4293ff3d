"""Rows -> packs of rows that fill a sequence, by best-fit decreasing; and what that saves.

A pack is a list of rows, never a cut one: images and labels stay with their tokens, and where one row ends and the next
begins is known to the collator.
"""

from __future__ import annotations

import random
from bisect import bisect_left, insort
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

WINDOW = 1000  # rows of a stream that are packed among each other


def best_fit_decreasing(lengths: Sequence[int], capacity: int, *, seed: int) -> list[list[int]]:
    """Lengths of rows, none over `capacity` -> packs of their numbers, each at most `capacity` long in sum.

    The longest row first, each into the pack that it leaves the least room in. Rows of one length are taken in an order
    drawn by `seed`, so that sources which stand one after the other share packs.
    """
    order = list(range(len(lengths)))
    random.Random(seed).shuffle(order)
    order.sort(key=lambda number: -lengths[number])
    packs: list[list[int]] = []
    by_room: dict[int, list[list[int]]] = {}  # room -> packs that have it
    rooms: list[int] = []  # those rooms, in order
    for number in order:
        length = lengths[number]
        place = bisect_left(rooms, length)
        if place < len(rooms):
            room = rooms[place]
            pack = by_room[room].pop()
            if not by_room[room]:
                del by_room[room], rooms[place]
        else:
            room, pack = capacity, []
            packs.append(pack)
        pack.append(number)
        room -= length
        if room not in by_room:
            by_room[room] = []
            insort(rooms, room)
        by_room[room].append(pack)
    return packs


def pack(rows: Dataset, capacity: int, *, seed: int) -> Dataset:
    """Encoded rows -> one example a pack: `members`, the numbers of its rows, and their `length` in sum."""
    from datasets import Dataset, Features, Value
    from datasets.features import List

    lengths = rows["length"][:]
    packs = best_fit_decreasing(lengths, capacity, seed=seed)
    features = Features({"members": List(Value("int64")), "length": Value("int64")})
    columns = {"members": packs, "length": [sum(lengths[number] for number in members) for members in packs]}
    return Dataset.from_dict(columns, features=features)


def pack_stream(rows: IterableDataset, capacity: int, *, seed: int) -> IterableDataset:
    """A stream of encoded rows -> a stream of packs, each holding its `documents`. Packed are WINDOW rows at a time, in
    an order drawn by `seed`."""
    from datasets import IterableDataset

    def packs() -> Iterator[dict[str, Any]]:
        stream, draw = iter(rows), random.Random(seed)
        while window := list(islice(stream, WINDOW)):
            packed = best_fit_decreasing([row["length"] for row in window], capacity, seed=seed)
            draw.shuffle(packed)
            for members in packed:
                yield {"documents": [window[number] for number in members]}

    return IterableDataset.from_generator(packs)


def padding_fraction(lengths: Sequence[int], rows: int, *, seed: int) -> float:
    """The share of padding in batches of so many rows, drawn at random by `seed`."""
    drawn = list(lengths)
    random.Random(seed).shuffle(drawn)
    batches = [drawn[start : start + rows] for start in range(0, len(drawn), rows)]
    return 1 - sum(drawn) / sum(len(batch) * max(batch) for batch in batches)
