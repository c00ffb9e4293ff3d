"""Dispatch of tokens to the two pools by rows, which are chosen once per batch.

transformers' block masks (B, T, H) element by element, four times in every layer, and asks the device in every layer
whether the batch has vision tokens at all. The rows are the same in all layers: they are chosen where the language
model begins and handed down in place of `moe_mm_token_type_ids`, which it passes on untouched. Nothing is kept between
forwards, so a recomputed layer, a decode step and a copy of the model each see the rows of their own batch.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.models.ernie4_5_vl_moe.modeling_ernie4_5_vl_moe import Ernie4_5_VLMoeMoeBlock


class ExpertIndices(NamedTuple):
    """Indices into the B·T tokens. text, vision: those of each pool; place (B·T,): where each token stands in
    [text; vision]."""

    text: Tensor
    vision: Tensor
    place: Tensor

    @classmethod
    def of(cls, moe_mm_token_type_ids: Tensor | None) -> ExpertIndices | None:
        """(B, T) of 0 text, 1 or 2 vision. None where no token is vision: the whole batch goes to the text pool."""
        if moe_mm_token_type_ids is None:
            return None
        is_vision = moe_mm_token_type_ids.reshape(-1).bool()
        vision = is_vision.nonzero().squeeze(1)
        if len(vision) == 0:
            return None
        text = (~is_vision).nonzero().squeeze(1)
        place = torch.empty_like(is_vision, dtype=torch.long)
        place[torch.cat([text, vision])] = torch.arange(len(place), device=place.device)
        return cls(text, vision, place)


class IndexedMoeBlock(Ernie4_5_VLMoeMoeBlock):
    """transformers' block with the same children under the same names, and the same bits out, forward and backward."""

    def __init__(self, block: Ernie4_5_VLMoeMoeBlock):
        nn.Module.__init__(self)  # not the stock constructor, which makes new weights
        self.num_experts = block.num_experts
        self.text_moe, self.vision_moe = block.text_moe, block.vision_moe
        self.shared_experts = block.shared_experts
        self.train(block.training)

    def forward(
        self, hidden_states: Tensor, moe_mm_token_type_ids: ExpertIndices | Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """hidden_states (B, T, H); rows, or the types they follow from -> (B, T, H) and router logits (B·T, E)."""
        rows = moe_mm_token_type_ids
        if not isinstance(rows, ExpertIndices):
            rows = ExpertIndices.of(rows)
        if rows is None:
            return super().forward(hidden_states)
        # before the pools, as in the stock block: the order in which autograd adds up their gradients depends on it
        shared = None if self.shared_experts is None else self.shared_experts(hidden_states)
        tokens = hidden_states.reshape(-1, hidden_states.shape[-1])
        pools = (self.text_moe, rows.text), (self.vision_moe, rows.vision)
        outputs, logits = zip(*(pool(tokens.index_select(0, own)) for pool, own in pools), strict=True)
        # the pools return flat vectors
        output = torch.cat(outputs).view_as(tokens).index_select(0, rows.place).view_as(hidden_states)
        if shared is not None:
            output = output + shared
        return output, torch.cat(logits).view(-1, self.num_experts).index_select(0, rows.place)


def compute_expert_indices(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    """Forward pre-hook of the language model. A plain function, so that a deep copy of the model carries it."""
    types = kwargs.get("moe_mm_token_type_ids")
    if isinstance(types, Tensor):
        kwargs["moe_mm_token_type_ids"] = ExpertIndices.of(types)
    return args, kwargs


def install_token_dispatch(language_model: nn.Module) -> None:
    """Put our block around the pools of each sparse layer of an `Ernie4_5_VLMoeTextModel`. Twice is once.

    A child module takes another's place, as when an adapter is put on: no class is touched, and other models in the
    process are as they were.
    """
    if compute_expert_indices in language_model._forward_pre_hooks.values():
        return
    language_model.register_forward_pre_hook(compute_expert_indices, with_kwargs=True)
    for layer in language_model.layers:
        if isinstance(layer.mlp, Ernie4_5_VLMoeMoeBlock):
            layer.mlp = IndexedMoeBlock(layer.mlp)
