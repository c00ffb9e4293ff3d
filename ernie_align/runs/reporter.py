"""The interface through which a run reports to its user."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from transformers import TrainerCallback

    from ernie_align.data.load import SourceStats
    from ernie_align.data.preview import TokenSpan
    from ernie_align.models.text_parity import TextProbe
    from ernie_align.models.trainable_parts import ParameterSummary


class Reporter(Protocol):
    """Receives everything a run has to report. report.console.Terminal prints it."""

    def log(self, line: str) -> None:
        """Report one line."""

    def parameter_summary(self, table: ParameterSummary) -> None:
        """Report which parts of the model are trained."""

    def sources(self, counts: list[SourceStats]) -> None:
        """Report how many rows of each source are used, and why the others are dropped."""

    def preview(self, parts: dict[str, list[TokenSpan]]) -> None:
        """Report the first training example, token by token."""

    def progress(self) -> list[TrainerCallback]:
        """Return callbacks for the trainer of this rank, such as a progress bar."""

    def text_parity(self, probe: TextProbe, unchanged: bool) -> None:
        """Report if the logits of text are bit-identical before and after training."""


class SilentReporter:
    """Reports nothing. callbacks: added to the trainer."""

    def __init__(self, *callbacks: TrainerCallback):
        self.callbacks = list(callbacks)

    def progress(self) -> list[TrainerCallback]:
        """Return the callbacks."""
        return self.callbacks

    def log(self, *report: Any) -> None:
        """Drop the report."""

    parameter_summary = sources = preview = text_parity = log
