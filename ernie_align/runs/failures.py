"""Errors of training, with the step, the cause, and the checkpoint from which the run resumes."""

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

_DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS}
# torch's writer and safetensors report a full disk in their message only
_DISK_MESSAGES = ("No space left on device", "Disk quota exceeded", "File too large", "inline_container", "os error")


@contextmanager
def explain_failures(run_dir: RunDirectory, trainer: Trainer, ranks: RankGroup) -> Iterator[None]:
    """Raise RunError if the disk or another rank failed, and add the checkpoint to resume from to every AlignError.

    Any other exception is a bug here and is re-raised unchanged.
    """
    try:
        yield
    except Interrupted:
        raise
    except AlignError as error:
        raise type(error)(*error.faults, _resume_from(run_dir)) from error
    except (OSError, RuntimeError, SafetensorError) as error:
        step = trainer.state.global_step
        if ranks.is_communication_error(error):
            what = f"rank {ranks.rank} of {ranks.world_size} lost contact with another rank"
            why = f"{ranks.find_missing_ranks()} ({_first_line(error)})"
            fault = Fault(f"step {step + 1}", what, why, "read the output of that rank")
            raise RunError(fault, _resume_from(run_dir)) from error
        if run_dir.saving.exists() and _is_disk_error(error):
            free = shutil.disk_usage(run_dir.path).free
            shutil.rmtree(run_dir.saving, ignore_errors=True)
            what = f"the checkpoint of step {step} could not be written: {_first_line(error)}"
            why = f"{free / 1e9:.3f} GB were free; the incomplete checkpoint was removed"
            raise RunError(Fault(str(run_dir.path), what, why, "make room"), _resume_from(run_dir)) from error
        raise


def _resume_from(run_dir: RunDirectory) -> Fault:
    checkpoint, _ = run_dir.newest_checkpoint()
    what = f"--resume continues from {checkpoint.name}" if checkpoint else "no checkpoint was written yet"
    return Fault(str(run_dir.path), what)


def _is_disk_error(error: BaseException | None) -> bool:
    while error is not None:
        if getattr(error, "errno", None) in _DISK_ERRORS or any(words in str(error) for words in _DISK_MESSAGES):
            return True
        error = error.__cause__ or error.__context__
    return False


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
