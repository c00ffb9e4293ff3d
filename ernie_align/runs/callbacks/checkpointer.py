"""Complete checkpoints: manifest, final name, and removal of older ones."""

from __future__ import annotations

from pathlib import Path

from transformers import TrainerCallback

from ernie_align.checkpoints import flush_to_disk, integrity_error
from ernie_align.models.load import Bundle
from ernie_align.runs.run_dir import RunDirectory


class Checkpointer(TrainerCallback):
    """Completes each checkpoint that Trainer has written, moves it to its place, and then removes older ones.

    Trainer's own save_total_limit would delete the old checkpoint before the new one is known to be complete. Must be
    on every rank, since each of them writes a part.
    """

    def __init__(self, run_dir: RunDirectory, bundle: Bundle, limit: int | None):
        self.run_dir = run_dir
        self.bundle = bundle
        self.limit = limit

    def on_save(self, args, state, control, **kwargs) -> None:
        from accelerate import PartialState

        ranks = PartialState()
        ranks.wait_for_everyone()  # each has written its random state
        name = f"checkpoint-{state.global_step}"
        written = self.run_dir.saving / name
        best = state.best_model_checkpoint
        is_best = best is not None and Path(best) == written
        if is_best:
            state.best_model_checkpoint = best = str(self.run_dir.path / name)
        if ranks.is_main_process:
            if is_best:
                state.save_to_json(str(written / "trainer_state.json"))  # names the place it is about to be moved to
            self.bundle.save_processor(str(written))
            metrics = self.run_dir.path / "metrics.jsonl"
            if metrics.exists():
                flush_to_disk(metrics)
            self.run_dir.publish_checkpoint(name)
            self._remove_older(Path(best).name if best else None)
        ranks.wait_for_everyone()

    def _remove_older(self, best: str | None) -> None:
        if self.limit is None:
            return
        others = [path for path in self.run_dir.checkpoints() if path.name != best and integrity_error(path) is None]
        for old in others[: -self.limit] if self.limit else others[:-1]:
            self.run_dir.remove_checkpoint(old)
