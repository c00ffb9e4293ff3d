"""Every process touches every part: what a batch without images leaves out, where others wait for it.

Processes that train together meet in collectives: of each trained weight's gradient under DDP, of each sharded block
under FSDP2 and ZeRO-3, forward and backward. A batch of text alone reaches neither the vision tower, nor the resampler,
nor the vision experts; beside a batch with images its process waits for ever. So it sends the smallest image through
tower and resampler and one token through the vision pool of each layer, and adds *none of the rows* of what comes out:
the sum of an empty slice changes no bit, and hands every weight on its way a gradient of zeros.

What no process has seen an image for since the last step gets no gradient, as on one process: an optimizer takes zeros
for a reason to move on by its momentum, and to decay weights.

Nothing is computed where the batch has images, nor of parts that are neither trained nor sharded. Text needs no such
thing: without text tokens the text pool is given an empty batch, which touches it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ernie_align.models.token_dispatch import ExpertIndices, IndexedMoeBlock


def needs_collective(*modules: nn.Module) -> bool:
    """Whether a collective waits for these modules: for gradients of trained weights, or for shards of any."""
    if torch.is_grad_enabled() and any(weight.requires_grad for module in modules for weight in module.parameters()):
        return True
    return is_sharded(*modules)


def is_sharded(*modules: nn.Module) -> bool:
    """Whether any weight of these modules is spread over the processes, by FSDP2 or ZeRO-3."""
    weights = (weight for module in modules for weight in module.parameters())
    return any(isinstance(weight, DTensor) or hasattr(weight, "ds_id") for weight in weights)


def is_frozen(*modules: nn.Module) -> bool:
    """Nothing in these modules is trained or adapted, whichever adapter is on."""
    named = [pair for module in modules for pair in module.named_parameters()]
    return not any(weight.requires_grad or ".lora_" in name for name, weight in named)


def dummy_vision_forward(
    backbone: nn.Module, args: tuple, kwargs: dict[str, Any]
) -> tuple[tuple, dict[str, Any]] | None:
    """Forward pre-hook of an `Ernie4_5_VLMoeModel`: where no image is shown, none of the smallest one is.

    A plain function, so that a deep copy of the model carries it.
    """
    pixels = (kwargs.get("pixel_values"), kwargs.get("pixel_values_videos"))
    # `generate` hands on the features it has encoded, and an empty dict where there were no images
    if any(given is not None for given in pixels) or kwargs.get("mm_encoder_outputs"):
        backbone.saw_images |= torch.is_grad_enabled()
        return None
    tower, resampler, cache = backbone.vision_tower, backbone.resampler_model, kwargs.get("past_key_values")
    goes_on = cache is not None and cache.get_seq_length() > 0  # images come with the prompt
    if goes_on or not needs_collective(tower, resampler):
        return None
    side = tower.spatial_merge_size  # patches of the smallest image: one token
    # Shards come in one order everywhere. Where an image is shown, `generate` encodes it before it calls the backbone,
    # and any other forward once it has embedded the text.
    if cache is None and kwargs.get("inputs_embeds") is None:
        kwargs["inputs_embeds"] = backbone.get_input_embeddings()(kwargs["input_ids"])
    device = kwargs["input_ids"].device
    patch = tower.patch_embed
    pixels = torch.zeros(side * side, patch.in_channels * patch.patch_size**2, device=device)
    # A frozen tower takes images without gradient (models.vision_once). Embeddings made to require gradients for
    # checkpointing would send a backward through this one alone, and fetch shards that no other process asks for.
    with torch.set_grad_enabled(torch.is_grad_enabled() and not is_frozen(tower, resampler)):
        seen = backbone.get_image_features(pixels, torch.tensor([[1, side, side]], device=device), return_dict=True)
    seen.pooler_output = tuple(tokens[:0] for tokens in seen.pooler_output)
    kwargs["mm_encoder_outputs"] = {"image": seen}
    return args, kwargs


def dummy_vision_pool_forward(
    block: IndexedMoeBlock, args: tuple, output: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor] | None:
    """Forward hook of a block: where no token goes to the vision pool, none of one token does."""
    hidden_states, rows = args[0], args[1] if len(args) > 1 else None
    if not isinstance(rows, ExpertIndices):
        rows = ExpertIndices.of(rows)
    if rows is not None or not needs_collective(block.vision_moe):
        return None
    # Zeros that depend on the hidden states: shards are fetched again for the backward pass where its gradient passes.
    token = hidden_states.reshape(-1, hidden_states.shape[-1])[:1] * 0
    # ZeRO-3 wants the same calls of the same modules everywhere: so through the pool's own door, where the routing
    # guard counts the tokens of the data, and is told that this is none
    block.vision_moe.is_dummy_forward = True
    try:
        touched, _ = block.vision_moe(token)
    finally:
        block.vision_moe.is_dummy_forward = False
    return output[0] + touched[:0].sum(), output[1]


def install_dummy_vision(backbone: nn.Module) -> None:
    """Install both on an `Ernie4_5_VLMoeModel` whose tokens are dispatched by rows. Twice is once."""
    if dummy_vision_forward in backbone._forward_pre_hooks.values():
        return
    backbone.saw_images = False  # since the last step of the optimizer
    backbone.register_forward_pre_hook(dummy_vision_forward, with_kwargs=True)
    for layer in backbone.language_model.layers:
        if isinstance(layer.mlp, IndexedMoeBlock):
            layer.mlp.register_forward_hook(dummy_vision_pool_forward)


def run_dummy_vision_last(backbone: nn.Module) -> None:
    """After DeepSpeed has put its hooks on: an image is shown within the backbone, so none of one is too. ZeRO-3
    compares the order of modules on all processes, and fetches weights by it."""
    backbone._forward_pre_hooks.move_to_end(_place_of(backbone))


def _place_of(backbone: nn.Module) -> int:
    return next(place for place, hook in backbone._forward_pre_hooks.items() if hook is dummy_vision_forward)


def find_dummy_vision_backbone(model: nn.Module) -> nn.Module | None:
    """The backbone in a model that `touch_every_pool` was installed on, if it was."""
    return next(
        (module for module in model.modules() if dummy_vision_forward in module._forward_pre_hooks.values()), None
    )


def any_rank_saw_images(backbone: nn.Module) -> bool:
    """Whether any process showed its model an image, in a forward that learns, since this was asked last. All must ask
    at the same point."""
    seen = torch.tensor(int(backbone.saw_images), device=next(backbone.parameters()).device)
    torch.distributed.all_reduce(seen, torch.distributed.ReduceOp.MAX)
    backbone.saw_images = False
    return bool(seen)


def vision_modules(backbone: nn.Module) -> list[nn.Module]:
    """What nothing but images passes through."""
    pools = [layer.mlp.vision_moe for layer in backbone.language_model.layers if isinstance(layer.mlp, IndexedMoeBlock)]
    return [backbone.vision_tower, backbone.resampler_model, *pools]


def clear_unused_vision_gradients(backbone: nn.Module) -> None:
    """Between backward pass and optimizer, on every process: what no process showed an image to is not stepped."""
    if not any_rank_saw_images(backbone):
        for part in vision_modules(backbone):
            part.zero_grad(set_to_none=True)
