"""Pairs made beforehand, drawn beside the rollouts: the other half of offline-UPO."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from ernie_align.stages.reference import ReferenceLogps

if TYPE_CHECKING:
    from datasets import Dataset
    from torch import Tensor


class OfflinePairs:
    """Preference rows in an order that `seed` alone decides, each seen once per round.

    name: of the file that keeps their reference log-probabilities; rows: of PairEncoder; collate: of PairCollator.
    """

    def __init__(
        self,
        name: str,
        rows: Dataset,
        *,
        collate: Callable[[list[dict[str, Any]]], dict[str, Tensor]],
        stored: ReferenceLogps,
        seed: int,
    ):
        self.name = name
        self.rows = rows
        self.collate = collate
        self.stored = stored
        self.seed = seed

    def ask_reference(self, reference: Callable[[dict[str, Any]], tuple[Tensor, Tensor]], batch_size: int) -> None:
        """Compute, or find, what the reference says of every pair."""
        self.rows = self.stored.add_to(self.rows, self.name, reference, batch_size, self.collate)

    def batch(self, number: int, size: int) -> dict[str, Tensor]:
        """The batch of that number, counted from 0 over the whole run: nothing has to be remembered to go on."""
        return self.collate([self.rows[self._place(at)] for at in range(number * size, (number + 1) * size)])

    def in_order(self, size: int) -> list[dict[str, Tensor]]:
        """All pairs, for measuring."""
        places = range(len(self.rows))
        return [self.collate([self.rows[at] for at in places[start : start + size]]) for start in places[::size]]

    def _place(self, at: int) -> int:
        turn, position = divmod(at, len(self.rows))
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + turn)
        return int(torch.randperm(len(self.rows), generator=generator)[position])
