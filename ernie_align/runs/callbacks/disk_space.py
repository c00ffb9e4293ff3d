"""Room on the disk for the next checkpoint, looked for before the last one is given up."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from typing import Any

from transformers import TrainerCallback

from ernie_align.checkpoints import manifest_size
from ernie_align.errors import RunError
from ernie_align.runs.run_dir import RunDirectory

_SPARE = 1.02  # of the last checkpoint: logs grow, and file systems keep books
_SMALL = 2**20  # bytes: the files that are not tensors


class DiskSpaceGuard(TrainerCallback):
    """Refuses a checkpoint for which there is no room before a byte of it is written, and warns a checkpoint ahead.

    For the first process; a checkpoint is as large as the last one, or as the tensors that make it up.
    """

    def __init__(self, directory: RunDirectory, log: Callable[[str], None]):
        self.directory = directory
        self.log = log

    def on_step_end(self, args, state, control, **kwargs) -> None:
        if control.should_save:
            self._refuse_if_short(state, **kwargs)

    def on_epoch_end(self, args, state, control, **kwargs) -> None:
        if control.should_save:
            self._refuse_if_short(state, **kwargs)

    def on_evaluate(self, args, state, control, **kwargs) -> None:
        if (
            args.save_strategy == "best" and state.global_step < state.max_steps
        ):  # decided next, and told to no callback
            self._refuse_if_short(state, **kwargs)

    def on_save(self, args, state, control, **kwargs) -> None:
        needed, free = self._needed(**kwargs), self._free()
        if free < needed:
            room = f"the next checkpoint needs {_gb(needed)}, {_gb(free)} are free"
            self.log(f"step {state.global_step}: {room} at {self.directory.path}: make room before it is due")

    def _refuse_if_short(self, state: Any, **kwargs: Any) -> None:
        needed, free = self._needed(**kwargs), self._free()
        if free < needed:
            what = f"the checkpoint of step {state.global_step} needs {_gb(needed)}, {_gb(free)} are free"
            why = "nothing of it was written, and no older checkpoint was removed"
            raise RunError.at(str(self.directory.path), what, why=why, fix="make room: older checkpoints may go")

    def _free(self) -> int:
        return shutil.disk_usage(self.directory.path).free

    def _needed(self, model: Any = None, optimizer: Any = None, **kwargs: Any) -> int:
        last, _ = self.directory.newest_checkpoint()
        if last is not None:
            return int(manifest_size(last) * _SPARE) + _SMALL
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        if not hasattr(model, "peft_config"):
            parameters = list(model.parameters())
        states = [value for state in optimizer.state.values() for value in state.values() if hasattr(value, "nbytes")]
        return sum(tensor.nbytes for tensor in (*parameters, *states)) + _SMALL


def _gb(size: int) -> str:
    return f"{size / 1e9:.3f} GB"
