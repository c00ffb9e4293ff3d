"""TRL's SFTTrainer with evaluation metrics weighted by tokens."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from trl import SFTTrainer

from ernie_align.data.render import IGNORE_INDEX
from ernie_align.models.image_cache import ImageFeatureCache, find_backbone
from ernie_align.stages.fused_head import fused_head_forward
from ernie_align.stages.trainer import AlignmentTrainer


class SupervisedTrainer(AlignmentTrainer, SFTTrainer):
    """SFTTrainer over encoded rows. Arguments are those of AlignmentTrainer and of TRL."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        # The VL class sets accepts_loss_kwargs=False, which averages the means of micro-batches: four micro-batches of
        # one row would weight their tokens differently from one batch of four rows.
        self.model_accepts_loss_kwargs = True

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Return TRL's loss of a batch, with routing and finiteness checked."""
        vision_tokens = self.monitor.pop_metadata(inputs)
        evaluating = not self.model.training
        if evaluating:
            inputs["labels"][self.count_non_padding_rows(len(inputs["labels"])) :] = IGNORE_INDEX
        policy = self.accelerator.unwrap_model(self.model)
        forward = fused_head_forward(model, find_backbone(policy))
        # Without the cache, gradient checkpointing recomputes and differentiates a vision tower that is not trained.
        images = ImageFeatureCache(frozen=True).use(policy) if self.vision_is_frozen else nullcontext()
        correct = torch.zeros(())

        def counting_forward(**kwargs: Any) -> Any:
            nonlocal correct
            outputs = forward(**kwargs)
            if "fused_lm_head" in kwargs:
                correct = outputs.is_top1.sum()
            return outputs

        with self.monitor.check_forward(vision_tokens, inputs["input_ids"].numel()), images:
            result = super().compute_loss(counting_forward, inputs, return_outputs, num_items_in_batch)
        loss = self.finish_loss(result[0] if return_outputs else result)
        if evaluating:
            tokens = (inputs["labels"][:, 1:] != IGNORE_INDEX).sum().item()
            self.eval_means.add("loss", loss.item(), tokens)
            self.eval_means.add("mean_token_accuracy", correct.item() / max(tokens, 1), tokens)
        return (loss, *result[1:]) if return_outputs else loss
