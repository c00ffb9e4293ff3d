"""Each image of a batch through the vision tower once, for every row and every model that shows it.

transformers takes finished image features in place of pixels (`mm_encoder_outputs`): they are put there by a hook on
the backbone, so within its forward, where autocast, gathered shards and recomputation are as they are for any layer.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPooling


def backbone_of(model: nn.Module) -> nn.Module:
    """The module that turns ids and pixels into hidden states, under an adapter too."""
    base = model.get_base_model() if hasattr(model, "peft_config") else model
    return base.base_model


def vision_is_frozen(model: nn.Module) -> bool:
    """Nothing in tower or resampler is trained or adapted: the features of an image are the same before and after any
    step, and with the adapters off. True of a text model."""
    backbone = backbone_of(model)
    parts = [getattr(backbone, name) for name in ("vision_tower", "resampler_model") if hasattr(backbone, name)]
    named = [pair for part in parts for pair in part.named_parameters()]
    return not any(parameter.requires_grad or ".lora_" in name for name, parameter in named)


class ImagesOnce:
    """The images of one batch. Made anew for each batch and gone with it, so that no feature outlives its step.

    frozen: of vision_is_frozen, for the model that is trained. Features are then computed without gradient by the first
    model that needs them and serve all others, which must have the same tower; otherwise each forward computes its
    own. Input embeddings that are made to require gradients for checkpointing would else send a backward, and a second
    forward, through a tower that learns nothing.
    """

    def __init__(self, *, frozen: bool):
        self.frozen = frozen
        self._features: tuple[Tensor, ...] | None = None

    @contextmanager
    def shown(self, model: nn.Module, *, times: int = 1) -> Iterator[None]:
        """While it lasts, a forward of `model` takes pixel_values and image_grid_thw of n images, and shows them to
        rows that hold `times` · n: all of them in order, then all again."""

        def encode(backbone: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
            if kwargs.get("pixel_values") is None:
                return None
            grid = kwargs["image_grid_thw"]
            features = self._encoded(backbone, kwargs.pop("pixel_values"), grid)
            kwargs["mm_encoder_outputs"] = {"image": BaseModelOutputWithPooling(pooler_output=features * times)}
            kwargs["image_grid_thw"] = grid.repeat(times, 1)
            return args, kwargs

        handle = backbone_of(model).register_forward_pre_hook(encode, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()

    def _encoded(self, backbone: nn.Module, pixel_values: Tensor, grid: Tensor) -> tuple[Tensor, ...]:
        """Of each image (tokens, H)."""
        if self._features is not None:
            return self._features
        with torch.no_grad() if self.frozen else nullcontext():
            features = tuple(backbone.get_image_features(pixel_values, grid, return_dict=True).pooler_output)
        if self.frozen:
            self._features = features
        return features
