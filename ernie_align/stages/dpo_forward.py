"""A batch of pairs on its way through the policy and its reference, in rows of its own for each side or in one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ernie_align.data.collate import model_inputs
from ernie_align.data.render import IGNORED
from ernie_align.models import shared_prompt
from ernie_align.models.vision_once import ImagesOnce, backbone_of
from ernie_align.stages.head import score_at, scoring_labels


class PairsApart:
    """A batch of PairCollator, its images once: chosen and rejected each behind a prompt of their own.

    for_loss: what TRL's loss reads, whose completion_mask[:, 1:] is as wide as the outputs of `forward`; tokens:
    positions that a forward computes.
    """

    def __init__(self, inputs: Mapping[str, Any], images: ImagesOnce):
        self.inputs = inputs
        self.images = images
        self.for_loss = dict(inputs)
        self.tokens = inputs["input_ids"].numel()

    def forward(self, model: nn.Module, inner: nn.Module) -> Any:
        """TRL's outputs of the fused head: per-token log-probabilities and what its metrics are made of, chosen above
        rejected, each 0 where there is no answer.

        model: as it is called; inner: the same without what wraps it for many devices.
        """
        labels = self.inputs["input_ids"].masked_fill(self.inputs["completion_mask"] == 0, IGNORED)
        scored = scoring_labels(model, backbone_of(inner))
        with self.images.shown(inner, times=2):
            return scored(**model_inputs(self.inputs), labels=labels, fused_lm_head=True, use_cache=False)


class PairsShared:
    """The same of a batch of SharedPromptCollator: each prompt is computed once, and the head scores answers alone.

    backbone: of the policy, which says where images place the tokens behind them.
    """

    def __init__(self, inputs: Mapping[str, Any], images: ImagesOnce, backbone: nn.Module):
        ids, parts, mask = inputs["input_ids"], inputs["parts"], inputs["completion_mask"]
        width = ids.shape[1]
        self.images = images
        self.tokens = ids.numel()
        places, predicted = shared_prompt.answer_places(parts, mask.shape[1] - 1)
        self.predicted_at = predicted + width * torch.arange(len(ids), device=ids.device).repeat(2)[:, None]
        answers = ids.repeat(2, 1).gather(1, places)
        self.labels = answers.masked_fill(mask[:, 1:] == 0, IGNORED)
        self.given: dict[str, Tensor] = model_inputs(inputs) | {
            "attention_mask": shared_prompt.attention_mask(parts, width, backbone.get_input_embeddings().weight.dtype),
            "position_ids": shared_prompt.position_ids(backbone, ids, parts, inputs.get("image_grid_thw")),
        }
        # in the width of the answers behind the last token of the prompt, which is masked and may be any
        self.for_loss = {**inputs, "input_ids": answers[:, :1].expand(-1, mask.shape[1])}

    def forward(self, model: nn.Module, inner: nn.Module) -> Any:
        """See PairsApart."""
        with self.images.shown(inner):
            return score_at(
                model, backbone_of(inner), self.predicted_at, self.labels, {**self.given, "use_cache": False}
            )
