"""Run a dummy image on ranks without images, so that collectives do not hang.

Ranks meet in collectives: for each trained weight's gradient under DDP, and for each sharded block under FSDP2 and
ZeRO-3, forward and backward. A text-only batch uses neither the vision tower, nor the resampler, nor the vision
experts, so ranks with images would wait forever for the ones without. Such a rank passes the smallest image through
tower and resampler and one token through the vision experts of each layer, and adds *an empty slice* of the outputs:
its sum changes no bit, and gives every weight a gradient of zeros.

If no rank has had an image since the last step, those gradients are dropped, as on a single process: with zeros, an
optimizer would still apply momentum and weight decay.

Nothing runs if the batch has images, or for parts that are neither trained nor sharded. The text experts need no dummy
forward: without text tokens they receive an empty batch.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ernie_align.models.token_dispatch import ExpertIndices, IndexedMoeBlock


def needs_collective(*modules: nn.Module) -> bool:
    """Return True if ranks communicate for these modules: gradients of trained weights, or shards of any weight."""
    if torch.is_grad_enabled() and any(weight.requires_grad for module in modules for weight in module.parameters()):
        return True
    return is_sharded(*modules)


def is_sharded(*modules: nn.Module) -> bool:
    """Return True if any weight of these modules is sharded, by FSDP2 or ZeRO-3."""
    weights = (weight for module in modules for weight in module.parameters())
    return any(isinstance(weight, DTensor) or hasattr(weight, "ds_id") for weight in weights)


def is_frozen(*modules: nn.Module) -> bool:
    """Return True if nothing in these modules is trained or adapted, by any adapter."""
    named = [pair for module in modules for pair in module.named_parameters()]
    return not any(weight.requires_grad or ".lora_" in name for name, weight in named)


def dummy_vision_forward(
    backbone: nn.Module, args: tuple, kwargs: dict[str, Any]
) -> tuple[tuple, dict[str, Any]] | None:
    """Forward pre-hook of an `Ernie4_5_VLMoeModel`: if the batch has no image, encode a dummy one and use none of it.

    A module-level function, so that a deep copy of the model keeps it.
    """
    pixels = (kwargs.get("pixel_values"), kwargs.get("pixel_values_videos"))
    # `generate` passes the features it has encoded, and an empty dict if there were no images
    if any(values is not None for values in pixels) or kwargs.get("mm_encoder_outputs"):
        backbone.saw_images |= torch.is_grad_enabled()
        return None
    tower, resampler, cache = backbone.vision_tower, backbone.resampler_model, kwargs.get("past_key_values")
    is_decode_step = cache is not None and cache.get_seq_length() > 0  # images come with the prompt
    if is_decode_step or not needs_collective(tower, resampler):
        return None
    side = tower.spatial_merge_size  # patches per side of the smallest image, which is one token
    # All ranks must gather shards in the same order. With images, `generate` encodes them before it calls the backbone,
    # and any other forward encodes them after embedding the text.
    if cache is None and kwargs.get("inputs_embeds") is None:
        kwargs["inputs_embeds"] = backbone.get_input_embeddings()(kwargs["input_ids"])
    device = kwargs["input_ids"].device
    patch = tower.patch_embed
    pixels = torch.zeros(side * side, patch.in_channels * patch.patch_size**2, device=device)
    # A frozen tower encodes images without gradient (models.image_cache). Embeddings made to require gradients for
    # checkpointing would cause a backward pass through the tower on this rank alone, and gathers that hang.
    with torch.set_grad_enabled(torch.is_grad_enabled() and not is_frozen(tower, resampler)):
        output = backbone.get_image_features(pixels, torch.tensor([[1, side, side]], device=device), return_dict=True)
    output.pooler_output = tuple(tokens[:0] for tokens in output.pooler_output)
    kwargs["mm_encoder_outputs"] = {"image": output}
    return args, kwargs


def dummy_vision_pool_forward(
    block: IndexedMoeBlock, args: tuple, output: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor] | None:
    """Forward hook of a block: if no token went to the vision experts, run a dummy one and use none of it."""
    hidden_states = args[0]
    indices = ExpertIndices.from_token_types(args[1] if len(args) > 1 else None)
    if indices is not None or not needs_collective(block.vision_moe):
        return None
    # Zeros that depend on the hidden states, so that the backward pass reaches these weights and gathers their shards.
    token = hidden_states.reshape(-1, hidden_states.shape[-1])[:1] * 0
    # ZeRO-3 requires the same module calls on all ranks, so the pool itself is called; the flag keeps this token out of
    # the counts of routed tokens
    block.vision_moe.is_dummy_forward = True
    try:
        dummy, _ = block.vision_moe(token)
    finally:
        block.vision_moe.is_dummy_forward = False
    return output[0] + dummy[:0].sum(), output[1]


def install_dummy_vision(backbone: nn.Module) -> None:
    """Install both hooks on an `Ernie4_5_VLMoeModel` with token dispatch. Calling it again has no effect."""
    if dummy_vision_forward in backbone._forward_pre_hooks.values():
        return
    backbone.saw_images = False  # since the last step of the optimizer
    backbone.register_forward_pre_hook(dummy_vision_forward, with_kwargs=True)
    for layer in backbone.language_model.layers:
        if isinstance(layer.mlp, IndexedMoeBlock):
            layer.mlp.register_forward_hook(dummy_vision_pool_forward)


def run_dummy_vision_last(backbone: nn.Module) -> None:
    """Move the backbone's hook behind those of DeepSpeed; call it once DeepSpeed has installed them.

    ZeRO-3 records the order of module calls and fetches weights by it: real images are encoded within the backbone's
    forward, so the dummy image must be too.
    """
    hooks = backbone._forward_pre_hooks
    hooks.move_to_end(next(key for key, hook in hooks.items() if hook is dummy_vision_forward))


def find_dummy_vision_backbone(model: nn.Module) -> nn.Module | None:
    """Return the backbone that `install_dummy_vision` was called on, or None."""
    return next(
        (module for module in model.modules() if dummy_vision_forward in module._forward_pre_hooks.values()), None
    )


def any_rank_saw_images(backbone: nn.Module) -> bool:
    """Return True if any rank had an image in a forward with gradients since the last call. Call it on all ranks."""
    seen = torch.tensor(int(backbone.saw_images), device=next(backbone.parameters()).device)
    torch.distributed.all_reduce(seen, torch.distributed.ReduceOp.MAX)
    backbone.saw_images = False
    return bool(seen)


def vision_modules(backbone: nn.Module) -> list[nn.Module]:
    """Return the modules that only images pass through."""
    pools = [layer.mlp.vision_moe for layer in backbone.language_model.layers if isinstance(layer.mlp, IndexedMoeBlock)]
    return [backbone.vision_tower, backbone.resampler_model, *pools]


def clear_unused_vision_gradients(backbone: nn.Module) -> None:
    """Drop the zero gradients of vision modules if no rank had an image. Call it on all ranks, before the optimizer."""
    if not any_rank_saw_images(backbone):
        for part in vision_modules(backbone):
            part.zero_grad(set_to_none=True)
