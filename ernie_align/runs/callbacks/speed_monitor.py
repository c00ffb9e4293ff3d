"""How long a step takes, and how long it waited for its data."""

from __future__ import annotations

import time
from collections.abc import Callable

from transformers import TrainerCallback

_SLOW = 0.2  # of a step's time
_SETTLED, _JUDGED = 5, 10  # steps: the first ones wait for workers to start and for memory to be had


class SpeedMonitor(TrainerCallback):
    """How long the steps take, and how much of that the loop waits for data: reading, decoding, collating.

    The wait begins when everything behind the last step is done, saving and evaluating included, and ends where the
    next step begins: so this callback stands last. say: told once if data is slow, with the key to change.
    """

    def __init__(self, log: Callable[[str], None]):
        self.log = log
        self.steps, self.waited, self.worked = 0, 0.0, 0.0  # since the last log
        self._judged: list[tuple[float, float]] = []  # (waited, worked) of the first steps
        self._mark = time.monotonic()
        self._wait = 0.0

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        self._mark = time.monotonic()

    on_log = on_evaluate = on_save = on_train_begin

    def on_step_begin(self, args, state, control, **kwargs) -> None:
        self._wait = self._lap()

    def on_step_end(self, args, state, control, **kwargs) -> None:
        work = self._lap()
        self.steps, self.waited, self.worked = self.steps + 1, self.waited + self._wait, self.worked + work
        if len(self._judged) < _SETTLED + _JUDGED:
            self._judged.append((self._wait, work))
            if len(self._judged) == _SETTLED + _JUDGED:
                self._judge(args.dataloader_num_workers)

    def take(self) -> dict[str, float]:
        """Means of the steps since the last time: `data_seconds`, waited, and `step_seconds`, all in all."""
        if not self.steps:
            return {}
        found = {"data_seconds": self.waited / self.steps, "step_seconds": (self.waited + self.worked) / self.steps}
        self.steps, self.waited, self.worked = 0, 0.0, 0.0
        return {name: round(seconds, 6) for name, seconds in found.items()}

    def _judge(self, workers: int) -> None:
        waited, worked = (sum(seconds) for seconds in zip(*self._judged[_SETTLED:], strict=True))
        share = waited / (waited + worked)
        if share > _SLOW:
            key = "training.dataloader_num_workers"
            fix = f"raise {key} above {workers}" if workers else f"set {key}: 2, so that rows are read during the step"
            self.log(f"data is slow: {share:.0%} of each step is spent waiting for it; {fix}")

    def _lap(self) -> float:
        before, self._mark = self._mark, time.monotonic()
        return self._mark - before
