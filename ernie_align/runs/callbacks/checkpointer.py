"""Callbacks that keep what a run produces: its metrics, and checkpoints that are known to be whole."""

from __future__ import annotations

import platform
import time
from pathlib import Path

from transformers import TrainerCallback

from ernie_align.checkpoints import flush_to_disk, integrity_error, write_manifest
from ernie_align.models.load import Bundle
from ernie_align.runs.callbacks.speed_monitor import SpeedMonitor
from ernie_align.runs.run_dir import RunDirectory


def peak_memory() -> float:
    """GB (10^9 bytes) at the worst moment so far: allocated on the accelerator, else resident in this process."""
    import resource

    import torch

    if torch.accelerator.is_available():
        return round(torch.accelerator.max_memory_allocated() / 1e9, 3)
    kilo = 1 if platform.system() == "Darwin" else 1024  # ru_maxrss is in bytes there, in KiB on Linux
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * kilo / 1e9, 3)


class MetricsWriter(TrainerCallback):
    """Every log as a line of metrics.jsonl: step, epoch, Trainer's values, what the steps took, seconds since the
    start, and peak memory."""

    def __init__(self, directory: RunDirectory, clock: SpeedMonitor):
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


class Checkpointer(TrainerCallback):
    """Completes each checkpoint so that it loads by itself, seals it, names it, and only then drops older ones.

    Trainer writes it beside (models.seal.beside). Its own save_total_limit would delete the old checkpoint before
    anybody knows that the new one is whole. Needed in every process: each of them writes a part.
    """

    def __init__(self, directory: RunDirectory, bundle: Bundle, limit: int | None):
        self.directory = directory
        self.bundle = bundle
        self.limit = limit

    def on_save(self, args, state, control, **kwargs) -> None:
        from accelerate import PartialState

        processes = PartialState()
        processes.wait_for_everyone()  # each has written its random state
        name = f"checkpoint-{state.global_step}"
        written = self.directory.saving / name
        best = state.best_model_checkpoint
        is_best = best is not None and Path(best) == written
        if is_best:
            state.best_model_checkpoint = best = str(self.directory.path / name)
        if processes.is_main_process:
            if is_best:
                state.save_to_json(str(written / "trainer_state.json"))  # where it will be, not where it was written
            self.bundle.save_processor(str(written))
            metrics = self.directory.path / "metrics.jsonl"
            if metrics.exists():
                flush_to_disk(metrics)
            write_manifest(written)
            self.directory.keep_checkpoint(name)
            self._drop_older(Path(best).name if best else None)
        processes.wait_for_everyone()

    def _drop_older(self, best: str | None) -> None:
        if self.limit is None:
            return
        whole = [path for path in self.directory.checkpoints() if integrity_error(path) is None and path.name != best]
        for old in whole[: -self.limit] if self.limit else whole[:-1]:
            self.directory.drop_checkpoint(old)
