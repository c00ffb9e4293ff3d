"""Training progress as a rich progress bar, or as lines if the output is not a terminal."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from transformers import TrainerCallback

from ernie_align.report.console import make_table, markup

_SHOWN = {  # logged key -> label
    "loss": "loss",
    "mean_token_accuracy": "accuracy",
    "rewards/accuracies": "preferred",
    "reward": "reward",
    "kl": "kl",
    "held_out/accuracy": "held-out pairs preferred",
    "eval_loss": "eval loss",
}
_SHOWN_COMPLETIONS = 4  # the run directory keeps all of them
_LONGEST = 160  # characters


class ProgressBar(TrainerCallback):
    """Show steps, remaining time, and the latest loss and token accuracy."""

    def __init__(self, console: Console):
        self.console = console
        self.progress: Progress | None = None
        self.values: dict[str, float] = {}

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        if not state.is_world_process_zero:
            return
        self.progress = Progress(
            TextColumn("training"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[values]}"),
            console=self.console,
        )
        self.task = self.progress.add_task("training", total=state.max_steps, completed=state.global_step, values="")
        if not self.console.is_jupyter:  # in a notebook rich's bar needs ipywidgets; the printed lines show the same
            self.progress.start()

    def on_step_end(self, args, state, control, **kwargs) -> None:
        if self.progress is not None:
            self.progress.update(self.task, completed=state.global_step)

    def on_log(self, args, state, control, logs=None, **kwargs) -> None:
        logs = logs or {}
        self.values.update({_SHOWN[key]: value for key, value in logs.items() if key in _SHOWN})
        if self.progress is not None:
            values = _format(self.values, "  ")
            self.progress.update(self.task, values=values)
            if not self.console.is_terminal and "loss" in logs:  # rich draws a bar only on a terminal
                self.console.print(f"step {state.global_step} of {state.max_steps}: {values}")
        elif "eval_loss" in logs:
            values = {label: logs[f"eval_{key}"] for key, label in _SHOWN.items() if f"eval_{key}" in logs}
            self.console.print(f"evaluated: {_format(values, ', ')}")

    def on_completions(self, step: int, table: list[dict[str, Any]]) -> None:
        """Print some completions of a rollout with their rewards; called by the stage that samples them."""
        rewards = [name for name in table[0] if name.startswith("reward/")]
        names = (*(name.removeprefix("reward/") for name in rewards), "reward", "advantage", "side")
        shown = make_table(f"step {step}: some completions", "row", "completion", numbers=names)
        for row in table[:: max(1, len(table) // _SHOWN_COMPLETIONS)][:_SHOWN_COMPLETIONS]:
            text = row["completion"]
            if row["reasoning"] is not None:
                text = f"<think> {row['reasoning']} </think> {text}"
            if len(text) > _LONGEST:
                text = f"{text[: _LONGEST // 2]} ... {text[-_LONGEST // 2 :]}"
            numbers = (f"{row[name]:.3g}" for name in (*rewards, "reward", "advantage"))
            shown.add_row(markup(row["row"]), markup(text), *numbers, row["side"] or row["left_out"] or "")
        self.console.print(shown)

    def on_train_end(self, args, state, control, **kwargs) -> None:
        if self.progress is not None:
            self.progress.stop()
            self.progress = None


def _format(values: dict[str, float], separator: str) -> str:
    return separator.join(f"{label} {value:.4f}" for label, value in values.items())
