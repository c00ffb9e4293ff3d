"""Callbacks that keep what a run produces: its metrics, and checkpoints that are known to be whole."""

from __future__ import annotations

import platform
import shutil
import time
from pathlib import Path

from transformers import TrainerCallback

from ernie_align.models.load import Bundle
from ernie_align.models.seal import broken, seal
from ernie_align.runs.clock import StepClock
from ernie_align.runs.directory import RunDirectory


def peak_memory() -> float:
    """GB (10^9 bytes) at the worst moment so far: allocated on the accelerator, else resident in this process."""
    import resource

    import torch

    if torch.accelerator.is_available():
        return round(torch.accelerator.max_memory_allocated() / 1e9, 3)
    kilo = 1 if platform.system() == "Darwin" else 1024  # ru_maxrss is in bytes there, in KiB on Linux
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * kilo / 1e9, 3)


class MetricsKeeper(TrainerCallback):
    """Every log as a line of metrics.jsonl: step, epoch, Trainer's values, what the steps took, seconds since the
    start, and peak memory."""

    def __init__(self, directory: RunDirectory, clock: StepClock):
        self.directory = directory
        self.clock = clock
        self.start = time.monotonic()

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        self.start = time.monotonic()

    def on_log(self, args, state, control, logs=None, **kwargs) -> None:
        seconds = round(time.monotonic() - self.start, 3)
        took = self.clock.take() if "loss" in (logs or {}) else {}
        values = {**(logs or {}), **took, "seconds": seconds, "peak_memory_gb": peak_memory()}
        self.directory.append_metrics({"step": state.global_step, **values})


class CheckpointKeeper(TrainerCallback):
    """Completes each checkpoint so that it loads by itself, seals it, and only then drops older ones.

    Trainer's own save_total_limit deletes the old checkpoint before anybody knows that the new one is whole.
    """

    def __init__(self, directory: RunDirectory, bundle: Bundle, limit: int | None):
        self.directory = directory
        self.bundle = bundle
        self.limit = limit

    def on_save(self, args, state, control, **kwargs) -> None:
        checkpoint = self.directory.path / f"checkpoint-{state.global_step}"
        self.bundle.save_processor(str(checkpoint))
        seal(checkpoint)
        if self.limit is None:
            return
        best = Path(state.best_model_checkpoint).name if state.best_model_checkpoint else None
        whole = [path for path in self.directory.checkpoints() if broken(path) is None and path.name != best]
        for old in whole[: -self.limit] if self.limit else whole[:-1]:
            shutil.rmtree(old)
