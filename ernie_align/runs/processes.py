"""The processes of one run: what they agree on, and which of them is missing when the others wait in vain."""

from __future__ import annotations

import re
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from ernie_align.recipe import Recipe

if TYPE_CHECKING:
    from accelerate import PartialState

_TIMEOUT = 1800  # seconds: TrainingArguments' own default
_ROLL_CALL = timedelta(seconds=10)


def begin_processes(recipe: Recipe) -> PartialState:
    """accelerate's state, whose collectives wait as long as training.ddp_timeout says.

    The first to ask for that state sets the timeout, before Trainer reads the key: so nothing else asks first.
    """
    from accelerate import PartialState

    return PartialState(timeout=timedelta(seconds=timeout_of(recipe)))


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
        self._group = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout)) if self.count > 1 else None

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
        """Who is missing, asked once more and for ten seconds at most. Whoever failed asks, and so is here."""
        import torch.distributed as dist

        try:
            dist.monitored_barrier(self._group, timeout=_ROLL_CALL, wait_all_ranks=True)
        except RuntimeError as error:
            # the first process hears all others; they hear it alone
            named = re.search(r"Ranks? ([\d, ]+?) failed to pass monitoredBarrier", str(error))
            missing = named[1].strip() if named else "0" if self.rank else ""
            return f"process {missing} does not answer" if missing else "a process does not answer"
        return "all processes answer now"
