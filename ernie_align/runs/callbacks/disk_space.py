"""Free disk space for the next checkpoint, checked before anything is written or removed."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from typing import Any

from transformers import TrainerCallback

from ernie_align.checkpoints import manifest_size
from ernie_align.errors import RunError
from ernie_align.runs.run_dir import RunDirectory

_MARGIN = 1.02  # on the size of the last checkpoint: logs grow, and file systems need some room themselves
_SMALL_FILES = 2**20  # bytes: the files that hold no tensors


class DiskSpaceGuard(TrainerCallback):
    """Stops before a checkpoint is written for which the disk has no room, and warns one checkpoint ahead.

    For rank 0. The next checkpoint is assumed to be as large as the last one, or as the tensors that go into it.
    """

    def __init__(self, run_dir: RunDirectory, log: Callable[[str], None]):
        self.run_dir = run_dir
        self.log = log

    def on_step_end(self, args, state, control, **kwargs) -> None:
        if control.should_save:
            self._stop_if_short(state, **kwargs)

    on_epoch_end = on_step_end

    def on_evaluate(self, args, state, control, **kwargs) -> None:
        # Trainer decides after this call if the step is the best so far, and saves without a further event.
        if args.save_strategy == "best" and state.global_step < state.max_steps:
            self._stop_if_short(state, **kwargs)

    def on_save(self, args, state, control, **kwargs) -> None:
        if shortage := self._shortage(**kwargs):
            what = f"step {state.global_step}: the next checkpoint needs {shortage} at {self.run_dir.path}"
            self.log(f"{what}; make room before it is due")

    def _stop_if_short(self, state: Any, **kwargs: Any) -> None:
        if shortage := self._shortage(**kwargs):
            what = f"the checkpoint of step {state.global_step} needs {shortage}"
            why = "nothing of it was written, and no older checkpoint was removed"
            raise RunError.at(str(self.run_dir.path), what, why=why, fix="make room on the disk")

    def _shortage(self, **kwargs: Any) -> str:
        needed, free = self._needed(**kwargs), shutil.disk_usage(self.run_dir.path).free
        return f"{needed / 1e9:.3f} GB, {free / 1e9:.3f} GB are free" if free < needed else ""

    def _needed(self, model: Any = None, optimizer: Any = None, **kwargs: Any) -> int:
        last, _ = self.run_dir.newest_checkpoint()
        if last is not None:
            return int(manifest_size(last) * _MARGIN) + _SMALL_FILES
        parameters = list(model.parameters())
        if hasattr(model, "peft_config"):
            parameters = [parameter for parameter in parameters if parameter.requires_grad]
        states = [value for state in optimizer.state.values() for value in state.values() if hasattr(value, "nbytes")]
        return sum(tensor.nbytes for tensor in (*parameters, *states)) + _SMALL_FILES
