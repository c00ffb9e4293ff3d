"""The processes of one run: what they agree on, and which of them is missing when the others wait in vain."""

from __future__ import annotations

import os
from contextlib import suppress
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from ernie_align.recipe import Recipe

if TYPE_CHECKING:
    from accelerate import PartialState

_TIMEOUT = 1800  # seconds: TrainingArguments' own default
_ROLL_CALL = timedelta(seconds=10)


def begin_processes(recipe: Recipe) -> PartialState:
    """accelerate's state, whose collectives wait as long as training.ddp_timeout says.

    The first to ask for that state sets the timeout, before Trainer reads the key: so nothing else asks first. It is
    told that there is no accelerator where there is none: it would take each process for the only one.
    """
    import torch
    from accelerate import PartialState

    told = os.environ.get("ACCELERATE_USE_CPU", "").lower() == "true"
    cpu = told or not torch.accelerator.is_available()
    return PartialState(cpu=cpu, timeout=timedelta(seconds=timeout_of(recipe)))


def timeout_of(recipe: Recipe) -> float:
    """Seconds that one process waits for another."""
    return recipe.training.get("ddp_timeout") or _TIMEOUT


class Processes:
    """All processes of the run. What they tell each other goes over the CPU, beside the collectives of training: it
    waits for no device, and it still works where one of those has failed.

    timeout: seconds that one process waits for another. With one process, nothing is asked of anybody.
    """

    def __init__(self, timeout: float):
        import torch.distributed as dist

        self.count = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
        self.rank = dist.get_rank() if self.count > 1 else 0
        self._group = self._calls = None
        if self.count > 1:
            self._group = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout))
            self._calls = dist.new_group(backend="gloo", timeout=_ROLL_CALL)

    @property
    def is_first(self) -> bool:
        """Whether this is the one that writes and speaks."""
        return self.rank == 0

    def any(self, flag: bool) -> bool:
        """Whether the flag is up in any process. All must ask at the same point."""
        if self._group is None:
            return flag
        import torch
        import torch.distributed as dist

        up = torch.tensor([int(flag)])
        dist.all_reduce(up, op=dist.ReduceOp.MAX, group=self._group)
        return bool(up.item())

    def of_first(self, value: Any) -> Any:
        """What the first process found, in all of them. The others' own value is not looked at."""
        if self._group is None:
            return value
        import torch.distributed as dist

        values = [value]
        dist.broadcast_object_list(values, src=0, group=self._group)
        return values[0]

    def wait(self) -> None:
        """Go on when all are here."""
        self.any(False)

    def failed_together(self, error: BaseException) -> bool:
        """Whether an error says that another process could not be reached."""
        if self._group is None or not isinstance(error, RuntimeError):
            return False
        import torch.distributed as dist

        return isinstance(error, dist.DistError) or "gloo" in str(error)

    def roll_call(self) -> str:
        """Who does not answer, asked by whoever waited in vain: ten seconds for each at most.

        One that still waits for the lost one may be named beside it.
        """
        import torch
        import torch.distributed as dist

        others = [rank for rank in range(self.count) if rank != self.rank]
        missing, sent = [], []
        for rank in others:
            with suppress(RuntimeError):  # gone: it will not be heard either
                sent.append(dist.isend(torch.ones(1), rank, group=self._calls))
        for rank in others:
            try:
                dist.recv(torch.empty(1), rank, group=self._calls)
            except RuntimeError:
                missing.append(str(rank))
        if not missing:
            return "all processes answer now"
        return f"process{'es' * (len(missing) > 1)} {', '.join(missing)} did not answer"
