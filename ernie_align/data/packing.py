"""Packing: rows -> packs that fill a sequence, by best-fit decreasing; and the padding that this saves.

A pack is a list of whole rows: images and labels stay with their tokens, and the collator knows the row boundaries.
"""

from __future__ import annotations

import random
from bisect import bisect_left, insort
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

WINDOW = 1000  # rows of a stream that are packed together


def best_fit_decreasing(lengths: Sequence[int], capacity: int, *, seed: int) -> list[list[int]]:
    """Return packs of row numbers, each with a total length of at most `capacity`. No row may be longer than that.

    The longest row comes first, each into the pack in which it leaves the least room. Rows of equal length are ordered
    at random by `seed`, so that consecutive sources share packs.
    """
    order = list(range(len(lengths)))
    random.Random(seed).shuffle(order)
    order.sort(key=lambda number: -lengths[number])
    packs: list[list[int]] = []
    by_room: dict[int, list[list[int]]] = {}  # room -> packs with that room left
    rooms: list[int] = []  # the keys of by_room, sorted
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
    """Pack encoded rows to one example per pack: `members`, the numbers of its rows, and their total `length`."""
    from datasets import Dataset, Features, Value
    from datasets.features import List

    lengths = rows["length"][:]
    packs = best_fit_decreasing(lengths, capacity, seed=seed)
    features = Features({"members": List(Value("int64")), "length": Value("int64")})
    columns = {"members": packs, "length": [sum(lengths[number] for number in members) for members in packs]}
    return Dataset.from_dict(columns, features=features)


def pack_stream(rows: IterableDataset, capacity: int, *, seed: int) -> IterableDataset:
    """Pack a stream of encoded rows to a stream of packs with their `documents`.

    WINDOW rows are packed at a time; the packs of a window are shuffled by `seed`.
    """
    from datasets import IterableDataset

    def packs() -> Iterator[dict[str, Any]]:
        stream, generator = iter(rows), random.Random(seed)
        while window := list(islice(stream, WINDOW)):
            packed = best_fit_decreasing([row["length"] for row in window], capacity, seed=seed)
            generator.shuffle(packed)
            for members in packed:
                yield {"documents": [window[number] for number in members]}

    return IterableDataset.from_generator(packs)


def padding_fraction(lengths: Sequence[int], rows: int, *, seed: int) -> float:
    """Return the fraction of padding in batches of this many rows, shuffled by `seed`."""
    shuffled = list(lengths)
    random.Random(seed).shuffle(shuffled)
    batches = [shuffled[start : start + rows] for start in range(0, len(shuffled), rows)]
    return 1 - sum(shuffled) / sum(len(batch) * max(batch) for batch in batches)
