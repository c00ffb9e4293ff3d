"""TRL's SFTTrainer, watched, and with losses that are weighted by tokens everywhere."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from trl import SFTTrainer

from ernie_align.checkpoints import partial_checkpoint
from ernie_align.data.render import IGNORE_INDEX
from ernie_align.models.image_cache import ImageFeatureCache, find_backbone, is_vision_frozen
from ernie_align.stages.eval_metrics import WeightedMeans, count_non_padding_rows
from ernie_align.stages.fused_head import fused_head_forward
from ernie_align.stages.sharded_checkpoint import ShardedTrainer
from ernie_align.stages.trainer import TrainingMonitor


class SupervisedTrainer(ShardedTrainer, SFTTrainer):
    """SFTTrainer over encoded rows.

    row_name: (source, row) -> the row's name. Other arguments are TRL's.
    """

    def __init__(self, *args: Any, row_name: Callable[[int, int], str], **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.shard_adapters()
        self.watch = TrainingMonitor(self.model, row_name)
        # The VL class says accepts_loss_kwargs=False, which would average the means of micro-batches: with it, four
        # micro-batches of one row weigh their tokens unlike one batch of four rows.
        self.model_accepts_loss_kwargs = True
        self.vision_is_frozen = is_vision_frozen(self.model)
        self._means = WeightedMeans()  # of the evaluation so far

    def _send_telemetry(self) -> None:
        """Nothing is sent: a run reaches only the hub ids that its recipe names."""

    def _get_output_dir(self, trial: Any) -> str:
        """Checkpoints are written beside the whole ones, and named once they are whole (runs.keep)."""
        return str(partial_checkpoint(super()._get_output_dir(trial)))

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """TRL's loss of a batch, with the routing and the number watched."""
        vision_tokens = self.watch.take(inputs)
        if not self.model.training:
            inputs["labels"][count_non_padding_rows(self.accelerator, len(inputs["labels"])) :] = IGNORE_INDEX
        inner = self.accelerator.unwrap_model(self.model)
        scoring = fused_head_forward(model, find_backbone(inner))
        # without it, checkpointing sends a backward, and a second forward, through a tower that learns nothing
        images = ImageFeatureCache(frozen=True).use(inner) if self.vision_is_frozen else nullcontext()
        right = torch.zeros(())

        def scored(**given: Any) -> Any:
            nonlocal right
            outputs = scoring(**given)
            if "fused_lm_head" in given:
                right = outputs.is_top1.sum()
            return outputs

        with self.watch.forward(vision_tokens, inputs["input_ids"].numel()), images:
            result = super().compute_loss(scored, inputs, return_outputs, num_items_in_batch)
        loss = result[0] if return_outputs else result
        self.watch.finite(loss.detach(), "loss", self.state.global_step + 1)
        loss = self.watch.attach_to_graph(loss, self.model)
        if not self.model.training:
            self._count_evaluated(loss.item(), right.item(), inputs["labels"])
            self.watch.end_step()
        return (loss, *result[1:]) if return_outputs else loss

    def _get_grad_norm(self, model, grad_norm=None):
        """The norm that Trainer is about to log: the last moment before the optimizer would spoil the weights."""
        norm = super()._get_grad_norm(model, grad_norm)
        self.watch.gradient(norm, self.state.global_step + 1, self.model)
        return norm

    def _count_evaluated(self, loss: float, right: float, labels: torch.Tensor) -> None:
        tokens = (labels[:, 1:] != IGNORE_INDEX).sum().item()
        self._means.add("loss", loss, tokens)
        self._means.add("mean_token_accuracy", right / max(tokens, 1), tokens)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """TRL's log. Of an evaluation, loss and accuracy are means over tokens, not means over batches of means."""
        if "eval_loss" in logs:
            means = self._means.mean_over_ranks()
            logs["eval_loss"] = means.pop("loss")
            self._metrics["eval"].update({name: [value] for name, value in means.items()})
        super().log(logs, start_time)
