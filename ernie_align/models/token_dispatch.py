"""Dispatch tokens to the text and vision experts by index, computed once per batch.

transformers' block masks (B, T, H) element by element, four times in every layer, and synchronizes with the device in
every layer to find out if the batch has vision tokens. The indices are the same in all layers: they are computed at the
start of the language model and passed in place of `moe_mm_token_type_ids`, which it forwards unchanged. Nothing is kept
between forwards, so a recomputed layer, a decode step and a copy of the model each use the indices of their own batch.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.models.ernie4_5_vl_moe.modeling_ernie4_5_vl_moe import Ernie4_5_VLMoeMoeBlock


class ExpertIndices(NamedTuple):
    """Indices into the B·T tokens.

    text, vision: the tokens of each pool; inverse (B·T,): the index of each token in [text; vision].
    """

    text: Tensor
    vision: Tensor
    inverse: Tensor

    @classmethod
    def from_token_types(cls, types: Tensor | ExpertIndices | None) -> ExpertIndices | None:
        """Convert (B, T) token types: 0 text, 1 or 2 vision. None if no token is vision: all go to the text pool.

        Indices are returned unchanged.
        """
        if types is None or isinstance(types, cls):
            return types
        is_vision = types.reshape(-1).bool()
        vision = is_vision.nonzero().squeeze(1)
        if len(vision) == 0:
            return None
        text = (~is_vision).nonzero().squeeze(1)
        inverse = torch.empty_like(is_vision, dtype=torch.long)
        inverse[torch.cat([text, vision])] = torch.arange(len(inverse), device=inverse.device)
        return cls(text, vision, inverse)


class IndexedMoeBlock(Ernie4_5_VLMoeMoeBlock):
    """A replacement for transformers' block: same children and names, bit-equal outputs and gradients."""

    def __init__(self, block: Ernie4_5_VLMoeMoeBlock):
        nn.Module.__init__(self)  # the stock constructor would create new weights
        self.num_experts = block.num_experts
        self.text_moe, self.vision_moe = block.text_moe, block.vision_moe
        self.shared_experts = block.shared_experts
        self.train(block.training)

    def forward(
        self, hidden_states: Tensor, moe_mm_token_type_ids: ExpertIndices | Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """hidden_states (B, T, H), and indices or token types -> (B, T, H) and router logits (B·T, E)."""
        indices = ExpertIndices.from_token_types(moe_mm_token_type_ids)
        if indices is None:
            return super().forward(hidden_states)
        # before the pools, as in the stock block: the order in which autograd sums their gradients depends on it
        shared = None if self.shared_experts is None else self.shared_experts(hidden_states)
        tokens = hidden_states.reshape(-1, hidden_states.shape[-1])
        pools = (self.text_moe, indices.text), (self.vision_moe, indices.vision)
        outputs, logits = zip(*(pool(tokens.index_select(0, index)) for pool, index in pools), strict=True)
        # the pools return flat vectors
        output = torch.cat(outputs).view_as(tokens).index_select(0, indices.inverse).view_as(hidden_states)
        if shared is not None:
            output = output + shared
        return output, torch.cat(logits).view(-1, self.num_experts).index_select(0, indices.inverse)


def compute_expert_indices(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    """Forward pre-hook of the language model: replace token types by indices.

    A module-level function, so that a deep copy of the model keeps it.
    """
    kwargs["moe_mm_token_type_ids"] = ExpertIndices.from_token_types(kwargs.get("moe_mm_token_type_ids"))
    return args, kwargs


def install_token_dispatch(language_model: nn.Module) -> None:
    """Replace the block of each sparse layer of an `Ernie4_5_VLMoeTextModel`. Calling it again has no effect.

    Only this model's child modules are replaced, as when an adapter is attached: no class is patched.
    """
    if compute_expert_indices in language_model._forward_pre_hooks.values():
        return
    language_model.register_forward_pre_hook(compute_expert_indices, with_kwargs=True)
    for layer in language_model.layers:
        if isinstance(layer.mlp, Ernie4_5_VLMoeMoeBlock):
            layer.mlp = IndexedMoeBlock(layer.mlp)
