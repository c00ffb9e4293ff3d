"""Trainer's steps as a rich progress bar, or as lines where the output is a file."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from transformers import TrainerCallback

_SHOWN = {
    "loss": "loss",
    "mean_token_accuracy": "accuracy",
    "rewards/accuracies": "preferred",
    "reward": "reward",
    "kl": "kl",
    "held_out/accuracy": "held-out pairs preferred",
    "eval_loss": "eval loss",
}


_SHOWN_COMPLETIONS = 4  # the run directory keeps them all
_LONGEST = 160  # characters


def _short(text: str) -> str:
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST // 2]} ... {text[-_LONGEST // 2 :]}"


class ProgressBar(TrainerCallback):
    """Steps done, time left, and the latest loss and token accuracy."""

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
        if not self.console.is_jupyter:  # there rich wants ipywidgets for a bar; the lines say as much
            self.progress.start()

    def on_step_end(self, args, state, control, **kwargs) -> None:
        if self.progress is not None:
            self.progress.update(self.task, completed=state.global_step)

    def on_log(self, args, state, control, logs=None, **kwargs) -> None:
        self.values.update({_SHOWN[key]: value for key, value in (logs or {}).items() if key in _SHOWN})
        values = "  ".join(f"{name} {value:.4f}" for name, value in self.values.items())
        if self.progress is not None:
            self.progress.update(self.task, values=values)
            if not self.console.is_terminal and "loss" in (logs or {}):  # rich draws a bar only where it can redraw it
                self.console.print(f"step {state.global_step} of {state.max_steps}: {values}")
        elif "eval_loss" in (logs or {}):
            found = {name: logs[f"eval_{key}"] for key, name in _SHOWN.items() if f"eval_{key}" in logs}
            self.console.print("evaluated: " + ", ".join(f"{name} {value:.4f}" for name, value in found.items()))

    def on_completions(self, step: int, table: list[dict[str, Any]]) -> None:
        """Show a few completions of a rollout and what they earned; called by the stage that draws them."""
        rewards = [name for name in table[0] if name.startswith("reward/")]
        shown = Table("row", "completion", title=f"step {step}: some completions", title_justify="left")
        for name in (*(name.removeprefix("reward/") for name in rewards), "reward", "advantage", "side"):
            shown.add_column(name, justify="right")
        for row in table[:: max(1, len(table) // _SHOWN_COMPLETIONS)][:_SHOWN_COMPLETIONS]:
            numbers = (row[name] for name in (*rewards, "reward", "advantage"))
            text = row["completion"]
            if row["reasoning"] is not None:
                text = f"<think> {row['reasoning']} </think> {text}"
            side = row["side"] or row["left_out"] or ""
            shown.add_row(escape(row["row"]), escape(_short(text)), *(f"{number:.3g}" for number in numbers), side)
        self.console.print(shown)

    def on_train_end(self, args, state, control, **kwargs) -> None:
        if self.progress is not None:
            self.progress.stop()
            self.progress = None
