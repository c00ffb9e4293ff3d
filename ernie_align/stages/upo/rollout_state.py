"""A rollout may last several steps. A checkpoint between two of them keeps it, so that a resumed run learns from the
completions that it had drawn, where TRL draws them anew, from another policy.
"""

from __future__ import annotations

import logging
from pathlib import Path

import torch

from ernie_align.stages.upo.forwards import WatchedTrainer

_log = logging.getLogger(__name__)


class OpenRolloutTrainer(WatchedTrainer):
    """Each process keeps its own share of a rollout, beside its random numbers."""

    @property
    def _batches_a_rollout(self) -> int:
        return self.args.steps_per_generation * self.num_iterations

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        within = self._step % self._batches_a_rollout != 0
        kept = {"step": self._step, "batches": self._buffered_inputs if within else None}
        torch.save(kept | {"processes": self.accelerator.num_processes}, self._rollout_file(output_dir))

    def _load_rng_state(self, checkpoint: str | None) -> None:
        super()._load_rng_state(checkpoint)
        if checkpoint is None:
            return
        path = self._rollout_file(checkpoint)
        if path.exists():
            kept = torch.load(path, map_location=self.accelerator.device, weights_only=True)
            if kept["processes"] == self.accelerator.num_processes:
                self._step, self._buffered_inputs = kept["step"], kept["batches"]
                return
        self._step = self.state.global_step * self.args.gradient_accumulation_steps
        if self._step % self._batches_a_rollout:
            _log.warning("the checkpoint falls into a rollout of other processes: completions are drawn anew")

    def _rollout_file(self, checkpoint: str) -> Path:
        return Path(checkpoint) / f"rollout_{self.accelerator.process_index}.pt"
