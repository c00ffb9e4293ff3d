"""How training fails: with an error that says at which step, why, and from which checkpoint the run goes on."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Iterator
from contextlib import contextmanager

from safetensors import SafetensorError
from transformers import Trainer

from ernie_align.errors import AlignError, Fault, Interrupted, RunError
from ernie_align.runs.distributed import RankGroup
from ernie_align.runs.run_dir import RunDirectory

_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS}
# torch's writer and safetensors' tell of a full disk in words alone
_DISK_WORDS = ("No space left on device", "Disk quota exceeded", "File too large", "inline_container", "os error")


@contextmanager
def explain_failures(directory: RunDirectory, trainer: Trainer, processes: RankGroup) -> Iterator[None]:
    """Around training. Raises RunError where the disk or another process failed; says with every AlignError where the
    run goes on. What is neither is a fault of ours, and comes through as it is.
    """
    try:
        yield
    except Interrupted:
        raise
    except AlignError as error:
        raise type(error)(*error.faults, _goes_on(directory)) from error
    except (OSError, RuntimeError, SafetensorError) as error:
        step = trainer.state.global_step
        if processes.failed_together(error):
            what = f"process {processes.rank} of {processes.count} waited in vain for another"
            why = f"{processes.find_missing_ranks()} ({_first_line(error)})"
            fault = Fault(f"step {step + 1}", what, why, "look at the output of that process")
            raise RunError(fault, _goes_on(directory)) from error
        if directory.saving.exists() and _of_the_disk(error):
            free = shutil.disk_usage(directory.path).free
            shutil.rmtree(directory.saving, ignore_errors=True)
            what = f"the checkpoint of step {step} could not be written: {_first_line(error)}"
            why = f"{free / 1e9:.3f} GB were free; what was written of it is removed"
            raise RunError(Fault(str(directory.path), what, why, "make room"), _goes_on(directory)) from error
        raise


def _goes_on(directory: RunDirectory) -> Fault:
    checkpoint, _ = directory.newest_checkpoint()
    what = f"whole up to {checkpoint.name}, from which --resume goes on" if checkpoint else "no checkpoint is there yet"
    return Fault(str(directory.path), what)


def _of_the_disk(error: BaseException | None) -> bool:
    while error is not None:
        if getattr(error, "errno", None) in _DISK or any(word in str(error) for word in _DISK_WORDS):
            return True
        error = error.__cause__ or error.__context__
    return False


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
