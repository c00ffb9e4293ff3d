"""Stop on SIGTERM or Ctrl-C at the end of the running step, with a checkpoint."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from transformers import Trainer, TrainerCallback

from ernie_align.errors import Interrupted
from ernie_align.runs.distributed import RankGroup
from ernie_align.runs.run_dir import RunDirectory

_WORKER_GRACE = 30  # seconds: the grace period of torchrun, Slurm and Kubernetes by default


class _Stop(BaseException):
    """Passes through library code that catches Exception. It never leaves `handle_signals`."""


class Signals:
    """Remembers which signal asked for a stop. Before and after training, a signal stops the run at once."""

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self.waits_for_step = False
        self._process = os.getpid()

    def receive(self, number: int, frame: Any) -> None:
        """Handle a signal of this process."""
        if os.getpid() != self._process:
            self._receive_in_worker(number)
        elif self.received == number == signal.SIGINT:
            raise KeyboardInterrupt  # the second Ctrl-C does not wait
        else:
            self.received = signal.Signals(number)
            if not self.waits_for_step:
                raise _Stop

    def _receive_in_worker(self, number: int) -> None:
        """Handle a signal of a forked data worker: schedulers and terminals signal the whole process group, but the
        running step still needs batches."""
        if number == signal.SIGINT:
            return
        if self.waits_for_step:
            signal.alarm(_WORKER_GRACE)
        else:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)


@contextmanager
def handle_signals(run_dir: RunDirectory) -> Iterator[Signals]:
    """Handle SIGTERM and SIGINT during a run, and restore the previous handlers afterwards.

    Raises Interrupted if the run was stopped outside of training. Python delivers signals to the main thread only: a
    run in another thread receives none.
    """
    signals = Signals()
    numbers = (signal.SIGTERM, signal.SIGINT)
    in_main_thread = threading.current_thread() is threading.main_thread()
    before = {number: signal.signal(number, signals.receive) for number in numbers} if in_main_thread else {}
    try:
        yield signals
    except _Stop:
        raise interrupted(run_dir, signals.received, "outside of training") from None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def interrupted(run_dir: RunDirectory, received: signal.Signals | None, when: str) -> Interrupted:
    """Return the error of a stopped run."""
    checkpoint, _ = run_dir.newest_checkpoint()
    cause = received.name if received is not None else "a signal to another rank"
    fix = f"--resume continues from {checkpoint.name}" if checkpoint else "no step was saved: --resume starts at step 0"
    return Interrupted.at(str(run_dir.path), f"stopped by {cause} {when}", fix=fix)


class AlreadyAtLastStep(Exception):
    """The run resumes at its last step. Trainer would take one more."""


class GracefulStop(TrainerCallback):
    """Saves and stops all ranks at the end of the step in which one of them received a signal.

    An evaluation that is due or running is skipped: it may take longer than the scheduler's grace period.
    """

    def __init__(self, run_dir: RunDirectory, signals: Signals, ranks: RankGroup):
        self.run_dir = run_dir
        self.signals = signals
        self.ranks = ranks
        self.trainer: Trainer | None = None  # set once it is built
        self.stopped = False

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        self.signals.waits_for_step = True
        if state.global_step >= state.max_steps:
            raise AlreadyAtLastStep

    def on_step_end(self, args, state, control, **kwargs) -> None:
        if self.ranks.any(self.signals.received is not None):
            self.stopped = True
            control.should_evaluate = False
            control.should_save = True
            control.should_training_stop = True

    def on_prediction_step(self, args, state, control, **kwargs) -> None:
        if self.ranks.any(self.signals.received is not None):
            trainer = self.trainer
            self.stopped = True
            if not self.ranks.broadcast((self.run_dir.path / f"checkpoint-{state.global_step}").exists()):
                trainer._save_checkpoint(trainer.model, trial=None)
                trainer.callback_handler.on_save(trainer.args, trainer.state, trainer.control)
            raise self.error(state.global_step)

    def error(self, step: int) -> Interrupted:
        """Return the error of the stopped run."""
        return interrupted(self.run_dir, self.signals.received, f"after step {step}")
