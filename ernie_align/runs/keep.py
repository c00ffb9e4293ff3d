"""Callbacks that keep what a run produces: its metrics, and checkpoints that are known to be whole."""

from __future__ import annotations

import shutil
import time
from pathlib import Path

from transformers import TrainerCallback

from ernie_align.models.load import Bundle
from ernie_align.models.seal import broken, seal
from ernie_align.runs.directory import RunDirectory


class MetricsKeeper(TrainerCallback):
    """Every log as a line of metrics.jsonl: step, epoch, seconds since the start, and Trainer's values."""

    def __init__(self, directory: RunDirectory):
        self.directory = directory
        self.start = time.monotonic()

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        self.start = time.monotonic()

    def on_log(self, args, state, control, logs=None, **kwargs) -> None:
        seconds = round(time.monotonic() - self.start, 3)
        self.directory.append_metrics({"step": state.global_step, **(logs or {}), "seconds": seconds})


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
