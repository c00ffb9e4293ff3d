"""Metrics of an evaluation on several ranks: each row counts once, and the rows of all ranks count."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from accelerate import Accelerator
    from torch import Tensor


def count_non_padding_rows(accelerator: Accelerator, rows: int) -> int:
    """Return how many rows of this rank's batch, the first ones, belong to the data set.

    The last batches are padded with rows from the beginning, so that all ranks take as many steps.
    """
    state = accelerator.gradient_state
    if not state.end_of_dataloader or state.remainder <= 0:
        return rows
    # ranks of one tensor-parallel group share a batch
    group_size = accelerator.parallelism_config.tp_size if accelerator.parallelism_config else 1
    return min(max(state.remainder - accelerator.process_index // group_size * rows, 0), rows)


class WeightedMeans:
    """Weighted means, by name, over everything that all ranks see in an evaluation."""

    def __init__(self) -> None:
        self._sums: dict[str, tuple[float, float]] = {}

    def add(self, name: str, value: float, weight: float) -> None:
        """Add a mean over `weight` pairs or tokens of this rank."""
        total, before = self._sums.get(name, (0.0, 0.0))
        self._sums[name] = (total + value * weight, before + weight)

    def over_ranks(self) -> dict[str, float]:
        """Return the mean of each name that any rank has added (0 if its weight is 0), and reset."""
        sums = _sum_over_ranks(self._sums)
        self._sums = {}
        return {name: total / weight if weight else 0.0 for name, (total, weight) in sums.items()}


class SingleProcess:
    """Stands in for the accelerator in a loss that must not gather from other ranks."""

    def __init__(self, accelerator: Accelerator):
        self.device = accelerator.device

    def gather(self, values: Tensor) -> Tensor:
        """Return the values of this rank."""
        return values

    gather_for_metrics = gather

    def reduce(self, values: Tensor, reduction: str) -> Tensor:
        """Return the sum or mean over this rank."""
        return values


def mean_over_ranks(metrics: Mapping[str, list[float]]) -> dict[str, list[float]]:
    """Return the mean of each metric over the values of all ranks, as lists of one value."""
    sums = _sum_over_ranks({name: (sum(values), len(values)) for name, values in metrics.items()})
    return {name: [total / count] for name, (total, count) in sums.items() if count}


def _sum_over_ranks(local: dict[str, tuple[float, float]]) -> dict[str, tuple[float, float]]:
    from accelerate.utils import gather_object

    sums: dict[str, tuple[float, float]] = {}
    for sums_of_rank in gather_object([local]):
        for name, (total, weight) in sums_of_rank.items():
            before = sums.get(name, (0.0, 0.0))
            sums[name] = (before[0] + total, before[1] + weight)
    return sums
