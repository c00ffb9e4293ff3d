"""What an evaluation on several processes counts: each row once, and the rows of all."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from accelerate import Accelerator


def fresh_rows(accelerator: Accelerator, rows: int) -> int:
    """How many of the rows in this process's batch, the first ones, no process has seen yet in this evaluation.

    The last batches are filled up with rows from the beginning, so that all processes take as many steps.
    """
    state = accelerator.gradient_state
    if not state.end_of_dataloader or state.remainder <= 0:
        return rows
    neighbours = accelerator.parallelism_config.tp_size if accelerator.parallelism_config else 1  # that share a batch
    return min(max(state.remainder - accelerator.process_index // neighbours * rows, 0), rows)


def over_processes(metrics: Mapping[str, list[float]]) -> dict[str, list[float]]:
    """Values that each process noted for itself -> of each name its mean over the values of all processes."""
    from accelerate.utils import gather_object

    sums: dict[str, tuple[float, int]] = {}
    for own in gather_object([{name: (sum(values), len(values)) for name, values in metrics.items()}]):
        for name, (total, count) in own.items():
            before = sums.get(name, (0.0, 0))
            sums[name] = (before[0] + total, before[1] + count)
    return {name: [total / count] for name, (total, count) in sums.items() if count}
