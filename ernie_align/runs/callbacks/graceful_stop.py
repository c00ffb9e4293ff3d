"""A run that is asked to stop: by SIGTERM or Ctrl-C, at the end of the running step, with a checkpoint."""

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

_WORKER_OUTLIVES = 30  # seconds: what torchrun, Slurm and Kubernetes leave a job by default


class _Stop(BaseException):
    """Goes through library code that catches Exception. It never leaves `listening`."""


class Signals:
    """Which signal asked for a stop. Before training and after it a signal stops the run where it is."""

    def __init__(self) -> None:
        self.asked: signal.Signals | None = None
        self.waits_for_step = False
        self._process = os.getpid()

    def receive(self, number: int, frame: Any) -> None:
        """The handler of the process."""
        if os.getpid() != self._process:
            self._receive_in_worker(number)
        elif self.asked == number == signal.SIGINT:
            raise KeyboardInterrupt  # the second Ctrl-C does not wait
        else:
            self.asked = signal.Signals(number)
            if not self.waits_for_step:
                raise _Stop

    def _receive_in_worker(self, number: int) -> None:
        """A forked data worker. Schedulers and terminals signal the whole group: the step needs its batches still."""
        if number == signal.SIGINT:
            return
        if self.waits_for_step:
            signal.alarm(_WORKER_OUTLIVES)
        else:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)


@contextmanager
def handle_signals(directory: RunDirectory) -> Iterator[Signals]:
    """Hear SIGTERM and SIGINT while a run runs; what heard them before hears them again afterwards.

    Raises Interrupted where the run was stopped outside of training. Signals reach the main thread alone: a run in
    another one is deaf.
    """
    signals = Signals()
    deaf = threading.current_thread() is not threading.main_thread()
    before = {} if deaf else {one: signal.signal(one, signals.receive) for one in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield signals
    except _Stop:
        raise interrupted(directory, signals.asked, "outside of training") from None
    finally:
        for one, handler in before.items():
            signal.signal(one, handler)


def interrupted(directory: RunDirectory, asked: signal.Signals | None, when: str) -> Interrupted:
    """The error that a stopped run ends with."""
    checkpoint, _ = directory.newest_checkpoint()
    by = asked.name if asked is not None else "a signal to another process"
    fix = f"--resume goes on from {checkpoint.name}" if checkpoint else "--resume begins it anew: no step was saved"
    return Interrupted.at(str(directory.path), f"stopped by {by} {when}", fix=fix)


class NothingLeft(Exception):
    """The run is resumed at its last step. Trainer would take one more."""


class GracefulStop(TrainerCallback):
    """Saves and stops at the end of the step during which a signal came, in all processes at once.

    An evaluation that is due or under way is left out: it may last longer than the scheduler waits.
    """

    def __init__(self, directory: RunDirectory, signals: Signals, processes: RankGroup):
        self.directory = directory
        self.signals = signals
        self.processes = processes
        self.trainer: Trainer | None = None  # set once it is built
        self.stopped = False

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        self.signals.waits_for_step = True
        if state.global_step >= state.max_steps:
            raise NothingLeft

    def on_step_end(self, args, state, control, **kwargs) -> None:
        if self.processes.any(self.signals.asked is not None):
            self.stopped = True
            control.should_evaluate = False
            control.should_save = True
            control.should_training_stop = True

    def on_prediction_step(self, args, state, control, **kwargs) -> None:
        if self.processes.any(self.signals.asked is not None):
            trainer = self.trainer
            self.stopped = True
            if not self.processes.of_first((self.directory.path / f"checkpoint-{state.global_step}").exists()):
                trainer._save_checkpoint(trainer.model, trial=None)
                trainer.callback_handler.on_save(trainer.args, trainer.state, trainer.control)
            raise self.ended(state.global_step)

    def ended(self, step: int) -> Interrupted:
        """The error of the stopped run."""
        return interrupted(self.directory, self.signals.asked, f"after step {step}")
