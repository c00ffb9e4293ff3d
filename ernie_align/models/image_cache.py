"""Each image of a batch through the vision tower once, for every row and every model that shows it.

transformers takes finished image features in place of pixels (`mm_encoder_outputs`): they are put there by a hook on
the backbone, so within its forward, where autocast, gathered shards and recomputation are as they are for any layer.
`generate` asks for features before that forward: there the hooks are on tower and resampler.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPooling

from ernie_align.models.distributed.dummy_vision import is_frozen, is_sharded


def find_backbone(model: nn.Module) -> nn.Module:
    """The module that turns ids and pixels into hidden states, of a model or of the PeftModel around it."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    return base.base_model


def is_vision_frozen(model: nn.Module) -> bool:
    """Nothing in tower or resampler is trained or adapted: the features of an image are the same before and after any
    step, and with the adapters off. True of a text model."""
    backbone = find_backbone(model)
    parts = [getattr(backbone, name) for name in ("vision_tower", "resampler_model") if hasattr(backbone, name)]
    return is_frozen(*parts)


class ImageFeatureCache:
    """The images of one batch. Made anew for each batch and gone with it, so that no feature outlives its step.

    frozen: of vision_is_frozen, for the model that is trained. Features are then computed without gradient by the first
    model that shows these pixels and serve the next, which must have the same tower; otherwise each forward computes
    its own, as it does where weights are spread over processes. (Input embeddings that are made to require gradients
    for checkpointing would send a backward, and a second forward, through a tower that learns nothing.) An image that
    comes several times, as those of several completions of one prompt do, is encoded once.
    """

    def __init__(self, *, frozen: bool):
        self.frozen = frozen
        self._kept: tuple[Tensor, Tensor, tuple[Tensor, ...]] | None = None  # pixels, their grid, their features

    @contextmanager
    def shown(self, model: nn.Module, *, times: int = 1) -> Iterator[None]:
        """While it lasts, a forward of `model` takes pixel_values and image_grid_thw of n images, and shows them to
        rows that hold `times` · n: all of them in order, then all again."""

        def encode(backbone: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
            if kwargs.get("pixel_values") is None:
                return None
            grid = kwargs["image_grid_thw"]
            if kwargs.get("inputs_embeds") is None:  # first of all, as everywhere: shards are gathered in one order
                kwargs["inputs_embeds"] = backbone.get_input_embeddings()(kwargs["input_ids"])
            features = self._encoded(backbone, kwargs.pop("pixel_values"), grid)
            kwargs["mm_encoder_outputs"] = {"image": BaseModelOutputWithPooling(pooler_output=features * times)}
            kwargs["image_grid_thw"] = grid.repeat(times, 1)
            return args, kwargs

        handle = find_backbone(model).register_forward_pre_hook(encode, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()

    def _encoded(self, backbone: nn.Module, pixel_values: Tensor, grid: Tensor) -> tuple[Tensor, ...]:
        """Of each image (tokens, H)."""
        if self._kept is not None and _same(self._kept[0], pixel_values) and _same(self._kept[1], grid):
            return self._kept[2]
        pixels, sizes, order = _distinct(pixel_values, grid)
        with torch.no_grad() if self.frozen else nullcontext():
            found = backbone.get_image_features(pixels, sizes, return_dict=True).pooler_output
        features = tuple(found[place] for place in order)
        # where weights are spread over processes, a tower that one of them left out would leave the others waiting
        if self.frozen and not is_sharded(backbone.vision_tower, backbone.resampler_model):
            self._kept = pixel_values, grid, features
        return features


@contextmanager
def deduplicate_images(model: nn.Module) -> Iterator[None]:
    """While it lasts, images that are alike go through tower and resampler once in each call for their features,
    whoever asks. The caller is handed the features of every one, so `generate` never knows. Nothing is done to a text
    model."""
    backbone = find_backbone(model)
    if not hasattr(backbone, "vision_tower"):
        yield
        return
    tower, resampler = backbone.vision_tower, backbone.resampler_model
    asked: list[tuple[Tensor, list[int]]] = []  # of the call under way: sizes of its distinct images, and their order

    def distinct(_: nn.Module, args: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        pixels, sizes, order = _distinct(*args)
        asked[:] = [(sizes, order)]
        return pixels, sizes

    def of_distinct(_: nn.Module, args: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        return args[0], asked[0][0]

    def of_all(_: nn.Module, args: tuple[Tensor, Tensor], features: Tensor) -> Tensor:
        sizes, order = asked.pop()
        found = features.split((sizes.prod(dim=-1) // tower.spatial_merge_size**2).tolist())
        return torch.cat([found[place] for place in order])

    handles = [tower.register_forward_pre_hook(distinct), resampler.register_forward_pre_hook(of_distinct)]
    handles.append(resampler.register_forward_hook(of_all))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _same(kept: Tensor, given: Tensor) -> bool:
    return kept is given or torch.equal(kept, given)


def _distinct(pixels: Tensor, grid: Tensor) -> tuple[Tensor, Tensor, list[int]]:
    """pixels (patches, C·P²) and grid (n, 3) of the images without those that come again, and of each of the n its
    place among them."""
    images = pixels.split(grid.prod(dim=-1).tolist())
    first = _first_alike(images, grid)
    kept = sorted(set(first))
    if len(kept) < len(images):
        pixels = torch.cat([images[place] for place in kept])
    return pixels, grid[kept], [kept.index(place) for place in first]


def _first_alike(images: Sequence[Tensor], grid: Tensor) -> list[int]:
    """Of each image (patches, C·P²): the place of the first that is the same, pixel by pixel, which may be its own."""
    if len(images) < 2:
        return [0] * len(images)
    sums = torch.stack([image.sum() for image in images]).tolist()  # one wait for the device; alike only if these are
    seen: dict[tuple, list[int]] = {}
    first = []
    for number, (image, size, total) in enumerate(zip(images, grid.tolist(), sums, strict=True)):
        others = seen.setdefault((*size, total), [])
        place = next((other for other in others if torch.equal(images[other], image)), number)
        if place == number:
            others.append(number)
        first.append(place)
    return first
