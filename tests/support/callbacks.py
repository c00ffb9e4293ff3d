"""Callbacks and a reporter through which a test looks into a run, or disturbs it."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from typing import Any

from transformers import TrainerCallback

from ernie_align.runs.reporter import SilentReporter


class RecordingReporter(SilentReporter):
    """Remembers the lines that were logged. callbacks: added to the trainer."""

    def __init__(self, *callbacks: TrainerCallback):
        super().__init__(*callbacks)
        self.lines: list[str] = []

    def log(self, line: str) -> None:
        """Remember a line."""
        self.lines.append(line)


class At(TrainerCallback):
    """Acts after a number of steps, by default before the next batch. act: called with Trainer's keyword arguments."""

    def __init__(self, step: int, act: Callable[..., Any], event: str = "on_step_begin"):
        self.step, self.act = step, act
        setattr(self, event, self._event)

    def _event(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            self.act(**kwargs)


def send_signal(number: int = signal.SIGTERM) -> Callable[..., None]:
    """Return an act that sends this process a signal."""
    return lambda **_: os.kill(os.getpid(), number)
