"""Pairs from a dataset, drawn next to the rollouts (offline UPO)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from ernie_align.stages.reference import ReferenceLogps

if TYPE_CHECKING:
    from datasets import Dataset
    from torch import Tensor


@dataclass
class OfflinePairs:
    """Preference rows in a seeded order, each row once per epoch.

    name: of the file that stores their reference log-probs; rows: from PairEncoder; collate: a PairCollator; stored:
    computes or reads the reference log-probs.
    """

    name: str
    rows: Dataset
    collate: Callable[[list[dict[str, Any]]], dict[str, Tensor]]
    stored: ReferenceLogps
    seed: int

    def add_reference_logps(
        self, reference: Callable[[dict[str, Any]], tuple[Tensor, Tensor]], batch_size: int
    ) -> None:
        """Add the reference log-probs of every pair: read from the run directory, or computed there once."""
        self.rows = self.stored.add_to(self.rows, self.name, reference, batch_size, self.collate)

    def batch(self, number: int, size: int) -> dict[str, Tensor]:
        """Return batch `number`, counted from 0 over the whole run. It depends on nothing else, so a resumed run needs
        no saved state."""
        return self.collate([self.rows[self._row_at(at)] for at in range(number * size, (number + 1) * size)])

    def in_order(self, size: int) -> list[dict[str, Tensor]]:
        """Return all pairs in batches of `size`, for evaluation."""
        indices = range(len(self.rows))
        return [self.collate([self.rows[at] for at in indices[start : start + size]]) for start in indices[::size]]

    def _row_at(self, position: int) -> int:
        epoch, offset = divmod(position, len(self.rows))
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
        return int(torch.randperm(len(self.rows), generator=generator)[offset])
