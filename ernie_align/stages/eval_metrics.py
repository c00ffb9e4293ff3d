"""What an evaluation on several processes counts: each row once, and the rows of all."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from accelerate import Accelerator
    from torch import Tensor


def count_non_padding_rows(accelerator: Accelerator, rows: int) -> int:
    """How many of the rows in this process's batch, the first ones, no process has seen yet in this evaluation.

    The last batches are filled up with rows from the beginning, so that all processes take as many steps.
    """
    state = accelerator.gradient_state
    if not state.end_of_dataloader or state.remainder <= 0:
        return rows
    neighbours = accelerator.parallelism_config.tp_size if accelerator.parallelism_config else 1  # that share a batch
    return min(max(state.remainder - accelerator.process_index // neighbours * rows, 0), rows)


class WeightedMeans:
    """Means over what all processes see in an evaluation, value by value with its weight."""

    def __init__(self) -> None:
        self._sums: dict[str, tuple[float, float]] = {}

    def add(self, name: str, value: float, weight: float) -> None:
        """A mean over so many pairs or tokens of this process."""
        total, before = self._sums.get(name, (0.0, 0.0))
        self._sums[name] = (total + value * weight, before + weight)

    def mean_over_ranks(self) -> dict[str, float]:
        """Of each name that any process has noted; 0 where nothing has weight. Then all is forgotten."""
        sums = _added_up(self._sums)
        self._sums = {}
        return {name: total / weight if weight else 0.0 for name, (total, weight) in sums.items()}


class SingleProcess:
    """The part of an accelerator that a loss asks about the other processes, where there are none to be asked."""

    def __init__(self, accelerator: Accelerator):
        self.device = accelerator.device

    def gather(self, values: Tensor) -> Tensor:
        """Those of this process."""
        return values

    gather_for_metrics = gather

    def reduce(self, values: Tensor, reduction: str) -> Tensor:
        """Sum or mean over this process."""
        return values


def mean_over_ranks(metrics: Mapping[str, list[float]]) -> dict[str, list[float]]:
    """Values that each process noted for itself -> of each name its mean over the values of all processes."""
    sums = _added_up({name: (sum(values), len(values)) for name, values in metrics.items()})
    return {name: [total / count] for name, (total, count) in sums.items() if count}


def _added_up(own: dict[str, tuple[float, float]]) -> dict[str, tuple[float, float]]:
    from accelerate.utils import gather_object

    sums: dict[str, tuple[float, float]] = {}
    for sums_of_one in gather_object([own]):
        for name, (total, weight) in sums_of_one.items():
            before = sums.get(name, (0.0, 0.0))
            sums[name] = (before[0] + total, before[1] + weight)
    return sums
