"""Metrics of each log, with the time that steps take and the time that they wait for data."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable

from transformers import TrainerCallback

from ernie_align.runs.run_dir import RunDirectory

_SLOW = 0.2  # share of a step's time
_WARMUP, _MEASURED = 5, 10  # steps: in the first ones, workers start and memory is allocated


def peak_memory() -> float:
    """Return the peak memory so far in GB (10^9 bytes): allocated on the accelerator, else resident in this process."""
    import resource

    import torch

    if torch.accelerator.is_available():
        return round(torch.accelerator.max_memory_allocated() / 1e9, 3)
    unit = 1 if platform.system() == "Darwin" else 1024  # ru_maxrss is in bytes there, in KiB on Linux
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9, 3)


class SpeedMonitor(TrainerCallback):
    """Measures how long steps take, and how much of that the loop waits for data: reading, decoding, collating.

    The wait starts when all callbacks of the last step are done, saving and evaluation included, and ends where the
    next step begins: so this callback must be the last. log: called once if data is slow, with the key to change.
    """

    def __init__(self, log: Callable[[str], None]):
        self.log = log
        self.steps, self.data_seconds, self.step_seconds = 0, 0.0, 0.0  # since the last log
        self._measured: list[tuple[float, float]] = []  # (wait, whole step) of the first steps
        self._mark = time.monotonic()
        self._wait = 0.0

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        self._mark = time.monotonic()

    on_log = on_evaluate = on_save = on_train_begin

    def on_step_begin(self, args, state, control, **kwargs) -> None:
        self._wait = self._lap()

    def on_step_end(self, args, state, control, **kwargs) -> None:
        seconds = self._wait + self._lap()
        self.steps += 1
        self.data_seconds += self._wait
        self.step_seconds += seconds
        if len(self._measured) < _WARMUP + _MEASURED:
            self._measured.append((self._wait, seconds))
            if len(self._measured) == _WARMUP + _MEASURED:
                self._warn_if_slow(args.dataloader_num_workers)

    def take(self) -> dict[str, float]:
        """Return `data_seconds` (waiting) and `step_seconds` (all), means of the steps since the last call."""
        if not self.steps:
            return {}
        means = {"data_seconds": self.data_seconds / self.steps, "step_seconds": self.step_seconds / self.steps}
        self.steps, self.data_seconds, self.step_seconds = 0, 0.0, 0.0
        return {name: round(seconds, 6) for name, seconds in means.items()}

    def _warn_if_slow(self, workers: int) -> None:
        waited, total = (sum(seconds) for seconds in zip(*self._measured[_WARMUP:], strict=True))
        share = waited / total
        if share > _SLOW:
            key = "training.dataloader_num_workers"
            fix = f"raise {key} above {workers}" if workers else f"set {key}: 2, so that rows are read during the step"
            self.log(f"data is slow: {share:.0%} of each step is spent waiting for it; {fix}")

    def _lap(self) -> float:
        before, self._mark = self._mark, time.monotonic()
        return self._mark - before


class MetricsWriter(TrainerCallback):
    """Writes every log as a line of metrics.jsonl: step, Trainer's values, step times, seconds since the start, and
    peak memory."""

    def __init__(self, run_dir: RunDirectory, speed: SpeedMonitor):
        self.run_dir = run_dir
        self.speed = speed
        self.start = time.monotonic()

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        self.start = time.monotonic()

    def on_log(self, args, state, control, logs=None, **kwargs) -> None:
        values = {"step": state.global_step, **(logs or {})}
        if "loss" in values:
            values |= self.speed.take()
        seconds = round(time.monotonic() - self.start, 3)
        self.run_dir.append_metrics({**values, "seconds": seconds, "peak_memory_gb": peak_memory()})
